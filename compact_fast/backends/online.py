"""Softmax statistics of rows whose logits come one block of the vocabulary after another.

With m the largest logit met so far, the sum over entries is kept as s = sum_v exp(z_v - m); when m
grows to m', everything relative to it shrinks by exp(m - m'). The target's own entry y is kept out
of s, so that what a confident row still has to learn is not the difference of two numbers near 1:

    1 - p_y = s / (s + exp(z_y - m))        -log p_y = log(1 + exp(log s + m - z_y))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compact_fast.backends.assembly import TokenStatistics
from compact_fast.native import native_with

NO_ROWS = slice(0, 0)
CACHE_BYTES = 8 << 20  # exponentiated at a time, so that the passes over them stay in cache


class OnlineRows:
    """Running statistics of n rows. `targets` [n]: their labels, negative where there is none.

    full: entropy and correctness too. infinite: a logit may be -inf (a bias that masks entries).
    """

    def __init__(
        self, targets: Tensor, dtype: torch.dtype, full: bool, infinite: bool = False
    ) -> None:
        self.targets = targets
        n = targets.numel()
        # finite, so that differences of two of them are; small enough that the differences fit
        lowest = torch.finfo(dtype).min / 4
        self.peak = torch.full((n,), lowest, dtype=dtype, device=targets.device)
        self.rest = torch.zeros_like(self.peak)  # sum of exp(z - peak) without the target
        self.at_target = torch.full_like(self.peak, -torch.inf)
        self._shrink = torch.empty_like(self.peak)
        self._left_out = 2 * lowest  # in the target's place: below any peak by enough for exp
        self._infinite = infinite
        self._pz = torch.zeros_like(self.peak) if full else None  # sum of exp(z-peak) (z-peak)
        # whether an entry before the target is as large: then that one is the prediction
        self._preceded = torch.zeros_like(targets, dtype=torch.bool) if full else None
        # one piece of memory for all passes: fresh memory costs more than they do
        self._distances = self.peak.new_empty(0)
        plain = dtype == torch.float32 and targets.device.type == "cpu"
        self._native = native_rows() if plain else None

    def update(self, z: Tensor, a: int, raw: slice = NO_ROWS) -> Tensor:
        """Turn logits z [n, w] of vocabulary entries a to a + w into exp(z - peak), in place.

        The target's entry becomes 0; `raw` rows stay what they are. Returns exp(old peak - new
        peak) [n], the factor by which whatever the caller keeps relative to the peak shrinks; the
        next call overwrites it and the peak. New memory for them would lie behind the block's and
        keep the heap from using that again for the next block.
        """
        if self._native is not None and z.stride(1) == 1:
            return self._update_natively(self._native, z, a, raw)
        w = z.shape[1]
        logits = z[raw].clone()
        at = self.targets - a
        here = (at >= 0) & (at < w)
        at = at.clamp(0, w - 1)
        value = z.gather(1, at[:, None]).squeeze(1)
        self.at_target = torch.where(here, value, self.at_target)
        z.scatter_(1, at[:, None], torch.where(here, self._left_out, value)[:, None])
        old, peak, total = self.peak, torch.empty_like(self.peak), torch.empty_like(self.peak)
        more = None if self._pz is None else torch.empty_like(peak)
        if self._preceded is not None:
            self._preceded |= here & (old >= value)
        step = max(1, CACHE_BYTES // (w * z.itemsize))
        for i in range(0, z.shape[0], step):
            part = z[i : i + step]
            rows = slice(i, i + part.shape[0])
            top = part.amax(-1)
            if self._preceded is not None:
                tie = here[rows] & (top == value[rows])
                if bool(tie.any()):
                    self._preceded[rows][tie] |= part[tie].argmax(-1) < at[rows][tie]
            top = torch.maximum(top, old[rows])
            if more is None:
                part.sub_(top[:, None]).exp_()
            else:
                distance = torch.sub(part, top[:, None], out=self._room(part))
                torch.exp(distance, out=part)
                if self._infinite:
                    distance.clamp_(min=-1e4)  # -inf x 0 is not 0
                torch.sum(distance.mul_(part), -1, out=more[rows])
            torch.sum(part, -1, out=total[rows])
            peak[rows] = top
        z[raw] = logits
        shrink = (old - peak).exp_()
        if self._pz is not None and more is not None:
            self._pz = shrink * (self._pz + (old - peak) * self.rest) + more
        self.rest = self.rest * shrink + total
        self.peak = peak
        return shrink

    def _update_natively(
        self, softmax_rows: Callable[..., None], z: Tensor, a: int, raw: slice
    ) -> Tensor:
        """The same in two passes of the native module (csrc/row_softmax.h), in place."""
        state = (
            self.targets, self.peak, self.rest, self.at_target, self._pz, self._preceded,
            self._shrink,
        )  # fmt: skip
        addresses = (0 if t is None else t.data_ptr() for t in state)
        more = (raw.start, raw.stop, torch.get_num_threads())
        softmax_rows(z.data_ptr(), z.stride(0), *z.shape, a, *addresses, *more)
        return self._shrink

    def _room(self, part: Tensor) -> Tensor:
        """Memory in the shape of a part."""
        if self._distances.numel() < part.numel():
            self._distances = self._distances.new_empty(part.numel())
        return self._distances[: part.numel()].view(part.shape)

    def finish(self) -> Softmax:
        """The rows' statistics, once all of the vocabulary has been met."""
        labelled = self.targets >= 0
        top = torch.maximum(self.peak, self.at_target)
        grow, own = (self.peak - top).exp(), (self.at_target - top).exp()
        total = self.rest * grow + own
        # float64: the last bit of a float32 is more than a row's sums are off by
        rest, peak, at_target = self.rest.double(), self.peak.double(), self.at_target.double()
        against = rest.log() + (peak - at_target)  # log odds of any other entry
        logp = torch.where(labelled, -torch.logaddexp(torch.zeros_like(against), against), 0.0)
        entropy = correct = None
        if self._pz is not None and self._preceded is not None:
            others = grow * (self._pz + (self.peak - top) * self.rest)
            mine = torch.where(own > 0, own * (self.at_target - top), 0.0)
            entropy = torch.where(labelled, total.log() - (others + mine) / total, 0.0)
            largest = (self.at_target >= self.peak) & self.rest.isfinite()
            correct = labelled & largest & ~self._preceded
        return Softmax(
            factor=grow / total,
            rest=self.rest,
            peak=self.peak,
            logp=logp,
            logsumexp=top + total.double().log(),
            entropy=entropy,
            correct=correct,
        )

    def record(self, rows: Tensor, stats: TokenStatistics) -> Softmax:
        """`finish`, and write the statistics of packed positions rows [n] where they belong."""
        found = self.finish()
        stats.record(rows, found)
        return found


@dataclass(frozen=True)
class Softmax:
    """What is known of n rows at the end. All [n]."""

    factor: Tensor  # exp(z - peak) x factor = softmax
    rest: Tensor  # rest x factor = 1 - p of the target, without cancellation
    peak: Tensor
    logp: Tensor  # float64, as is the next
    logsumexp: Tensor
    entropy: Tensor | None
    correct: Tensor | None

    def select(self, rows: slice) -> Softmax:
        """Of some of the rows."""
        values = (getattr(self, name) for name in self.__dataclass_fields__)
        return Softmax(*(None if v is None else v[rows] for v in values))  # type: ignore[arg-type]


def native_rows() -> Callable[..., None] | None:
    """`softmax_rows` of the native module, or None; then torch's operations do the same."""
    module = native_with("softmax_rows", "the loss on a CPU takes a few percent longer")
    return None if module is None else module.softmax_rows
