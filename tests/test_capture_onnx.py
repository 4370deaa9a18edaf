"""ONNX capture: parameters and matrix FLOP against closed forms, quantized weights, and files that are wrong."""

import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from narrows.capture.generalize import SHARED, generalize
from narrows.errors import NarrowsError
from narrows.graph import BF16, FP16, FP32, INT8, DType, Graph, Op, Size
from narrows.step import Step

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper  # noqa: E402

from narrows.capture.onnx import MASKED, from_onnx  # noqa: E402

FLOAT, HALF, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64
Save = Callable[..., Path]


def weight(name: str, *shape: int, kind: int = FLOAT) -> Any:
    """A stored tensor of zero bytes."""
    bits = {FLOAT: 32, HALF: 16, TensorProto.BFLOAT16: 16, INT64: 64, TensorProto.INT4: 4}.get(kind, 8)
    return helper.make_tensor(name, kind, shape, bytes(math.ceil(math.prod(shape) * bits / 8)), raw=True)


def ints(name: str, *values: int) -> Any:
    return helper.make_tensor(name, INT64, [len(values)], values)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def build(
        nodes: list[Any], inputs: dict[str, Any], stored: list[Any], *, opset: int = 21, kind: int = FLOAT, outside: bool = False
    ) -> Path:
        kinds = {k: INT64 if k.endswith(("ids", "lens")) else kind for k in inputs}
        entries = [helper.make_tensor_value_info(k, kinds[k], shape) for k, shape in inputs.items()]
        outputs = [helper.make_empty_tensor_value_info(nodes[-1].output[0])]
        graph = helper.make_graph(nodes, "g", entries, outputs, stored)
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        path = tmp_path / "model.onnx"
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        if outside:
            onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
        else:
            onnx.save(model, path)
        return path

    return build


def node(op: str, inputs: str, outputs: str, name: str = "", **attrs: Any) -> Any:
    """A node of inputs and outputs separated by spaces; `_` is one that is left out."""
    given, made = (["" if n == "_" else n for n in names.split()] for names in (inputs, outputs))
    return helper.make_node(op, given, made, name, **attrs)


def matrix_flop(graph: Graph, step: Step) -> float:
    return sum(op.spec.flop(op.sized(step)) * op.repeat for op in graph if op.spec.matmul)


def by_name(graph: Graph) -> dict[str, Op]:
    return {op.name: op for op in graph}


def mlp(layers: int = 3) -> tuple[list[Any], list[Any]]:
    nodes, stored, x = [], [], "x"
    for i in range(layers):
        nodes += [
            node("MatMul", f"{x} w{i}", f"a{i}", f"/layers.{i}/fc/MatMul"),
            node("Add", f"a{i} b{i}", f"c{i}", f"/layers.{i}/fc/Add"),
            node("Relu", f"c{i}", f"x{i}", f"/layers.{i}/act/Relu"),
        ]
        stored += [weight(f"w{i}", 64, 64), weight(f"b{i}", 64)]
        x = f"x{i}"
    return nodes, stored


# --- layers


def test_layers_fold_and_a_bias_joins_its_product(save: Save) -> None:
    nodes, stored = mlp()
    graph = from_onnx(save(nodes, {"x": ["batch", "sequence", 64]}, stored))
    linears = graph.find("linear")
    assert graph.parameters == 3 * (64 * 64 + 64) and sum(op.repeat for op in linears) == 3
    assert {op.name for op in linears} == {"layers.*.fc"} and linears[0]["rows"] == Size.of(tokens=1) and linears[0]["bias"] == 1
    assert graph.weight_bytes == 4 * graph.parameters and linears[0].act == FP32
    assert matrix_flop(graph, Step.forward(3, 5)) == 3 * 2 * 15 * 64 * 64


def test_weights_beside_the_file_are_not_opened(save: Save) -> None:
    nodes, stored = mlp()
    path = save(nodes, {"x": ["batch", "sequence", 64]}, stored, outside=True)
    whole = from_onnx(path)
    (path.parent / "weights.bin").unlink()
    assert from_onnx(path) == whole and whole.parameters == 3 * (64 * 64 + 64)


