"""config.skip_below on a GPU: gradients of the logits where they matter, and what that leaves out.

Blocks are a column of the vocabulary by up to BLOCK_ROWS rows; see "Leaving out small gradients" in
docs/method.md. The gradient of the bias is a column sum, and stays whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compact_fast.backends.triton_rows import DeviceHead, GradientSums
from compact_fast.triton_kernels.gradient_rows import scale_rows
from compact_fast.triton_kernels.kept_columns import (
    BLOCK_ROWS,
    keep_columns,
    kept_to_head,
    kept_to_rows,
    move_together,
)


@dataclass(frozen=True)
class SkippingProducts:
    """Adds rows to the gradients, and sums up what was left out, on the device."""

    eps: float
    head: DeviceHead
    lengths: Tensor  # [V] float32: |W_v|
    row_kept: Tensor  # [T] float32: columns that were multiplied
    row_missing: Tensor  # [T] float32: sum over the others of |softmax - label| |W_v|
    column_missing: Tensor  # [V] float32: sum over rows that leave the column out of |g| |h|

    @classmethod
    def of(cls, eps: float, head: DeviceHead, num_tokens: int) -> SkippingProducts:
        lengths = torch.linalg.vector_norm(head.weight, dim=1, dtype=torch.float32)
        row_kept = lengths.new_zeros(num_tokens)
        return cls(
            eps, head, lengths, row_kept, torch.zeros_like(row_kept), torch.zeros_like(lengths)
        )

    def add(
        self,
        grads: GradientSums,
        at: Tensor,  # [n] int64: packed positions
        x: Tensor,  # [n, D]
        exps: Tensor,  # [n, V]; overwritten
        factor: Tensor,  # [n] float32
        total: Tensor,  # [n] float32: exps / total = softmax - label
    ) -> None:
        """As DeviceHead.add_gradients, without the columns that `eps` leaves out."""
        if at.numel() == 0:
            return
        norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
        self.head.add_bias_gradient(grads, exps, factor)
        kept = keep_columns(exps, total, factor, norms, self.eps)
        self.row_missing[at] = move_together(exps, total, self.lengths, kept)
        block = torch.arange(at.numel(), device=at.device) // BLOCK_ROWS
        self.row_kept[at] = kept.count[block].float()
        self.column_missing.add_(kept.bound)
        if grads.hidden is not None:
            rows = kept_to_rows(exps, self.head.weight, kept)
            scale_rows(rows, factor, grads.hidden, to=at)
        if grads.weight is not None:
            grads.settle()
            scaled = scale_rows(x, grads.of_head(factor), torch.empty_like(x))
            kept_to_head(exps, scaled, kept, grads.weight)

    def report(
        self,
        grads: GradientSums,
        rows: Tensor,  # [n] int64: packed positions
        factor: Tensor,  # [n] float32: alpha / |A| of each
        normalizer: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(kept_share, gradient_error [3]) of LossResult."""
        live = factor != 0
        kept = torch.where(live, self.row_kept[rows], 0.0).double().sum()
        share = kept / (self.head.vocab * live.sum().clamp(min=1))
        none = torch.zeros_like(share)
        missing = torch.where(live, factor * self.row_missing[rows], 0.0).double()
        hidden = none if grads.hidden is None else missing.norm()
        weight = none if grads.weight is None else self.column_missing.double().norm()
        # entries are as they were rounded on their way into E
        slack = 1 + torch.finfo(self.head.dtype).eps
        bounds = torch.stack([hidden, weight, none]) * slack / normalizer
        return share.float(), bounds.float()
