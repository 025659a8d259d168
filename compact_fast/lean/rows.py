"""A layer's work between its products: SwiGLU and RMS norms, forwards and back.

The native module does each in one pass over the rows (csrc/layers.h); where it cannot, torch's
operations do, with the same numbers but for the order of a norm's sums and the last bit of an
exponential. Nothing here knows autograd.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from compact_fast.lean.kept import passing
from compact_fast.native import native_with


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; all of one shape."""
    native = _native_for(gate, up)
    if native is None:
        return torch.nn.functional.silu(gate).mul_(up)
    out = passing(tuple(gate.shape), gate)
    native.gated(_at(gate), _at(up), _at(out), gate.numel(), torch.get_num_threads())
    return out


def gated_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by gate and up, by that of `gated`."""
    native = _native_for(grad, gate, up)
    if native is None:
        g_up = torch.nn.functional.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), g_up
    g_gate, g_up = (passing(tuple(gate.shape), gate) for _ in range(2))
    native.gated_back(
        *map(_at, (grad, gate, up, g_gate, g_up)), gate.numel(), torch.get_num_threads()
    )
    return g_gate, g_up


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(weight * x / rms(x), 1 / rms(x)) for x [..., m] and weight [m]; the latter [..., 1]."""
    native = _native_for(x, weight)
    if native is None:
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        return norm_again(x, inverse, weight), inverse
    out, inverse = passing(tuple(x.shape), x), x.new_empty((*x.shape[:-1], 1))
    native.norm(_at(x), _at(weight), eps, _at(inverse), _at(out), *_rows(x))
    return out, inverse


def norm_again(x: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    """What `norm` gave first."""
    native = _native_for(x, weight, inverse)
    if native is None:
        return (x * inverse).mul_(weight)
    out = passing(tuple(x.shape), x)
    native.norm_again(_at(x), _at(weight), _at(inverse), _at(out), *_rows(x))
    return out


def norm_gradient(
    grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, more: Tensor | None = None
) -> Tensor:
    """The gradient by x, by that of the norm; and `more`, by another use of x."""
    native = _native_for(grad, x, weight, inverse, *(() if more is None else (more,)))
    if native is None:
        g_x = grad * weight
        along = torch.linalg.vecdot(g_x, x).unsqueeze(-1)  # [..., 1]
        g_x.mul_(inverse).addcmul_(x, along * inverse.pow(3), value=-1 / x.shape[-1])
        return g_x if more is None else g_x.add_(more)
    g_x = passing(tuple(x.shape), x)
    places = [*map(_at, (grad, x, weight, inverse)), 0 if more is None else _at(more), _at(g_x)]
    native.norm_back(*places, *_rows(x))
    return g_x


def can_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate` takes x [1, heads, N, d], heads of a token in a row, and cos [1, N, d]."""
    if x.ndim != 4 or len(x) != 1 or x.shape[-1] % 2:
        return False
    shape = (1, x.shape[2], x.shape[3])
    fit = cos.shape == sin.shape == shape
    return fit and _native_for(x.transpose(1, 2), cos, sin) is not None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, back: bool = False) -> Tensor:
    """Rotary positions, x * cos + (-x's second half, its first) * sin, into `out`; or of a
    gradient by it that by x. All as `can_rotate` wants them; `out` [1, N, heads, d].

    Returns [1, heads, N, d].
    """
    native = _native()
    assert native is not None
    _, heads, N, d = x.shape
    places = map(_at, (x, cos, sin, out))
    native.rotate(*places, N, heads, d, back, torch.get_num_threads())
    return out.transpose(1, 2)


def _at(t: Tensor) -> int:
    return t.data_ptr()


def _rows(x: Tensor) -> tuple[int, int, int]:
    return x.numel() // max(1, x.shape[-1]), x.shape[-1], torch.get_num_threads()


def _native_for(*given: Tensor) -> ModuleType | None:
    """The native module, if it takes them."""
    fit = all(
        t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in given
    )
    return _native() if fit else None


def _native() -> ModuleType | None:
    return native_with("gated", "layers on a CPU take a few percent longer")
