"""Exponentials of some rows, held until the rows' weights are known."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from compact_fast.backends.gradients import GradientSums
from compact_fast.backends.head import Head


@dataclass
class HeldRows:
    """exp(z - peak) of n rows in blocks of the vocabulary, each with its own running peak.

    The peak that a block was taken against is below the last one by a factor that multiplies
    [n, D] matrices instead of the block.
    """

    head: Head
    storage: Tensor  # [n * V]
    blocks: list[tuple[int, int]]
    peaks: list[Tensor] = field(default_factory=list)  # [n] each; the peak of each block

    def block(self, a: int, b: int) -> Tensor:
        """Where vocabulary entries a to b of all rows belong, [n, b - a]."""
        n = self.storage.numel() // self.head.vocab
        return self.storage[n * a : n * b].view(n, b - a)

    def replace(self, start: int, gradients: Tensor) -> None:
        """Put finished logit gradients [m, V] in the place of the rows from `start` on."""
        for a, b in self.blocks:
            self.block(a, b)[start : start + gradients.shape[0]] = gradients[:, a:b]

    def add_to(
        self,
        grads: GradientSums,
        at: Tensor,
        x: Tensor,  # [n, D]
        factor: Tensor,  # [n]; 1 for replaced rows
        last: Tensor,  # [n]; the last peak
        replaced: slice,
        runs: list[tuple[int, int]],
    ) -> None:
        """Add the gradients of these runs of rows; `factor` x exp(z - last peak) = gradient."""
        overwrite = grads.unwritten
        for first, end in runs:
            rows = slice(first, end)
            into = torch.zeros_like(x[rows]) if grads.hidden is not None else None
            before = None
            for (a, b), peak in zip(self.blocks, self.peaks, strict=True):
                exps, block = self.block(a, b)[rows], self.head.block(a, b)
                behind = _ratio(peak, last, replaced)[rows]
                if into is not None:
                    if before is not None:
                        into.mul_(_ratio(before, peak, replaced)[rows, None])
                    into.addmm_(exps, block)
                    before = peak
                scale = factor[rows] * behind
                if grads.weight is not None:
                    scaled, beta = x[rows] * scale[:, None], 0 if overwrite else 1
                    grads.weight[a:b].addmm_(exps.T, scaled, beta=beta)
                if grads.bias is not None:
                    grads.bias[a:b].addmv_(exps.T, scale)
            overwrite = grads.unwritten = False
            if into is not None and grads.hidden is not None:
                grads.hidden[at[rows]] = into.mul_(factor[rows, None])


def _ratio(old: Tensor, new: Tensor, replaced: slice) -> Tensor:
    """exp(old - new), 1 for the replaced rows."""
    ratio = (old - new).exp_()
    ratio[replaced] = 1.0
    return ratio
