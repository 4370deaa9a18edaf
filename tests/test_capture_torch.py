"""Capturing an nn.Module on the meta device: closed forms, what training adds, and that the module stays as it was."""

import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from narrows.capture.generalize import generalize  # noqa: E402
from narrows.capture.torch import from_module  # noqa: E402
from narrows.capture.tracer import CUSTOM  # noqa: E402
from narrows.cost import cost, total  # noqa: E402
from narrows.errors import NarrowsError  # noqa: E402
from narrows.graph import BF16, FP16, FP32, DType, Graph, Op, Size  # noqa: E402
from narrows.step import Step  # noqa: E402

LLAMA: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
    "vocab_size": 1024,
}  # fmt: skip
LAYER = 256 * (256 + 2 * 64 + 256) + 3 * 256 * 704  # matrices of one layer
HEAD = 256 * 1024


def llama(device: str = "meta", **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model("llama", **{**LLAMA, **changes})
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def matrix_flop(graph: Graph, step: Step, phase: str = "forward") -> float:
    return sum(float(cost(op, step).flop) for op in graph if op.spec.matmul and op.phase == phase)


def owned(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def the(graph: Graph, kind: str) -> Op:
    (op,) = graph.find(kind)
    return op


class Attention(nn.Module):
    """Causal self-attention as people write it today."""

    def __init__(self, width: int = 64, heads: int = 4, causal: bool = True) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int = 64, again: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.again = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), again

    def work(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.work, x, use_reentrant=False) if self.again else self.work(x)


class Blocks(nn.Module):
    def __init__(self, again: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(100, 64)
        self.blocks = nn.ModuleList(Block(again=again) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return x


# closed forms


def test_mlp_is_its_two_products() -> None:
    model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 10))
    graph = from_module(model, Step.forward(4))
    assert graph.parameters == owned(model) == 32 * 128 + 128 + 128 * 10 + 10
    assert matrix_flop(graph, Step.forward(4)) == 2 * 4 * (32 * 128 + 128 * 10)
    assert [op.kind for op in graph] == ["linear", "elementwise", "linear"]
    assert graph.ops[1].inputs == ("*",) and graph.ops[1]["elements"] == graph.ops[1]["reads"] == 4 * 128


def test_cnn_counts_positions_groups_and_batch_norm() -> None:
    first, last = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, groups=16)
    model = nn.Sequential(first, nn.BatchNorm2d(16), nn.ReLU(), last)
    graph = from_module(model, Step.forward(2))
    assert graph.parameters == owned(model)
    assert matrix_flop(graph, Step.forward(2)) == 2 * 2 * (112 * 112 * 3 * 16 * 9 + 110 * 110 * 16 * 9)
    assert dict(the(graph, "norm").dims) == {"rows": 2 * 112 * 112, "width": 16, "weights": 2, "flop_per_element": 4.0}


@pytest.mark.parametrize("step", [Step.forward(2, 48), Step.prefill(2, 48), Step.decode(3, 47)], ids=lambda s: s.phase)
def test_llama_in_closed_form(step: Step) -> None:
    model = llama()
    graph = from_module(model, step)
    pairs = step["pairs"]
    expected = step["tokens"] * 3 * 2 * LAYER + 3 * pairs * 4 * 256 + step["outputs"] * 2 * HEAD
    assert graph.parameters == owned(model)
    assert matrix_flop(graph, step) == expected
    assert the(graph, "attention")["pairs"] == pairs  # half of T x T, and so noted
    assert any("half" in note for note in graph.notes)
    caches = step.phase != "forward"
    attention = the(graph, "attention")
    assert attention["held"] == (step["held"] if caches else 0)
    assert attention.repeat == 3 and attention["kv_heads"] == 2  # keys and values stay grouped
    bytes_held = attention.spec.held(attention.sized(step)) * attention.repeat * 2
    assert bytes_held == caches * step["held"] * 3 * 2 * (2 * 32) * 2


def test_decode_reads_the_whole_cache() -> None:
    attention = the(from_module(llama(), Step.decode(2, 100)), "attention")
    assert (attention["queries"], attention["context"], attention["held"]) == (2, 2 * 101, 2 * 101)
    assert attention.cache == BF16


def test_layers_fold_into_one_op_each() -> None:
    graph = from_module(llama(), Step.prefill(1, 16))
    names = [op.name for op in graph]
    assert len(names) == len(set(names)) < 25
    queries = next(op for op in graph if op.name == "model.layers.*.self_attn.q_proj")
    assert queries.repeat == 3 and queries.inputs == ("model.layers.*.input_layernorm",)
    norm = next(op for op in graph if op.name == "model.layers.*.input_layernorm")
    assert norm.kind == "norm" and norm["width"] == 256 and norm.repeat == 3
    assert set(norm.inputs) == {"model.embed_tokens", "model.layers.*.add_2"}