def test_gemm_turned_weights_and_what_is_shared_is_counted_once(save: Save) -> None:
    nodes = [
        node("Gather", "emb.weight ids", "e", "/emb/Gather"),
        node("Transpose", "emb.weight", "t", perm=[1, 0]),
        node("MatMul", "e t", "y", "/head/MatMul"),
        node("Gemm", "z w b", "o", "/fc/Gemm", transB=1),
    ]
    graph = from_onnx(
        save(
            nodes,
            {"ids": ["batch", "seq_len"], "z": ["batch", 32]},
            [weight("emb.weight", 100, 32), weight("w", 7, 32), weight("b", 7)],
        )
    )
    ops = by_name(graph)
    assert graph.parameters == 3200 + 7 * 33 and ops["head"].tied == "emb" and ops["head"].stored_bytes == 3200 * 4
    assert dict(ops["fc"].dims) == {"rows": Size.of(sequences=1), "inputs": 32, "outputs": 7, "bias": 1, "matrices": 1}
    assert matrix_flop(graph, Step.forward(2, 5)) == 2 * 10 * 32 * 100 + 2 * 2 * 32 * 7


def test_convolutions_and_norms(save: Save) -> None:
    nodes = [
        node("Conv", "x c.weight c.bias", "a", "/c/Conv", strides=[2, 2], pads=[1, 1, 1, 1]),
        node("BatchNormalization", "a s b m v", "n", "/n/BatchNormalization"),
        node("Relu", "n", "r", "/r/Relu"),
        node("Conv", "r d.weight", "q", "/d/Conv", group=16),
        node("ConvTranspose", "q u.weight", "u", "/u/ConvTranspose", strides=[2, 2]),
        node("GlobalAveragePool", "u", "p", "/p/Pool"),
        node("Flatten", "p", "f"),
        node("Gemm", "f w wb", "o", "/fc/Gemm"),
    ]
    stored = [
        weight("c.weight", 16, 3, 3, 3),
        weight("c.bias", 16),
        *(weight(n, 16) for n in "sbmv"),
        weight("d.weight", 16, 1, 3, 3),
        weight("u.weight", 16, 8, 2, 2),
        weight("w", 8, 10),
        weight("wb", 10),
    ]
    graph = from_onnx(save(nodes, {"x": ["N", 3, 32, 32]}, stored))
    assert graph.parameters == (432 + 16) + 2 * 16 + 144 + 512 + 90  # running mean and variance are no parameters
    flop = 2 * (256 * 432 + 14 * 14 * 144 + 14 * 14 * 512 + 80)
    assert matrix_flop(graph, Step.forward(1)) == flop and matrix_flop(graph, Step.forward(6)) == 6 * flop
    assert by_name(graph)["c"]["positions"] == Size.of(sequences=256) and by_name(graph)["n"].kind == "norm"


def test_written_out_rms_norm_is_one_norm(save: Save) -> None:
    nodes = [
        node("Pow", "x two", "p", "/norm/Pow"),
        node("ReduceMean", "p axes", "m", "/norm/ReduceMean"),
        node("Add", "m eps", "e", "/norm/Add"),
        node("Sqrt", "e", "s", "/norm/Sqrt"),
        node("Div", "x s", "d", "/norm/Div"),
        node("Mul", "d norm.weight", "y", "/norm/Mul"),
    ]
    stored = [weight("two"), ints("axes", -1), weight("eps"), weight("norm.weight", 64)]
    (op,) = from_onnx(save(nodes, {"x": ["batch", "sequence", 64]}, stored))
    assert (op.kind, op.name, op.kernels, op.parameters) == ("norm", "norm", 6, 64) and op["rows"] == Size.of(tokens=1)


# --- attention


