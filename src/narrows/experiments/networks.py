"""Published convolutional networks as graphs of their convolutions and linear layers, written from the tables of their papers.

Pooling, normalisation and activations are left out; sizes are for images of 224 x 224 (Xception 299).
"""

from collections.abc import Callable
from typing import Self

from narrows.graph import FP32, Dim, Graph, Op, Size


class _Net:
    """A network under construction: `channels` and `side` of the feature map so far, and its ops."""

    def __init__(self, side: int = 224, channels: int = 3) -> None:
        self.side, self.channels, self.ops = side, channels, list[Op]()

    def conv(self, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, inputs: int = 0, keep: bool = False) -> Self:
        """Append a padded convolution; `inputs` channels (the map's by default); with `keep` it is a branch of the map."""
        inputs, out = inputs or self.channels, -(-self.side // stride)
        dims: dict[str, Dim] = {
            "positions": Size.of(sequences=out**2), "in_positions": Size.of(sequences=self.side**2),
            "in_channels": inputs, "out_channels": outputs, "kernel": kernel**2, "groups": groups,
        }  # fmt: skip
        self.ops.append(Op(f"conv{len(self.ops)}", "conv", dims, act=FP32, weight=FP32))
        if not keep:
            self.channels, self.side = outputs, out
        return self

    def pool(self, side: int = 0) -> Self:
        """Halve the map, or bring it to a `side` (1: its mean)."""
        self.side = side or -(-self.side // 2)
        return self

    def linear(self, *widths: int) -> Self:
        """Fully connected layers on the whole map."""
        inputs = self.channels * self.side**2
        for width in widths:
            dims: dict[str, Dim] = {"rows": Size.of(sequences=1), "inputs": inputs, "outputs": width}
            self.ops.append(Op(f"fc{len(self.ops)}", "linear", dims, act=FP32, weight=FP32))
            inputs = width
        return self


def _alexnet() -> _Net:
    net = _Net(220).conv(96, 11, 4).pool(27).conv(256, 5, groups=2).pool(13).conv(384, 3)  # 227 without padding gives 55
    return net.conv(384, 3, groups=2).conv(256, 3, groups=2).pool(6).linear(4096, 4096, 1000)


def _vgg(*repeats: int) -> _Net:
    net = _Net()
    for width, repeat in zip((64, 128, 256, 512, 512), repeats, strict=True):
        for _ in range(repeat):
            net.conv(width, 3)
        net.pool()
    return net.linear(4096, 4096, 1000)


def _nin() -> _Net:
    net = _Net()
    for width, kernel, stride in ((96, 11, 4), (256, 5, 1), (384, 3, 1), (1024, 3, 1)):
        net.conv(width, kernel, stride).conv(width).conv(1000 if width == 1024 else width).pool()
    return net


def _squeezenet() -> _Net:
    net = _Net().conv(96, 7, 2).pool()
    for i, (squeeze, expand) in enumerate(((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))):
        if i in (3, 7):
            net.pool()
        net.conv(squeeze).conv(expand, 3, keep=True).conv(expand)
        net.channels = 2 * expand
    return net.conv(1000)


def _resnet_basic(*repeats: int) -> _Net:
    net = _Net().conv(64, 7, 2).pool()
    for stage, repeat in enumerate(repeats):
        width = 64 << stage
        for block in range(repeat):
            stride = 2 if stage and not block else 1
            if stride == 2:
                net.conv(width, 1, 2, keep=True)
            net.conv(width, 3, stride).conv(width, 3)
    return net.pool(1).linear(1000)


def _resnet(*repeats: int, width: int = 64, groups: int = 1) -> _Net:
    """Bottleneck ResNets; `width` 128 gives the wide ones, with `groups` 32 the ResNeXt of 4 channels a group."""
    net = _Net().conv(64, 7, 2).pool()
    for stage, repeat in enumerate(repeats):
        inner, outer = width << stage, 256 << stage
        for block in range(repeat):
            stride = 2 if stage and not block else 1
            if not block:
                net.conv(outer, 1, stride, keep=True)
            net.conv(inner).conv(inner, 3, stride, groups).conv(outer)
    return net.pool(1).linear(1000)


def _densenet(*repeats: int, growth: int = 32) -> _Net:
    net = _Net().conv(64, 7, 2).pool()
    for stage, repeat in enumerate(repeats):
        for _ in range(repeat):
            before = net.channels
            net.conv(4 * growth).conv(growth, 3)
            net.channels = before + growth
        if stage < 3:
            net.conv(net.channels // 2).pool()
    return net.pool(1).linear(1000)


def _googlenet() -> _Net:
    net = _Net().conv(64, 7, 2).pool().conv(64).conv(192, 3).pool()
    table = ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64), (192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64),
             (128, 128, 256, 24, 64, 64), (112, 144, 288, 32, 64, 64), (256, 160, 320, 32, 128, 128),
             (256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128))  # fmt: skip
    for i, (one, three_in, three, five_in, five, pooled) in enumerate(table):
        if i in (2, 7):
            net.pool()
        net.conv(one, keep=True).conv(three_in, keep=True).conv(three, 3, inputs=three_in, keep=True)
        net.conv(five_in, keep=True).conv(five, 5, inputs=five_in, keep=True).conv(pooled)
        net.channels = one + three + five + pooled
    return net.pool(1).linear(1000)


def _separable(net: _Net, outputs: int, stride: int = 1, kernel: int = 3) -> _Net:
    return net.conv(net.channels, kernel, stride, groups=net.channels).conv(outputs)


def _mobilenet(scale: float = 1.0) -> _Net:
    net = _Net().conv(int(32 * scale), 3, 2)
    for outputs, stride in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1)):
        _separable(net, int(outputs * scale), stride)
    return net.pool(1).linear(1000)


