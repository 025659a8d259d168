"""Products of one input with several layers' weights, in one step of autograd.

peft's LoRA layer keeps the dropped input and a float mask, 8 bytes for every number it reads, for
each of the seven projections of a block. Here projections share their input, or what it was made
from, which is made again once for all of them; of a mask a CPU keeps the seed; updates are added
in place, and so are the gradients by the input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compact_fast.lean import dropout
from compact_fast.lean.kept import gradient_room, keep, keep_gradient, output, passing
from compact_fast.lean.sources import source_of
from compact_fast.products import add_linear, add_transposed, linear


class Projection(NamedTuple):
    """x w^T + bias + scale · (units ∘ x) a^T b^T, or x w^T + bias where there is no a and b."""

    w: Tensor  # [out, in]; frozen where there is a
    bias: Tensor | None  # [out]
    a: Tensor | None = None  # [r, in]
    b: Tensor | None = None  # [out, r]
    units: dropout.Units | None = None  # the input's that dropout keeps; None: all
    scale: float = 1.0


_TENSORS = 4  # of a projection, its first fields


def project(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """What each makes of x [..., in]: [..., out]."""
    if not torch.is_grad_enabled():
        return tuple(_product(x, p) for p in projections)
    source = source_of(x)
    make, parts = (None, (x,)) if source is None else (source.make, source.parts)
    constants = tuple(p[_TENSORS:] for p in projections)
    tensors = (t for p in projections for t in p[:_TENSORS])
    return cast(
        tuple[Tensor, ...],
        _Projections.apply(x, make, constants, *tensors, *parts),  # type: ignore[no-untyped-call]
    )


def _product(x: Tensor, p: Projection) -> Tensor:
    out = linear(x, p.w, output)
    if p.bias is not None:
        out += p.bias
    if p.a is not None and p.b is not None:
        low = _dropped(x, p.units) @ p.a.T
        out.view(-1, p.b.shape[0]).addmm_(low, p.b.T, alpha=p.scale)
    # no view of the product: what a Function returns as one may not be changed in place
    return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out


def _dropped(x: Tensor, units: dropout.Units | None, *, in_place: bool = False) -> Tensor:
    """[..., in] -> [N, in]"""
    x = x if units is None else dropout.apply(x, units, in_place=in_place)
    return x.reshape(-1, x.shape[-1])


class _Projections(torch.autograd.Function):
    """`project`. It keeps x, or the parts that `make` makes it of, if a gradient needs it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        make: Callable[..., Tensor] | None,
        constants: tuple[tuple[Any, ...], ...],
        *tensors: Tensor | None,  # of each projection, then the parts
    ) -> tuple[Tensor, ...]:
        projections, parts = _grouped(constants, tensors)
        needed, _ = _grouped(constants, ctx.needs_input_grad[3:])
        ctx.readers = [i for i, need in enumerate(needed) if need.w or need.a or need.b]
        kept: Sequence[Tensor | None] = ()
        if ctx.readers:
            kept = (keep(x),) if make is None else parts
        ctx.save_for_backward(*tensors[: len(tensors) - len(parts)], *kept)
        ctx.make, ctx.constants, ctx.shape, ctx.given = make, constants, x.shape, len(parts)
        ctx.set_materialize_grads(False)
        return tuple(_product(x, p) for p in projections)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        projections, kept = _grouped(ctx.constants, ctx.saved_tensors)
        needed, _ = _grouped(ctx.constants, ctx.needs_input_grad[3:])
        x: Any = None
        if ctx.readers:
            x = kept[0] if ctx.make is None else ctx.make(*kept)
        g_x: Tensor | None = None
        found: list[Tensor | None] = []
        for i, (p, need, grad) in enumerate(zip(projections, needed, grads, strict=True)):
            if grad is None:  # nobody used what it made
                found += [None] * _TENSORS
                continue
            g = grad.reshape(-1, p.w.shape[0])
            low = None if p.b is None else (g @ p.b) * p.scale  # [N, r]
            # what was made for this alone may lose its units to the last one that reads it
            in_place = ctx.make is not None and ctx.readers[-1:] == [i]
            found += _weight_gradients(p, need, g, low, x, in_place=in_place)
            if ctx.needs_input_grad[0]:
                g_x = _add_input_gradient(g_x, p, g, low)
        g_x = None if g_x is None else g_x.view(ctx.shape)
        return g_x, None, None, *found, *(None,) * ctx.given


def _grouped(
    constants: Sequence[tuple[Any, ...]], flat: Sequence[Any]
) -> tuple[list[Projection], Any]:
    """What belongs to each projection, and the rest."""
    n = _TENSORS
    each = [Projection(*flat[n * i : n * (i + 1)], *own) for i, own in enumerate(constants)]
    return each, flat[n * len(constants) :]


def _weight_gradients(
    p: Projection, need: Projection, g: Tensor, low: Tensor | None, x: Tensor, *, in_place: bool
) -> list[Tensor | None]:
    """By w, bias, a and b; `low`: the gradient by the dropped input times a."""
    g_w = g_bias = g_a = g_b = None
    if need.w:
        g_w = gradient_room(p.w)
        add_transposed(g_w, g, x.reshape(-1, p.w.shape[1]), overwrite=True)
    if need.bias:
        g_bias = g.sum(0)
    if low is not None and p.a is not None and (need.a or need.b):
        dropped = _dropped(x, p.units, in_place=in_place)
        # x a^T again: r numbers a token for every layer are worth more than a thin product
        g_b = keep_gradient((((dropped @ p.a.T) * p.scale).T @ g).T)
        g_a = torch.mm(low.T, dropped, out=gradient_room(p.a))
    return [g_w, g_bias, g_a, g_b]


def _add_input_gradient(
    g_x: Tensor | None, p: Projection, g: Tensor, low: Tensor | None
) -> Tensor:  # [N, in]
    """The gradient by x that others gave, and this one's."""
    if g_x is None:
        g_x = linear(g, p.w.T, passing)
    else:
        add_linear(g_x, g, p.w.T)
    if low is None or p.a is None:
        return g_x
    if p.units is None:
        return g_x.addmm_(low, p.a)
    update = torch.mm(low, p.a, out=passing((len(low), p.a.shape[1]), low))
    return dropout.add(g_x, update, p.units)
