"""Decoder layers whose sums lie where they will be kept.

x + attention(norm(x)), then x + mlp(norm(x)): both sums are kept, by the norm behind them or by
the next layer. In the heap they would lie among tensors that are gone a moment later.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from compact_fast.lean.blocks import normed
from compact_fast.lean.kept import added, begin_layer
from compact_fast.lean.ordinary import same, unwrapped

_NAMES = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


def is_layer(module: nn.Module) -> bool:
    """Whether it is two residual steps on a CPU in float32, by its code and tried on two tokens."""
    if not isinstance(module, GradientCheckpointingLayer):
        return False
    theirs = unwrapped(type(module))
    if theirs is None or set(theirs.__code__.co_names) != _NAMES:
        return False
    if not all(p.device.type == "cpu" for p in module.parameters()):
        return False
    stand_in = SimpleNamespace(
        input_layernorm=torch.cos,
        self_attn=lambda hidden_states, **_: (torch.tanh(hidden_states), None),
        post_attention_layernorm=torch.sin,
        mlp=torch.exp,
        gradient_checkpointing=False,
        training=False,
    )
    return same(theirs, stand_in, _layer)


def layer_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The layer's forward."""
    cached = kwargs.get("use_cache") or kwargs.get("past_key_values") is not None
    if args or cached or torch.compiler.is_compiling():
        return type(self).forward(self, hidden_states, *args, **kwargs)
    if self.gradient_checkpointing and self.training:
        return self._gradient_checkpointing_func(partial(_layer, self, **kwargs), hidden_states)
    return _layer(self, hidden_states, **kwargs)


def _layer(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    begin_layer()
    given, x = normed(self.input_layernorm, hidden_states)
    found, _ = self.self_attn(hidden_states=given, **kwargs)
    given, x = normed(self.post_attention_layernorm, added(x, found))
    found = self.mlp(given)
    return added(x, found, recomputed=self.gradient_checkpointing and self.training)
