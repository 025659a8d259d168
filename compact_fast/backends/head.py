"""The unembedding in chunks: logits of some rows, and their contributions to the gradients.

Low-precision weights are multiplied as float32, a block of the vocabulary at a time: rounding
logits to bf16 would move a token's log-likelihood by 0.03 nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compact_fast.scores import statistics_dtype

UPCAST_BYTES = 16 << 20  # float32 copy of a block of a low-precision head
CACHE_BYTES = 1 << 20  # rows exponentiated at a time, so that the passes over them stay in cache


class Head:
    """Products with the unembedding W [V, D] and bias [V], in float32 (float64 for float64)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, chunk_bytes: int) -> None:
        self.weight = weight
        self.dtype = statistics_dtype(weight.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)
        self.vocab = weight.shape[0]
        self.row_bytes = self.vocab * self.dtype.itemsize
        self.max_rows = max(16, chunk_bytes // self.row_bytes)
        self._buffer = weight.new_empty((0, self.vocab), dtype=self.dtype)

    def _blocks(self) -> list[tuple[int, int]]:
        if self.weight.dtype == self.dtype:
            return [(0, self.vocab)]
        step = max(1, UPCAST_BYTES // (self.weight.shape[1] * self.dtype.itemsize))
        return [(v, min(v + step, self.vocab)) for v in range(0, self.vocab, step)]

    def logits(self, x: Tensor) -> Tensor:  # [n, D] -> [n, V]
        """Logits in a buffer that the next call overwrites."""
        n = x.shape[0]
        if self._buffer.shape[0] < n:
            self._buffer = self.weight.new_empty((n, self.vocab), dtype=self.dtype)
        out, x = self._buffer[:n], x.to(self.dtype)
        for a, b in self._blocks():
            torch.mm(x, self.weight[a:b].to(self.dtype).T, out=out[:, a:b])
        if self.bias is not None:
            out += self.bias
        return out

    def back_to_rows(self, g: Tensor) -> Tensor:  # [n, V] -> [n, D]
        """g W."""
        blocks = self._blocks()
        out = g[:, : blocks[0][1]] @ self.weight[: blocks[0][1]].to(self.dtype)
        for a, b in blocks[1:]:
            out.addmm_(g[:, a:b], self.weight[a:b].to(self.dtype))
        return out


@dataclass
class Statistics:
    """Per-token results, filled chunk by chunk. All [T]."""

    logp: Tensor  # 0 where there is no label
    logsumexp: Tensor  # NaN where no logits were made
    entropy: Tensor | None
    correct: Tensor | None

    @classmethod
    def empty(cls, T: int, dtype: torch.dtype, device: torch.device, full: bool) -> Statistics:
        logp = torch.zeros(T, dtype=dtype, device=device)
        return cls(
            logp=logp,
            logsumexp=torch.full_like(logp, torch.nan),
            entropy=torch.zeros_like(logp) if full else None,
            correct=torch.zeros_like(logp, dtype=torch.bool) if full else None,
        )

    def measure(self, logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        """Record the rows' statistics and turn logits [n, V] into exp(logits - max) in place.

        rows [n] are packed positions, targets [n] their labels or negative. Returns the rows'
        sums [n]: softmax = logits / sum.
        """
        labelled = targets >= 0
        at_target = logits.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
        if self.correct is not None:
            self.correct[rows] = labelled & (logits.argmax(-1) == targets)
        top = logits.new_empty(logits.shape[0])
        total = torch.empty_like(top)
        step = max(1, CACHE_BYTES // (logits.shape[1] * logits.itemsize))
        for a in range(0, logits.shape[0], step):
            block = logits[a : a + step]
            peak = block.amax(-1, keepdim=True)
            block.sub_(peak)
            if self.entropy is not None:
                p = block.softmax(-1)
                plogp = (p * block.log_softmax(-1)).sum(-1)
                self.entropy[rows[a : a + step]] = torch.where(labelled[a : a + step], -plogp, 0.0)
            block.exp_()
            torch.sum(block, -1, out=total[a : a + step])
            top[a : a + step] = peak.squeeze(1)
        log_total = total.log()
        self.logsumexp[rows] = top + log_total
        # the difference of two large numbers first: a confident row keeps its digits
        self.logp[rows] = torch.where(labelled, (at_target - top) - log_total, 0.0)
        return total


def subtract_targets(exps: Tensor, total: Tensor, targets: Tensor) -> None:
    """exps [n, V] -> exps - total * onehot(targets), in place: (softmax - onehot) * total."""
    at = targets.clamp(min=0)[:, None]
    exps.scatter_add_(1, at, torch.where(targets >= 0, -total, 0.0)[:, None])
