"""Exponentials of some rows, held until the rows' weights are known.

The head's gradient [V, D] is memory that nothing uses until the first rows are added to it. The
exponentials of the first rows are held there: the gradient is written block by block from its
beginning, and the exponentials lie at its end, so that each is read before it is written over.
About D rows cost no memory at all. What does not fit there is held beside it as far as the caller
allows; the rest of the logits are made again, which costs one more product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compact_fast.backends.gradients import GradientSums
from compact_fast.backends.head import LEAST_WIDTH, Head, off_page
from compact_fast.products import add_transposed

LINE = 64  # columns: places begin with a cache line
LEAST_INSIDE = 512  # columns of a block in the gradient, where memory allows; narrower is slower
SCRATCH = off_page(512)  # columns of a block that is made again
OWN = off_page(1024)  # of one whose product makes memory of its own

Blocks = list[tuple[int, int]]


@dataclass
class HeldRows:
    """exp(z - peak) of n rows in blocks of the vocabulary, each with its own running peak; of the
    `raw` rows the logits, which become their gradients.

    The peak that a block was taken against is below the last one by a factor that multiplies
    [n, D] matrices instead of the block.
    """

    blocks: Blocks
    places: list[Tensor | None]  # [n, b - a] of every block; None: made again
    scratch: Tensor  # [n, w] of the widest block that is made again
    peaks: Tensor  # [blocks, n]; the peak of each block
    raw: slice
    logits: list[Tensor]  # [m, b - a] of the raw rows; in the places, or beside them

    @classmethod
    def arrange(
        cls,
        n: int,
        head: Head,
        grads: GradientSums,
        most: int,
        spare: Callable[[int], Tensor],
        raw: slice,
    ) -> HeldRows:
        """Room for n rows: in the head's gradient, if nothing has been written to it, and for the
        rest in memory that `spare` gives when asked for so many elements: `most`, rounded up to
        whole columns, beside what one block takes that is made again."""
        start, end, again = _plan(n, head, grads.unwritten, most)
        blocks = _blocks_inside(n, start, head)
        places: list[Tensor | None] = []
        if start:
            assert grads.weight is not None
            inside = grads.weight.view(-1)
            for a, b in blocks:
                first = inside.numel() - n * (start - a)
                places.append(inside[first : first + n * (b - a)].view(n, b - a))
        held = _cut(start, end, _block_width(n, head))
        widest = _widest(again, head)
        memory = spare(n * (end - start + widest))
        places += [memory[n * (a - start) : n * (b - start)].view(n, b - a) for a, b in held]
        places += [None] * len(again)
        scratch = memory[n * (end - start) :].view(n, widest)
        blocks = [*blocks, *held, *again]
        logits = [
            scratch.new_empty(raw.stop - raw.start, b - a) if place is None else place[raw]
            for (a, b), place in zip(blocks, places, strict=True)
        ]
        peaks = scratch.new_empty(len(blocks), n)
        return cls(blocks, places, scratch, peaks, raw, logits)

    def room(self, i: int) -> Tensor:
        """Where the logits of block i are written."""
        place, (a, b) = self.places[i], self.blocks[i]
        if place is None:
            n = self.scratch.shape[0]
            place = self.scratch.view(-1)[: n * (b - a)].view(n, b - a)
        return place

    def take(self, i: int, z: Tensor, peak: Tensor) -> None:
        """What block i's logits have become, in its room or in memory of its own."""
        self.peaks[i] = peak
        place = self.places[i]
        if place is None:
            self.logits[i].copy_(z[self.raw])
        elif place.data_ptr() != z.data_ptr():
            place.copy_(z)

    def add_to(
        self,
        grads: GradientSums,
        x: Tensor,  # [n, D]
        factor: Tensor,  # [n]; 1 for raw rows
        last: Tensor,  # [n]; the last peak
        runs: list[tuple[int, int]],
        again: Callable[[int], Tensor],
    ) -> None:
        """Add these runs of rows to the head's gradients; `factor` x exp(z - last peak) is the
        gradient by the logits, but raw rows have theirs. `again` makes exp(z - last peak) of a
        block that is not held."""
        if not runs:
            return
        scaled = x.new_empty(x.shape)  # once: fresh memory costs more than the products by scale
        for i, (a, b) in enumerate(self.blocks):
            exps = self.places[i]
            if exps is None:
                exps, scale = again(i), factor
                exps[self.raw] = self.logits[i]
            else:
                scale = factor * self._ratio(self.peaks[i], last)
            torch.mul(x, scale[:, None], out=scaled)
            overwrite = grads.unwritten
            for first, end in runs:
                rows = slice(first, end)
                if grads.weight is not None:
                    into = grads.weight[a:b]
                    add_transposed(into, exps[rows], scaled[rows], overwrite=overwrite)
                if grads.bias is not None:
                    grads.bias[a:b].addmv_(exps[rows].T, scale[rows])
                overwrite = False
            del exps  # as in RowPass.measure
        grads.unwritten = False

    def _ratio(self, old: Tensor, new: Tensor) -> Tensor:
        """exp(old - new), 1 for raw rows."""
        ratio = (old - new).exp_()
        ratio[self.raw] = 1.0
        return ratio


