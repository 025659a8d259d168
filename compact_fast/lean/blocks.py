"""RMS norms and gated MLPs that keep their inputs alone, with the numbers they had."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from compact_fast.lean.kept import keep, lasting_output, settle
from compact_fast.lean.linear import project_together
from compact_fast.lean.ordinary import computes, is_ordinary, same, stand_in_of
from compact_fast.lean.rows import gated, gated_gradients, norm, norm_again, norm_gradient
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
    return same(type(module).forward, stand_in, _norm)


def norm_forward(self: Any, x: Tensor) -> Tensor:
    """The norm's forward, on a CPU."""
    if not _computes_here(self, x):
        return cast(Tensor, type(self).forward(self, x))
    if not torch.is_grad_enabled():
        return norm(x, self.weight, self.variance_epsilon)[0]
    return _with_input(self, x)[0]


def normed(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(what a norm makes of x, x for its other uses): both uses' gradients are added in one pass,
    if the norm is one of ours."""
    ours = stand_in_of(layer) is norm_forward and torch.is_grad_enabled()
    if not ours or not _computes_here(layer, x):
        return layer(x), x
    return _with_input(layer, x)


def _computes_here(self: Any, x: Tensor) -> bool:
    return x.dtype == self.weight.dtype and _plain(x) and not torch.compiler.is_compiling()


def _with_input(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    found, x, kept, inverse = _Norm.apply(x, self.weight, self.variance_epsilon)  # type: ignore[no-untyped-call]
    note_source(found, Source(norm_again, (kept, inverse, self.weight.detach())))
    return found, x


def _norm(self: Any, x: Tensor) -> Tensor:
    """Its class's arithmetic, to the last bit."""
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return (x * inverse).mul_(self.weight)


def _plain(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.dtype == torch.float32  # in which the layer computes


class _Norm(torch.autograd.Function):
    """(weight * x / rms(x), x, x as it is kept, 1 / rms(x))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
        kept = keep(x)
        found, inverse = norm(kept, weight, eps)
        inverse = keep(inverse)
        ctx.save_for_backward(kept, inverse, weight)
        ctx.mark_non_differentiable(kept, inverse)
        ctx.set_materialize_grads(False)  # no zeros for them
        return found, x, kept, inverse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, more: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        if grad is None:
            return more, None, None
        x, inverse, weight = ctx.saved_tensors
        g_x = g_weight = None
        if ctx.needs_input_grad[1]:
            g_weight = (grad * (x * inverse)).flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            g_x = norm_gradient(grad, x, inverse, weight, more)
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
    return same(type(module).forward, stand_in, _mlp)


def _mlp(self: Any, x: Tensor) -> Tensor:
    """Its class's arithmetic, to the last bit."""
    return cast(Tensor, self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)))


def mlp_forward(self: Any, x: Tensor) -> Tensor:
    """The MLP's forward."""
    if not is_ordinary(self.act_fn):
        return cast(Tensor, type(self).forward(self, x))
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return cast(Tensor, self.down_proj(gated(*_gate_and_up(self, x))))
    # each where it will be kept at once, or both lie in the heap a second time
    with lasting_output():
        gate, up = _gate_and_up(self, x)
    gate, up = settle(gate), settle(up)
    inner, gate, up = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    if gate.device.type == "cpu":  # elsewhere kept as it is: untried
        note_source(inner, Source(gated, (gate, up)))
    return cast(Tensor, self.down_proj(inner))


def _gate_and_up(self: Any, x: Tensor) -> tuple[Tensor, ...]:
    found = project_together((self.gate_proj, self.up_proj), x)
    return (self.gate_proj(x), self.up_proj(x)) if found is None else found


class _SwiGLU(torch.autograd.Function):
    """(silu(gate) * up, gate and up as they are kept); silu is made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        gate, up = keep(gate), keep(up)
        inner = gated(gate, up)
        ctx.save_for_backward(gate, up)
        ctx.mark_non_differentiable(gate, up)
        ctx.set_materialize_grads(False)  # no zeros for them
        return inner, gate, up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        return gated_gradients(grad, gate, up)
