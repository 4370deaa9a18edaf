"""An embedding whose rows stay packed: those of a packed output layer, where weights are tied, or its own."""

import torch
from torch import Tensor, nn

from narrows.graph import DType, Op
from narrows.modules.packed_linear import PackedLinear


class PackedEmbedding(nn.Module):  # type: ignore[misc]
    """Rows [..., D] of a PackedLinear of V outputs and D inputs, by token ids [...].

    `path` is the output layer's name in the model where weights are tied: that layer alone has them in its state dict then,
    and this module only refers to it. Rows come in the model's dtype, which an empty buffer follows.
    """

    like: Tensor

    def __init__(self, layer: PackedLinear, path: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.path = path
        if path:
            self._tied = (layer,)  # in a tuple, so that it is no submodule of two parents
        else:
            self.rows = layer
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=layer.packed.device), persistent=False)

    @property
    def layer(self) -> PackedLinear:
        """What keeps the rows."""
        return self._tied[0] if self.path else self.rows

    def graph_op(self, name: str, rows: int, act: DType) -> Op:
        """What capture writes down for this layer."""
        layer = self.layer
        dims = {"rows": rows, "outputs": layer.in_features, "vocabulary": layer.out_features}
        return Op(name, "embedding", dims, act=act, weight=layer.form, tied=self.path)

    def forward(self, ids: Tensor) -> Tensor:
        if ids.is_meta:
            return self.like.new_empty(*ids.shape, self.layer.in_features)
        return self.layer.rows(ids, self.like.dtype)
