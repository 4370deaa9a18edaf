"""Step-3's prices and throughput, from its own sizes, and from the bundled configs of the models it is compared with."""

from dataclasses import replace

from narrows.capture import capture
from narrows.graph import BF16, FP8, Dim, Graph, Op, Size
from narrows.machine import Machine, machine
from narrows.step import Step
from narrows.techniques.serving.step_3_mfa_afd import Step3

_PRICES = {"h800": 2.0, "h20": 0.8}  # USD per hour: table 4
_ROWS = Size.of(tokens=1)


def _machines() -> tuple[Machine, ...]:
    return tuple(replace(machine(name), price_per_hour=usd) for name, usd in _PRICES.items())


def _linear(name: str, repeat: int, inputs: int, outputs: int, split: str) -> Op:
    return Op(name, "linear", {"rows": _ROWS, "inputs": inputs, "outputs": outputs}, BF16, FP8, repeat=repeat, split=split)


def _experts(name: str, repeat: int, inputs: int, outputs: int, split: str) -> Op:
    dims: dict[str, Dim] = {"rows": _ROWS, "experts": 48, "top_k": 3, "inputs": inputs, "outputs": outputs}
    return Op(name, "expert", dims, BF16, FP8, repeat=repeat, split=split)


def _ffn(name: str, repeat: int, hidden: int) -> tuple[Op, ...]:
    return (_linear(f"{name}.gate_up_proj", repeat, 7168, 2 * hidden, "column"),
            _linear(f"{name}.down_proj", repeat, hidden, 7168, "row"))  # fmt: skip


def step3() -> Graph:
    """Step-3's text model by its table 1: 61 layers, 64 heads over one of keys and values, 3 of 48 experts and a shared one."""
    layers, dense, sparse = 61, 5, 56
    heads: dict[str, Dim] = {"heads": 64, "kv_heads": 1, "head_dim": 256, "value_dim": 256, "queries": _ROWS}
    keys: dict[str, Dim] = {name: Size.of({name: 1}) for name in ("pairs", "context", "held")}
    ops = (
        Op("layers.*.input_layernorm", "norm", {"rows": _ROWS, "width": 7168}, BF16, BF16, repeat=layers),
        _linear("layers.*.attention.q_a_proj", layers, 7168, 2048, ""),
        _linear("layers.*.attention.q_b_proj", layers, 2048, 64 * 256, "column"),
        _linear("layers.*.attention.kv_proj", layers, 7168, 2 * 256, ""),
        Op("layers.*.attention.core", "attention", heads | keys, BF16, cache=FP8, repeat=layers, split="heads", compute="fp8"),
        _linear("layers.*.attention.o_proj", layers, 64 * 256, 7168, "row"),
        Op("layers.*.post_layernorm", "norm", {"rows": _ROWS, "width": 7168}, BF16, BF16, repeat=layers),
        *_ffn("layers.*.mlp", dense, 18432),
        *_ffn("layers.*.shared_expert", sparse, 5120),
        _experts("layers.*.experts.gate_up", sparse, 7168, 2 * 5120, "column"),
        _experts("layers.*.experts.down", sparse, 5120, 7168, "row"),
        Op("lm_head", "linear", {"rows": Size.of(outputs=1), "inputs": 7168, "outputs": 128815}, BF16, FP8, split="vocabulary"),
    )
    return Graph("step-3", tuple(replace(op, compute="fp8") if op.weight == FP8 else op for op in ops), "table 1 of the paper")


def eight_bits(graph: Graph) -> Graph:
    """Products and the cache in FP8, as the paper takes every model."""

    def change(op: Op) -> Op:
        if not op.spec.matmul:
            return op
        return replace(op, weight=FP8 if op.weight else None, cache=FP8 if op.cache else None, compute="fp8")

    return graph.map(change)


def _usd(technique: Step3, graph: Graph, context: int) -> float:
    return technique.price(graph, _machines(), Step.decode(1, context - 1))[0]


def usd_8k(technique: Step3) -> float:
    """US dollars per million tokens of Step-3 at 8K."""
    return _usd(technique, step3(), 8192)


def usd_32k(technique: Step3) -> float:
    """US dollars per million tokens of Step-3 at 32K."""
    return _usd(technique, step3(), 32768)


def qwen_usd_32k(technique: Step3) -> float:
    """US dollars per million tokens of Qwen3-235B-A22B at 32K."""
    return _usd(technique, eight_bits(capture("qwen3-235b-a22b")), 32768)


def over_deepseek(technique: Step3) -> float:
    """What DeepSeek-V3 costs on one kind of machine over what Step-3 does."""
    theirs = _usd(technique.baseline(), eight_bits(capture("deepseek-v3")), 32768)
    return theirs / _usd(technique, step3(), 32768)


def tokens_per_device(technique: Step3) -> float:
    """Tokens per second and H800 at 4K on four nodes, within the limit."""
    return technique.pools(step3(), machine("h800"), 4096, instances=4).rate
