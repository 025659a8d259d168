"""Sums of gradients over the rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compact_fast.backends.head import Head
from compact_fast.backends.protocol import Gradients, Needs
from compact_fast.chunks import Chunks, bytes_of
from compact_fast.heap import MOST_IN_HEAP
from compact_fast.products import add_transposed

FEW = 256  # rows copied at a time

_CHUNKS = Chunks()


@dataclass
class GradientSums:
    """Gradients of the sum over questions, in the statistics' dtype. None: not needed."""

    hidden: Tensor | None  # [T, D]
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]
    unwritten: bool = False  # `weight` is memory as it came, no zeros yet

    @classmethod
    def empty(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs, dtype: torch.dtype
    ) -> GradientSums:
        """Nothing yet of what is needed."""
        return cls(
            torch.zeros_like(hidden, dtype=dtype) if needs.hidden else None,
            _empty(weight, dtype) if needs.weight else None,
            torch.zeros_like(bias, dtype=dtype) if needs.bias and bias is not None else None,
            unwritten=needs.weight,
        )

    @property
    def head(self) -> bool:
        """Whether the head has a gradient, for which a row's weight must be known beforehand."""
        return self.weight is not None or self.bias is not None

    @property
    def any(self) -> bool:
        """Whether there is anything to do."""
        return self.hidden is not None or self.head

    def settle(self) -> None:
        """Make `weight` zeros, unless something has been written to all of it.

        The first product into it overwrites instead, where it can: that saves two passes over
        the largest matrix here.
        """
        if self.unwritten and self.weight is not None:
            self.weight.zero_()
        self.unwritten = False

    def add(self, head: Head, at: Tensor, x: Tensor, g: Tensor, scale: Tensor) -> None:
        """Rows `at` [n], with hidden x [n, D] and logit gradients g [n, V] times scale [n]."""
        self.settle()
        if self.hidden is not None:
            self.hidden.index_add_(0, at, head.back_to_rows([g]) * scale[:, None])
        if self.weight is not None:
            add_transposed(self.weight, g, x.to(head.dtype) * scale[:, None])
        if self.bias is not None:
            self.bias.addmv_(g.T, scale)

    def add_columns(self, head: Head, at: Tensor, x: Tensor, g: Tensor, columns: Tensor) -> None:
        """The same where only some columns [k] of the vocabulary are there: g [n, k], scaled."""
        self.settle()
        if columns.numel() == 0:
            return
        if self.hidden is not None:
            self.hidden.index_add_(0, at, g @ head.weight[columns].to(head.dtype))
        if self.weight is not None:
            self.weight.index_add_(0, columns, g.T @ x)
        if self.bias is not None:
            self.bias.index_add_(0, columns, g.sum(0))

    def subtract_targets(
        self,
        head: Head,
        at: Tensor,  # [n]
        x: Tensor,  # [n, D]
        targets: Tensor,  # [n]
        amount: Tensor,  # [n]
        live: Tensor,  # [n] bool
        hidden: bool = True,
    ) -> None:
        """The target's share of packed positions `at`, where `live`: its logit gradient is -amount.

        hidden: of the hidden states' gradient too.
        """
        self.settle()
        for some in torch.split(live.nonzero().squeeze(1), FEW):
            own, less = targets[some], -amount[some]
            if hidden and self.hidden is not None:
                share = head.weight[own].to(head.dtype) * less[:, None]
                self.hidden.index_add_(0, at[some], share)
            if self.weight is not None:
                self.weight.index_add_(0, own, x[some].mul_(less[:, None]))
            if self.bias is not None:
                self.bias.index_add_(0, own, less)

    def finish(
        self, normalizer: float, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Gradients:
        """Divided by the normalizer, in the dtype of what they belong to."""
        self.settle()
        whole = normalizer == 1  # a pass over memory for nothing
        sums, owners = (self.hidden, self.weight, self.bias), (hidden, weight, bias)
        return Gradients(
            *(
                None if g is None or o is None else (g if whole else g.div_(normalizer)).to(o.dtype)
                for g, o in zip(sums, owners, strict=True)
            )
        )


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for a head's gradient; the one before's, if that is gone and was large."""
    shape = tuple(like.shape)
    if like.device.type != "cpu" or bytes_of(shape, dtype) <= MOST_IN_HEAP:
        return torch.empty(shape, dtype=dtype, device=like.device)
    return _CHUNKS.whole(shape, dtype)


def give_back() -> None:
    """Return the memory of gradients that are gone to the system."""
    _CHUNKS.give_back()