def attention_nodes(past: bool) -> tuple[list[Any], list[Any]]:
    """8 query heads of 16, 2 key heads, as exporters write it."""
    nodes, stored = [], [ints("q.shape", 0, 0, 8, 16), ints("k.shape", 0, 0, 2, 16), ints("o.shape", 0, 0, 128), ints("two", 2)]
    for n, width, heads in (("q", 128, "q.shape"), ("k", 32, "k.shape"), ("v", 32, "k.shape")):
        stored.append(weight(f"{n}.weight", 128, width))
        nodes += [
            node("MatMul", f"x {n}.weight", f"{n}1", f"/attn/{n}/MatMul"),
            node("Reshape", f"{n}1 {heads}", f"{n}2"),
            node("Transpose", f"{n}2", f"{n}3", perm=[0, 2, 1, 3]),
        ]
    for n in "kv":
        made = f"{n}3"
        if past:
            nodes.append(node("Concat", f"past.{n} {n}3", f"{n}4", f"/attn/Concat{n}", axis=2))
            made = f"{n}4"
        nodes += [
            node("Unsqueeze", f"{made} two", f"{n}5"),
            node("Shape", f"{n}5", f"{n}s"),
            node("Mul", f"{n}s by", f"{n}r"),
            node("Expand", f"{n}5 {n}r", f"{n}6"),
            node("Reshape", f"{n}6 wide", f"{n}7"),
        ]
    stored += [
        ints("by", 1, 1, 4, 1, 1),
        helper.make_tensor("wide", INT64, [4], [0, 8, -1, 16]),
        weight("scale"),
        weight("o.weight", 128, 128),
    ]
    nodes += [
        node("Transpose", "k7", "kt", perm=[0, 1, 3, 2]),
        node("MatMul", "q3 kt", "s1", "/attn/MatMul"),
        node("Mul", "s1 scale", "s2", "/attn/Mul"),
        node("Softmax", "s2", "s3", "/attn/Softmax"),
        node("MatMul", "s3 v7", "y1", "/attn/MatMul_1"),
        node("Transpose", "y1", "y2", perm=[0, 2, 1, 3]),
        node("Reshape", "y2 o.shape", "y3"),
        node("MatMul", "y3 o.weight", "y", "/attn/o/MatMul"),
    ]
    return nodes, stored


@pytest.mark.parametrize("past", [False, True])
def test_written_out_attention_is_one_op(save: Save, past: bool) -> None:
    nodes, stored = attention_nodes(past)
    inputs: dict[str, Any] = {"x": ["batch", "sequence", 128]}
    if past:
        inputs |= {f"past.{n}": ["batch", 2, "past_sequence_length", 16] for n in "kv"}
    graph = from_onnx(save(nodes, inputs, stored))
    (attention,) = graph.find("attention")
    context = Size.of(context=1)
    assert dict(attention.dims) == {
        "heads": 8,
        "kv_heads": 2,
        "head_dim": 16,
        "value_dim": 16,
        "queries": Size.of(tokens=1),
        "pairs": Size.of({"pairs[full]": 1}),
        "context": context,
        "held": Size.of(held=1) if past else 0,
    }
    assert attention.name == "attn" and MASKED in graph.notes and graph.parameters == 128 * (128 + 64 + 128)
    if past:
        assert matrix_flop(graph, Step.decode(3, 10)) == 2 * 3 * 128 * (128 + 64 + 128) + 4 * 3 * 8 * 16 * 11


def test_scores_without_a_softmax_are_half_an_attention(save: Save) -> None:
    nodes = [
        node("Transpose", "x", "t", perm=[0, 2, 1]),
        node("MatMul", "x t", "s", "/s/MatMul"),
        node("MatMul", "s x", "y", "/y/MatMul"),
    ]
    graph = from_onnx(save(nodes, {"x": ["batch", "sequence", 64]}, []))
    assert matrix_flop(graph, Step.forward(3, 7)) == 2 * 2 * 3 * 7 * 7 * 64
    scores, values = graph.find("attention")
    assert (scores["value_dim"], values["head_dim"]) == (0, 0)
    assert [op["elements"] for op in graph.find("elementwise")] == [Size.of({"pairs[full]": 1}), 0]


