"""What each ATen operator is: free, a product, a norm, or arithmetic done number by number. Names only, no torch.

Operators that are in no table here are number by number, with one FLOP per element of the result (of the input,
where the result is smaller: a reduction).
"""

# Names without their overload; a trailing underscore (in place) is taken off first.

# No kernel: they allocate, or only describe a tensor. Views are found by their shared storage.
FREE = frozenset((
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift", "lift_fresh",
    "lift_fresh_copy", "resize", "set", "_unsafe_view", "_reshape_alias", "scalar_tensor", "sym_size", "sym_stride",
    "sym_numel", "_local_scalar_dense", "_assert_async", "_assert_scalar", "is_same_size", "expand_copy",
))  # fmt: skip

# Bytes move, nothing is computed.
MOVES = frozenset((
    "copy", "clone", "_to_copy", "contiguous", "cat", "stack", "index", "index_select", "gather", "index_put", "index_copy",
    "scatter", "slice_scatter", "select_scatter", "as_strided_scatter", "zeros", "zeros_like", "new_zeros", "ones",
    "ones_like", "new_ones", "full", "full_like", "new_full", "arange", "fill", "zero", "constant_pad_nd", "repeat", "flip",
    "roll", "upsample_nearest2d", "upsample_nearest1d", "unfold", "im2col", "masked_fill", "masked_scatter", "where", "tril",
    "triu", "eye", "pixel_shuffle", "pixel_unshuffle", "reflection_pad2d", "replication_pad2d", "reflection_pad1d",
    "channel_shuffle", "select_copy", "slice_copy",
))  # fmt: skip

OVERWRITES = frozenset(("copy", "fill", "zero"))  # in place, and what was there is not read

# FLOP per element where it is not one: as many simple operators as the formula has.
FLOP = {"softmax": 5.0, "log_softmax": 5.0, "gelu": 8.0, "silu": 4.0, "sigmoid": 4.0, "tanh": 4.0, "var_mean": 3.0, "var": 3.0,
        "std": 3.0, "native_dropout": 2.0, "addcmul": 2.0, "lerp": 3.0, "softplus": 3.0, "mish": 8.0, "hardswish": 4.0,
        "elu": 3.0, "leaky_relu": 2.0, "upsample_bilinear2d": 8.0, "upsample_bicubic2d": 32.0,
        "_upsample_bilinear2d_aa": 8.0}  # fmt: skip

# A mean of squares or a variance: the mark of a norm that is written out.
REDUCES_TO_NORM = frozenset(("mean", "var", "var_mean", "std", "linalg_vector_norm"))

# Products: where the left side, the right side and the added bias stand among the arguments.
PRODUCTS: dict[str, tuple[int, int, int | None]] = {
    "mm": (0, 1, None), "bmm": (0, 1, None), "mv": (0, 1, None), "dot": (0, 1, None), "_int_mm": (0, 1, None),
    "_scaled_mm": (0, 1, None), "addmm": (1, 2, 0), "baddbmm": (1, 2, 0), "addmv": (1, 2, 0), "_addmm_activation": (1, 2, 0),
}  # fmt: skip

CONVOLUTIONS = frozenset(("convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution"))

# Norms: where their scale and their shift stand among the arguments (the same place: there is no shift).
NORMS: dict[str, tuple[int, int]] = {
    "native_layer_norm": (2, 3), "native_group_norm": (1, 2), "native_batch_norm": (1, 2), "_fused_rms_norm": (2, 2),
    "_native_batch_norm_legit": (1, 2), "_native_batch_norm_legit_no_training": (1, 2), "cudnn_batch_norm": (1, 2),
    "_native_batch_norm_legit_functional": (1, 2), "_batch_norm_with_update": (1, 2), "rms_norm": (2, 2),
    "_batch_norm_no_update": (1, 2),
}  # fmt: skip
NORM_FLOP = 4.0  # per element: square or subtract, sum, scale, weight

EMBEDDINGS = frozenset(("embedding", "_embedding_bag", "embedding_bag"))


def base_name(schema_name: str) -> str:
    """'aten::_softmax' -> 'softmax', 'aten::add_' -> 'add'; names that these tables list keep their leading underscore."""
    name = schema_name.split("::")[-1]
    if name.endswith("_") and not name.startswith("__"):
        name = name[:-1]
    return name[1:] if name in ("_softmax", "_log_softmax", "_safe_softmax") else name


def flop_of(name: str, largest_input: float, written: float) -> float:
    """FLOP of an operator number by number: one for each element of its result, or of what it reduces."""
    return 0.0 if name in MOVES else FLOP.get(name, 1.0) * max(largest_input, written)