def columns_inside(n: int, head: Head) -> int:
    """How many columns of n rows' exponentials fit the head's gradient [V, D], from the first on.

    They lie at its end in order. Block (a, b) must begin behind the gradient's own rows up to b,
    which are written while it is read: V D - n (end - a) >= b D, for the first and the last of
    blocks that are LEAST_INSIDE wide, and so for those between.
    """
    V, D = head.vocab, head.width
    first = (V - LEAST_INSIDE) * D // n
    last = V - -(-LEAST_INSIDE * n // D)
    end = min(first, last, V - LEAST_INSIDE)
    return end // LINE * LINE if end >= LEAST_INSIDE else 0


def _blocks_inside(n: int, end: int, head: Head) -> Blocks:
    """The columns that lie in the gradient, in blocks as wide as it allows: what has been read
    leaves room for more of its rows, where n > D."""
    V, D = head.vocab, head.width
    blocks, a, most = [], 0, _block_width(n, head)
    while a < end:
        room = (V * D - n * (end - a)) // D - a  # rows of the gradient before the exponentials
        width = max(LEAST_INSIDE, room // LEAST_INSIDE * LEAST_INSIDE)
        width = min(most, off_page(width), end - a)
        blocks.append((a, a + width))
        a += width
    return blocks


def _plan(n: int, head: Head, inside: bool, most: int) -> tuple[int, int, Blocks]:
    """Columns up to the first lie in the gradient, up to the second in `most` elements of memory
    beside it; blocks of the others, which are made again. Those need room for one of them: they are
    narrow."""
    start = columns_inside(n, head) if inside else 0
    end = min(head.vocab, start + -(-most // (n * LINE)) * LINE)
    return start, end, _cut(end, head.vocab, OWN if head.makes_memory else SCRATCH)


def _block_width(n: int, head: Head) -> int:
    """Of what is held: the maths library's own memory grows with a product's width."""
    return min(head.block_width(n), LEAST_WIDTH)


def _cut(start: int, end: int, width: int) -> Blocks:
    return [(a, min(a + width, end)) for a in range(start, end, width)]


def _widest(again: Blocks, head: Head) -> int:
    """Columns for which there must be room."""
    return 0 if head.makes_memory or not again else again[0][1] - again[0][0]


def most_asked(sizes: Sequence[int], head: Head, inside: bool, most: int) -> int:
    """The elements that `arrange` asks for at most, for groups of so many rows in turn."""
    asked = [0]
    for i, n in enumerate(sizes):
        start, end, again = _plan(n, head, inside and i == 0, most)
        asked.append(n * (end - start + _widest(again, head)))
    return max(asked)


def most_inside(head: Head, spare: int) -> int:
    """So many rows at most can be held in the head's gradient and `spare` elements."""
    n = head.width + spare // head.vocab
    while n > spare // head.vocab and n * (head.vocab - columns_inside(n, head)) > spare:
        n -= max(1, n // 64)
    return max(n, spare // head.vocab)


def least_spare(sizes: Sequence[int], head: Head, inside: bool, share: float) -> int:
    """The least elements beside the head's gradient with which no more than this share of the
    logits of groups of so many rows is made again. inside: the first group finds room in it."""
    outside = [n * head.vocab for n in sizes]
    if inside and sizes:
        outside[0] -= sizes[0] * columns_inside(sizes[0], head)
    left = share * sum(sizes) * head.vocab
    # what is made again falls by as many elements a step as there are groups that need more
    spare, needs = max(outside, default=0), sorted(outside, reverse=True)
    for rank, need in enumerate(needs, start=1):
        step = need - (needs[rank] if rank < len(needs) else 0)
        if rank * step > left:
            return spare - int(left / rank)
        spare, left = spare - step, left - rank * step
    return 0