def test_transposed_convolution_multiplies_once_per_input_position() -> None:
    model = nn.ConvTranspose2d(3, 8, 2, stride=2)
    graph = from_module(model, Step.forward(2), torch.empty(2, 3, 10, 10))
    assert graph.parameters == owned(model)
    assert matrix_flop(graph, Step.forward(2)) == 2 * 2 * 100 * 3 * 8 * 4


def test_a_trace_is_the_same_every_time_and_tells_how_to_cut_it() -> None:
    one, two = (from_module(llama(), Step.prefill(2, 33)) for _ in range(2))
    assert one.to_json() == two.to_json()
    cut = {op.name.rpartition(".")[2]: op.split for op in one if op.split}
    assert cut["q_proj"] == cut["up_proj"] == "column" and cut["o_proj"] == cut["down_proj"] == "row"
    assert (cut["attention"], cut["embed_tokens"], cut["lm_head"]) == ("heads", "vocabulary", "vocabulary")


def test_encoder_and_vision_transformer_see_all_pairs() -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.device("meta"):
        bert = transformers.BertModel._from_config(transformers.BertConfig(**shape, vocab_size=500))
        vit = transformers.ViTModel._from_config(transformers.ViTConfig(**shape, image_size=32, patch_size=8))
    layer = 12 * 128 * 128
    graph = from_module(bert, Step.forward(2, 24))
    assert graph.parameters == owned(bert)
    assert matrix_flop(graph, Step.forward(2, 24)) == 2 * 2 * (24 * 2 * layer + 2 * 24 * 24 * 2 * 128 + 128 * 128)
    graph = from_module(vit, Step.forward(3))
    assert graph.parameters == owned(vit)
    assert matrix_flop(graph, Step.forward(3)) == 2 * 3 * (17 * 2 * layer + 2 * 17 * 17 * 2 * 128 + 16 * 3 * 64 * 128 + 128 * 128)


def test_plain_attention_is_taken_whole() -> None:
    step = Step.forward(2, 24)
    causal, full = (from_module(Attention(causal=c), step) for c in (True, False))
    assert the(causal, "attention")["pairs"] == step["pairs"] and the(full, "attention")["pairs"] == step["pairs[full]"]
    built_in = from_module(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), step)
    assert the(built_in, "attention")["pairs"] == step["pairs[full]"]
    assert built_in.parameters == owned(nn.TransformerEncoderLayer(64, 4, 128))


def test_experts_are_one_op_per_matrix() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(**LLAMA, num_local_experts=8, num_experts_per_tok=2)
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM._from_config(config)
    graph = from_module(model, Step.prefill(1, 32))
    up, down = graph.find("expert")
    assert graph.parameters == owned(model)
    assert (up["rows"], up["experts"], up["top_k"], up["inputs"], up["outputs"], up.repeat) == (32, 8, 2, 256, 1408, 3)
    assert (down["inputs"], down["outputs"]) == (704, 256)


def test_state_space_models_are_scans() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(hidden_size=128, num_hidden_layers=2, vocab_size=500)
    with torch.device("meta"):
        model = transformers.MambaForCausalLM._from_config(config)
    graph = from_module(model, Step.decode(3, 5000))  # far too long to loop over
    scan = the(graph, "scan")
    assert graph.parameters == owned(model)
    assert (scan["rows"], scan["channels"], scan["state"], scan["held"], scan.repeat) == (3, 256, 16, 3, 2)
    assert the(graph, "conv")["kernel"] == 4


def test_dtypes_follow_the_tensors() -> None:
    graph = from_module(llama(), Step.prefill(1, 16))
    assert {op.weight for op in graph if op.weight} == {BF16}
    assert graph.weight_bytes == 2 * graph.parameters
    assert the(from_module(nn.Linear(8, 8).half(), Step.forward(1)), "linear").act == FP16


def test_parameters_without_use_and_with_two_are_counted_once() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=True)
            self.head.weight = self.words.weight
            self.unused = nn.Parameter(torch.zeros(7, 3))

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.words(ids))

    model = Odd()
    graph = from_module(model, Step.forward(1, 4))
    assert graph.parameters == owned(model) == 50 * 16 + 50 + 21
    assert the(graph, "linear").tied == "words"
    rest = {op.name: op["weights"] for op in graph.find("elementwise") if op["elements"] == 0}
    assert rest == {"head.bias": 50, "unused": 21}


# training