def test_operators_of_onnxruntime(save: Save) -> None:
    ms = {"domain": "com.microsoft"}
    nodes = [
        node("SimplifiedLayerNormalization", "x g", "n", "/model/norm"),
        node("MatMulNBits", "n w s", "qkv", "/model/layers.0/attn/qkv/MatMul", K=128, N=192, bits=4, block_size=32, **ms),
        node(
            "GroupQueryAttention",
            "qkv _ _ pk pv lens total cos_cache sin_cache",
            "a ok ov",
            "/model/layers.0/attn/GQA",
            num_heads=8,
            kv_num_heads=2,
            **ms,
        ),
        node("SkipSimplifiedLayerNormalization", "a x g2", "h _ _ sum", "/model/layers.0/norm/Skip", **ms),
        node("FusedMatMul", "h f", "y", "/model/fc/MatMul", transB=1, **ms),
        node("QuickGelu", "y", "z", "/model/act/Gelu", **ms),
    ]
    u8 = TensorProto.UINT8
    stored = [
        weight("g", 128, kind=HALF),
        weight("g2", 128, kind=HALF),
        weight("w", 192, 4, 16, kind=u8),
        weight("s", 768, kind=HALF),
        weight("total", kind=INT64),
        weight("cos_cache", 512, 8, kind=HALF),
        weight("sin_cache", 512, 8, kind=HALF),
        weight("f", 256, 128, kind=HALF),
    ]
    cache = ["batch_size", 2, "past_sequence_length", 16]
    inputs = {"x": ["batch_size", "sequence_length", 128], "pk": cache, "pv": cache, "lens": ["batch_size"]}
    graph = from_onnx(save(nodes, inputs, stored, kind=HALF))
    ops = by_name(graph)
    packed, attention = ops["model.layers.*.attn.qkv"], ops["model.layers.*.attn"]
    assert packed.weight == DType("int4", 4, 32, 16) and packed.weight_bytes == 192 * 64 + 768 * 2 and packed.act == FP16
    assert graph.parameters == 128 + 192 * 128 + 128 + 256 * 128
    assert attention["pairs"] == Size.of(pairs=1) and attention["held"] == Size.of(held=1) and attention["kv_heads"] == 2
    assert matrix_flop(graph, Step.prefill(2, 9)) == 2 * 18 * 128 * (192 + 256) + 4 * 2 * 45 * 8 * 16
    assert "cos_cache" not in str(graph.ops)


def test_multi_head_attention_with_its_projection(save: Save) -> None:
    nodes = [node("Attention", "x w b", "y", "/attn/Attention", domain="com.microsoft", num_heads=4, unidirectional=1)]
    graph = from_onnx(save(nodes, {"x": ["batch", "sequence", 64]}, [weight("w", 64, 192), weight("b", 192)]))
    assert graph.parameters == 65 * 192 and matrix_flop(graph, Step.prefill(1, 5)) == 2 * 5 * 64 * 192 + 4 * 15 * 64


# --- quantized weights


def test_weights_that_are_dequantized_keep_their_type(save: Save) -> None:
    nodes = [
        node("DequantizeLinear", "q s z", "w", "/fc/DQ", axis=1),
        node("MatMul", "x w", "y", "/fc/MatMul"),
        node("DequantizeLinear", "q4 s4", "w4", "/up/DQ", axis=0, block_size=32),
        node("MatMul", "y w4", "o", "/up/MatMul"),
    ]
    i8 = TensorProto.INT8
    stored = [
        weight("q", 64, 32, kind=i8),
        weight("s", 32),
        weight("z", 32, kind=i8),
        weight("q4", 32, 128, kind=TensorProto.INT4),
        weight("s4", 1, 128),
    ]
    graph = from_onnx(save(nodes, {"x": ["batch", "sequence", 64]}, stored))
    ops = by_name(graph)
    assert graph.parameters == 64 * 32 + 32 * 128
    assert ops["fc"].weight == DType("int8", 8, 0, 32, 8) and ops["up"].weight == DType("int4", 4, 32, 32)
    assert ops["up"].weight_bytes == 32 * 128 / 2 + 128 * 4


def test_integer_products_compute_in_int8(save: Save) -> None:
    nodes = [
        node("DynamicQuantizeLinear", "x", "q s z", "/fc/Q"),
        node("MatMulInteger", "q w z", "i", "/fc/MatMul"),
        node("Cast", "i", "f", "/fc/Cast", to=FLOAT),
        node("Mul", "f s", "y", "/fc/Mul"),
    ]
    graph = from_onnx(save(nodes, {"x": ["batch", "sequence", 64]}, [weight("w", 64, 32, kind=TensorProto.INT8)]))
    (op,) = graph.find("linear")
    assert (op.weight, op.compute, op.act, op.parameters) == (INT8, "int8", INT8, 2048)


