"""The dependency graph of channels: what is bound, what stays, and that groups of zeros go without a trace."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from narrows.modules.channels import Family, Forgetting, families, most_salient, remove, scale


class Net(nn.Module):
    """Layers, and what is done with them."""

    def __init__(self, run: "Callable[[Net, Tensor], Tensor]", **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(inputs: int, outputs: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups)


def residual(m: Net, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.out((x + m.b(F.relu(m.norm(x)))).mean((2, 3)))


def joined(m: Net, x: Tensor) -> Tensor:
    return m.out(torch.cat((m.a(x), F.gelu(m.b(x))), 1).flatten(1))


def gated(m: Net, x: Tensor) -> Tensor:
    up, gate = m.a(x).chunk(2, 1)
    return m.out(F.max_pool2d(up * gate.sigmoid(), 2).flatten(1))


def doubted(m: Net, x: Tensor) -> Tensor:
    return m.out(m.b(m.a(x).cumsum(1)).relu_().mean((2, 3)))


def squeezed(m: Net, x: Tensor) -> Tensor:
    x = m.a(x)
    return m.out((x * m.b(x.mean((2, 3), keepdim=True)).sigmoid()).flatten(1))


CASES: dict[str, tuple[Callable[[], Net], list[tuple[int, int]]]] = {  # (groups, layers that make them) of each family
    "residual": (lambda: Net(residual, a=conv(3, 6), norm=nn.BatchNorm2d(6), b=conv(6, 6), out=nn.Linear(6, 2)), [(6, 2)]),
    "concatenated": (lambda: Net(joined, a=conv(3, 5), b=conv(3, 4), out=nn.Linear(9 * 16, 2)), [(5, 1), (4, 1)]),
    "gated": (lambda: Net(gated, a=conv(3, 10), out=nn.Linear(5 * 4, 2)), [(5, 1)]),
    "not understood": (lambda: Net(doubted, a=conv(3, 6), b=conv(6, 8), out=nn.Linear(8, 2)), [(8, 1)]),
    "squeeze and excitation": (lambda: Net(squeezed, a=conv(3, 6), b=nn.Conv2d(6, 6, 1), out=nn.Linear(96, 2)), [(6, 2)]),
    "grouped": (lambda: Net(lambda m, x: m.out(m.b(m.a(x)).flatten(1)), a=conv(3, 8), b=conv(8, 12, groups=4),
                            out=nn.Linear(192, 2)), [(4, 2)]),
    "depthwise": (lambda: Net(lambda m, x: m.out(m.b(m.a(x)).flatten(1)), a=conv(3, 8), b=conv(8, 16, groups=8),
                              out=nn.Linear(256, 2)), [(8, 2)]),
    "transposed": (lambda: Net(lambda m, x: m.out(m.b(m.a(x)).flatten(1)), a=conv(3, 8), b=nn.ConvTranspose2d(8, 6, 2, 2),
                               out=nn.Linear(384, 2)), [(8, 1), (6, 1)]),
    "layer norm": (lambda: Net(lambda m, x: m.out(F.relu(m.a(m.norm(m.b(x.flatten(1)))))), b=nn.Linear(48, 8),
                               norm=nn.LayerNorm(8), a=nn.Linear(8, 5), out=nn.Linear(5, 2)), [(5, 1)]),
    "used twice": (lambda: Net(lambda m, x: m.out(m.a(F.relu(m.a(x.mean((2, 3)))))), a=nn.Linear(3, 3), out=nn.Linear(3, 2)), []),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_groups_of_zeros_go_without_a_trace(name: str) -> None:
    make, expected = CASES[name]
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(2, 3, 4, 4)
    found = families(model, {"x": x})
    assert sorted((f.count, len(f.made_by)) for f in found) == sorted(expected)
    for family in found:
        scale(model, family, (torch.arange(family.count) % 2).float())
    with torch.no_grad():
        before, size = model(x), sum(p.numel() for p in model.parameters())
        cuts = [(family, most_salient(model, family, family.count // 2)) for family in found]
        assert all(torch.equal(kept, torch.arange(family.count) % 2 == 1) for family, kept in cuts)
        remove(model, cuts)
        torch.testing.assert_close(model(x), before)
    assert not found or sum(p.numel() for p in model.parameters()) < size
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.shape[:2] == (layer.out_channels, layer.in_channels // layer.groups)


def attention(kv: int) -> Net:
    """Query heads that share key-value heads, 4 wide, with positions turned in by cosines."""

    def run(m: Net, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], -1, 4).transpose(1, 2) for layer in (m.q, m.k, m.v))
        turn = torch.arange(x.shape[1] * 4.0).view(-1, 4).cos()
        k, v = (t.repeat_interleave(4 // kv, 1) for t in (k * turn, v))
        return m.o(F.scaled_dot_product_attention(q * turn, k, v).transpose(1, 2).flatten(2))

    return Net(run, q=nn.Linear(10, 16), k=nn.Linear(10, 4 * kv), v=nn.Linear(10, 4 * kv), o=nn.Linear(16, 10))


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_query_heads_go_with_their_key_value_head(kv: int) -> None:
    torch.manual_seed(0)
    model, x = attention(kv).eval(), torch.randn(3, 5, 10)
    found = families(model, {"x": x})
    (family,) = found
    assert (family.count, family.made_by) == (kv, ("k.weight", "q.weight", "v.weight"))
    if kv > 1:
        scale(model, family, (torch.arange(kv) > 0).float())
        before = model(x)
        remove(model, [(family, torch.arange(kv) > 0)])
        torch.testing.assert_close(model(x), before)
        assert model.q.weight.shape == (16 - 16 // kv, 10)


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["plain", "norm", "depthwise", "residual"])), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_any_chain_of_convolutions_shrinks_alike(blocks: list[tuple[int, str]], seed: int) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    width = 2
    for times, kind in blocks:
        if kind == "residual":
            layers += [Net(lambda m, x: x + m.inner(x), inner=nn.Sequential(conv(width, width), nn.Tanh(), conv(width, width)))]
            continue
        layers += [conv(width, 2 * times + 1), nn.ReLU()]
        width = 2 * times + 1
        layers += {"norm": [nn.BatchNorm2d(width)], "depthwise": [conv(width, width, width)]}.get(kind, [])
    model, x = nn.Sequential(*layers, nn.Flatten(), nn.Linear(9 * width, 3)).eval(), torch.randn(1, 2, 3, 3)
    found = families(model, {"input": x})
    kept = {f.made_by: torch.rand(f.count) < 0.5 for f in found}
    for family in found:
        scale(model, family, kept[family.made_by].float())
    with torch.no_grad():
        before = model(x)
        remove(model, [(family, kept[family.made_by] | (torch.arange(family.count) == 0)) for family in found])
        torch.testing.assert_close(model(x), before)


def test_a_weight_that_is_also_read_in_another_way_stays() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.out(F.relu(m.a(x))) + (m.out.weight * 2).sum()

    assert families(Net(run, a=nn.Linear(3, 6), out=nn.Linear(6, 2)), {"x": torch.randn(1, 3)}) == []


def test_a_bias_that_is_a_constant_keeps_its_channels() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        return m.out(F.linear(x, m.a.weight, torch.ones(6)).relu())

    assert families(Net(run, a=nn.Linear(3, 6, bias=False), out=nn.Linear(6, 2)), {"x": torch.randn(1, 3)}) == []


def test_what_is_written_into_other_memory_stays() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        whole = torch.zeros(len(x), 4, 4, 4)
        whole[:, :] = m.a(x)
        return m.out(whole.flatten(1))

    assert families(Net(run, a=conv(3, 4), out=nn.Linear(64, 2)), {"x": torch.randn(1, 3, 4, 4)}) == []


def test_forgetting_fades_exactly_what_is_to_go() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    (family,) = families(model, {"input": torch.randn(1, 4)})
    forgetting = Forgetting(model, [(family, 3)], start=2, steps=10)
    zeros: list[int] = []
    for _ in range(14):
        forgetting.step()
        zeros.append(int((model[0].weight == 0).all(1).sum()))
    assert zeros[:3] == [0, 0, 0]
    assert zeros == sorted(zeros)
    assert zeros[-1] == 5
    model[0].weight.data += 1.0  # an optimizer with momentum moves them again
    forgetting.step()
    assert int((model[0].weight == 0).all(1).sum()) == 5


def test_a_family_is_found_on_the_device_without_numbers() -> None:
    with torch.device("meta"):
        model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
        found: list[Family] = families(model, {"input": torch.empty(1, 3, 4, 4)})
        assert [(f.count, f.made_by) for f in found] == [(4, ("0.weight",))]
        remove(model, [(found[0], torch.arange(4, device="cpu") < 2)])
        assert model[3].weight.shape == (2, 32)
        (heads,) = families(attention(2), {"x": torch.empty(3, 5, 10)})  # attention is other operators there
    assert (heads.count, len(heads.made_by)) == (2, 3)
