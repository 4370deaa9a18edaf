"""What networks are made of, as data: parts that write their ops, joined by residual branches into blocks and stacks.

A family is a short function that fills these in from its config (see `decoders`, `mixers`, `encoders`); module names are
those of `transformers`, so that a technique finds the module that an op stands for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from narrows.capture.tape import TOKENS, Tape
from narrows.graph import Dim, Size

NONE = Size(())


class Part(Protocol):
    """Anything that reads a tensor, writes ops and names the op that gives its result."""

    def emit(self, tape: Tape, x: str) -> str: ...


@dataclass(frozen=True)
class Work:
    """What an activation function costs: FLOP per number (a transcendental function is 4), and kernels when eager."""

    flop: float
    kernels: int = 1


SILU, GELU = Work(4), Work(8)
ACTIVATIONS = {
    "silu": SILU,
    "swish": SILU,
    "gelu": GELU,
    "gelu_pytorch_tanh": GELU,
    "gelu_new": Work(11, 8),
    "gelu_fast": Work(12, 9),
    "quick_gelu": Work(6, 3),
    "relu": Work(1),
    "relu2": Work(2, 2),
    "tanh": Work(4),
    "sigmoid": Work(4),
    "mish": GELU,
}


@dataclass(frozen=True)
class Reach:
    """Which keys the queries of an attention see: query-key `pairs`, keys read (`context`), keys `held` after the step."""

    pairs: Size
    context: Size
    held: Size = NONE

    @classmethod
    def causal(cls, window: int | None = None, cached: bool = True) -> "Reach":
        """All tokens before, or the last `window` of them; kept for the next step in a decoder."""
        how = f"[window={window}]" if window else ""
        return cls(*(Size.of({f"{what}{how}": 1.0}) for what in ("pairs", "context", "held")[: 2 + cached]))

    @classmethod
    def both(cls, half: int | None = None) -> "Reach":
        """All tokens, or those at most `half` away: what a causal window of half + 1 sees, twice, less the token itself."""
        pairs = Size.of({f"pairs[window={half + 1}]": 2.0, "tokens": -1.0}) if half else Size.of({"pairs[full]": 1.0})
        return cls(pairs, TOKENS)

    @classmethod
    def fixed(cls, length: int, per: str = "sequences") -> "Reach":
        """All of `length` positions for each of `per`."""
        return cls(Size.of({per: float(length) ** 2}), Size.of({per: float(length)}))


@dataclass(frozen=True)
class Norm:
    """RMSNorm with one weight vector, LayerNorm with two (one without its bias, none without affine)."""

    name: str
    weights: int = 1
    rms: bool = True
    width: int = 0
    groups: int = 1
    split: str = ""

    def emit(self, tape: Tape, x: str) -> str:
        width, rows = self.width or tape.width, tape.rows * self.groups
        saved = tape.keep(x, rows * width)
        dims: dict[str, Dim] = {"rows": rows, "width": width, "weights": self.weights}
        return tape.add(self.name, "norm", dims, x, kernels=6 if self.rms else 1, saved=saved, split=self.split)


def layer_norm(name: str, bias: bool = True, affine: bool = True) -> Norm:
    return Norm(name, weights=(1 + bias) * affine, rms=False)


@dataclass(frozen=True)
class Attention:
    """Softmax attention with its projections.

    inner      names of the q, k, v projections, or of the one that makes all three
    bias       one flag per projection; `out_bias` for the last
    rotary     numbers per head that are turned by the position (0: none)
    norms      norms of queries and keys: over each head, or over the whole row (`row_norms`)
    values     name of the attention op itself (by default `attention` under the module)
    memory     op whose rows are keys and values (cross attention), and how many `memory_rows` there are
    weights    sinks, one per head
    buckets    relative position biases, one per head and bucket
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    reach: Reach
    inner: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output: str = "o_proj"
    bias: tuple[bool, ...] = (False, False, False)
    out_bias: bool = False
    rotary: int = 0
    norms: tuple[str, str] | None = None
    row_norms: bool = False
    values: str = ""
    memory: str = ""
    memory_rows: Size | None = None
    memory_width: int = 0
    sinks: bool = False
    buckets: int = 0

    def emit(self, tape: Tape, x: str) -> str:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        source, rows = self.memory or x, self.memory_rows or tape.rows

        def inner(i: int, outputs: int, of: str, count: Size, width: int) -> str:
            return tape.linear(f"{self.name}.{self.inner[i]}", of, width, outputs, self.bias[i], "column", rows=count)

        if len(self.inner) == 1:
            q = k = v = inner(0, queries + 2 * keys, x, tape.rows, tape.width)
        else:
            q = inner(0, queries, x, tape.rows, tape.width)
            k = inner(1, keys, source, rows, self.memory_width or tape.width)
            v = inner(2, keys, source, rows, self.memory_width or tape.width)
        if self.norms:
            q = self._norm(self.norms[0], self.heads).emit(tape, q)
            k = self._norm(self.norms[1], self.kv_heads).emit(tape, k)
        if self.rotary:
            turned = tape.rows * ((self.heads + self.kv_heads) * self.rotary)
            q = k = tape.elementwise(f"{self.name}.rope", tuple(dict.fromkeys((q, k))), turned, 3, 8, split="heads")
        extra: tuple[str, ...] = ()
        if self.buckets:
            dims: dict[str, Dim] = {"rows": self.reach.pairs, "outputs": self.heads, "vocabulary": self.buckets}
            extra = (tape.add(f"{self.name}.relative_attention_bias", "embedding", dims, plain=True),)
        if self.sinks:
            extra = (tape.elementwise(f"{self.name}.sinks", (), tape.rows * self.heads, 2, 1, weights=self.heads, split="heads"),)
        sizes: dict[str, Dim] = {
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "value_dim": self.head_dim,
            "queries": tape.rows,
            "pairs": self.reach.pairs,
            "context": self.reach.context,
            "held": self.reach.held,
        }
        # q, k, v and the output, and the fp32 log-sum-exp of every query and head, which is two elements of 16 bits
        saved = tape.rows * (2 * queries + 2 * self.heads) + rows * (2 * keys)
        out = tape.add(
            self.values or f"{self.name}.attention",
            "attention",
            sizes,
            *dict.fromkeys((q, k, v, *extra)),
            split="heads",
            saved=saved,
            cache=(tape.cache or tape.act) if self.reach.held.terms else None,
        )
        return tape.linear(f"{self.name}.{self.output}", out, queries, tape.width, self.out_bias, "row", saves=False)

    def _norm(self, name: str, heads: int) -> Norm:
        full = f"{self.name}.{name}"
        if self.row_norms:
            return Norm(full, width=heads * self.head_dim, split="heads")
        return Norm(full, width=self.head_dim, groups=heads, split="heads")


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2): keys and values of all heads are made from one short latent per token."""

    name: str
    heads: int
    rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    reach: Reach
    query_rank: int = 0
    bias: bool = False

    def emit(self, tape: Tape, x: str) -> str:
        queries = self.heads * (self.nope_dim + self.rope_dim)
        if self.query_rank:
            low = tape.linear(f"{self.name}.q_a_proj", x, tape.width, self.query_rank, self.bias)
            low = Norm(f"{self.name}.q_a_layernorm", width=self.query_rank).emit(tape, low)
            q = tape.linear(f"{self.name}.q_b_proj", low, self.query_rank, queries, split="column")
        else:
            q = tape.linear(f"{self.name}.q_proj", x, tape.width, queries, split="column")
        latent = tape.linear(f"{self.name}.kv_a_proj_with_mqa", x, tape.width, self.rank + self.rope_dim, self.bias)
        short = Norm(f"{self.name}.kv_a_layernorm", width=self.rank).emit(tape, latent)
        turned = tape.rows * ((self.heads + 1) * self.rope_dim)
        turned_name = tape.elementwise(f"{self.name}.rope", (q, latent), turned, 3, 8)
        dims: dict[str, Dim] = {
            "heads": self.heads,
            "rank": self.rank,
            "nope_dim": self.nope_dim,
            "rope_dim": self.rope_dim,
            "value_dim": self.value_dim,
            "queries": tape.rows,
            "pairs": self.reach.pairs,
            "context": self.reach.context,
            "held": self.reach.held,
        }
        # as trained: expanded keys and values of every head are kept, with the latent that they are made from
        per_row = self.rank + queries + self.heads * (self.nope_dim + self.rope_dim + 2 * self.value_dim + 2)
        out = tape.add(
            f"{self.name}.kv_b_proj",
            "latent_attention",
            dims,
            short,
            turned_name,
            split="heads",
            saved=tape.rows * per_row,
            cache=tape.cache or tape.act,
            kernels=2,
        )
        return tape.linear(f"{self.name}.o_proj", out, self.heads * self.value_dim, tape.width, self.bias, "row", saves=False)


@dataclass(frozen=True)
class MLP:
    """Two linear layers around an activation; gated with `gate` and `up` (or both as one) before `down`."""

    name: str
    hidden: int
    inner: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    gated: bool = True
    bias: bool = False
    act: str = "act_fn"
    work: Work = SILU

    def emit(self, tape: Tape, x: str) -> str:
        path = f"{self.name}." if self.name else ""
        outputs = self.hidden * (2 if self.gated and len(self.inner) == 1 else 1)
        made = tuple(tape.linear(path + n, x, tape.width, outputs, self.bias, "column") for n in self.inner)
        act = activation(tape, path + self.act, made, tape.rows * self.hidden, self.gated, self.work)
        return tape.linear(path + self.down, act, self.hidden, tape.width, self.bias, "row")


def activation(
    tape: Tape, name: str, inputs: tuple[str, ...], elements: Size, gated: bool, work: Work, split: str = "column"
) -> str:
    """An activation, times the other half where gated; both its inputs are kept."""
    reads = elements * (1 + gated)
    return tape.elementwise(name, inputs, elements, work.flop + gated, work.kernels + gated, reads, saved=reads, split=split)


@dataclass(frozen=True)
class Experts:
    """A router that sends each token to `top_k` of `experts` gated MLPs, beside `shared` ones that see every token."""

    name: str
    experts: int
    top_k: int
    hidden: int
    router: str = "gate"
    bias: bool = False
    shared: MLP | None = None
    work: Work = SILU

    def emit(self, tape: Tape, x: str) -> str:
        rows, width = tape.rows, tape.width
        logits = tape.linear(f"{self.name}.{self.router}", x, width, self.experts, self.bias, plain=True)
        chosen = tape.elementwise(f"{self.name}.top_k", (logits,), rows * self.experts, 5, 4)

        def matrix(name: str, inputs: int, outputs: int, *of: str) -> str:
            dims: dict[str, Dim] = {
                "rows": rows,
                "experts": self.experts,
                "top_k": self.top_k,
                "inputs": inputs,
                "outputs": outputs,
                "bias": int(self.bias),
            }
            saved = rows * (self.top_k * inputs)  # a copy, ordered by expert
            return tape.add(f"{self.name}.experts.{name}", "expert", dims, *of, split="experts", saved=saved)

        both = matrix("gate_up_proj", width, 2 * self.hidden, x, chosen)
        act = activation(
            tape, f"{self.name}.experts.act_fn", (both,), rows * (self.top_k * self.hidden), True, self.work, "experts"
        )
        down = matrix("down_proj", self.hidden, width, act)
        out = tape.elementwise(
            f"{self.name}.combine", (down, chosen), rows * width, 2 * self.top_k, 2, rows * (self.top_k * width), split="sum"
        )
        if self.shared is None:
            return out
        beside = self.shared.emit(tape, x)
        return tape.elementwise(f"{self.name}.add", (out, beside), rows * width, 1, 1, rows * (2 * width), split="sum")


@dataclass(frozen=True)
class Path:
    """One way through a branch: an optional norm, the parts that read it (their results are added), an optional norm."""

    norm: Norm | None
    parts: tuple[Part, ...]
    post: Norm | None = None


@dataclass(frozen=True)
class Branch:
    """Paths that read the same tensor and are added to it; `after` norms the sum (post-norm networks)."""

    paths: tuple[Path, ...]
    after: Norm | None = None


@dataclass(frozen=True)
class Block:
    """One layer: residual branches in order."""

    branches: tuple[Branch, ...]

    def emit(self, tape: Tape, x: str) -> str:
        for number, branch in enumerate(self.branches, 1):
            ends: list[str] = []
            for path in branch.paths:
                normed = path.norm.emit(tape, x) if path.norm else x
                made = [part.emit(tape, normed) for part in path.parts]
                if path.post:
                    made = [path.post.emit(tape, name) for name in made]
                ends.extend(made)
            size = tape.rows * tape.width
            x = tape.elementwise(f"residual_{number}", (x, *ends), size, len(ends), len(ends), size * (1 + len(ends)))
            if branch.after:
                x = branch.after.emit(tape, x)
        return x


def block(*branches: tuple[Norm | None, Part], post: Sequence[Norm] = ()) -> Block:
    """The usual one: norm, part, add; `post` norms each part's result before the sum."""
    ends = [*post, *[None] * len(branches)]
    return Block(tuple(Branch((Path(norm, (part,), end),)) for (norm, part), end in zip(branches, ends, strict=False)))


@dataclass(frozen=True)
class Stack:
    """Layers under one path; equal ones are written once, with their number."""

    name: str
    layers: tuple[Block, ...]

    def emit(self, tape: Tape, x: str) -> str:
        kinds: dict[Block, list[int]] = {}
        for index, layer in enumerate(self.layers):
            kinds.setdefault(layer, []).append(index)
        for layer, indices in kinds.items():
            with tape.layer(f"{self.name}.*", tuple(indices)):
                x = layer.emit(tape, x)
        return x
