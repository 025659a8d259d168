"""RMS norms and gated MLPs that keep their inputs alone, with the numbers they had."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from compact_fast.lean.kept import keep, settle
from compact_fast.lean.ordinary import computes, is_ordinary, same
from compact_fast.lean.sources import Source, note_source

# ---- RMS norm --------------------------------------------------------------------------------


_NORM_NAMES = frozenset(
    (
        *("weight", "variance_epsilon", "dtype", "torch", "float32", "float"),
        *("to", "type_as", "pow", "mean", "sqrt", "rsqrt"),
    )
)


def is_norm(module: nn.Module) -> bool:
    """Whether it is weight * (x / rms(x)), by its code and tried on two rows."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not _plain(weight):
        return False
    if not isinstance(getattr(module, "variance_epsilon", None), float):
        return False
    if not computes(module, _NORM_NAMES, (2, -1, True, ("keepdim",))):
        return False
    stand_in = SimpleNamespace(weight=torch.linspace(0.5, 3, 8), variance_epsilon=0.1)
    return same(type(module), stand_in, _norm)


def norm_forward(self: Any, x: Tensor) -> Tensor:
    """The norm's forward, on a CPU."""
    usual = x.dtype == self.weight.dtype and _plain(x) and torch.is_grad_enabled()
    if not usual or torch.compiler.is_compiling():
        return cast(Tensor, type(self).forward(self, x))
    found: Tensor
    found, kept, inverse = _Norm.apply(x, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
    note_source(found, Source(_normed, (kept, inverse, self.weight.detach())))
    return found


def _norm(self: Any, x: Tensor) -> Tensor:
    return _normed(x, _inverse(x, self.variance_epsilon), self.weight)


def _plain(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.dtype == torch.float32  # in which the layer computes


def _inverse(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _normed(x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    return (x * inverse).mul_(weight)


class _Norm(torch.autograd.Function):
    """(weight * x / rms(x), x as it is kept, 1 / rms(x))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
        kept, inverse = keep(x), keep(_inverse(x, eps))
        ctx.save_for_backward(kept, inverse, weight)
        ctx.mark_non_differentiable(kept, inverse)
        return _normed(x, inverse, weight), kept, inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, inverse, weight = ctx.saved_tensors
        g_x = g_weight = None
        if ctx.needs_input_grad[1]:
            g_weight = (grad * (x * inverse)).flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            g_x = grad * weight
            along = torch.linalg.vecdot(g_x, x).unsqueeze(-1)  # [..., 1]
            g_x.mul_(inverse).addcmul_(x, along * inverse.pow(3), value=-1 / x.shape[-1])
        return g_x, g_weight, None


# ---- gated MLP -------------------------------------------------------------------------------

_SILU = ("SiLU", "SiLUActivation")


_MLP_NAMES = frozenset(("gate_proj", "up_proj", "down_proj", "act_fn"))


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether it is down(silu(gate(x)) * up(x)), by its code and tried on two tokens."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    act = getattr(module, "act_fn", None)
    if not all(isinstance(p, nn.Module) for p in parts) or type(act).__name__ not in _SILU:
        return False
    if not computes(module, _MLP_NAMES):
        return False
    stand_in = SimpleNamespace(
        gate_proj=lambda x: 2 * x, up_proj=torch.cos, down_proj=torch.tanh, act_fn=nn.SiLU()
    )
    return same(type(module), stand_in, mlp_forward)


def mlp_forward(self: Any, x: Tensor) -> Tensor:
    """The MLP's forward."""
    if not is_ordinary(self.act_fn):
        return cast(Tensor, type(self).forward(self, x))
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return cast(Tensor, self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)))
    # each where it will be kept at once, or both lie in the heap a second time
    gate = settle(self.gate_proj(x))
    up = settle(self.up_proj(x))
    inner, gate, up = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    if gate.device.type == "cpu":  # elsewhere kept as it is: untried
        note_source(inner, Source(_gated, (gate, up)))
    return cast(Tensor, self.down_proj(inner))


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    """(silu(gate) * up, gate and up as they are kept); silu is made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        inner, gate, up = _gated(gate, up), keep(gate), keep(up)
        ctx.save_for_backward(gate, up)
        ctx.mark_non_differentiable(gate, up)
        return inner, gate, up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        g_gate = g_up = None
        if ctx.needs_input_grad[1]:
            g_up = nn.functional.silu(gate).mul_(grad)
        if ctx.needs_input_grad[0]:
            g_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return g_gate, g_up
