"""Models of transformers and diffusers: their inputs, the operators to take whole, and building them from a config."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from narrows.errors import NarrowsError, closest
from narrows.graph import Graph
from narrows.step import Step

if TYPE_CHECKING:
    from narrows.capture.tracer import Tracer

_NAME = "narrows_capture"  # of our attention and experts in transformers' tables


def is_model(module: nn.Module) -> bool:
    """Whether transformers built the module (asks without importing it)."""
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(module, library.PreTrainedModel)


@contextmanager
def semantics(module: nn.Module, tracer: "Tracer") -> Iterator[None]:
    """Let transformers' models hand attention, experts, scans and caches to the tracer as long as the context lasts."""
    models = [m for m in module.modules() if is_model(m)]
    if not models:
        yield
        return
    from transformers import cache_utils, masking_utils, modeling_utils
    from transformers.integrations import moe

    with ExitStack() as stack:
        attend, choose = _attention(tracer), _experts(tracer)
        stack.enter_context(patch.dict(modeling_utils.AttentionInterface._global_mapping, {_NAME: attend}))
        stack.enter_context(patch.dict(moe.ExpertsInterface._global_mapping, {_NAME: choose}))
        # without an entry for the implementation no mask is made: who may see whom, the attention is told itself
        stack.enter_context(patch.dict(masking_utils.AttentionMaskInterface._global_mapping, clear=True))
        for cache in (cache_utils.Cache, cache_utils.EncoderDecoderCache):
            for method in ("update", "update_conv_state", "update_recurrent_state"):
                if method in vars(cache):
                    stack.enter_context(patch.object(cache, method, tracer.unseen(vars(cache)[method])))
        for config in {id(c): c for m in module.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation")}.values():
            for field, value in (("_attn_implementation_internal", _NAME), ("_experts_implementation_internal", _NAME)):
                stack.enter_context(patch.dict(vars(config), {field: value}))
        sources = {sys.modules[type(m).__module__] for m in module.modules()}
        for source in sources:
            if is_source(source) and not hasattr(source, "ALL_ATTENTION_FUNCTIONS"):  # it asks for `sdpa` by that name
                _use_sdpa(module, source, stack)
            for function, make in _KERNELS.items():
                for found in [n for n in vars(source) if n.endswith(function) and callable(getattr(source, n))]:
                    stack.enter_context(patch.object(source, found, make(tracer, getattr(source, found))))
        yield
