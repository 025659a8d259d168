"""Rows through the unembedding on a GPU: their statistics, exponentials and gradients.

Shape suffixes: n rows of a chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compact_fast.backends.protocol import Gradients, Needs
from compact_fast.softcap import cap_
from compact_fast.triton_kernels.gradient_rows import scale_rows
from compact_fast.triton_kernels.gradient_scale import divide_into
from compact_fast.triton_kernels.launch import architecture
from compact_fast.triton_kernels.logits_gemm import padded_width
from compact_fast.triton_kernels.products import add_product, product
from compact_fast.triton_kernels.row_softmax import FLOAT16_TOTAL, row_softmax
from compact_fast.triton_kernels.row_statistics import RowStatistics
from compact_fast.triton_kernels.token_logp import can_fuse, measure_rows

if TYPE_CHECKING:
    from compact_fast.backends.triton_backend import TritonBackend

logger = logging.getLogger(__name__)

UPCAST_BYTES = 256 << 20  # float32 copy of a part of a narrower head
ROW_MULTIPLE = 128  # rows of a GEMM tile: a chunk of 3,500 would leave the last one part empty


@dataclass
class GradientSums:
    """Float32 gradients of the sum over questions. None: not needed."""

    hidden: Tensor | None  # [T, D]
    weight: Tensor | None  # [V, D]; times `unit`
    bias: Tensor | None  # [V]; times `unit`
    unit: float | Tensor = 1.0  # see DeviceHead.unit
    unwritten: bool = False  # `weight` is memory as it came, no zeros yet

    @classmethod
    def zeros(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: Needs,
        unit: float | Tensor = 1.0,
    ) -> GradientSums:
        """Room for those that are needed."""

        def room(owner: Tensor | None, need: bool) -> Tensor | None:
            if owner is None or not need:
                return None
            return owner.new_empty(owner.shape, dtype=torch.float32)

        sums = cls(
            room(hidden, needs.hidden),
            room(weight, needs.weight),
            room(bias, needs.bias),
            unit,
            unwritten=needs.weight,
        )
        for small in (sums.hidden, sums.bias):
            if small is not None:
                small.zero_()
        return sums

    @property
    def head(self) -> bool:
        return self.weight is not None or self.bias is not None

    def of_head(self, factor: Tensor) -> Tensor:
        """A row's factor [n] in the gradients of the head."""
        return factor if isinstance(self.unit, float) and self.unit == 1 else factor * self.unit

    def settle(self) -> None:
        """Make `weight` zeros, unless something has been written to all of it."""
        if self.unwritten and self.weight is not None:
            self.weight.zero_()
        self.unwritten = False

    def add_to_weight(self, g: Tensor, x: Tensor) -> None:
        """dW += g^T x, for g [n, V] and x [n, D]; the first such product overwrites."""
        assert self.weight is not None
        if self.unwritten and g.shape[0]:
            product(g.T, x, out=self.weight)
            self.unwritten = False
        else:
            self.settle()
            add_product(self.weight, g.T, x)

    def finish(
        self, normalizer: float | Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Gradients:
        """Divided by the normalizer, in the dtype of what they belong to."""
        self.settle()
        head = self.unit * normalizer
        return Gradients(
            _divided(self.hidden, hidden, normalizer),
            _divided(self.weight, weight, head),
            None if bias is None else _divided(self.bias, bias, head),
        )


def _divided(total: Tensor | None, owner: Tensor, by: float | Tensor) -> Tensor | None:
    """A sum of gradients, divided in its place where it may stay, in the dtype of its owner."""
    if total is None or (not isinstance(by, Tensor) and by == 1):
        return None if total is None else total.to(owner.dtype)
    if not isinstance(by, Tensor):
        by = torch.full((), by, dtype=torch.float32, device=total.device)
    same = owner.dtype == torch.float32
    out: Tensor = divide_into(
        total, by, total if same else torch.empty_like(total, dtype=owner.dtype)
    )
    return out


@dataclass
class DeviceHead:
    """The unembedding W [V, D] and bias [V], and the memory that rows pass through.

    dtype: of rows and exponentials, the wider one of hidden states and head. Where the head is
        narrower, products take a wide copy of a part of it at a time.
    fused: exponentials come out of the GEMM. Those of float16 do not: exp(z - z_label) leaves its
        range, and what would fit is known once the row is complete.
    sums: where no exponentials are kept, their sums come out of the GEMM.
    softcap: of the logits; 0: none.
    """

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    chunk_bytes: int
    hold_bytes: int
    fused: bool
    sums: bool
    softcap: float = 0.0
    _buffer: Tensor | None = None

    @classmethod
    def of(
        cls,
        backend: TritonBackend,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float = 0.0,
    ) -> DeviceHead:
        """Raises ValueError where tier="fused" cannot be had."""
        weight = weight.detach()
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        narrow = dtype.itemsize == 2
        fits = narrow and can_fuse(hidden[:0].contiguous(), weight)
        if narrow and not fits and backend.tier != "library":
            why = (
                f"bulk copies cannot address a {weight.dtype} head of shape "
                f"{tuple(weight.shape)} on {architecture(weight)}: rows have to start at "
                "multiples of 16 bytes"
            )
            if backend.tier == "fused":
                raise ValueError(f"tier='fused': {why}; use tier='auto'")
            say_once(f"{why}; the vendor's GEMM and a pass over each row are taken", warning=True)
        bias = None if bias is None else bias.detach().contiguous()
        sums = fits and backend.tier != "library"
        fused = sums and dtype == torch.bfloat16
        sizes = (backend.chunk_bytes, backend.hold_bytes)
        return cls(weight, bias, dtype, *sizes, fused, sums, softcap)

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    @property
    def row_bytes(self) -> int:
        width: int = padded_width(self.vocab)
        return width * (self.dtype.itemsize if self.fused else 4)

    @property
    def max_rows(self) -> int:
        rows = self.chunk_bytes // self.row_bytes
        return max(16, rows // ROW_MULTIPLE * ROW_MULTIPLE)

    @property
    def most_held_rows(self) -> int:
        """Rows that may be held for one question that does not fit a chunk."""
        return max(self.max_rows, self.hold_bytes // self.row_bytes)

    def chunks(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows [n] in chunks of much the same size: a last one of few rows would be slow."""
        parts = max(1, -(-rows.numel() // self.max_rows))
        even = -(-rows.numel() // parts)
        step = min(self.max_rows, max(1, -(-even // ROW_MULTIPLE)) * ROW_MULTIPLE)
        return torch.split(rows, step)

    def take(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Rows of hidden [T, D] in the dtype of products, [n, D]."""
        return hidden[rows].to(self.dtype)

    def unit(self, largest: float) -> float:
        """A power of two that head gradients are kept times, given the rows' largest factor > 0.

        Factors of rows are 1e-3 and less: times x they would lose digits in float16.
        """
        if self.dtype != torch.float16:
            return 1.0
        return math.ldexp(FLOAT16_TOTAL, -math.ceil(math.log2(largest)))

    def unit_on_device(self, factors: Tensor) -> float | Tensor:
        """The same where the rows' factors, any number of them, are not known to the host."""
        if self.dtype != torch.float16 or factors.numel() == 0:
            return 1.0
        largest = factors.abs().amax()
        there = torch.isfinite(largest) & (largest > 0)
        exponent = torch.frexp(torch.where(there, largest, 1.0)).exponent
        return torch.ldexp(torch.full_like(largest, FLOAT16_TOTAL), -exponent)

    def _memory(self, n: int) -> Tensor:
        """[n, V] that the next call overwrites; float32 logits, or exponentials in `dtype`."""
        if self._buffer is None or self._buffer.shape[0] < n:
            dtype = self.dtype if self.fused else torch.float32
            self._buffer = None
            self._buffer = self.weight.new_empty((n, padded_width(self.vocab)), dtype=dtype)
        return self._buffer[:n, : self.vocab]

    def logits(self, x: Tensor) -> Tensor:
        """Float32 logits [n, V] of x [n, D], capped, in new memory."""
        out = x.new_empty((x.shape[0], self.vocab), dtype=torch.float32)
        return cap_(self._products(x, out), self.softcap)

    def _products(self, x: Tensor, z: Tensor) -> Tensor:
        for part, weight in self._parts(x.dtype):
            product(x, weight.T, out=z[:, part])
        return z if self.bias is None else z.add_(self.bias)

    def back_to_rows(self, g: Tensor) -> Tensor:
        """g [n, V] times W in float32, [n, D]; g in the dtype of products, or float32."""
        out: Tensor | None = None
        for part, weight in self._parts(g.dtype):
            if out is None:
                out = product(g[:, part], weight)
            else:
                add_product(out, g[:, part], weight)
        assert out is not None
        return out

    def _parts(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The vocabulary and W in parts that are multiplied as `dtype`; one if W is of it."""
        step = self.vocab
        if dtype != self.weight.dtype:
            step = max(1, UPCAST_BYTES // (self.weight.shape[1] * dtype.itemsize))
        for a in range(0, self.vocab, step):
            part = slice(a, min(a + step, self.vocab))
            yield part, self.weight[part].to(dtype)

    def measure(
        self, x: Tensor, targets: Tensor, *, keep: bool, statistics: bool
    ) -> tuple[Tensor | None, RowStatistics]:
        """(E [n, V] if `keep`, statistics): E / statistics.total = softmax - onehot, times the
        slope of the cap."""
        cap = self.softcap
        if self.fused or (self.sums and not keep):
            exps = self._memory(x.shape[0]) if keep else None
            out = measure_rows(
                x, self.weight, self.bias, targets, exps=exps, statistics=statistics, softcap=cap
            )
            return exps, out
        z = self._products(x, self._memory(x.shape[0]))
        exps, out = row_softmax(
            z, targets, self.dtype, statistics=statistics, store=keep, softcap=cap
        )
        return exps if keep else None, out

    def add_gradients(
        self,
        grads: GradientSums,
        at: Tensor,  # [n] int64: packed positions, negative: a row that is not there
        x: Tensor,  # [n, D]
        g: Tensor,  # [n, V]
        factor: Tensor,  # [n] float32
        *,
        add: bool,
    ) -> None:
        """Rows with logit gradients factor * g: dH[at] (+)= them times W, dW and db += them."""
        if grads.hidden is not None:
            scale_rows(self.back_to_rows(g), factor, grads.hidden, to=at, add=add)
        if grads.weight is not None:
            scaled = scale_rows(x, grads.of_head(factor), torch.empty_like(x, dtype=g.dtype))
            grads.add_to_weight(g, scaled)
        self.add_bias_gradient(grads, g, factor)

    def add_bias_gradient(self, grads: GradientSums, g: Tensor, factor: Tensor) -> None:
        """db += the sum over rows of factor [n] times g [n, V]."""
        if grads.bias is not None:
            # two columns: a factor rounded to two bytes, and what the rounding left
            factor = grads.of_head(factor)
            high = factor.to(g.dtype)
            columns = torch.stack([high, (factor - high.float()).to(g.dtype)], 1)
            grads.bias.add_(product(g.T, columns).sum(1))


@cache
def say_once(text: str, *, warning: bool = False) -> None:
    """Log what a run did in another way than the usual one."""
    logger.log(logging.WARNING if warning else logging.INFO, "triton backend: %s", text)
