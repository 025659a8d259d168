"""Query and key maps of a student's last layer, for the attention consensus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compact_fast.students.parts import causal_model, inference, is_unit, logit_scale


@dataclass(frozen=True)
class AttentionProjections:
    """Query and key maps of the last decoder layer: no rotation, no norm, adapters included.

    They take what a body makes, and undo the logits' scale in it.
    """

    queries: Callable[[Tensor], Tensor]  # [S, D] -> [S, num_heads * head_dim]
    keys: Callable[[Tensor], Tensor]  # [S, D] -> [S, num_kv_heads * head_dim]
    num_heads: int
    num_kv_heads: int
    head_dim: int


def attention_projections(model: Any) -> AttentionProjections:
    """Query and key maps of the last decoder layer (Llama, Qwen, Gemma, Mistral, Phi and alike).

    Raises ValueError, naming the layer's class, where there are none.
    """
    causal = causal_model(model)
    config, scale = causal.config.get_text_config(), logit_scale(causal)
    layers = getattr(causal.base_model, "layers", None)
    last = layers[-1] if layers is not None else None
    attention = getattr(last, "self_attn", None)
    heads, kv_heads, dim = _head_sizes(config, type(causal).__name__)
    q, k = getattr(attention, "q_proj", None), getattr(attention, "k_proj", None)
    fused = getattr(attention, "qkv_proj", None)
    if q is not None and k is not None:
        widths = (q.out_features, k.out_features)
        queries, keys = _without_dropout(q, last, scale), _without_dropout(k, last, scale)
    elif fused is not None:
        widths = (heads * dim, kv_heads * dim)
        both = _without_dropout(fused, last, scale)
        bounds = (widths[0], sum(widths))

        def queries(x: Tensor) -> Tensor:
            return both(x)[..., : bounds[0]]

        def keys(x: Tensor) -> Tensor:
            return both(x)[..., bounds[0] : bounds[1]]
    else:
        where = type(attention).__name__ if attention is not None else type(causal).__name__
        raise ValueError(
            f"{where}: no q_proj and k_proj in the last layer; attention consensus is not "
            'supported for this student (use consensus="graph")'
        )
    if widths != (heads * dim, kv_heads * dim):
        raise ValueError(
            f"{type(attention).__name__}: q_proj and k_proj make {widths} features, expected "
            f"{(heads * dim, kv_heads * dim)}; attention consensus is not supported for it"
        )
    return AttentionProjections(queries, keys, heads, kv_heads, dim)


def _head_sizes(config: Any, model: str) -> tuple[int, int, int]:
    """(query heads, key heads, features of a head); ValueError where layers differ in them."""
    try:
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads
    except RuntimeError as error:  # the host's, of a class that older versions lack
        raise ValueError(
            f"{model}: its layers differ in the number or size of attention heads; attention "
            'consensus is not supported for this student (use consensus="graph")'
        ) from error


def _without_dropout(module: nn.Module, layer: Any, scale: float) -> Callable[[Tensor], Tensor]:
    """A part of `layer`, called by itself with x / scale; a sharded layer is gathered for it."""

    def run(x: Tensor) -> Tensor:
        if is_unit(layer):
            layer.unshard()
        with inference(module):
            out: Tensor = module(x if scale == 1 else x / scale)
        if is_unit(layer):
            layer.reshard()
        return out

    return run
