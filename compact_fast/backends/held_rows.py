"""Exponentials of some rows, held until the rows' weights are known.

The head's gradient [V, D] is memory that nothing uses until the first rows are added to it. The
exponentials of the first rows are held there: the gradient is written block by block from its
beginning, and the exponentials lie at its end, so that each is read before it is written over.
About D rows cost no memory at all. Of what does not fit there, only as much is held as keeps the
share of the logits that are made again small: they cost one more product each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compact_fast.backends.gradients import GradientSums
from compact_fast.backends.head import ALIGNED, BLOCK_BYTES, Head
from compact_fast.products import add_transposed

LINE = 64  # columns: places begin with a cache line

Blocks = list[tuple[int, int]]


@dataclass
class HeldRows:
    """exp(z - peak) of n rows in blocks of the vocabulary, each with its own running peak.

    The peak that a block was taken against is below the last one by a factor that multiplies
    [n, D] matrices instead of the block.
    """

    blocks: Blocks
    places: list[Tensor | None]  # [n, b - a] of every block; None: made again
    scratch: Tensor  # [n, w] of the widest block that is made again
    peaks: Tensor  # [blocks, n]; the peak of each block

    @classmethod
    def arrange(
        cls, n: int, head: Head, grads: GradientSums, most: int, spare: Callable[[int], Tensor]
    ) -> HeldRows:
        """Room for n rows: in the head's gradient, if nothing has been written to it, and for the
        rest in memory that `spare` gives when asked for so many elements: `most`, rounded up to
        whole columns, beside what one block takes that is made again."""
        blocks = head.blocks(n)
        count = blocks_inside(n, blocks, head.width) if grads.unwritten else 0
        places: list[Tensor | None] = []
        if count:
            assert grads.weight is not None
            inside, end = grads.weight.view(-1), blocks[count - 1][1]
            for a, b in blocks[:count]:
                first = inside.numel() - n * (end - a)
                places.append(inside[first : first + n * (b - a)].view(n, b - a))
        start = blocks[count - 1][1] if count else 0
        end = min(head.vocab, start + -(-most // (n * LINE)) * LINE)
        held = [(a, min(b, end)) for a, b in blocks[count:] if a < end]
        # what is made again needs room for a block beside what is held: narrow ones
        width = max(ALIGNED, BLOCK_BYTES // (n * head.dtype.itemsize) // ALIGNED * ALIGNED)
        again = [(a, min(a + width, head.vocab)) for a in range(end, head.vocab, width)]
        widest = 0 if head.makes_memory or not again else again[0][1] - again[0][0]
        memory = spare(n * (end - start + widest))
        places += [memory[n * (a - start) : n * (b - start)].view(n, b - a) for a, b in held]
        places += [None] * len(again)
        scratch = memory[n * (end - start) :].view(n, widest)
        blocks = [*blocks[:count], *held, *again]
        return cls(blocks, places, scratch, scratch.new_empty(len(blocks), n))

    def room(self, i: int) -> Tensor:
        """Where the logits of block i are written."""
        place, (a, b) = self.places[i], self.blocks[i]
        if place is None:
            n = self.scratch.shape[0]
            place = self.scratch.view(-1)[: n * (b - a)].view(n, b - a)
        return place

    def add_to(
        self,
        grads: GradientSums,
        x: Tensor,  # [n, D]
        factor: Tensor,  # [n]; 1 for replaced rows
        last: Tensor,  # [n]; the last peak
        replaced: slice,
        gradients: Tensor | None,  # [m, V]; finished logit gradients of the replaced rows
        runs: list[tuple[int, int]],
        again: Callable[[int], Tensor],
    ) -> None:
        """Add these runs of rows to the head's gradients; `factor` x exp(z - last peak) is the
        gradient by the logits. `again` makes exp(z - last peak) of a block that is not held."""
        if not runs:
            return
        scaled = x.new_empty(x.shape)  # once: fresh memory costs more than the products by scale
        for i, ((a, b), peak) in enumerate(zip(self.blocks, self.peaks, strict=True)):
            place = self.places[i]
            if place is None:
                exps, scale = again(i), factor
            else:
                exps, scale = place, factor * _ratio(peak, last, replaced)
            if gradients is not None:
                exps[replaced] = gradients[:, a:b]
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
            del exps, scale  # as in RowPass.measure
        grads.unwritten = False


def blocks_inside(n: int, blocks: Blocks, width: int) -> int:
    """How many blocks of n rows' exponentials fit a gradient [V, width], from the first on.

    They lie at its end in order; block (a, b) must begin behind the gradient's own rows up to b,
    which are written while it is read.
    """
    vocab = blocks[-1][1]
    for count in range(len(blocks), 0, -1):
        end = blocks[count - 1][1]
        if all(vocab * width - n * (end - a) >= b * width for a, b in blocks[:count]):
            return count
    return 0


def most_inside(head: Head, spare: int) -> int:
    """So many rows at most can be held in the head's gradient and `spare` elements."""
    n = head.width + spare // head.vocab
    while n > spare // head.vocab:
        blocks = head.blocks(n)
        count = blocks_inside(n, blocks, head.width)
        start = blocks[count - 1][1] if count else 0
        if n * (head.vocab - start) <= spare:
            break
        n -= max(1, n // 64)
    return max(n, spare // head.vocab)


def least_spare(sizes: Sequence[int], head: Head, inside: bool, share: float) -> int:
    """The least elements beside the head's gradient with which no more than this share of the
    logits of groups of so many rows is made again. inside: the first group finds room in it."""
    outside = []
    for i, n in enumerate(sizes):
        blocks = head.blocks(n)
        count = blocks_inside(n, blocks, head.width) if inside and i == 0 else 0
        outside.append(n * (head.vocab - (blocks[count - 1][1] if count else 0)))
    left = share * sum(sizes) * head.vocab
    # what is made again falls by as many elements a step as there are groups that need more
    spare, needs = max(outside, default=0), sorted(outside, reverse=True)
    for rank, need in enumerate(needs, start=1):
        step = need - (needs[rank] if rank < len(needs) else 0)
        if rank * step > left:
            return spare - int(left / rank)
        spare, left = spare - step, left - rank * step
    return 0


def _ratio(old: Tensor, new: Tensor, replaced: slice) -> Tensor:
    """exp(old - new), 1 for the replaced rows."""
    ratio = (old - new).exp_()
    ratio[replaced] = 1.0
    return ratio
