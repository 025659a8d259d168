"""Gradients of which the small part is left out: `skip_below`.

A block is one column of the vocabulary by up to BLOCK_ROWS rows. It is left out when every softmax
in it is below the limit. The decision falls when the block's exponentials are at hand, before the
last of the vocabulary is known: against what the log-sum-exp is at least, namely that of the
blocks so far and of the target, so that softmax is overestimated and nothing large is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from compact_fast.backends.gradients import GradientSums
from compact_fast.backends.head import Head
from compact_fast.backends.online import OnlineRows, Softmax

ROUNDING = 1 - 1e-4  # of the limit: the target's logit is made twice, in two orders of summation
ROWS = 16  # finished rows whose columns are chosen together
BLOCK_ROWS = 256  # other rows whose columns are: fewer keep less, and gather the head more often
LEAST_SHARE = 1 / 4  # that is reckoned with
CACHE_BYTES = 1 << 20  # scaled at a time on the way to a column's largest entry


@dataclass
class Left:
    """What was left out of the gradients so far."""

    limit: float
    norms: Tensor  # [V]; Euclidean norm of each row of the head
    kept: int = 0  # entries multiplied
    total: int = 0  # entries of rows with a weight
    hidden: float = 0.0  # sum over rows of the squared bound
    weight: Tensor | None = None  # [V]; bound of each row of the head's gradient
    bias: Tensor | None = None  # [V]

    @classmethod
    def nothing(cls, limit: float, head: Head, grads: GradientSums) -> Left:
        """Before the first rows."""
        norms = torch.cat([head.block(a, b).norm(dim=1) for a, b in head.blocks(1)])
        zeros = torch.zeros_like(norms)
        return cls(
            limit,
            norms,
            weight=None if grads.weight is None else zeros,
            bias=None if grads.bias is None else zeros.clone(),
        )

    def rows_together(self, max_rows: int) -> int:
        """So many rows that what is kept of them takes no more memory than max_rows whole ones;
        by what was kept so far, for the next rows are likely to be alike."""
        share = self.kept / self.total if self.total else 1.0
        return int(max_rows / max(share, LEAST_SHARE))

    def report(self) -> tuple[Tensor, Tensor]:
        """(share that was multiplied, bounds [3] for hidden, weight, bias)."""
        columns = [0.0 if c is None else float(c.norm()) for c in (self.weight, self.bias)]
        share = self.kept / self.total if self.total else 1.0
        return self.norms.new_tensor(share), self.norms.new_tensor([self.hidden**0.5, *columns])

    def add(self, scaled: Tensor, columns: Tensor | None, x: Tensor) -> None:
        """Finished gradients |g| [n, k] of these columns that are left out, of hidden x [n, D]."""
        norms = self.norms if columns is None else self.norms[columns]
        self.hidden += float((scaled @ norms).double().square().sum())
        for into, sizes in ((self.weight, x.norm(dim=1)), (self.bias, torch.ones_like(x[:, 0]))):
            if into is not None:
                into += scaled.T @ sizes

    def add_finished(
        self, grads: GradientSums, head: Head, at: Tensor, x: Tensor, g: Tensor, scale: Tensor
    ) -> None:
        """Add finished gradients g [n, V] of rows whose weight is scale [n] > 0."""
        for first in range(0, at.numel(), ROWS):
            rows = slice(first, first + ROWS)
            size = g[rows].abs()
            keep = (size >= self.limit * scale[rows, None]).any(0)
            columns = keep.nonzero().squeeze(1)
            grads.add_columns(head, at[rows], x[rows], g[rows][:, columns], columns)
            self.kept += size.shape[0] * columns.numel()
            self.total += size.numel()
            self.add(size.masked_fill_(keep, 0.0), None, x[rows])


@dataclass
class SparseRows:
    """The large exponentials of n rows, held until the rows' weights are known."""

    left: Left
    head: Head
    at: Tensor  # [n] packed positions
    x: Tensor  # [n, D]
    targets: Tensor  # [n]
    member: Tensor  # [n, S]; 1 / |A| in the column of the row's sequence
    blocks: list[_Block] = field(init=False)

    def __post_init__(self) -> None:
        own = self.head.weight[self.targets].to(self.head.dtype)
        self._at_target = (self.x * own).sum(1)
        if self.head.bias is not None:
            self._at_target += self.head.bias[self.targets]
        self._missing = torch.zeros_like(self._at_target)  # [n]; sum of softmax x norm, at most
        sums = self._missing.new_zeros(self.member.shape[1], self.head.vocab)
        self._weight = sums if self.left.weight is not None else None  # [S, V]
        self._bias = sums.clone() if self.left.bias is not None else None
        self._sizes = self.x.norm(dim=1, keepdim=True)
        self._scratch = sums.new_empty(0)
        bounds = range(0, self.at.numel(), BLOCK_ROWS)
        self.blocks = [_Block(slice(first, first + BLOCK_ROWS)) for first in bounds]

    def take(self, exps: Tensor, a: int, online: OnlineRows) -> None:
        """Choose from exp(z - peak) [n, w] of the vocabulary from a on; may set NaN rows to 0."""
        n, w = exps.shape
        peak = online.peak[:n]
        least = online.rest[:n] + (self._at_target - peak).exp()
        most = least.reciprocal()  # softmax <= exps x most
        broken = ~torch.isfinite(most)
        if bool(broken.any()):
            exps[broken] = 0.0
            most = torch.where(broken, 0.0, most)
        norms = self.left.norms[a : a + w]
        for block in self.blocks:
            rows, part = block.rows, exps[block.rows]
            columns = self._large(part, most[rows])
            block.columns.append(columns + a)
            block.exps.append(part[:, columns])
            block.peaks.append(peak[rows].clone())
            self._missing[rows] += (part @ norms.index_fill(0, columns, 0.0)) * most[rows]
            member = self.member[rows] * most[rows, None]
            for sums, weight in ((self._weight, self._sizes[rows]), (self._bias, None)):
                if sums is not None:
                    into = sums[:, a : a + w]
                    kept = into[:, columns]  # as they were
                    there = self.member[rows].any(0).nonzero().squeeze(1)
                    scaled = member if weight is None else member * weight
                    into.index_add_(0, there, scaled[:, there].T @ part)
                    into[:, columns] = kept

    def _large(self, part: Tensor, most: Tensor) -> Tensor:
        """Columns [k] of part [m, w] in which any entry times most [m] reaches the limit."""
        w = part.shape[1]
        step = max(1, CACHE_BYTES // (w * part.itemsize))
        if self._scratch.numel() < step * w:
            self._scratch = part.new_empty(step * w)
        scratch, top = self._scratch[: step * w].view(step, w), part.new_zeros(w)
        for i in range(0, part.shape[0], step):
            some = part[i : i + step]
            scaled = torch.mul(some, most[i : i + step, None], out=scratch[: some.shape[0]])
            torch.maximum(top, scaled.amax(0), out=top)
        return (top >= self.left.limit * ROUNDING).nonzero().squeeze(1)

    def add_to(self, grads: GradientSums, soft: Softmax, scale: Tensor, alpha: Tensor) -> None:
        """Add the gradients of the rows whose scale [n] is not 0; alpha [S] of their sequences."""
        factor, live, left = soft.factor * scale, scale > 0, self.left
        for block in self.blocks:
            self._add_block(grads, block, factor[block.rows], soft.peak[block.rows], live)
        amount = factor * soft.rest
        grads.subtract_targets(self.head, self.at, self.x, self.targets, amount, live)
        left.total += int(live.sum()) * self.head.vocab
        left.hidden += float((self._missing * scale)[live].double().square().sum())
        if left.weight is not None and self._weight is not None:
            left.weight += alpha @ self._weight
        if left.bias is not None and self._bias is not None:
            left.bias += alpha @ self._bias

    def _add_block(
        self,
        grads: GradientSums,
        block: _Block,
        factor: Tensor,  # [m]
        last: Tensor,  # [m]; the rows' last peaks
        live: Tensor,  # [n] bool
    ) -> None:
        rows, live = block.rows, live[block.rows]
        columns = torch.cat(block.columns)
        parts = zip(block.exps, block.peaks, strict=True)
        g = torch.cat([exps * (factor * (peak - last).exp())[:, None] for exps, peak in parts], 1)[
            live
        ]
        grads.add_columns(self.head, self.at[rows][live], self.x[rows][live], g, columns)
        kept = torch.zeros(self.head.vocab, dtype=torch.bool, device=columns.device)
        kept[columns] = True
        # the target's own entry is always multiplied, in a kept column or by itself
        self.left.kept += g.numel() + int((~kept[self.targets[rows][live]]).sum())


@dataclass
class _Block:
    """Rows that share kept columns, and what was kept of each part of the vocabulary."""

    rows: slice
    columns: list[Tensor] = field(default_factory=list)  # [k] each
    exps: list[Tensor] = field(default_factory=list)  # [m, k] each: exp(z - peak)
    peaks: list[Tensor] = field(default_factory=list)  # [m] each
