"""Rows through the unembedding on a GPU: their statistics, exponentials and gradients.

Shape suffixes: n rows of a chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compact_fast.backends.gradients import divided
from compact_fast.backends.protocol import Gradients, Needs
from compact_fast.triton_kernels.gradient_rows import scale_rows
from compact_fast.triton_kernels.launch import architecture
from compact_fast.triton_kernels.logits_gemm import padded_width
from compact_fast.triton_kernels.products import add_product, product
from compact_fast.triton_kernels.row_softmax import row_softmax
from compact_fast.triton_kernels.row_statistics import RowStatistics
from compact_fast.triton_kernels.token_logp import can_fuse, measure_rows

if TYPE_CHECKING:
    from compact_fast.backends.triton_backend import TritonBackend

logger = logging.getLogger(__name__)

ROW_MULTIPLE = 128  # rows of a GEMM tile: a chunk of 3,500 would leave the last one part empty


@dataclass(frozen=True)
class TokenStatistics:
    """Per-token results on the device, filled chunk by chunk; all [T] float32 but `correct`."""

    logp: Tensor  # 0 where there is no label
    logsumexp: Tensor  # NaN where no logits were made
    entropy: Tensor | None
    correct: Tensor | None  # bool

    @classmethod
    def empty(cls, targets: Tensor, *, statistics: bool) -> TokenStatistics:
        logp = torch.zeros(targets.numel(), dtype=torch.float32, device=targets.device)
        return cls(
            logp,
            torch.full_like(logp, torch.nan),
            torch.zeros_like(logp) if statistics else None,
            torch.zeros_like(logp, dtype=torch.bool) if statistics else None,
        )

    def record(self, rows: Tensor, out: RowStatistics) -> None:
        """Place the results of `rows` [n], packed positions."""
        self.logp[rows] = out.logp
        self.logsumexp[rows] = out.logsumexp
        if self.entropy is not None and out.entropy is not None:
            self.entropy[rows] = out.entropy
        if self.correct is not None and out.correct is not None:
            self.correct[rows] = out.correct


@dataclass(frozen=True)
class GradientSums:
    """Float32 gradients of the sum over questions. None: not needed."""

    hidden: Tensor | None  # [T, D]
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]

    @classmethod
    def zeros(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs
    ) -> GradientSums:
        """Room for those that are needed."""
        owners = (hidden, weight, bias)
        return cls(
            *(
                torch.zeros_like(owner, dtype=torch.float32, memory_format=torch.contiguous_format)
                if need and owner is not None
                else None
                for owner, need in zip(owners, needs, strict=True)
            )
        )

    @property
    def head(self) -> bool:
        return self.weight is not None or self.bias is not None

    def finish(
        self, normalizer: float | Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Gradients:
        """Divided by the normalizer, in the dtype of what they belong to."""
        return divided((self.hidden, self.weight, self.bias), (hidden, weight, bias), normalizer)


@dataclass
class DeviceHead:
    """The unembedding W [V, D] and bias [V], and the memory that rows pass through."""

    weight: Tensor
    bias: Tensor | None
    chunk_bytes: int
    hold_bytes: int
    fused: bool
    _buffer: Tensor | None = None

    @classmethod
    def of(
        cls, backend: TritonBackend, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> DeviceHead:
        """Raises ValueError where hidden states would have to be rounded to the head's dtype."""
        weight = weight.detach()
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        if torch.promote_types(hidden.dtype, weight.dtype) != weight.dtype:
            raise ValueError(
                f"hidden is {hidden.dtype}, lm_head_weight {weight.dtype}: cast hidden to the "
                "head's dtype, or use backend='torch'"
            )
        narrow = weight.dtype == torch.bfloat16
        fits = narrow and can_fuse(hidden[:0].to(weight.dtype).contiguous(), weight)
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
        fused = fits and backend.tier != "library"
        return cls(weight, bias, backend.chunk_bytes, backend.hold_bytes, fused)

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    @property
    def row_bytes(self) -> int:
        width: int = padded_width(self.vocab)
        return width * (self.weight.element_size() if self.fused else 4)

    @property
    def max_rows(self) -> int:
        rows = self.chunk_bytes // self.row_bytes
        return max(16, rows // ROW_MULTIPLE * ROW_MULTIPLE)

    @property
    def most_held_rows(self) -> int:
        """Rows that may be held for one question that does not fit a chunk."""
        return max(self.max_rows, self.hold_bytes // self.row_bytes)

    def take(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Rows of hidden [T, D] in the head's dtype, [n, D]."""
        return hidden[rows].to(self.weight.dtype)

    def _memory(self, n: int) -> Tensor:
        """[n, V] that the next call overwrites; float32 logits, or exponentials in W's dtype."""
        if self._buffer is None or self._buffer.shape[0] < n:
            dtype = self.weight.dtype if self.fused else torch.float32
            self._buffer = None
            self._buffer = self.weight.new_empty((n, padded_width(self.vocab)), dtype=dtype)
        return self._buffer[:n, : self.vocab]

    def logits(self, x: Tensor) -> Tensor:
        """Float32 logits [n, V] of x [n, D] in new memory."""
        z: Tensor = product(x, self.weight.T)
        return z if self.bias is None else z.add_(self.bias)

    def measure(
        self, x: Tensor, targets: Tensor, *, keep: bool, statistics: bool
    ) -> tuple[Tensor | None, RowStatistics]:
        """(E [n, V] if `keep`, statistics): E / statistics.total = softmax - onehot."""
        if self.fused:
            exps = self._memory(x.shape[0]) if keep else None
            out = measure_rows(x, self.weight, self.bias, targets, exps=exps, statistics=statistics)
            return exps, out
        z = self._memory(x.shape[0])
        product(x, self.weight.T, out=z)
        if self.bias is not None:
            z += self.bias
        exps, out = row_softmax(z, targets, self.weight.dtype, statistics=statistics, store=keep)
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
            scale_rows(product(g, self.weight), factor, grads.hidden, to=at, add=add)
        if grads.weight is not None:
            scaled = scale_rows(x, factor, torch.empty_like(x))
            add_product(grads.weight, g.T, scaled)
        self.add_bias_gradient(grads, g, factor)

    def add_bias_gradient(self, grads: GradientSums, g: Tensor, factor: Tensor) -> None:
        """db += the sum over rows of factor [n] times g [n, V]."""
        if grads.bias is not None:
            # two columns: a factor rounded to bfloat16, and what the rounding left
            high = factor.to(g.dtype)
            columns = torch.stack([high, (factor - high.float()).to(g.dtype)], 1)
            grads.bias.add_(product(g.T, columns).sum(1))


@cache
def say_once(text: str, *, warning: bool = False) -> None:
    """Log what a run did in another way than the usual one."""
    logger.log(logging.WARNING if warning else logging.INFO, "triton backend: %s", text)