# --- exported models


def exported(tmp_path: Path, model: Any, inputs: dict[str, Any], dims: dict[str, Any]) -> Path:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    for parameter in model.parameters():  # equal tensors would be stored as one
        torch.nn.init.normal_(parameter)
    path = tmp_path / "exported.onnx"
    shapes = {k: dict(enumerate(v)) if isinstance(v, list) else v for k, v in dims.items()}
    torch.onnx.export(model.eval(), (), path, kwargs=inputs, dynamic_shapes=shapes, dynamo=True, verbose=False)
    return path


def test_exported_llama(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    dims = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}}
    graph = from_onnx(exported(tmp_path, model, {"input_ids": torch.randint(0, 90, (3, 7))}, dims))
    assert graph.parameters == sum(p.numel() for p in model.parameters())
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 112
    tokens, pairs = 3 * 10, 3 * 10 * 10
    assert matrix_flop(graph, Step.forward(3, 10)) == 2 * tokens * (2 * layer + 64 * 96) + 2 * 4 * 64 * pairs
    assert (
        by_name(graph)["model.layers.*.self_attn"]["kv_heads"] == 2 and by_name(graph)["model.layers.*.mlp.down_proj"].repeat == 2
    )
    assert sum(op.repeat for op in graph.find("norm")) == 5


def test_exported_bert(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.BertModel(config)
    dims = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}}
    graph = from_onnx(exported(tmp_path, model, {"input_ids": torch.randint(0, 90, (3, 7))}, dims))
    assert graph.parameters == sum(p.numel() for p in model.parameters()) and SHARED in graph.notes
    layers = 2 * (2 * 30 * (4 * 64 * 64 + 2 * 64 * 112) + 4 * 64 * 300)
    assert matrix_flop(graph, Step.forward(3, 10)) == layers + 2 * 3 * 64 * 64  # and the pooler


def test_exported_resnet(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], num_labels=10)
    model = transformers.ResNetForImageClassification(config)
    places: list[int] = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, _, out: places.append(out[0, 0].numel() * m.weight.numel()))
    images = {"pixel_values": torch.randn(2, 3, 32, 32)}
    model.eval()(**images)
    flop = 2 * (sum(places) + 320)
    graph = from_onnx(exported(tmp_path, model, images, {"pixel_values": {0: torch.export.Dim("batch")}}))
    assert matrix_flop(graph, Step.forward(4)) == 4 * flop
    batch_norms = sum(p.numel() for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters())
    # the exporter folds each scale and shift into the convolution before: half as many parameters, as its bias
    assert graph.parameters == sum(p.numel() for p in model.parameters()) - batch_norms // 2


# --- sizes


def test_sizes_can_be_given_or_named(save: Save) -> None:
    nodes = [node("Conv", "x w", "y", "/c/Conv")]
    path = save(nodes, {"x": ["s0", 3, "height", None]}, [weight("w", 8, 3, 1, 1)])
    with pytest.raises(NarrowsError, match=r"'s0' is not known.*dims=\{\"s0\": 8\}"):
        from_onnx(path)
    with pytest.raises(NarrowsError, match=r"x\.3"):
        from_onnx(path, dims={"s0": "batch", "height": 4})
    graph = from_onnx(path, dims={"s0": "batch", "height": 4, "x.3": 6})
    assert graph.ops[0]["positions"] == Size.of(sequences=24)
    with pytest.raises(NarrowsError, match=r"'heihgt'.*height"):
        from_onnx(path, dims={"s0": "batch", "height": 4, "x.3": 6, "heihgt": 3})
    with pytest.raises(NarrowsError, match="given as 0"):
        from_onnx(path, dims={"s0": 0, "height": 4, "x.3": 6})


def test_a_file_of_fixed_sizes_has_plain_numbers(save: Save) -> None:
    nodes, stored = mlp(1)
    graph = from_onnx(save(nodes, {"x": [2, 5, 64]}, stored))
    assert graph.ops[0]["rows"] == 10


# --- generalize


