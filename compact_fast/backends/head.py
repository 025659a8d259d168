"""The unembedding in blocks of the vocabulary: logits of some rows, and products back to rows.

A block is small enough to stay in cache from the product that makes its logits to the one that
uses them. Low-precision weights are multiplied as float32, a block at a time: rounding logits to
bf16 would move a token's log-likelihood by 0.03 nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from compact_fast.products import LONGEST, ROWS, multiply, quick
from compact_fast.scores import statistics_dtype
from compact_fast.softcap import cap_, slope

BLOCK_BYTES = 4 << 20  # logits of a block of the vocabulary, to stay in cache
LEAST_WIDTH = 2048  # of a block, where there are many rows; narrower products are slower
ALIGNED = 1024  # blocks are so many entries times n, less LESS: rows that straddle cache lines are
LESS = 32  # slow, and so are rows whole pages apart, which share a few places in the cache
UPCAST_BYTES = 16 << 20  # float32 copy of a block of a low-precision head
LEAST_ROWS = 16  # a chunk has at least so many rows, however large the vocabulary


def off_page(width: int) -> int:
    """About so many columns, such that rows of them are not whole pages apart."""
    return width - LESS if width > LESS else width


class Head:
    """Products with the unembedding W [V, D] and bias [V], in float32 (float64 for float64).

    softcap: of the logits; 0: none.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, chunk_bytes: int, softcap: float = 0.0
    ) -> None:
        self.weight, self.softcap = weight, softcap
        self.dtype = statistics_dtype(weight.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)
        self.vocab, self.width = weight.shape
        self.row_bytes = self.vocab * self.dtype.itemsize
        self.max_rows = max(LEAST_ROWS, chunk_bytes // self.row_bytes)
        self._widest = self.vocab
        if weight.dtype != self.dtype:
            widest = UPCAST_BYTES // (weight.shape[1] * self.dtype.itemsize)
            self._widest = widest // ALIGNED * ALIGNED or max(1, widest)
        self._buffer = weight.new_empty((0, self.vocab), dtype=self.dtype)
        self._quick = quick(self._buffer)
        if self._quick is not None:
            self._widest = min(self._widest, LONGEST)  # what products back to rows sum over

    @property
    def bytes(self) -> int:
        """Of W in the dtype of the products."""
        return self.width * self.row_bytes

    @property
    def makes_memory(self) -> bool:
        """Whether products come in memory of their own, whatever they are asked to write to."""
        return self._quick is not None

    def block_width(self, rows: int) -> int:
        """Of a block of the vocabulary, for so many rows."""
        width = max(LEAST_WIDTH, BLOCK_BYTES // (max(1, rows) * self.dtype.itemsize))
        return min(off_page(width // ALIGNED * ALIGNED or width), self._widest)

    def blocks(self, rows: int) -> list[tuple[int, int]]:
        """The vocabulary in blocks for so many rows."""
        width = self.block_width(rows)
        return [(a, min(a + width, self.vocab)) for a in range(0, self.vocab, width)]

    def block(self, a: int, b: int) -> Tensor:  # [b - a, D]
        """Rows a to b of W, in the dtype of the products."""
        return self.weight[a:b].to(self.dtype)

    def multiply(self, x: Tensor, block: Tensor, a: int, out: Tensor | None) -> Tensor:
        """Logits of x [n, D] for the vocabulary block [w, D] that begins at a: [n, w].

        They are written into `out`, unless the head `makes_memory`.
        """
        if self._quick is None:
            assert out is not None
            z = multiply(out, x, block.T)
        else:
            z = self._quick(x, block)
        if self.bias is not None:
            z += self.bias[a : a + block.shape[0]]
        return cap_(z, self.softcap)

    def slope(self, z: Tensor, out: Tensor | None = None) -> Tensor | None:
        """What a gradient by these logits is multiplied with to be one by the products; None: 1."""
        return slope(z, self.softcap, out) if self.softcap else None

    def add_back(self, into: Tensor, g: Tensor, block: Tensor) -> None:
        """Add the first n rows of g [n or more, w] times the vocabulary block [w, D] to `into`
        [n, D]."""
        n = into.shape[0]
        if self._quick is None:
            multiply(into, g[:n], block, add=True)
        else:  # rows that are there anyway spare it a copy of all with some made up
            into += self._quick(g[: -(-n // ROWS) * ROWS], block.T)[:n]

    def logits(self, x: Tensor) -> Tensor:  # [n, D] -> [n, V]
        """All logits of some rows, in a buffer that the next call overwrites."""
        n = x.shape[0]
        if self._buffer.shape[0] < n:
            self._buffer = self.weight.new_empty((n, self.vocab), dtype=self.dtype)
        out, x = self._buffer[:n], x.to(self.dtype)
        for a, b in self.blocks(n):
            z = self.multiply(x, self.block(a, b), a, out[:, a:b])
            if self.makes_memory:
                out[:, a:b] = z
        return out

    def back_to_rows(self, parts: list[Tensor], blocks: Sequence[Tensor] = ()) -> Tensor:
        """g W of all parts [n, V], one below another, and below them of rows that are given in
        `blocks` of the vocabulary [n, w]: [sum of n, D]."""
        n = sum(g.shape[0] for g in (*parts, *blocks[:1]))
        out = self.weight.new_zeros((n, self.width), dtype=self.dtype)
        ends = list(accumulate(g.shape[1] for g in blocks))
        edges = zip([0, *ends], ends, strict=False) if blocks else self.blocks(n)
        for i, (a, b) in enumerate(edges):
            found = [*(g[:, a:b] for g in parts), *blocks[i : i + 1]]
            g = found[0] if len(found) == 1 else torch.cat(found)
            self.add_back(out, g, self.block(a, b))
        return out
