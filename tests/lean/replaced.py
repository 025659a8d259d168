"""A model whose layers of a kind have our forward, to hold against the plain one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn


def of_kind(model: nn.Module, ending: str) -> list[nn.Module]:
    """The model's layers by the end of their class's name."""
    return [m for m in model.modules() if type(m).__name__.endswith(ending)]


def with_forward(
    model: nn.Module, ending: str, fits: Callable[[nn.Module], bool], forward: Callable[..., Any]
) -> nn.Module:
    """A copy in which `forward` runs those layers, all of which must fit."""
    model = copy.deepcopy(model)
    for layer in of_kind(model, ending):
        assert fits(layer)
        layer.forward = partial(forward, layer)
    return model


def trained(model: nn.Module, **inputs: Any) -> list[torch.Tensor]:
    """Logits and every gradient of one backward pass."""
    model.zero_grad()
    logits = model.train()(**inputs).logits
    logits.pow(2).mean().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
