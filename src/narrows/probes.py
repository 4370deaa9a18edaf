"""What a calibration times: ops of the cost model, each beside the torch calls that are that op on this machine."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from narrows.graph import BF16, FP32, DType, Graph, Op
from narrows.step import Step

if TYPE_CHECKING:
    import torch

Calls = Callable[[], Iterator[Callable[[], object]]]

# (inputs, outputs) between a small encoder's and a 7B decoder's, most of them no power of two
MATRICES = ((480, 480), (512, 1408), (1408, 512), (2048, 2048))
PACKED = ((512, 1408), (2048, 2048))  # a group of 64 divides the inputs, a block of 64 the outputs
ROWS = (1, 8, 32, 128, 512)
# by one row alone: a matrix that is next to nothing, one with as many inputs that is not, and one of short rows
STREAMED = ((512, 128), (512, 24_576), (192, 768))
STREAM_BYTES = 200_000_000  # so many bytes are read in turn: far beyond any cache that one core may fill
# (images, channels in, channels out, side of the image, side of the kernel, stride): what a ResNet consists of
CONVOLUTIONS = ((1, 3, 64, 192, 7, 2), (1, 64, 64, 48, 3, 1), (1, 256, 256, 16, 3, 1), (4, 128, 128, 24, 3, 1),
                (1, 64, 256, 48, 1, 1), (1, 512, 128, 24, 1, 1), (4, 1024, 256, 12, 1, 1), (1, 384, 768, 32, 1, 2),
                (2, 160, 24, 48, 1, 1), (2, 24, 160, 48, 1, 1))  # fmt: skip
DEPTHWISE = ((1, 96, 96, 96, 3, 2), (1, 240, 240, 24, 5, 1), (2, 144, 144, 48, 3, 1), (2, 640, 640, 12, 5, 1),
             (1, 40, 40, 104, 3, 1), (3, 96, 96, 104, 3, 2), (1, 480, 480, 16, 3, 1))  # fmt: skip
TINY = (1, 16, 16, 4, 3, 1)  # next to nothing
ELEMENTS = (16_384, 262_144, 3_000_000)  # of a pointwise op: kept in the nearest cache, in a farther one, in none
KEYS = (48, 192, 768)
COPIES = 20  # of a layer and its input, taken in turn: as in a network, the nearest cache holds neither


ONE = Step.forward()


@dataclass(frozen=True)
class Probe:
    """Ops at a step, and the calls that are them: each call does all of `ops` once, on data that the others do not touch."""

    name: str
    ops: tuple[Op, ...]
    calls: Calls
    step: Step = ONE
    network: str = ""  # what it is in any format

    @property
    def op(self) -> Op:
        return self.ops[0]


def _op(kind: str, act: DType, **given: Any) -> Op:
    weight, kernels = given.pop("weight", None), given.pop("kernels", 1)
    return Op(kind, kind, given, act=act, weight=weight, kernels=kernels)


def dtype_of(act: DType) -> "torch.dtype":
    """torch's name of a dtype that activations are kept in."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[act.name]


def products(act: DType, device: str, bits: int = 0) -> Iterator[Probe]:
    """Linear layers of every shape and row count; `bits` 8 or 4: of packed weights."""
    from narrows.modules.packed_linear import int4, int8

    weight = {0: act, 8: int8(), 4: int4(64)}[bits]
    shapes = [*product(PACKED if bits else MATRICES, ROWS), *product(STREAMED, (1,))]
    for (inputs, outputs), rows in shapes:
        op = _op("linear", act, rows=rows, inputs=inputs, outputs=outputs, weight=weight)
        count = max(2, int(STREAM_BYTES / op.stored_bytes))
        yield Probe(f"products in {weight.name} and {act.name}", (op,), _layers(op, bits, count, device))


def _layers(op: Op, bits: int, count: int, device: str) -> Calls:
    def calls() -> Iterator[Callable[[], object]]:
        import torch

        from narrows.modules.packed_linear import PackedLinear, int4, int8, quantized

        rows, inputs, outputs = (int(op[dim]) for dim in ("rows", "inputs", "outputs"))  # type: ignore[arg-type]
        x = torch.ones(rows, inputs, dtype=dtype_of(op.act), device=device)
        if bits:
            layer = PackedLinear.of(quantized(torch.ones(outputs, inputs), int4(64) if bits == 4 else int8()))
        else:
            layer = torch.nn.Linear(inputs, outputs, bias=False, dtype=dtype_of(op.act), device=device)
        for _ in range(count):
            yield _bound(copy.deepcopy(layer), x)

    return calls


