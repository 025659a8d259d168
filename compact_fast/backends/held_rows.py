"""Exponentials of some rows, held until the rows' weights are known.

The head's gradient [V, D] is memory that nothing uses until the first rows are added to it. The
exponentials of the first rows are held there: the gradient is written block by block from its
beginning, and the exponentials lie at its end, so that each is read before it is written over.
About D rows cost no memory at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from compact_fast.backends.gradients import GradientSums
from compact_fast.backends.head import Head

Blocks = list[tuple[int, int]]


@dataclass
class HeldRows:
    """exp(z - peak) of n rows in blocks of the vocabulary, each with its own running peak.

    The peak that a block was taken against is below the last one by a factor that multiplies
    [n, D] matrices instead of the block.
    """

    blocks: Blocks
    places: list[Tensor]  # [n, b - a] of every block
    peaks: list[Tensor] = field(default_factory=list)  # [n] each; the peak of each block

    @classmethod
    def arrange(
        cls, n: int, head: Head, grads: GradientSums, spare: Callable[[int], Tensor]
    ) -> HeldRows:
        """Room for n rows: in the head's gradient, if nothing has been written to it, and for the
        rest in memory that `spare` gives when asked for so many elements."""
        blocks = head.blocks(n)
        count = blocks_inside(n, blocks, head.width) if grads.unwritten else 0
        places = []
        if count:
            assert grads.weight is not None
            inside, end = grads.weight.view(-1), blocks[count - 1][1]
            for a, b in blocks[:count]:
                first = inside.numel() - n * (end - a)
                places.append(inside[first : first + n * (b - a)].view(n, b - a))
        outside = blocks[count:]
        if outside:
            start = outside[0][0]
            memory = spare(n * (head.vocab - start))
            places += [memory[n * (a - start) : n * (b - start)].view(n, b - a) for a, b in outside]
        return cls(blocks, places)

    def replace(self, start: int, gradients: Tensor) -> None:
        """Put finished logit gradients [m, V] in the place of the rows from `start` on."""
        for (a, b), place in zip(self.blocks, self.places, strict=True):
            place[start : start + gradients.shape[0]] = gradients[:, a:b]

    def add_to(
        self,
        grads: GradientSums,
        x: Tensor,  # [n, D]
        factor: Tensor,  # [n]; 1 for replaced rows
        last: Tensor,  # [n]; the last peak
        replaced: slice,
        runs: list[tuple[int, int]],
    ) -> None:
        """Add these runs of rows to the head's gradients; `factor` x exp(z - last peak) is the
        gradient by the logits."""
        if not runs:
            return
        for (a, b), place, peak in zip(self.blocks, self.places, self.peaks, strict=True):
            scale = factor * _ratio(peak, last, replaced)
            beta = 0 if grads.unwritten else 1
            for first, end in runs:
                rows = slice(first, end)
                if grads.weight is not None:
                    scaled = x[rows] * scale[rows, None]
                    grads.weight[a:b].addmm_(place[rows].T, scaled, beta=beta)
                if grads.bias is not None:
                    grads.bias[a:b].addmv_(place[rows].T, scale[rows])
                beta = 1
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


def _ratio(old: Tensor, new: Tensor, replaced: slice) -> Tensor:
    """exp(old - new), 1 for the replaced rows."""
    ratio = (old - new).exp_()
    ratio[replaced] = 1.0
    return ratio
