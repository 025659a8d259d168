"""Gradients of which the small part is left out: `skip_below`.

A block is one column of the vocabulary by the rows at hand. It is left out when every softmax in
it is below the limit. The decision falls when the block's exponentials are at hand, before the
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
    parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        own = self.head.weight[self.targets].to(self.head.dtype)
        self._at_target = (self.x * own).sum(1)
        if self.head.bias is not None:
            self._at_target += self.head.bias[self.targets]
        self._missing = torch.zeros_like(self._at_target)  # [n]; sum of softmax x norm, at most
        sums = self._missing.new_zeros(self.head.vocab, self.member.shape[1])
        self._weight = sums if self.left.weight is not None else None  # [V, S]
        self._bias = sums.clone() if self.left.bias is not None else None
        self._sizes = self.x.norm(dim=1, keepdim=True)

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
        keep = (exps >= (self.left.limit * ROUNDING * least)[:, None]).any(0)
        columns = keep.nonzero().squeeze(1)
        self.parts.append((columns + a, exps[:, columns], peak))
        small = (~keep).to(exps.dtype)
        self._missing += (exps @ (small * self.left.norms[a : a + w])) * most
        member = self.member * most[:, None]
        if self._weight is not None:
            self._weight[a : a + w] = (exps.T @ (member * self._sizes)) * small[:, None]
        if self._bias is not None:
            self._bias[a : a + w] = (exps.T @ member) * small[:, None]

    def add_to(self, grads: GradientSums, soft: Softmax, scale: Tensor, alpha: Tensor) -> None:
        """Add the gradients of the rows whose scale [n] is not 0; alpha [S] of their sequences."""
        live = scale > 0
        columns = torch.cat([part[0] for part in self.parts])
        factor = soft.factor * scale
        g = torch.cat(
            [exps * (factor * (peak - soft.peak).exp())[:, None] for _, exps, peak in self.parts], 1
        )[live]
        at, x, left = self.at[live], self.x[live], self.left
        grads.add_columns(self.head, at, x, g, columns)
        amount = (factor * soft.rest)[live]
        grads.subtract_targets(self.head, at, x, self.targets[live], amount)
        kept = torch.zeros(self.head.vocab, dtype=torch.bool, device=columns.device)
        kept[columns] = True
        # the target's own entry is always multiplied, in a kept column or by itself
        left.kept += g.numel() + int((~kept[self.targets[live]]).sum())
        left.total += at.numel() * self.head.vocab
        left.hidden += float((self._missing * scale)[live].double().square().sum())
        if left.weight is not None and self._weight is not None:
            left.weight += self._weight @ alpha
        if left.bias is not None and self._bias is not None:
            left.bias += self._bias @ alpha
