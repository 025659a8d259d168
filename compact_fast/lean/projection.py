"""Linear layers, with a LoRA adapter or without, that keep little for the backward pass.

peft's LoRA layer keeps the dropped input and a float mask, 8 bytes for every number it reads, for
each of the seven projections of a block. Here projections share their input, or what it was made
from, and a mask takes one bit on a CPU; the update is added in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from compact_fast.lean import dropout
from compact_fast.lean.kept import keep, keep_gradient, output, passing
from compact_fast.lean.ordinary import is_ordinary
from compact_fast.lean.sources import source_of
from compact_fast.products import linear


def is_lora(module: nn.Module) -> bool:
    """Whether it is peft's LoRA layer over a plain linear one."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("peft.tuners.lora.layer", "Linear") and type(
        getattr(module, "base_layer", None)
    ) is nn.Linear


def lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A LoRA layer's forward; as it was wherever anything is out of the ordinary."""
    name = _plain_adapter(self) if not (args or kwargs) else None
    base = self.base_layer
    if name is None or torch.compiler.is_compiling():
        return cast(Tensor, type(self).forward(self, x, *args, **kwargs))
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    w, bias = base.weight, base.bias
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, a, b, w = (t.to(dtype) for t in (x, a, b, w))
        bias = None if bias is None else bias.to(dtype)
    if not x.dtype == a.dtype == b.dtype == w.dtype:
        return cast(Tensor, type(self).forward(self, x))
    dropping = self.lora_dropout[name]
    share = 1.0 - dropping.p if dropping.training and isinstance(dropping, nn.Dropout) else 1.0
    units, share = dropout.draw(x, share) if share < 1.0 else (None, 1.0)
    scale = self.scaling[name] / share if share > 0 else 0.0
    return _project(x, w, bias, a, b, units, scale)


def _plain_adapter(layer: Any) -> str | None:
    """The one active adapter of a plain LoRA layer, or None."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name: str = layer.active_adapters[0]
    if (
        name not in layer.lora_A
        or name in layer.lora_variant
        or layer.lora_B[name].bias is not None
        or not all(map(is_ordinary, (layer.base_layer, layer.lora_A[name], layer.lora_B[name])))
        or _is_trained(layer.base_layer)
    ):
        return None
    dropping = layer.lora_dropout[name]
    known = isinstance(dropping, (nn.Dropout, nn.Identity)) and is_ordinary(dropping)
    return name if known else None


def _is_trained(base: nn.Linear) -> bool:
    return base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)


def _project(
    x: Tensor,  # [..., in]
    w: Tensor,  # [out, in], frozen
    bias: Tensor | None,  # [out], frozen
    a: Tensor,  # [r, in]
    b: Tensor,  # [out, r]
    units: Tensor | None,  # the input's that dropout keeps; None: all
    scale: float,
) -> Tensor:  # [..., out]
    """x w^T + bias + scale · (units ∘ x) a^T b^T."""
    if not torch.is_grad_enabled():
        return _products(x, w, bias, a, b, units, scale)
    source = source_of(x)
    make, parts = (None, (x,)) if source is None else (source.make, source.parts)
    return cast(
        Tensor,
        _Projection.apply(x, w, bias, a, b, units, scale, make, *parts),  # type: ignore[no-untyped-call]
    )


def _products(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    units: Tensor | None,
    scale: float,
) -> Tensor:
    """What `_project` returns."""
    out = linear(x, w, output)
    if bias is not None:
        out += bias
    low = _dropped(x, units) @ a.T
    out.view(-1, b.shape[0]).addmm_(low, b.T, alpha=scale)
    # no view of the product: what a Function returns as one may not be changed in place
    return cast(Tensor, torch.ops.aten._unsafe_view(out, out.shape))


def _dropped(x: Tensor, units: Tensor | None, *, in_place: bool = False) -> Tensor:
    """[..., in] -> [N, in]"""
    x = x if units is None else dropout.apply(x, units, in_place=in_place)
    return x.reshape(-1, x.shape[-1])


class _Projection(torch.autograd.Function):
    """`_project`. It keeps x, or the parts that `make` makes it of."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        units: Tensor | None,
        scale: float,
        make: Callable[..., Tensor] | None,
        *parts: Tensor,
    ) -> Tensor:
        out = _products(x, w, bias, a, b, units, scale)
        kept = parts if make is not None else (keep(x),)
        units = None if units is None else keep(units)
        ctx.save_for_backward(w, a, b, units, *kept)
        ctx.scale, ctx.make, ctx.shape = scale, make, x.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w, a, b, units, *kept = ctx.saved_tensors
        g = grad.reshape(-1, b.shape[0])
        g_low = (g @ b) * ctx.scale  # [N, r]
        g_x = g_a = g_b = None
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            again = ctx.make is not None  # made for this alone
            x = _dropped(ctx.make(*kept) if again else kept[0], units, in_place=again)
            # x a^T again: r numbers a token for every layer are worth more than a thin product
            g_b = keep_gradient((((x @ a.T) * ctx.scale).T @ g).T)
            g_a = keep_gradient(g_low.T @ x)
        if ctx.needs_input_grad[0]:
            g_x = linear(g, w.T, passing).view(ctx.shape)
            update = passing(tuple(ctx.shape), g)
            torch.mm(g_low, a, out=update.view(-1, a.shape[1]))
            g_x += update if units is None else dropout.apply(update, units, in_place=True)
        others = (None,) * (5 + len(kept) - 1)
        return g_x, None, None, g_a, g_b, *others
