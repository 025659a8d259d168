"""Plain linear layers, trained or frozen, that keep what their input was made from, not the input.

Layers that read one tensor share what is kept of it, and a gradient of the weights is made in
memory of its own; products go the way that is quickest on the processor (`products`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from compact_fast.lean.kept import gradient_room, keep, output, passing
from compact_fast.lean.sources import source_of
from compact_fast.products import add_transposed, linear

_LEAST_NUMBERS = 1 << 16  # of the weight: below, a step of Python costs more than it saves


def is_large_linear(module: nn.Module) -> bool:
    """Whether it is torch's own layer, on a CPU, and worth the while."""
    if type(module) is not nn.Linear:
        return False
    return module.weight.device.type == "cpu" and module.weight.numel() >= _LEAST_NUMBERS


def linear_forward(self: Any, x: Tensor) -> Tensor:
    """The layer's forward; as it was wherever anything is out of the ordinary."""
    w, bias = self.weight, self.bias
    usual = type(w) is nn.Parameter and x.dtype == w.dtype and x.device.type == "cpu"
    if not usual or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return nn.functional.linear(x, w, bias)
    if not torch.is_grad_enabled():
        return _product(x, w, bias)
    source = source_of(x)
    make, parts = (None, (x,)) if source is None else (source.make, source.parts)
    return cast(Tensor, _Linear.apply(x, w, bias, make, *parts))  # type: ignore[no-untyped-call]


def _product(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    out = linear(x, w, output)
    return out if bias is None else out.add_(bias)


class _Linear(torch.autograd.Function):
    """x w^T + bias. It keeps x, or the parts that `make` makes it of, if w is trained."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [..., in]
        w: Tensor,  # [out, in]
        bias: Tensor | None,  # [out]
        make: Callable[..., Tensor] | None,
        *parts: Tensor,
    ) -> Tensor:  # [..., out]
        out = _product(x, w, bias)
        kept: tuple[Tensor, ...] = ()
        if ctx.needs_input_grad[1]:
            kept = parts if make is not None else (keep(x),)
        ctx.save_for_backward(w, *kept)
        ctx.make, ctx.shape, ctx.given = make, x.shape, len(parts)
        # no view of the product: what a Function returns as one may not be changed in place
        return cast(Tensor, torch.ops.aten._unsafe_view(out, out.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w, *kept = ctx.saved_tensors
        g = grad.reshape(-1, w.shape[0])
        g_x = g_w = g_bias = None
        if ctx.needs_input_grad[1]:
            x = kept[0] if ctx.make is None else ctx.make(*kept)
            x = x.reshape(-1, w.shape[1])
            g_w = gradient_room(w)
            add_transposed(g_w, g, x, overwrite=True)
        if ctx.needs_input_grad[2]:
            g_bias = g.sum(0)
        if ctx.needs_input_grad[0]:
            g_x = linear(g, w.T, passing).view(ctx.shape)
        return g_x, g_w, g_bias, None, *(None,) * ctx.given