def test_training_is_three_times_the_forward_pass() -> None:
    step = Step.train(2, 24)
    graph = from_module(llama(), step)
    attention = 3 * step["pairs"] * 4 * 256
    rest = matrix_flop(graph, step) - attention
    assert matrix_flop(graph, step, "backward") == pytest.approx(2 * rest + 2.5 * attention)
    assert [op.kind for op in graph if op.phase == "update"] == ["optimizer"]
    assert graph.parameters == owned(llama())


def test_the_first_layer_has_no_gradient_for_its_input_and_frozen_weights_have_none() -> None:
    model, step = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 32, bias=False)), Step.train(4, 1)
    first, second = 2 * 4 * 8 * 16, 2 * 4 * 16 * 32
    assert matrix_flop(from_module(model, step), step, "backward") == first + 2 * second
    model[1].weight.requires_grad = False
    assert matrix_flop(from_module(model, step), step, "backward") == first + second


def test_checkpointing_recomputes_and_saves_less() -> None:
    step = Step.train(2, 16)
    plain, again = (from_module(Blocks(again=a), step) for a in (False, True))
    assert not [op for op in plain if op.phase == "recompute"]
    redone = {op.name: op.repeat for op in again if op.phase == "recompute"}
    assert redone["blocks.*.up"] == 3
    assert matrix_flop(again, step, "backward") == matrix_flop(plain, step, "backward")

    def saved(graph: Graph) -> float:
        return sum(float(op.saved) * op.act.bits / 8 * op.repeat for op in graph)

    tokens = 2 * 16
    # kept: ids (8 bytes), each block's input, and between: the wide activations before and after gelu
    assert saved(plain) == tokens * (8 + 3 * 4 * (64 + 2 * 256))
    assert saved(again) == tokens * (8 + 3 * 4 * 64)


# the module and what describes itself


def test_the_module_is_left_as_it_was() -> None:
    model = llama("cpu")
    model.train()
    hooks: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: hooks.append(1))
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    config, buffers = json.dumps(model.config.to_dict(), default=str), dict(model.named_buffers())
    call = nn.Module.__call__
    for step in (Step.prefill(1, 8), Step.decode(1, 8), Step.train(1, 8)):
        from_module(model, step)
    assert len(hooks) == 4  # decode fills the cache first: a user's hooks run on the meta device too
    assert nn.Module.__call__ is call and model.training and model.model.layers[0].mlp.training
    assert json.dumps(model.config.to_dict(), default=str) == config and model.config._attn_implementation == "sdpa"
    assert all(b is buffers[n] for n, b in model.named_buffers())
    after = model.state_dict(keep_vars=True)
    assert all(id(after[n]) == i and torch.equal(after[n], t) and after[n].grad is None for n, (i, t) in before.items())


def test_a_hook_that_evicts_from_the_cache_is_seen() -> None:
    model = llama("cpu")

    def evict(module: Any, args: Any, kwargs: Any, out: Any) -> None:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        layer.keys, layer.values = layer.keys[:, :, -16:], layer.values[:, :, -16:]

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(evict, with_kwargs=True)
    prefill, decode = (the(from_module(model, step), "attention") for step in (Step.prefill(2, 64), Step.decode(2, 64)))
    assert (prefill["pairs"], prefill["held"]) == (Step.prefill(2, 64)["pairs"], 2 * 16)
    assert decode["context"] == 2 * 17


