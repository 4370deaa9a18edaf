"""State-space mixers and their families: Mamba (Gu and Dao 2023), Mamba-2 (Dao and Gu 2024), and hybrids with attention."""

from collections.abc import Callable
from dataclasses import dataclass

from narrows.capture.blocks import MLP, Block, Branch, Norm, Part, Path, block
from narrows.capture.decoders import CAUSAL, attention, base, decoder, experts, work
from narrows.capture.fields import Fields
from narrows.capture.tape import SEQUENCES, Tape
from narrows.capture.towers import Embedding, Network
from narrows.graph import Dim

SCAN = "The state of a mixer is counted; the last few inputs that its convolution keeps are not."


def _convolve(tape: Tape, name: str, x: str, channels: int, kernel: int, bias: bool) -> str:
    """A causal convolution of each channel with itself, and SiLU."""
    size = tape.rows * channels
    dims: dict[str, Dim] = {
        "positions": tape.rows,
        "in_positions": tape.rows,
        "in_channels": channels,
        "out_channels": channels,
        "kernel": kernel,
        "groups": channels,
        "bias": int(bias),
    }
    out = tape.add(f"{name}.conv1d", "conv", dims, x, saved=size, split="column", plain=True)
    return tape.elementwise(f"{name}.act", (out,), size, 4, 1, saved=size, split="column")


def _scan(tape: Tape, name: str, channels: int, state: int, flop: int, saved: int, *inputs: str) -> str:
    dims: dict[str, Dim] = {"rows": tape.rows, "channels": channels, "state": state, "flop_per_state": flop, "held": SEQUENCES}
    return tape.add(name, "scan", dims, *inputs, cache=tape.act, split="heads", saved=tape.rows * saved)


def _parameters(tape: Tape, name: str, decays: int, others: int) -> str:
    """A = -exp(A_log), made anew in every step, and the other parameters that the scan reads (D, biases of the time step)."""
    return tape.elementwise(name, (), decays, 2, 3, weights=decays + others, split="heads")


@dataclass(frozen=True)
class Mamba:
    """Selective scan over `channels` of `state` numbers each; `norms` those of the time step, B and C (Jamba)."""

    name: str
    channels: int
    state: int
    rank: int
    kernel: int
    bias: bool = False
    conv_bias: bool = True
    norms: tuple[str, str, str] | None = None

    def emit(self, tape: Tape, x: str) -> str:
        name, channels, rows = self.name, self.channels, tape.rows
        both = tape.linear(f"{name}.in_proj", x, tape.width, 2 * channels, self.bias, "column")
        u = _convolve(tape, name, both, channels, self.kernel, self.conv_bias)
        made = tape.linear(f"{name}.x_proj", u, channels, self.rank + 2 * self.state, split="row")
        parts = [made] * 3
        if self.norms:
            widths = (self.rank, self.state, self.state)
            parts = [Norm(f"{name}.{n}", width=w).emit(tape, made) for n, w in zip(self.norms, widths, strict=True)]
        dt = tape.linear(f"{name}.dt_proj", parts[0], self.rank, channels, True, "column")
        decay = _parameters(tape, f"{name}.A_log", channels * self.state, channels)
        y = _scan(
            tape, f"{name}.scan", channels, self.state, 8, channels + 2 * self.state, u, dt, decay, *dict.fromkeys(parts[1:])
        )
        gated = tape.elementwise(
            f"{name}.gate", (y, both), rows * channels, 5, 2, rows * (2 * channels), saved=rows * (2 * channels), split="column"
        )
        return tape.linear(f"{name}.out_proj", gated, channels, tape.width, self.bias, "row")


@dataclass(frozen=True)
class Mamba2:
    """Scan whose decay is one number per head; B and C are shared by the heads of a group. `normed` is a gated RMSNorm."""

    name: str
    heads: int
    head_dim: int
    state: int
    groups: int
    kernel: int
    bias: bool = False
    out_bias: bool = False
    conv_bias: bool = True
    normed: bool = True

    def emit(self, tape: Tape, x: str) -> str:
        name, rows = self.name, tape.rows
        channels = self.heads * self.head_dim
        mixed = channels + 2 * self.groups * self.state
        made = tape.linear(f"{name}.in_proj", x, tape.width, channels + mixed + self.heads, self.bias, "column")
        u = _convolve(tape, name, made, mixed, self.kernel, self.conv_bias)
        decay = _parameters(tape, f"{name}.A_log", self.heads, 2 * self.heads)
        y = _scan(tape, f"{name}.scan", channels, self.state, 6, mixed + self.heads, u, decay)
        gated = tape.elementwise(
            f"{name}.gate", (y, made), rows * channels, 5, 2, rows * (2 * channels), saved=rows * (2 * channels), split="column"
        )
        if self.normed:
            gated = Norm(f"{name}.norm", width=channels, split="column").emit(tape, gated)
        return tape.linear(f"{name}.out_proj", gated, channels, tape.width, self.out_bias, "row")


def _only_mixers(f: Fields, mixer: Part, tied: bool) -> Network:
    """A norm and a mixer per layer, and nothing else."""
    width, path = f.size("hidden_size", "d_model"), base(f, "backbone")
    layers = [block((Norm("norm"), mixer))] * f.layers("num_hidden_layers", "n_layer")
    embedding = Embedding(((f"{path}embeddings", f.size("vocab_size")),))
    return decoder(f, path, width, layers, norm=Norm(f"{path}norm_f"), embedding=embedding, tied=tied, notes=(SCAN,))