def _bound(layer: Callable[..., object], *inputs: object) -> Callable[[], object]:
    return lambda: layer(*inputs)


def convolutions(act: DType, device: str, depthwise: bool) -> Iterator[Probe]:
    """A convolution that is next to nothing, then those of the shapes of image networks, over one image and over a few."""
    for images, channels, outputs, side, kernel, stride in (TINY, *(DEPTHWISE if depthwise else CONVOLUTIONS)):
        groups = channels if depthwise else 1
        op = _op("conv", act, positions=images * (side // stride) ** 2, in_positions=images * side**2, in_channels=channels,
                 out_channels=outputs, kernel=kernel**2, groups=groups, weight=act)  # fmt: skip
        yield Probe(f"convolutions in {act.name}", (op,), _convolution(op, images, side, kernel, stride, device))


def _convolution(op: Op, images: int, side: int, kernel: int, stride: int, device: str) -> Calls:
    def calls() -> Iterator[Callable[[], object]]:
        import torch

        channels, outputs, groups = (int(op[dim]) for dim in ("in_channels", "out_channels", "groups"))  # type: ignore[arg-type]
        layer = torch.nn.Conv2d(channels, outputs, kernel, stride, kernel // 2, groups=groups, bias=False,
                                dtype=dtype_of(op.act), device=device)  # fmt: skip
        for _ in range(COPIES):
            yield _bound(copy.deepcopy(layer), torch.ones(images, channels, side, side, dtype=dtype_of(op.act), device=device))

    return calls


def pointwise(act: DType, device: str) -> Iterator[Probe]:
    """Chains of cheap pointwise ops, at sizes from the nearest cache to main memory."""
    return (_chain(elements, act, device) for elements in ELEMENTS)


def smallest(device: str) -> Probe:
    """Kernels that have next to nothing to do."""
    return _chain(16, FP32, device)


def _chain(elements: int, act: DType, device: str) -> Probe:
    def chain(x: "torch.Tensor") -> object:
        y = x.clamp_min(0)
        y = y + x
        return y * 2

    op = _op("elementwise", act, elements=elements, reads=2 * elements, kernels=3)
    return Probe(f"pointwise ops in {act.name}", (op,), _on(chain, (elements,), act, device))


def transcendentals(act: DType, device: str) -> Iterator[Probe]:
    """What activation functions cost in arithmetic, in the nearest cache."""
    from torch.nn import functional

    from narrows.capture.aten import FLOP

    for name in ("gelu", "silu"):
        op = _op("elementwise", act, elements=2**17, reads=2**17, flop_per_element=FLOP[name])
        yield Probe(f"activation functions in {act.name}", (op,), _on(getattr(functional, name), (2**17,), act, device))


def norms(act: DType, device: str) -> Iterator[Probe]:
    """Layer norms of rows and batch norms of images, at the sizes of the pointwise ops."""
    import torch

    for elements in ELEMENTS:
        width = 512
        layer = torch.nn.LayerNorm(width, dtype=dtype_of(act), device=device)
        op = _op("norm", act, rows=elements // width, width=width, weights=2)
        yield Probe(f"norms in {act.name}", (op,), _on(layer, (elements // width, width), act, device))
        side, channels = 32, max(1, elements // 1024)
        images = torch.nn.BatchNorm2d(channels, dtype=dtype_of(act), device=device).eval()
        op = _op("norm", act, rows=side**2, width=channels, weights=4, flop_per_element=2)
        yield Probe(f"norms in {act.name}", (op,), _on(images, (1, channels, side, side), act, device))


def _on(function: Callable[..., object], shape: tuple[int, ...], act: DType, device: str) -> Calls:
    def calls() -> Iterator[Callable[[], object]]:
        import torch

        for _ in range(COPIES):
            yield _bound(function, torch.ones(shape, dtype=dtype_of(act), device=device))

    return calls


def attention(act: DType, device: str) -> Iterator[Probe]:
    """Fused attention of a prompt to itself, from short to long, with heads of 32 and 64."""
    from torch.nn import functional

    for keys in KEYS:
        for head in (32, 64):
            op = _op("attention", act, heads=8, kv_heads=8, head_dim=head, value_dim=head, queries=keys, pairs=keys**2,
                     context=keys)  # fmt: skip
            shape = (1, 8, keys, head)
            yield Probe(f"attention in {act.name}", (op,), _on(_to_itself(functional), shape, act, device))


def _to_itself(functional: Any) -> Callable[["torch.Tensor"], object]:
    return lambda x: functional.scaled_dot_product_attention(x, x, x)


def copies(device: str) -> Probe:
    """A copy that no cache holds."""

    def calls() -> Iterator[Callable[[], object]]:
        import torch

        source = torch.ones(STREAM_BYTES // 4, device=device)
        yield _bound(torch.empty_like(source).copy_, source)

    count = STREAM_BYTES // 4
    return Probe("copies", (_op("elementwise", FP32, elements=count, reads=count, flop_per_element=0),), calls)


def networks(device: str) -> Iterator[Probe]:
    """Whole steps of small networks of random weights, on which a calibration checks itself: none is a model of `validate`."""
    import torch

    for act in (FP32, BF16):
        model, steps = _decoder(448, 8, device, act)
        for step in (Step.prefill(1, 48), Step.prefill(1, 160), Step.decode(1, 48)):
            yield _network("a decoder", act.name, model, step, steps)
        if act == BF16 and device == "cpu":
            _pack(model)
            for step in (Step.prefill(1, 48), Step.decode(1, 48)):
                yield _network("a decoder", "int4", model, step, steps)
        encoder = _encoder(device, act)
        for batch, tokens in ((1, 96), (6, 128)):
            ids = torch.ones(batch, tokens, dtype=torch.long, device=device)
            yield _network("an encoder", act.name, encoder, Step.forward(batch, tokens), _forward(encoder, input_ids=ids))
        for name, images in (
            ("an image network", _image_network(device, act)),
            ("a depthwise network", _depthwise_network(device, act)),
        ):
            for batch in (1, 3):
                pixels = torch.ones(batch, 3, 224, 224, dtype=dtype_of(act), device=device)
                forward = _forward(images, pixel_values=pixels)
                yield _network(name, act.name, images, Step.forward(batch), forward)


Steps = Callable[[Step], Callable[[], object]]


def _network(name: str, form: str, model: "torch.nn.Module", step: Step, steps: Steps) -> Probe:
    from narrows.capture.torch import from_module

    def calls() -> Iterator[Callable[[], object]]:
        yield steps(step)

    return Probe(f"{name} in {form}", replace(from_module(model, step), eager=True).ops, calls, step, name)


def _decoder(width: int, layers: int, device: str, act: DType) -> "tuple[torch.nn.Module, Steps]":
    from transformers import LlamaConfig, LlamaForCausalLM

    from narrows.verify import generation_steps

    config = LlamaConfig(hidden_size=width, intermediate_size=3 * width, num_attention_heads=width // 64,
                         num_key_value_heads=width // 64, num_hidden_layers=layers, vocab_size=4096)  # fmt: skip
    model = LlamaForCausalLM(config).eval().to(device, dtype_of(act))

    def steps(step: Step) -> Callable[[], object]:
        tokens = int(step.new[0]) if step.phase == "prefill" else int(step.past[0])
        return generation_steps(model, tokens, tokens)[step.phase]

    return model, steps


def _encoder(device: str, act: DType) -> "torch.nn.Module":
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=320, intermediate_size=1280, num_attention_heads=5, num_hidden_layers=5, vocab_size=4096)
    model: torch.nn.Module = BertModel(config).eval().to(device, dtype_of(act))
    return model


def _image_network(device: str, act: DType) -> "torch.nn.Module":
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=48, hidden_sizes=[96, 192, 384, 768], depths=[2, 3, 3, 2], layer_type="bottleneck")
    model: torch.nn.Module = ResNetForImageClassification(config).eval().to(device, dtype_of(act))
    return model


def _depthwise_network(device: str, act: DType) -> "torch.nn.Module":
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    model: torch.nn.Module = MobileNetV2ForImageClassification(MobileNetV2Config()).eval().to(device, dtype_of(act))
    return model


def _pack(model: "torch.nn.Module") -> None:
    """Give the layers of a decoder 4-bit weights, in place."""
    import torch

    from narrows.modules.packed_linear import PackedLinear, int4, quantized

    for parent in list(model.model.layers.modules()):  # type: ignore[attr-defined]
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(parent, name, PackedLinear.of(quantized(child.weight, int4(64))))


def _forward(model: "torch.nn.Module", **inputs: "torch.Tensor") -> Steps:
    import torch

    def run() -> object:
        with torch.inference_mode():
            return model(**inputs)

    return lambda _: run


def graph_of(probe: Probe) -> Graph:
    """The ops of a probe as plain PyTorch runs them."""
    return Graph(probe.name, probe.ops, eager=True)