def test_generalize_keeps_forms_and_names_what_differs() -> None:
    def build(step: Step) -> Graph:
        b, t = int(step["sequences"]), int(step.new[0])
        window = Size.of({"pairs[window=4]": 1})
        return Graph(
            "g",
            (
                Op("a", "linear", {"rows": b * (t + 3), "inputs": 8, "outputs": 4}, saved=b * t * 8),
                Op(
                    "w",
                    "attention",
                    {
                        "heads": 2,
                        "kv_heads": 2,
                        "head_dim": 4,
                        "value_dim": 4,
                        "queries": b * t,
                        "pairs": window,
                        "context": b * t,
                    },
                ),
                Op("t", "elementwise", {"elements": t * t, "reads": 0}),
            ),
        )

    steps = [Step(2, 11), Step(3, 17), Step(5, 29)]
    graph = generalize(build, steps)
    assert graph.ops[0]["rows"] == Size.of(tokens=1, sequences=3) and graph.ops[0].saved == Size.of(tokens=8)
    assert graph.ops[1]["pairs"] == Size.of({"pairs[window=4]": 1}) and graph.ops[2]["elements"] == Size.of({"pairs[full]": 1})
    assert graph.notes == (SHARED,)
    for step in (Step.forward(7, 13), Step.train(1, 100)):
        sized, exact = graph.ops[0].sized(step), build(step).ops[0].sized(step)
        assert sized == exact

    def renamed(step: Step) -> Graph:
        return Graph("g", (Op("same", "checkpoint", {"elements": 1}), Op(f"op{int(step.new[0])}", "checkpoint", {"elements": 1})))

    with pytest.raises(NarrowsError, match="op11 has name"):
        generalize(renamed, steps)
    with pytest.raises(NarrowsError, match=r"c: elements.*linear in none"):
        generalize(lambda s: Graph("g", (Op("c", "checkpoint", {"elements": float(s.new[0]) ** 5}),)), steps)
    with pytest.raises(NarrowsError, match="extra is there in one step only"):
        generalize(lambda s: Graph("g", (Op("extra", "checkpoint", {"elements": 1}),) * (1 + int(s.new[0] == 17))), steps)
    with pytest.raises(NarrowsError, match="two"):
        generalize(build, steps[:1])


# --- bad input


@pytest.mark.parametrize(
    ("nodes", "inputs", "stored", "message"),
    [
        ([node("MatMul", "x nowhere", "y", "m")], {"x": ["batch", 4]}, [], "m: it reads 'nowhere'"),
        ([node("MatMul", "x w", "y", "m")], {"x": ["batch", 4]}, [weight("w", 5, 5)], "m: the inputs do not fit MatMul"),
        ([node("Magic", "x", "y", "m")], {"x": ["batch", 4]}, [], "Magic is not an operator of opset"),
        ([node("Magic", "x", "y", "m", domain="my.ops")], {"x": ["batch", 4]}, [], "my.ops.Magic is not described"),
        ([node("Magic", "x", "y", "m", domain="com.microsoft")], {"x": ["batch", 4]}, [], "com.microsoft.Magic is not described"),
        (
            [node("LSTM", "x w w", "y", "m", hidden_size=4)],
            {"x": ["batch", 4, 4]},
            [weight("w", 1, 16, 4)],
            "LSTM is not described",
        ),
        ([node("NonZero", "x", "y", "m")], {"x": ["batch", 4]}, [], "m: the shape of NonZero's result depends on data"),
        (
            [node("MatMulNBits", "x w s", "y", "m", domain="com.microsoft", K=64, N=64, bits=4)],
            {"x": ["batch", 64]},
            [weight("w", 2, 2, 2, kind=TensorProto.UINT8), weight("s", 8)],
            "m: K, N and bits do not fit",
        ),
        (
            [node("GroupQueryAttention", "x", "y", "m", domain="com.microsoft", num_heads=7)],
            {"x": ["batch", "sequence", 64]},
            [],
            "7 heads",
        ),
    ],
)
def test_models_that_are_refused_name_the_node(save: Save, nodes: Any, inputs: Any, stored: Any, message: str) -> None:
    with pytest.raises(NarrowsError, match=message):
        from_onnx(save(nodes, inputs, stored))