def _rank(f: Fields, name: str, width: int) -> int:
    """Width of the time step's projection: a sixteenth of the model's unless given."""
    return -(-width // 16) if f.get(name, default="auto") == "auto" else f.size(name)


def _mamba(f: Fields) -> Network:
    width = f.size("hidden_size", "d_model")
    channels = _expanded(f, "expand", width)
    mixer = Mamba(
        "mixer",
        channels,
        f.size("state_size", default=16),
        _rank(f, "time_step_rank", width),
        f.size("conv_kernel", default=4),
        f.flag("use_bias", default=False),
        f.flag("use_conv_bias", default=True),
    )
    return _only_mixers(f, mixer, True)


def _mamba2(f: Fields) -> Network:
    heads, size, width = f.size("num_heads"), f.size("head_dim", default=64), f.size("hidden_size")
    if heads * size != _expanded(f, "expand", width):
        raise f.wrong(
            "num_heads",
            f"{heads} heads of {size} are not hidden_size x expand.",
            "Give num_heads x head_dim = hidden_size x expand.",
        )
    bias = f.flag("use_bias", default=False)
    mixer = Mamba2(
        "mixer",
        heads,
        size,
        f.size("state_size", default=128),
        f.size("n_groups", default=8),
        f.size("conv_kernel", default=4),
        bias,
        bias,
        f.flag("use_conv_bias", default=True),
    )
    return _only_mixers(f, mixer, False)


def _expanded(f: Fields, name: str, width: int) -> int:
    """Channels of a mixer: the width times a factor that may be a fraction."""
    channels = int(f.number(name, default=2) * width)
    if channels < 1:
        raise f.wrong(name, f"{f.get(name)} leaves no channels.", "Give a factor above 0, usually 2.")
    return channels


def _jamba(f: Fields) -> Network:
    width, count = f.size("hidden_size"), f.layers("num_hidden_layers")
    mixer = Mamba(
        "mamba",
        _expanded(f, "mamba_expand", width),
        f.size("mamba_d_state", default=16),
        _rank(f, "mamba_dt_rank", width),
        f.size("mamba_d_conv", default=4),
        f.flag("mamba_proj_bias", default=False),
        f.flag("mamba_conv_bias", default=True),
        ("dt_layernorm", "b_layernorm", "c_layernorm"),
    )
    attn = attention(f, width, rotary=0)
    dense = MLP("feed_forward", f.size("intermediate_size"), work=work(f))
    sparse = (
        experts(f, dense.hidden, "num_experts", name="feed_forward", router="router")
        if f.size("num_experts", default=16) > 1
        else dense
    )

    def chosen(i: int, which: str, period: int, offset: int) -> bool:
        every, at = f.size(f"{which}_layer_period", default=period), f.size(f"{which}_layer_offset", default=offset, least=0)
        if at >= every:
            raise f.wrong(f"{which}_layer_offset", f"{at} is not below the period {every}.", "Give a smaller offset.")
        return i % every == at

    layers = [
        block(
            (Norm("input_layernorm"), attn if chosen(i, "attn", 8, 4) else mixer),
            (Norm("pre_ff_layernorm"), sparse if chosen(i, "expert", 2, 1) else dense),
        )
        for i in range(count)
    ]
    path = base(f, "model")
    return decoder(f, path, width, layers, norm=Norm(f"{path}final_layernorm"), notes=(CAUSAL, SCAN))


def _falcon_h1(f: Fields) -> Network:
    width = f.size("hidden_size")
    channels, heads = f.maybe("mamba_d_ssm") or _expanded(f, "mamba_expand", width), f.size("mamba_n_heads")
    size = f.divides(heads, channels, "mamba_n_heads", "mamba_d_ssm")
    if f.get("mamba_d_head", default="auto") != "auto" and f.size("mamba_d_head") != size:
        raise f.wrong(
            "mamba_d_head",
            f"{heads} heads of {f.size('mamba_d_head')} are not {channels} channels.",
            "Give mamba_d_ssm / mamba_n_heads.",
        )
    mixer = Mamba2(
        "mamba",
        heads,
        size,
        f.size("mamba_d_state", default=256),
        f.size("mamba_n_groups", default=1),
        f.size("mamba_d_conv", default=4),
        f.flag("mamba_proj_bias", default=False),
        f.flag("projectors_bias", default=False),
        f.flag("mamba_conv_bias", default=True),
        f.flag("mamba_rms_norm", default=False),
    )
    mlp = MLP("feed_forward", f.size("intermediate_size"), bias=f.flag("mlp_bias", default=False), work=work(f))
    attn = attention(f, width, biased=f.flag("attention_bias", default=False))
    layer = Block((Branch((Path(Norm("input_layernorm"), (mixer, attn)),)), Branch((Path(Norm("pre_ff_layernorm"), (mlp,)),))))
    path = base(f, "model")
    layers = [layer] * f.layers("num_hidden_layers")
    return decoder(f, path, width, layers, norm=Norm(f"{path}final_layernorm"), notes=(CAUSAL, SCAN))


MIXERS: dict[str, Callable[[Fields], Network]] = {"mamba": _mamba, "mamba2": _mamba2, "jamba": _jamba, "falcon_h1": _falcon_h1}
