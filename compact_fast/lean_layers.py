"""Adapters and gated MLPs that keep less for the backward pass, with the numbers they had.

peft's LoRA layer keeps the dropped input and a float mask, 8 bytes for every number it reads, for
each of the seven projections of a block. Here the input itself is kept, which projections share,
and a mask of one byte; the update is added in place. A gated MLP keeps gate and up, not also
silu(gate). On a CPU dropout's random bits, which torch draws one by one, come 64 at a time from a
generator seeded by torch's: a seed still fixes every number, and recomputation repeats them.

Layers are changed one instance at a time, and only those whose arithmetic is known: what differs
in any way (another base layer, several adapters, DoRA, compilation, evaluation) runs as it was.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_BITS = 1 << 16  # a unit is kept where 16 random bits lie below its share of them


def make_lean(model: nn.Module) -> int:
    """Let the model's LoRA layers and gated MLPs keep less; returns how many now do."""
    changed = 0
    for module in model.modules():
        if "forward" in vars(module):  # ours, or somebody else's
            continue
        if _is_lora(module):
            module.forward = MethodType(_lora_forward, module)
        elif _is_gated_mlp(module):
            module.forward = MethodType(_mlp_forward, module)
        else:
            continue
        changed += 1
    return changed


# ---- LoRA ------------------------------------------------------------------------------------


def _is_lora(module: nn.Module) -> bool:
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("peft.tuners.lora.layer", "Linear") and type(
        getattr(module, "base_layer", None)
    ) is nn.Linear


def _lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    name = _plain_adapter(self) if not (args or kwargs) else None
    if name is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return cast(Tensor, type(self).forward(self, x, *args, **kwargs))
    result: Tensor = self.base_layer(x)
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    if torch.is_autocast_enabled(x.device.type):
        x, a, b = (t.to(result.dtype) for t in (x, a, b))
    if not x.dtype == a.dtype == b.dtype == result.dtype:
        return cast(Tensor, type(self).forward(self, x))
    dropout = self.lora_dropout[name]
    share = 1.0 - dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 1.0
    keep, share = keep_mask(x, share) if share < 1.0 else (None, 1.0)
    scale = self.scaling[name] / share if share > 0 else 0.0
    return cast(Tensor, _AddUpdate.apply(result, x, a, b, keep, scale))  # type: ignore[no-untyped-call]


def _plain_adapter(layer: Any) -> str | None:
    """The one active adapter of a plain LoRA layer, or None."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name: str = layer.active_adapters[0]
    if (
        name not in layer.lora_A
        or name in layer.lora_variant
        or layer.lora_B[name].bias is not None
    ):
        return None
    if not isinstance(layer.lora_dropout[name], (nn.Dropout, nn.Identity)):
        return None
    return name


def keep_mask(x: Tensor, share: float) -> tuple[Tensor, float]:
    """(mask like x, uint8: 1 with probability `share`; the probability it really has)."""
    if x.device.type != "cpu":
        return (torch.rand(x.shape, device=x.device) < share).view(torch.uint8), share
    most = round(share * _BITS)
    seed = int(torch.randint(1 << 62, ()))
    words = np.random.SFC64(seed).random_raw(-(-x.numel() // 4))
    bits = words.view(np.uint16)[: x.numel()]
    kept = np.ones(x.shape, np.bool_) if most == _BITS else (bits < most).reshape(x.shape)
    return torch.from_numpy(kept).view(torch.uint8), most / _BITS


class _AddUpdate(torch.autograd.Function):
    """result + scale · (keep ∘ x) Aᵀ Bᵀ, into `result` itself."""

    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,  # [..., out]
        x: Tensor,  # [..., in]
        a: Tensor,  # [r, in]
        b: Tensor,  # [out, r]
        keep: Tensor | None,  # [..., in] uint8
        scale: float,
    ) -> Tensor:
        low = (x if keep is None else x * keep).reshape(-1, a.shape[1]) @ a.T  # [N, r]
        result.view(-1, b.shape[0]).addmm_(low, b.T, alpha=scale)
        ctx.mark_dirty(result)
        ctx.save_for_backward(x, a, b, low, keep)
        ctx.scale = scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, low, keep = ctx.saved_tensors
        g = grad.reshape(-1, b.shape[0])
        g_low = (g @ b) * ctx.scale  # [N, r]
        g_x = g_a = g_b = None
        if ctx.needs_input_grad[3]:
            g_b = ((low * ctx.scale).T @ g).T
        if ctx.needs_input_grad[2]:
            g_a = g_low.T @ (x if keep is None else x * keep).reshape(-1, a.shape[1])
        if ctx.needs_input_grad[1]:
            g_x = (g_low @ a).view(x.shape)
            if keep is not None:
                g_x *= keep
        return grad, g_x, g_a, g_b, None, None


# ---- gated MLP -------------------------------------------------------------------------------


def _is_gated_mlp(module: nn.Module) -> bool:
    """Whether it is down(silu(gate(x)) * up(x)), tried on two tokens."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    act = getattr(module, "act_fn", None)
    if not all(isinstance(p, nn.Module) for p in parts) or type(act).__name__ not in _SILU:
        return False
    weight = next(parts[0].parameters(), None)  # type: ignore[union-attr]
    width = getattr(parts[0], "in_features", None)
    if weight is None or weight.is_meta or width is None:
        return False
    x = torch.linspace(-1, 1, 2 * width, device=weight.device, dtype=weight.dtype)
    x = x.view(1, 2, width)
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        with torch.no_grad():
            return torch.equal(module(x), _mlp_forward(module, x))
    except (TypeError, ValueError, RuntimeError):
        return False
    finally:
        for m in training:
            m.training = True


_SILU = ("SiLU", "SiLUActivation")


def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return cast(Tensor, self.down_proj(nn.functional.silu(gate) * up))
    return cast(Tensor, self.down_proj(_SwiGLU.apply(gate, up)))  # type: ignore[no-untyped-call]


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up, elementwise; silu is made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        g_gate = g_up = None
        if ctx.needs_input_grad[1]:
            g_up = nn.functional.silu(gate).mul_(grad)
        if ctx.needs_input_grad[0]:
            g_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return g_gate, g_up
