"""Linear layers, with a LoRA adapter or without, whose products `projection` makes.

Layers that read one tensor and are called one behind another (queries, keys and values; gate and
up) take one step together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from compact_fast.lean import dropout
from compact_fast.lean.ordinary import is_ordinary, stand_in_of
from compact_fast.lean.projection import Projection, project

_LEAST_NUMBERS = 1 << 16  # of the weight: below, a step of Python costs more than it saves


def is_lora(module: nn.Module) -> bool:
    """Whether it is peft's LoRA layer over a plain linear one."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("peft.tuners.lora.layer", "Linear") and type(
        getattr(module, "base_layer", None)
    ) is nn.Linear


def is_large_linear(module: nn.Module) -> bool:
    """Whether it is torch's own layer, on a CPU, and worth the while."""
    if type(module) is not nn.Linear:
        return False
    return module.weight.device.type == "cpu" and module.weight.numel() >= _LEAST_NUMBERS


def lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A LoRA layer's forward; as it was wherever anything is out of the ordinary."""
    if args or kwargs or not _fits_lora(self, x):
        return cast(Tensor, type(self).forward(self, x, *args, **kwargs))
    return projected((self,), x)[0]


def linear_forward(self: Any, x: Tensor) -> Tensor:
    """A linear layer's forward; as it was wherever anything is out of the ordinary."""
    return projected((self,), x)[0] if _fits_linear(self, x) else type(self).forward(self, x)


def project_together(layers: Sequence[Any], x: Tensor) -> tuple[Tensor, ...] | None:
    """What layers make of one input, in one step; None where one of them has to be called."""
    return projected(layers, x) if all(_is_ours(layer, x) for layer in layers) else None


def _is_ours(layer: Any, x: Tensor) -> bool:
    """Whether a call of the layer would end here, and nobody would notice."""
    ours = stand_in_of(layer)
    if ours is lora_forward:
        return _fits_lora(layer, x)
    return ours is linear_forward and _fits_linear(layer, x)


def projected(layers: Sequence[Any], x: Tensor) -> tuple[Tensor, ...]:
    """What layers that fit make of x [..., in]: [..., out]."""
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
    return project(x, [_projection(layer, x, dtype) for layer in layers])


def _projection(layer: Any, x: Tensor, dtype: torch.dtype) -> Projection:
    if type(layer) is nn.Linear:
        return Projection(layer.weight, layer.bias)
    name, base = layer.active_adapters[0], layer.base_layer
    dropping = layer.lora_dropout[name]
    share = 1.0 - dropping.p if dropping.training and isinstance(dropping, nn.Dropout) else 1.0
    units, scale = None, layer.scaling[name]
    if share < 1.0:
        units = dropout.draw(x, share)
        scale = scale / units.share if units.share > 0 else 0.0
    w, a, b = base.weight, layer.lora_A[name].weight, layer.lora_B[name].weight
    bias = None if base.bias is None else base.bias.to(dtype)
    return Projection(w.to(dtype), bias, a.to(dtype), b.to(dtype), units, scale)


def _fits_linear(layer: Any, x: Tensor) -> bool:
    w = layer.weight
    usual = type(w) is nn.Parameter and x.dtype == w.dtype and x.device.type == "cpu"
    return usual and not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())


def _fits_lora(layer: Any, x: Tensor) -> bool:
    """Whether it has one active adapter, a plain one, and computes in one dtype."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    name: str = layer.active_adapters[0]
    if name not in layer.lora_A or name in layer.lora_variant:
        return False
    base, a, b = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    dropping = layer.lora_dropout[name]
    if (
        b.bias is not None
        or not all(map(is_ordinary, (base, a, b, dropping)))
        or not isinstance(dropping, (nn.Dropout, nn.Identity))
        or base.weight.requires_grad
        or (base.bias is not None and base.bias.requires_grad)
    ):
        return False
    alike = x.dtype == base.weight.dtype == a.weight.dtype == b.weight.dtype
    casts = torch.is_autocast_enabled(x.device.type)
    return (alike or casts) and not torch.compiler.is_compiling()
