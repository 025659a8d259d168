"""Repairs of Triton's interpreter, applied on import.

It multiplies the raw bits of bfloat16 operands of `tl.dot`, and truncates float32 to bfloat16
where the hardware rounds to nearest even. `test_interpreter_bf16.py` proves both bit-exact.

Its products are NumPy's, whose rounding of a row depends, on some processors, on where in its tile
the row stands; on matrix units it does not. Summed in float64 and rounded once, it does not here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bits (uint16), rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


_dot = InterpreterBuilder.create_dot
_cast = InterpreterBuilder.cast_impl


def _create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    if not a.dtype.scalar.is_floating() or a.data.itemsize == 1:
        return _dot(self, a, b, d, *rest)
    left, right = (
        (widen(h.data) if h.dtype.scalar == tl.bfloat16 else h.data).astype(np.float64)
        for h in (a, b)
    )
    return TensorHandle((left @ right + d.data).astype(d.data.dtype), d.dtype.scalar)


def _cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        return TensorHandle(narrow(src.data), tl.bfloat16)
    return _cast(self, src, dst_type)


InterpreterBuilder.create_dot = _create_dot
InterpreterBuilder.cast_impl = _cast_impl