def test_control_flow_old_opsets_and_wrong_files_are_refused(save: Save, tmp_path: Path) -> None:
    branch = helper.make_graph([node("Relu", "x", "y")], "b", [], [helper.make_empty_tensor_value_info("y")])
    looped = save([node("If", "c", "y", "/decide/If", then_branch=branch, else_branch=branch)], {"c": [1]}, [])
    with pytest.raises(NarrowsError, match=r"/decide/If.*If holds a subgraph"):
        from_onnx(looped)
    with pytest.raises(NarrowsError, match="opset 12 is too old"):
        from_onnx(save([node("Relu", "x", "y")], {"x": ["batch"]}, [], opset=12))
    (tmp_path / "empty.onnx").write_bytes(b"")
    for path in (tmp_path / "empty.onnx", tmp_path / "none.onnx", tmp_path, Path("/dev/zero")):
        with pytest.raises(NarrowsError):
            from_onnx(path)
    short = weight("w", 64, 64)
    short.raw_data = b"1234"
    with pytest.raises(NarrowsError, match=r"w: 4 bytes are stored for shape \[64, 64\]"):
        from_onnx(save([node("MatMul", "x w", "y")], {"x": ["batch", 64]}, [short]))


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(NarrowsError, match=r"pip install 'narrows\[onnx\]'"):
        from_onnx("model.onnx")


def test_damaged_files_end_in_one_error(save: Save, tmp_path: Path) -> None:
    nodes, stored = attention_nodes(past=True)
    inputs = {"x": ["batch", "sequence", 128], **{f"past.{n}": ["batch", 2, "past_sequence_length", 16] for n in "kv"}}
    for tensor in stored:  # a small file, so that most flips hit its structure
        if math.prod(tensor.dims) > 100:
            tensor.ClearField("raw_data")
    whole = save(nodes, inputs, stored).read_bytes()
    dice, damaged = random.Random(0), []
    damaged += [whole[: len(whole) * i // 50] for i in range(50)]
    for _ in range(300):
        bits = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            bits[dice.randrange(len(bits))] ^= 1 << dice.randrange(8)
        damaged.append(bytes(bits))
    path, places = tmp_path / "damaged.onnx", []
    for content in damaged:
        path.write_bytes(content)
        try:
            assert isinstance(from_onnx(path), Graph)
        except NarrowsError as error:
            places.append(error.where)
    assert len(places) > 100 and all(str(path) in place for place in places)


def test_types_of_activations_follow_the_file(save: Save) -> None:
    kind = TensorProto.BFLOAT16
    graph = from_onnx(
        save([node("MatMul", "x w", "y", "/fc/MatMul")], {"x": ["batch", 64]}, [weight("w", 64, 8, kind=kind)], kind=kind)
    )
    assert graph.ops[0].act == graph.ops[0].weight == BF16


def test_einsum_is_the_product_it_spells(save: Save) -> None:
    nodes = [node("Einsum", "x w", "y", "/up/Einsum", equation="btd,edf->betf"), node("Relu", "y", "z", "/act/Relu")]
    (linear, act) = from_onnx(save(nodes, {"x": ["batch", "sequence", 64]}, [weight("w", 4, 64, 32)]))
    assert matrix_flop(Graph("g", (linear,)), Step.forward(2, 5)) == 2 * 10 * 64 * 4 * 32 and linear.parameters == 4 * 64 * 32
    assert act["elements"] == Size.of(tokens=128)


def test_the_standard_attention_operator(save: Save) -> None:
    nodes = [node("Attention", "q k v _ past_k past_v", "y present_k present_v", "/attn/Attention", is_causal=1)]
    new, old = ["batch", 2, "sequence", 16], ["batch", 2, "past_sequence_length", 16]
    inputs = {"q": ["batch", 8, "sequence", 16], "k": new, "v": new, "past_k": old, "past_v": old}
    (op,) = from_onnx(save(nodes, inputs, [], opset=23))
    assert (op.name, op["heads"], op["kv_heads"], op.cache) == ("attn", 8, 2, FP32)
    assert (op["pairs"], op["context"], op["held"]) == (Size.of(pairs=1), Size.of(context=1), Size.of(held=1))