class Packed(nn.Module):
    """A 4-bit layer that describes itself."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(outputs, inputs // 8, dtype=torch.int32), requires_grad=False)
        self.inputs, self.outputs = inputs, outputs

    def forward(self, x: Tensor) -> Tensor:
        shifts = torch.arange(0, 32, 4)
        weight = ((self.codes[..., None] >> shifts) & 15).flatten(1)
        return x @ weight.to(x.dtype).T

    def graph_op(self, name: str, rows: int, act: DType) -> Op:
        dims = {"rows": rows, "inputs": self.inputs, "outputs": self.outputs}
        return Op(name, "linear", dims, act=act, weight=DType("int4", 4, 32, 16), compute=act.name)


def test_a_module_that_describes_itself_is_not_looked_into() -> None:
    model = nn.Sequential(nn.Linear(64, 64), Packed(64, 32), nn.ReLU())
    graph = from_module(model, Step.forward(3, 5))
    packed = next(op for op in graph if op.weight and op.weight.name == "int4")
    assert (packed["rows"], packed["outputs"], packed.inputs) == (15, 32, ("*",))
    assert graph.parameters == 64 * 64 + 64 + 64 * 32  # as 4-bit numbers, not as the words that hold them
    assert len(graph.ops) == 3


def test_a_custom_operator_has_its_own_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    @torch.library.custom_op("narrows_test::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return 2 * x

    twice.register_fake(torch.empty_like)
    monkeypatch.setitem(CUSTOM, "narrows_test::twice", lambda args, kwargs, out: {
        "kind": "linear", "dims": {"rows": args[0].shape[0], "inputs": 8, "outputs": 8}, "act": FP32,
        "weight": DType("int8", 8)})  # fmt: skip

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return torch.ops.narrows_test.twice(x)

    graph = from_module(nn.Sequential(nn.Linear(4, 8), Twice()), Step.forward(6))
    op = next(o for o in graph if o.weight and o.weight.name == "int8")
    assert op["rows"] == 6 and op.spec.matmul


# generalizing, shipped files, errors


def test_a_trace_generalizes_to_every_step() -> None:
    model = llama()
    sizes = ((2, 53, 0), (3, 101, 0), (5, 61, 37), (7, 71, 13), (11, 89, 211))
    graph = generalize(lambda step: from_module(model, step), [Step.prefill(b, t, past=p) for b, t, p in sizes])
    for step in (Step.prefill(4, 128), Step.decode(9, 777)):
        exact = total(from_module(model, step), step)
        assert matrix_flop(graph, step) == matrix_flop(from_module(model, step), step)
        assert total(graph, step).flop == pytest.approx(exact.flop, rel=1e-3)
        assert total(graph, step).read_bytes == pytest.approx(exact.read_bytes, rel=1e-2)
    assert the(graph, "attention")["held"] == Size.of(held=1)


def test_any_transformers_config_is_captured() -> None:
    pytest.importorskip("transformers")
    from narrows.capture.config import from_config
    from narrows.capture.hf import from_transformers

    config = {"model_type": "mistral", **LLAMA, "sliding_window": 64, "dtype": "bfloat16"}
    traced, read = from_transformers(config, "m"), from_config(config, "m")
    for step in (Step.prefill(2, 300), Step.decode(3, 1000), Step.decode(3, 20)):
        assert matrix_flop(traced, step) == matrix_flop(read, step)
    assert traced.parameters == read.parameters
    with pytest.raises(NarrowsError, match=r"model_type.*mistral"):
        from_transformers({"model_type": "mistrall"}, "m")
    with pytest.raises(NarrowsError, match=r"num_hidden_layers: 1000000000"):
        from_transformers({**config, "num_hidden_layers": 10**9}, "m")
    with pytest.raises(NarrowsError, match=r"config\.json"):
        from_transformers({**config, "hidden_act": "soft"}, "m")


@pytest.mark.parametrize(("name", "parameters", "gflop"), [
    ("resnet-50", 25_557_032, 8.178), ("convnext-t", 28_589_128, 8.91), ("swin-t", 28_288_354, 8.98),
    ("dit-xl-2", 749_826_464, 237.3),
    ("flux.1-dev", 11_901_408_320, None), ("sd3-medium", 2_028_328_000, None), ("sdxl-unet", 2_567_463_684, None),
    ("qwen2-vl-7b", 8_291_375_616, None),
])  # fmt: skip
def test_shipped_graphs(name: str, parameters: int, gflop: float | None) -> None:
    """Parameters of the published checkpoints; FLOP of the papers (He 2015, Liu 2022, Liu 2021, Peebles 2022) doubled."""
    file = files("narrows.data").joinpath("models", f"{name}.json")
    graph = Graph.from_json(file.read_text("utf-8"))
    assert graph.parameters == parameters and len(file.read_bytes()) < 150_000
    one, four = (matrix_flop(graph, Step.forward(batch)) for batch in (1, 4))
    assert gflop is None or one == pytest.approx(gflop * 1e9, rel=0.01)
    assert four == pytest.approx(4 * one)


class Breaks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[: int(x.sum())]


@pytest.mark.parametrize(("make", "said"), [
    (lambda: (nn.Sequential(nn.Linear(4, 4), Breaks()), Step.forward(1)), r"Sequential: 1: .*meta"),
    (lambda: (nn.Sequential(nn.Linear(4, 8), nn.Linear(4, 4)), Step.forward(1)), r"Sequential: 1: .*inputs"),
    (lambda: (nn.Identity(), Step.forward(1)), "inputs="),
    (lambda: (nn.Linear(4, 4), Step.forward([1, 2], [3, 4])), "one batch"),
    (lambda: (nn.Linear(4, 4).requires_grad_(False), Step.train(1)), "gradient"),
])  # fmt: skip
def test_errors_name_the_module(make: Callable[[], tuple[nn.Module, Step]], said: str) -> None:
    module, step = make()
    with pytest.raises(NarrowsError, match=said):
        from_module(module, step)
    assert all(p.device.type == "cpu" for p in module.parameters())
