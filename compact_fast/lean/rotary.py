"""Rotary positions in one pass each way, put where attention keeps its queries and keys.

transformers' attention layers call a function of their module for it, in ten operations. A layer
whose module has the usual function, tried on two tokens, gets a forward of the same code that
finds another function under its name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from compact_fast.lean.kept import lasting, passing
from compact_fast.lean.linear import project_together
from compact_fast.lean.rows import can_rotate, rotate

_NAME = "apply_rotary_pos_emb"
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")  # of the layer's input


def is_rotary(module: nn.Module) -> bool:
    """Whether it is an attention layer on a CPU that rotates its queries and keys as usual."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or forward.__closure__ is not None:
        return False
    if _NAME not in forward.__code__.co_names:
        return False
    if not all(p.device.type == "cpu" for p in module.parameters()):
        return False
    return _is_usual(forward.__globals__.get(_NAME))


def rotary_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The layer's forward, with its rotation in one pass, and one step for its projections."""
    forward = type(self).forward
    if torch.compiler.is_compiling():
        return forward(self, *args, **kwargs)
    x = args[0] if args else kwargs.get("hidden_states")
    if isinstance(x, Tensor) and set(_PROJECTIONS) <= set(forward.__code__.co_names):
        found = project_together([getattr(self, name) for name in _PROJECTIONS], x)
        if found is not None:
            self = _Projected(self, x, dict(zip(_PROJECTIONS, found, strict=True)))
    return _with_ours(forward)(self, *args, **kwargs)


class _Projected:
    """An attention layer of which it is known what some projections make of one tensor."""

    def __init__(self, layer: nn.Module, x: Tensor, found: dict[str, Tensor]) -> None:
        def at_hand(name: str) -> Callable[[Tensor], Tensor]:
            whole = getattr(layer, name)
            return lambda given: found.pop(name) if given is x and name in found else whole(given)

        vars(self).update(_layer=layer, **{name: at_hand(name) for name in found})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._layer, name, value)


@lru_cache(maxsize=64)
def _with_ours(forward: FunctionType) -> Callable[..., Any]:
    theirs = forward.__globals__[_NAME]

    def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not (can_rotate(q, cos, sin) and can_rotate(k, cos, sin)):
            return theirs(q, k, cos, sin, *args, **kwargs)
        return tuple(cast(Tensor, _Rotation.apply(x, cos, sin)) for x in (q, k))  # type: ignore[no-untyped-call]

    made = FunctionType(
        forward.__code__, {**forward.__globals__, _NAME: ours}, forward.__name__,
        forward.__defaults__,
    )  # fmt: skip
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


@lru_cache(maxsize=64)
def _is_usual(function: Any) -> bool:
    """Whether it turns halves of heads by an angle, to the last bit, on two tokens."""
    x = torch.linspace(-1, 2, 32).view(1, 2, 2, 8)
    angles = torch.linspace(0, 3, 16).view(1, 2, 8)
    cos, sin = angles.cos(), angles.sin()
    try:
        with torch.no_grad():
            found = function(x, x[:, :1], cos, sin)
            want = x * cos[:, None] + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin[:, None]
            return all(map(torch.equal, found, (want, want[:, :1])))
    except Exception:  # of a foreign function, where anything may go wrong: then it is not known
        return False


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        _, heads, N, d = x.shape
        room = lasting if ctx.needs_input_grad[0] else passing
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin, room((1, N, heads, d), x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        if not can_rotate(grad, cos, sin):
            grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
        _, heads, N, d = grad.shape
        return rotate(grad, cos, sin, passing((1, N, heads, d), grad), back=True), None, None
