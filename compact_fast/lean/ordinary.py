"""Whether a module does what its class says, so that its arithmetic may be done another way."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn


def is_ordinary(module: nn.Module) -> bool:
    """Whether it has the forward of its class, and nobody wants to know when it is called."""
    return "forward" not in vars(module) and not is_watched(module)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody wants to know when it is called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def stand_in_of(module: Any) -> Callable[..., Any] | None:
    """The function that runs instead of its class's forward, where that is all a call would do."""
    forward = module.__dict__.get("forward") if isinstance(module, nn.Module) else None
    return forward.func if isinstance(forward, partial) and not is_watched(module) else None


def unwrapped(kind: type[nn.Module]) -> FunctionType | None:
    """The function that a class's forward is, without what wraps it; None: it is something else."""
    forward = inspect.unwrap(kind.forward)
    return forward if isinstance(forward, FunctionType) else None


def computes(module: nn.Module, names: frozenset[str], numbers: tuple[object, ...] = ()) -> bool:
    """Whether its class's forward is a function of one tensor that is made of these alone.

    `names`: of attributes and functions. What clamps, drops, calls or gates anything has another.
    """
    forward = type(module).forward
    if not isinstance(forward, FunctionType):
        return False
    code = forward.__code__
    docs = (None, forward.__doc__)
    return (
        code.co_argcount == 2
        and code.co_kwonlyargcount == 0
        and not code.co_flags & 0x0C  # *args, **kwargs
        and names.issuperset(code.co_names)
        and all(c in docs or c in numbers for c in code.co_consts)
    )


def same(forward: Callable[..., Any], stand_in: Any, ours: Callable[[Any, Tensor], Tensor]) -> bool:
    """Whether a class's forward and another function agree to the last bit on two rows of eight.

    `stand_in`: an instance's attributes as they are read, small; no module is called for this.
    """
    x = torch.linspace(-1, 2, 16).view(2, 8)
    try:
        with torch.no_grad():
            return torch.equal(forward(stand_in, x), ours(stand_in, x))
    except Exception:  # of a foreign class, where anything may go wrong: then it is not known
        return False