def _inverted(net: _Net, *table: tuple[int, int, int, int, int]) -> _Net:
    """Inverted residuals: rows of (expansion, outputs, repeats, stride, kernel)."""
    for expansion, outputs, repeats, stride, kernel in table:
        for i in range(repeats):
            if expansion > 1:
                net.conv(expansion * net.channels)
            _separable(net, outputs, 1 if i else stride, kernel)
    return net.conv(1280).pool(1).linear(1000)


def _mobilenet_v2() -> _Net:
    return _inverted(_Net().conv(32, 3, 2), (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3),
                     (6, 96, 3, 1, 3), (6, 160, 3, 2, 3), (6, 320, 1, 1, 3))  # fmt: skip


def _efficientnet_b0() -> _Net:
    return _inverted(_Net().conv(32, 3, 2), (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3),
                     (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3))  # fmt: skip


def _mnasnet() -> _Net:
    return _inverted(_Net().conv(32, 3, 2), (1, 16, 1, 1, 3), (3, 24, 3, 2, 3), (3, 40, 3, 2, 5), (6, 80, 3, 2, 5),
                     (6, 96, 2, 1, 3), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3))  # fmt: skip


def _shufflenet(groups: int = 3, width: int = 240) -> _Net:
    net = _Net().conv(24, 3, 2).pool()
    for stage, repeat in enumerate((4, 8, 4)):
        outputs = width << stage
        for block in range(repeat):
            joined = 0 if block else net.channels  # the first block of a stage concatenates its shortcut
            first = 1 if joined == 24 else groups
            net.conv(outputs // 4, groups=first)
            net.conv(net.channels, 3, 1 if block else 2, groups=net.channels).conv(outputs - joined, groups=groups)
            net.channels = outputs
    return net.pool(1).linear(1000)


def _xception() -> _Net:
    net = _Net(299).conv(32, 3, 2).conv(64, 3)
    for outputs in (128, 256, 728):
        net.conv(outputs, 1, 2, keep=True)
        _separable(_separable(net, outputs), outputs).pool()
    for _ in range(8 * 3):
        _separable(net, 728)
    net.conv(1024, 1, 2, keep=True)
    _separable(_separable(net, 728), 1024).pool()
    return _separable(_separable(net, 1536), 2048).pool(1).linear(1000)


def _convnext() -> _Net:
    net = _Net().conv(96, 4, 4)
    for stage, repeat in enumerate((3, 3, 9, 3)):
        if stage:
            net.conv(96 << stage, 2, 2)
        for _ in range(repeat):
            width = net.channels
            net.conv(width, 7, groups=width).conv(4 * width).conv(width)
    return net.pool(1).linear(1000)


NETWORKS: dict[str, Callable[[], _Net]] = {
    "AlexNet": _alexnet,
    "VGG-11": lambda: _vgg(1, 1, 2, 2, 2),
    "VGG-16": lambda: _vgg(2, 2, 3, 3, 3),
    "NiN": _nin,
    "GoogLeNet": _googlenet,
    "SqueezeNet": _squeezenet,
    "ResNet-18": lambda: _resnet_basic(2, 2, 2, 2),
    "ResNet-50": lambda: _resnet(3, 4, 6, 3),
    "ResNet-101": lambda: _resnet(3, 4, 23, 3),
    "WideResNet-50-2": lambda: _resnet(3, 4, 6, 3, width=128),
    "ResNeXt-50": lambda: _resnet(3, 4, 6, 3, width=128, groups=32),
    "DenseNet-121": lambda: _densenet(6, 12, 24, 16),
    "DenseNet-169": lambda: _densenet(6, 12, 32, 32),
    "MobileNet": _mobilenet,
    "MobileNet-0.5": lambda: _mobilenet(0.5),
    "MobileNetV2": _mobilenet_v2,
    "MnasNet": _mnasnet,
    "ShuffleNet": _shufflenet,
    "Xception": _xception,
    "EfficientNet-B0": _efficientnet_b0,
    "ConvNeXt-T": _convnext,
}


def network(name: str) -> Graph:
    """The convolutions and linear layers of a network by its name in NETWORKS; one image is one sequence of the step."""
    return Graph(name, tuple(NETWORKS[name]().ops))
