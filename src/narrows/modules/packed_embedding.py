"""An embedding that reads the rows of a packed output layer: tied weights stay one tensor when they are packed."""

import torch
from torch import Tensor, nn

from narrows.errors import NarrowsError
from narrows.graph import DType, Op
from narrows.modules.packed_linear import PackedLinear


class PackedEmbedding(nn.Module):  # type: ignore[misc]
    """Rows [..., D] of an int8 PackedLinear of V outputs and D inputs, by token ids [...].

    The layer keeps the weights, and alone has them in its state dict: this module only refers to it. `path` is the
    layer's name in the model, for capture. Rows come in the model's dtype, which an empty buffer follows.
    """

    like: Tensor

    def __init__(self, layer: PackedLinear, path: str, dtype: torch.dtype) -> None:
        super().__init__()
        if layer.form.bits != 8:
            raise NarrowsError(f"rows of {layer.form.name} are not stored one by one.", where=path, remedy="Pack it as int8.")
        self._layer = (layer,)  # in a tuple, so that it is no submodule of two parents
        self.path = path
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=layer.packed.device), persistent=False)

    def graph_op(self, name: str, rows: int, act: DType) -> Op:
        """What capture writes down for this layer."""
        layer = self._layer[0]
        dims = {"rows": rows, "outputs": layer.in_features, "vocabulary": layer.out_features}
        return Op(name, "embedding", dims, act=act, weight=layer.form, tied=self.path)

    def forward(self, ids: Tensor) -> Tensor:
        layer = self._layer[0]
        if ids.is_meta:
            return self.like.new_empty(*ids.shape, layer.in_features)
        scale = layer.scales[ids].view(torch.bfloat16).to(self.like.dtype)
        return layer.packed[ids].to(self.like.dtype) * scale[..., None]
