"""Which channels of a network stand and fall together: its dependency graph, found by running it once and watching.

Every channel of every weight gets a number, a label. The network runs on one small input, and beside each activation
runs a tensor of labels: what moves numbers moves labels, what adds or multiplies activations ties the labels that meet,
what mixes channels for good (a norm over them, the answer) keeps them. Labels that are tied make up a group: no channel
of it can be taken out without the others. No layer has to be known by name; an operator that is not understood keeps
every channel that it reads.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakTensorKeyDictionary

from narrows.capture.aten import CONVOLUTIONS
from narrows.capture.events import tensors_in

_KEPT = 0  # the label of what always stays
_STAYS = torch.tensor(_KEPT)
_SAME = frozenset(("clone", "contiguous", "detach", "alias", "_to_copy", "lift_fresh"))
_MOVES = frozenset(("permute", "transpose", "t", "expand", "slice", "select", "unsqueeze", "squeeze", "split",
                    "split_with_sizes", "unbind", "flip", "roll", "repeat"))  # fmt: skip
_RESHAPES = frozenset(("view", "_unsafe_view", "reshape", "_reshape_alias"))
_REDUCES = frozenset(("mean", "sum", "amax", "amin", "var", "var_mean", "std", "linalg_vector_norm", "max", "min"))
_RESIZES = ("max_pool", "avg_pool", "adaptive", "upsample", "constant_pad_nd", "reflection_pad", "replication_pad")


@dataclass(frozen=True)
class Family:
    """The groups of channels that some layers make together: alike, and removable one by one.

    made_by   the weights that make the channels;  count  groups
    places    by tensor and dimension, the group of each place along it, or -1: it stays, or is of another family
    own       those of `places` that make the channels; zero there, they are zero. The others read them.
    """

    made_by: tuple[str, ...]
    count: int
    places: Mapping[tuple[str, int], Tensor]
    own: frozenset[tuple[str, int]]


@dataclass(frozen=True)
class _Weight:
    """A matrix of parameters as an operator is given it: where each of its own dimensions is now."""

    name: str
    dims: tuple[int, ...]


class _Watch(TorchDispatchMode):  # type: ignore[misc]
    """Labels beside the activations of one run. `axes`: the first label of each (tensor, dimension), `made` its outputs."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.tensors = tensors
        self.axes: dict[tuple[str, int], int] = {}
        self.made: set[tuple[str, int]] = set()
        self.ties: list[Tensor] = []
        self.labels: Any = WeakTensorKeyDictionary()
        self.total = _KEPT + 1
        self.names = {id(tensor): name for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            wide = [i for i, n in enumerate(tensor.shape) if n > 1]
            if len(wide) > 1:
                self.labels[tensor] = _Weight(name, tuple(range(tensor.dim())))
            elif wide and isinstance(tensor, nn.Parameter):  # a vector among the buffers is a constant, but for batch norms
                self.labels[tensor] = self.axis(name, wide[0]).view(tensor.shape)

    def axis(self, name: str, dim: int, made: bool = False) -> Tensor:
        """The labels along a dimension of a tensor of the model."""
        size = self.tensors[name].shape[dim]
        if (name, dim) not in self.axes:
            self.axes[name, dim] = self.total
            self.total += size
        if made:
            self.made.add((name, dim))
        return torch.arange(size) + self.axes[name, dim]

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Labels that meet when both are broadcast stand and fall together."""
        a, b = torch.broadcast_tensors(a, b)
        for dim in range(a.dim()):
            if a.stride(dim) == b.stride(dim) == 0:
                a, b = a.narrow(dim, 0, 1), b.narrow(dim, 0, 1)
        self.ties.append(torch.unique(a.reshape(-1) << 32 | b.reshape(-1)))  # two labels as one number

    def keep(self, *labels: Any) -> None:
        """None of these channels may be taken out: those of labels, or of each dimension of a weight."""
        for one in labels:
            if isinstance(one, Tensor):
                self.tie(one, _STAYS)
            elif isinstance(one, _Weight):
                for dim in range(len(one.dims)):
                    self.keep(self.axis(one.name, dim))

    def alike(self, labels: Tensor, dims: Iterable[int]) -> Tensor:
        """The labels at the first place along some dimensions, tied to those at all other places there."""
        for dim in dims:
            first = labels.narrow(dim, 0, 1)
            if _varies(labels, dim):
                self.tie(labels, first)
            labels = first
        return labels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        outs = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        found = [self.labels.get(t) for t in given]
        if outs and any(f is not None for f in found):
            with torch.device("cpu"):  # labels have numbers, also where the model has none
                labels = self.follow(func, args, kwargs or {}, found, outs)
            for tensor, label in zip(outs, labels, strict=True):
                if any(tensor is t and f is None for t, f in zip(given, found, strict=True)):
                    self.keep(label)  # written into memory that others may look at without knowing these channels
                elif label is not None:
                    self.labels[tensor] = label if isinstance(label, _Weight) else label.expand(tensor.shape)
        return out

    def follow(self, func: Any, args: Any, kwargs: Any, found: list[Any], outs: list[Tensor]) -> Sequence[Any]:
        """The labels of each result of an operator; None where it does not depend on which channels there are."""
        name = func.__name__.partition(".")[0].removesuffix("_")
        first, rest = found[0], [None] * (len(outs) - 1)
        plain = [f if isinstance(f, Tensor) else None for f in found]
        if name in _SAME:
            return [first]
        if isinstance(first, _Weight) and name in ("t", "transpose", "permute"):
            sizes = func(torch.empty(tuple(range(2, 2 + len(first.dims))), device="meta"), *args[1:]).shape
            return [_Weight(first.name, tuple(first.dims[n - 2] for n in sizes))]
        if name in ("mm", "addmm") and isinstance(found[-1], _Weight) and not any(isinstance(f, _Weight) for f in found[:-1]):
            return [self._product(found[-1], plain[-2], plain[:-2])]
        if name in CONVOLUTIONS and len(args) > 8 and isinstance(found[1], _Weight) and not (args[6] and args[8] > 1):
            return [self._convolution(found[1].name, plain[0], plain[2:], args[6], args[8], outs[0].dim())]
        if name == "embedding" and isinstance(first, _Weight):
            return [self.axis(first.name, 1, made=True)]
        self.keep(*(f for f in found if isinstance(f, _Weight)))  # read in another way than a layer does
        if isinstance(first, Tensor) and name in _RESHAPES:
            return [first.reshape(outs[0].shape)]
        if isinstance(first, Tensor) and name in _MOVES:
            return [t for t in tree_flatten(func(first, *args[1:], **kwargs))[0] if isinstance(t, Tensor)]
        if name in ("cat", "stack"):
            filled = [torch.full(t.shape, _KEPT) if p is None else p for t, p in zip(args[0], plain, strict=True)]
            return [func(filled, *args[1:])]
        if "batch_norm" in name and isinstance(first, Tensor):
            for vector in (self.names[id(t)] for t in args[1:] if id(t) in self.names):
                self.tie(first, self.axis(vector, 0).view(-1, *(1,) * (first.dim() - 2)))
            return [first, *rest]
        if "scaled_dot_product" in name or name == "bmm":
            return [self._attended(plain[:2] if name == "bmm" else plain[:3], outs[0].dim()), *rest]
        if isinstance(first, Tensor) and name in ("_softmax", "_safe_softmax"):
            self.alike(first, [args[1]])
            return [first]
        if isinstance(first, Tensor) and name in _REDUCES and len(found) == 1:
            reduced = self._reduced(first, args[2 if name == "linalg_vector_norm" else 1 :], outs[0].dim())
            return [reduced] * len(outs)
        if isinstance(first, Tensor) and name.lstrip("_").startswith(_RESIZES):
            sizes = zip(first.shape, outs[0].shape, strict=True)
            return [self.alike(first, [d for d, (n, m) in enumerate(sizes) if n != m]), *rest]
        if torch.Tag.pointwise in func.tags or name == "copy":
            shapes = [t.shape for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
            return [self._pointwise(plain, shapes, outs[0].shape), *rest]
        self.keep(*found)
        return [None, *rest]

    def _product(self, weight: _Weight, x: Tensor | None, bias: Sequence[Tensor | None]) -> Tensor:
        """x [M, K] times a weight that is given as [K, N], plus a bias [N] if there is one."""
        inner, outer = weight.dims
        self.tie(_STAYS if x is None else self.alike(x, [0])[0], self.axis(weight.name, inner))
        return self._made(weight.name, outer, bias)

    def _made(self, name: str, dim: int, bias: Sequence[Tensor | None]) -> Tensor:
        """The channels that a layer makes, with those of its bias, which is a constant if nothing is known of it."""
        made = self.axis(name, dim, made=True)
        for one in bias:
            self.tie(made, _STAYS if one is None else one)
        return made

    def _convolution(
        self, name: str, x: Tensor | None, bias: Sequence[Tensor | None], transposed: bool, groups: int, dims: int
    ) -> Tensor:
        """The channels of each group of a grouped convolution, read and made, go together."""
        made = self._made(name, int(transposed), bias)
        read = _STAYS if x is None else self.alike(x, [d for d in range(x.dim()) if d != 1]).flatten()
        if groups == 1:
            self.tie(read, self.axis(name, int(not transposed)))
        else:
            self.tie(read.view(-1, 1) if x is None else read.view(groups, -1), made.view(groups, -1)[:, :1])
            self.alike(made.view(groups, -1), [1])
        return made.view(-1, *(1,) * (dims - 2))

    def _attended(self, parts: Sequence[Tensor | None], dims: int) -> Tensor | None:
        """A product of activations, [..., M, K] each: all channels of one batch entry (of one head) go together."""
        heads = [self.alike(p, [p.dim() - 2, p.dim() - 1]) for p in parts if p is not None]
        if not heads:
            return None
        most = max(h.shape[-3] for h in heads)
        heads = [h.repeat_interleave(most // h.shape[-3], -3) for h in heads]
        for other in heads[1:]:
            self.tie(heads[0], other)
        return heads[0] if heads[0].dim() == dims else None

    def _reduced(self, labels: Tensor, arguments: Sequence[Any], dims: int) -> Tensor | None:
        """A sum or the like. Over channels themselves: it is of all of them, which stay, or of a whole head's."""
        given = next((a for a in arguments if isinstance(a, int | list | tuple) and not isinstance(a, bool)), None)
        over = [d % labels.dim() for d in ([given] if isinstance(given, int) else given or range(labels.dim()))]
        left = reduce(lambda t, d: t.narrow(d, 0, 1), over, labels)
        if any(_varies(labels, d) for d in over):
            if not any(_varies(left, d) for d in range(left.dim())):
                self.keep(labels)
                return None
            self.alike(labels, over)
        return left if left.dim() == dims else left.squeeze(tuple(over))

    def _pointwise(self, parts: Sequence[Tensor | None], shapes: Sequence[torch.Size], out: torch.Size) -> Tensor | None:
        """Number by number: labels that meet are tied; along a dimension that a constant fills, none can go alone."""
        found = [p.broadcast_to(out) for p in parts if p is not None]
        for part, shape in zip(parts, shapes, strict=True):
            if part is None:
                filled = [d - len(shape) for d, n in enumerate(shape) if n > 1]
                for labels in found:
                    self.alike(labels, filled)
        for other in found[1:]:
            self.tie(found[0], other)
        return found[0] if found else None


def _varies(labels: Tensor, dim: int) -> bool:
    return labels.stride(dim) != 0 and bool((labels != labels.narrow(dim, 0, 1)).any())


def _roots(ties: Sequence[Tensor], total: int) -> Tensor:
    """The least label that each label is tied to, over any number of steps."""
    parent = torch.arange(total)
    if not ties:
        return parent
    pairs = torch.unique(torch.cat(ties))
    a, b = pairs >> 32, pairs & (2**32 - 1)
    while True:
        low = torch.minimum(parent[a], parent[b])
        after = parent.scatter_reduce(0, torch.cat((a, b, parent[a], parent[b])), low.repeat(4), "amin")
        after = after[after]
        if torch.equal(after, parent):
            return parent
        parent = after


def families(model: nn.Module, inputs: Mapping[str, Any]) -> list[Family]:
    """The removable channels of a network, from one run on `inputs` (keyword arguments of its forward; sizes count alone).

    Channels of the answer, of what a norm mixes and of what an unknown operator reads are in no family.
    """
    tensors = {n: t for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_floating_point()}
    with torch.device("cpu"):
        watch = _Watch(tensors)
    with _quiet(model), torch.no_grad(), watch:
        out = model(**inputs)
    with torch.device("cpu"):
        return _gathered(watch, tensors_in(out))


def _gathered(watch: _Watch, answers: Iterable[Tensor]) -> list[Family]:
    """The families, out of what was watched."""
    tensors = watch.tensors
    for tensor in answers:
        watch.keep(watch.labels.get(tensor))
    roots = _roots(watch.ties, watch.total)
    own = {key: roots[first : first + tensors[key[0]].shape[key[1]]] for key, first in watch.axes.items()}
    layers: list[set[int]] = []  # roots that some layer makes together, and the layers of shared ones joined
    for key in sorted(watch.made):
        mine = set(own[key].tolist()) - {int(roots[_KEPT])}
        joined = [old for old in layers if old & mine]
        layers = [old for old in layers if not old & mine] + [mine.union(*joined)]
    found = []
    for together in filter(None, layers):
        numbers = torch.full((watch.total,), -1)
        numbers[torch.tensor(sorted(together))] = torch.arange(len(together))
        places = {key: numbers[mine] for key, mine in own.items() if (numbers[mine] >= 0).any()}
        vectors = {k for k in places if tensors[k[0]].numel() == len(places[k]) and isinstance(tensors[k[0]], nn.Parameter)}
        makers = {key for key in places if key in watch.made}
        found.append(Family(tuple(sorted(name for name, _ in makers)), len(together), places, frozenset(makers | vectors)))
    return sorted(found, key=lambda family: family.made_by)


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and attention that shows its parts, for as long as the context lasts."""
    modes, fast = [(m, m.training) for m in model.modules()], torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes:
            module.training = mode


def most_salient(model: nn.Module, family: Family, count: int) -> Tensor:
    """True for the groups of most saliency: the norm of what makes their channels times that of what reads them.

    The product knows no scale between the two: a channel that is doubled and read by half is as salient as before.
    """
    readers = [key for key in family.places if key not in family.own and isinstance(_tensor(model, key[0]), nn.Parameter)]
    order = (_squares(model, family, family.own) * _squares(model, family, readers)).argsort(descending=True, stable=True)
    return torch.zeros(family.count, dtype=torch.bool).index_fill(0, order[:count], True)


def _squares(model: nn.Module, family: Family, keys: Iterable[tuple[str, int]]) -> Tensor:
    """For each group, the sum of squares of its numbers in some tensors."""
    total = torch.zeros(family.count)
    for name, dim in keys:
        lines = _tensor(model, name).detach().float().square().movedim(dim, 0)
        lines = lines.reshape(len(lines), -1).sum(1)
        group = family.places[name, dim]
        total.index_add_(0, group[group >= 0], lines.cpu()[group >= 0])
    return total


def scale(model: nn.Module, family: Family, factor: Tensor) -> None:
    """Multiply what makes each group's channels by its own factor, in place."""
    with torch.no_grad():
        for name, dim in family.own:
            tensor, group = _tensor(model, name), family.places[name, dim]
            line = factor[group].masked_fill(group < 0, 1.0)
            tensor.mul_(line.view(-1, *(1,) * (tensor.dim() - 1 - dim)).to(tensor))


class Forgetting:
    """Fades the least salient groups to zero while a network trains: call `step` after each step of its optimizer.

    Nothing happens for `start` steps; then the groups that are to go are chosen, in `periods` parts one after another, and
    each part fades evenly within its period and is held at zero from then on. The rest learn what the faded ones did.
    Source: OTOv3's group-sparse training, with the schedule of its later optimizer HESSO and `most_salient` for the choice.
    """

    def __init__(
        self, model: nn.Module, families: Sequence[tuple[Family, int]], start: int, steps: int, periods: int = 5
    ) -> None:
        self.model, self.families, self.start, self.periods = model, families, start, periods
        self.length = max(1, steps // periods)
        self.taken = 0
        self.stays = [torch.ones(family.count, dtype=torch.bool) for family, _ in families]
        self.fading = [torch.zeros(family.count, dtype=torch.bool) for family, _ in families]

    def step(self) -> None:
        """Fade what is fading by one step."""
        period, place = divmod(self.taken - self.start, self.length)
        self.taken += 1
        if period < 0:
            return
        if place == 0 and period < self.periods:
            self._choose(period)
        left = (self.length - place - 1) / (self.length - place) if period < self.periods else 0.0
        for (family, _), stays, fading in zip(self.families, self.stays, self.fading, strict=True):
            scale(self.model, family, torch.where(fading, left, stays.float()))

    def _choose(self, period: int) -> None:
        """The groups that fade in a period: of those that are left the least salient."""
        for i, (family, count) in enumerate(self.families):
            gone = round((family.count - count) * (period + 1) / self.periods)
            after = most_salient(self.model, family, family.count - gone) & self.stays[i]
            self.fading[i], self.stays[i] = self.stays[i] & ~after, after


def remove(model: nn.Module, cuts: Sequence[tuple[Family, Tensor]]) -> None:
    """Cut a model down, in place, to those groups of some families that are True; every tensor keeps its identity.

    All families at once: what `families` found is true of the model as it was. Gradients go, and optimizers must be new.
    """
    stays: dict[tuple[str, int], Tensor] = {}
    for family, kept in cuts:
        for key, group in family.places.items():
            mine = kept[group] | (group < 0)
            stays[key] = stays[key] & mine if key in stays else mine
    for (name, dim), places in stays.items():
        tensor = _tensor(model, name)
        tensor.grad = None
        tensor.data = tensor.data.index_select(dim, places.nonzero().flatten().to(tensor.device))
    for path in {name.rpartition(".")[0] for name, _ in stays}:
        _resize(model.get_submodule(path))


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), leaf)
    return tensor


def _resize(module: Any) -> None:
    """Bring the sizes that a layer states up to date with its weight."""
    shape = tuple(module.weight.shape)
    if isinstance(module, nn.modules.conv._ConvNd):
        made, read = (1, 0) if module.transposed else (0, 1)
        module.groups = module.groups * shape[made] // module.out_channels if module.groups > 1 else 1
        module.out_channels, module.in_channels = shape[made], shape[read] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = shape[0]
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = shape[1]
    elif type(module).__name__ == "Conv1D":  # of transformers: a linear layer that is kept transposed
        module.nx, module.nf = shape
