"""Rows through the vocabulary: what their logits are needed for, while each block is in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from compact_fast.backends.assembly import TokenStatistics
from compact_fast.backends.gradients import GradientSums
from compact_fast.backends.head import Head
from compact_fast.backends.held_rows import HeldRows
from compact_fast.backends.online import NO_ROWS, OnlineRows, Softmax
from compact_fast.backends.sparse_rows import SparseRows


class RowPass:
    """Passes of some rows of a batch at a time; their statistics are recorded in `stats`.

    most: rows whose logits are at hand at once, where they are not held.
    """

    def __init__(
        self,
        head: Head,
        hidden: Tensor,  # [T, D]
        targets: Tensor,  # [T]
        most: int,
        statistics: bool,
    ) -> None:
        self.head, self.hidden, self.targets, self.most = head, hidden, targets, most
        self.stats = TokenStatistics.empty(targets, torch.float64, full=statistics)
        self._full = statistics
        self._buffer = head.weight.new_empty(0, dtype=head.dtype)
        self._slopes = self._buffer

    def take(self, rows: Tensor) -> Tensor:  # [n] -> [n, D]
        """Hidden states of packed positions, in the dtype of the products."""
        return self.hidden[rows].to(self.head.dtype)

    def measure(
        self,
        rows: Tensor,  # [n]
        *,
        back: int = 0,
        out: Tensor | None = None,  # [T, D]
        held: HeldRows | None = None,
        sparse: SparseRows | None = None,
        kept: Tensor | None = None,  # [m, V]
        at: int = 0,
        again: bool = False,
    ) -> Softmax:
        """Make the rows' logits and record their statistics (not when made `again`).

        back, out: (softmax - onehot) W of the first `back` rows is written to `out`.
        held, sparse: they are given the exponentials, of all rows or of its first ones; `held` the
            logits of its raw rows.
        kept: takes the logits of the rows from `at` on.
        """
        head = self.head
        x, targets = self.take(rows), self.targets[rows]
        full = self._full and not again
        online = OnlineRows(targets, head.dtype, full, infinite=head.bias is not None)
        into = x.new_zeros(back, x.shape[1])
        # narrow ones for few sparse rows, too: more passes over them follow
        n = rows.numel() if sparse is None else max(rows.numel(), self.most // 2)
        blocks = head.blocks(n) if held is None else held.blocks
        for i, (a, b) in enumerate(blocks):
            block = head.block(a, b)
            place = None
            if not head.makes_memory:
                place = self._room(rows.numel(), b - a) if held is None else held.room(i)
            z = head.multiply(x, block, a, place)
            if kept is not None:
                kept[:, a:b] = z[at : at + kept.shape[0]]
            slope = self._slope(z)
            shrink = online.update(z, a, NO_ROWS if held is None else held.raw)
            if slope is not None:
                if held is not None:
                    slope[held.raw] = 1.0  # logits as yet
                z.mul_(slope)
            if held is not None:
                held.take(i, z, online.peak)
            if sparse is not None:
                sparse.take(z[: sparse.at.numel()], a, online)
            if back:
                head.add_back(into.mul_(shrink[:back, None]), z, block)
            del z  # where it is memory of its own, or the next block would need as much beside it
        soft = online.finish() if again else online.record(rows, self.stats)
        if back:
            assert out is not None
            own = head.weight[targets[:back]].to(head.dtype)
            into.addcmul_(own, self._of_targets(soft)[:back, None], value=-1)
            out[rows[:back]] = into.mul_(soft.factor[:back, None])
        return soft

    def add_again(self, grads: GradientSums, rows: Tensor, scale: Tensor) -> None:
        """Add gradients of rows [n] (which have none yet) with weights scale [T] not 0, by making
        their logits again."""
        back = grads.hidden is not None
        for part in torch.split(rows, self.head.max_rows if grads.head else self.most):
            n = part.numel()
            most = n * self.head.vocab
            held = self.room_to_hold(n, grads, most, NO_ROWS) if grads.head else None
            soft = self.measure(
                part, back=n if back else 0, out=grads.hidden, held=held, again=True
            )
            if grads.hidden is not None:
                grads.hidden[part] *= scale[part, None]
            if held is not None:
                self.add_held(grads, part, held, soft, scale[part])

    def add_held(
        self,
        grads: GradientSums,
        rows: Tensor,  # [n]
        held: HeldRows,
        soft: Softmax,
        scale: Tensor,  # [n]
    ) -> None:
        """Add to the head's gradients those of the held rows whose scale is not 0; raw ones have
        theirs already."""
        head, targets = self.head, self.targets[rows]
        x, factor = self.take(rows), scale * soft.factor
        factor[held.raw] = 1.0
        online = OnlineRows(targets, head.dtype, full=False, infinite=head.bias is not None)
        online.peak = soft.peak.clone()

        def again(i: int) -> Tensor:
            a, b = held.blocks[i]
            z = head.multiply(x, head.block(a, b), a, None if head.makes_memory else held.room(i))
            slope = self._slope(z)
            online.update(z, a)  # the same logits, so below the same peak
            return z if slope is None else z.mul_(slope)

        held.add_to(grads, x, factor, soft.peak, runs(scale != 0), again)
        own = scale != 0
        own[held.raw] = False
        amount = factor * self._of_targets(soft)
        grads.subtract_targets(head, rows, x, targets, amount, own, hidden=False)

    def _slope(self, z: Tensor) -> Tensor | None:
        """`Head.slope` of a block, in memory that the next call overwrites."""
        if not self.head.softcap:
            return None
        if self._slopes.numel() < z.numel():
            self._slopes = self._slopes.new_empty(z.numel())
        return self.head.slope(z, self._slopes[: z.numel()].view(z.shape))

    def _of_targets(self, soft: Softmax) -> Tensor:
        """What `factor` makes minus the gradient by the targets' products, [n]."""
        slope = self.head.slope((soft.logp + soft.logsumexp).to(soft.rest.dtype))
        return soft.rest if slope is None else soft.rest * slope

    def room_to_hold(self, n: int, grads: GradientSums, most: int, raw: slice) -> HeldRows:
        """Room for n rows, of `most` elements beside the gradient; the next call takes it away."""
        return HeldRows.arrange(n, self.head, grads, most, self._storage, raw)

    def reserve(self, size: int) -> None:
        """Take so much memory at once, instead of less and then more."""
        self._storage(size)

    def _room(self, n: int, w: int) -> Tensor:
        return self._storage(n * w).view(n, w)

    def _storage(self, size: int) -> Tensor:
        # one buffer for all groups: fresh memory costs more than a pass over it
        if self._buffer.numel() < size:
            self._buffer = self._buffer.new_empty(size)
        return self._buffer[:size]


def runs(keep: Tensor) -> list[tuple[int, int]]:
    """Maximal runs of True in a mask [n], as (start, end)."""
    edge = torch.nn.functional.pad(keep.to(torch.int8), (1, 1)).diff()
    starts, ends = (edge == 1).nonzero().flatten(), (edge == -1).nonzero().flatten()
    return list(zip(starts.tolist(), ends.tolist(), strict=True))
