"""Layers of a student that keep less for the backward pass, with the numbers they had.

    LoRA layers   the input itself, or what it was made from, and the seed of a mask
    gated MLPs    gate and up, not silu(gate) and the product
    RMS norms     their input
    linear layers what their input was made from
    attention     queries and keys once, rotated where they will be kept
    layers        their two sums, where the norms and the next layer keep them

What is kept on a CPU lies in memory of its own (`kept`), and so does what is gone soon: in the heap
they would leave each other holes that nothing fits.

Layers are changed one instance at a time, and only those whose arithmetic is known: what differs
in any way (another base layer, several adapters, DoRA, compilation, evaluation) runs as it was.
What they cannot do: a second derivative.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from compact_fast.heap import keep_top
from compact_fast.lean.blocks import is_gated_mlp, is_norm, mlp_forward, norm_forward
from compact_fast.lean.kept import settle
from compact_fast.lean.layer import is_layer, layer_forward
from compact_fast.lean.linear import is_large_linear, is_lora, linear_forward, lora_forward
from compact_fast.lean.rotary import is_rotary, rotary_forward


def make_lean(model: nn.Module) -> int:
    """Let the model's layers keep less; returns how many now do."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and not _settles(layer):
            layer.register_forward_hook(_settle_output)
    changed = _replace_forwards(model)
    if any(p.device.type == "cpu" for module in changed for p in module.parameters()):
        keep_top()
    return len(changed)


@contextmanager
def lean_inference(model: nn.Module) -> Iterator[None]:
    """Inside, where nothing is kept, layers have the numbers they would have in training."""
    changed = _replace_forwards(model)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _replace_forwards(model: nn.Module) -> list[nn.Module]:
    changed = []
    inside_lora: set[nn.Module] = set()  # of an adapted layer, which calls none of its parts
    for module in model.modules():
        if is_lora(module):
            inside_lora.update(m for m in module.modules() if m is not module)
        if "forward" in vars(module) or module in inside_lora:  # ours, or somebody else's
            continue
        found = next((forward for fits, forward in _KINDS if fits(module)), None)
        if found is not None:
            module.forward = partial(found, module)  # a method would not be unpickled
            changed.append(module)
    return changed


_KINDS = (
    (is_lora, lora_forward),
    (is_gated_mlp, mlp_forward),
    (is_norm, norm_forward),
    (is_rotary, rotary_forward),
    (is_layer, layer_forward),
    (is_large_linear, linear_forward),
)


def _settles(layer: nn.Module) -> bool:
    return _settle_output in layer._forward_hooks.values()


def _settle_output(layer: Any, args: Any, output: Any) -> Any:
    """A layer's output, on a CPU, where it will be kept."""
    if not isinstance(output, Tensor) or not output.requires_grad:
        return None
    if torch.compiler.is_compiling():
        return None
    return settle(output, recomputed=layer.training and layer.gradient_checkpointing)
