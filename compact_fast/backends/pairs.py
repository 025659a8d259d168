"""Divergences between rows of logits that are compared with one another, and their gradient.

For a set of rows with log-probabilities a_i = log p_i and coefficients c_ij = c_ji:

    value       = sum_{i<j} c_ij (KL(p_i || p_j) + KL(p_j || p_i))
    d / d z_i   = sum_j c_ij [p_i (a_i - a_j - KL(p_i || p_j)) + p_i - p_j]

Logits come in blocks of the vocabulary: once around for the divergences, once more for the
gradient, in place. On a CPU in float32 the native module takes each block in one pass
(csrc/pairs.h); torch's operations do the same elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from compact_fast.native import native_with

STEP_BYTES = 1 << 20  # logits compared at a time by torch's operations
LEAST = -1e30  # for a log-probability of -inf: the difference of two of them is 0


@dataclass(frozen=True)
class Aligned:
    """R sets of at most K rows each, one of every teacher of a question."""

    rows: Tensor  # [R, K]; row numbers, none twice among those inside
    inside: Tensor  # [R, K]; False: no row of its own there, the number is another one's
    coefficients: Tensor  # [R, K, K]; 0 on the diagonal and where either row is not inside


class Comparison:
    """Rows of logits in sets. `add` every block; `values`; `differentiate` all blocks.

    logsumexp [A]: of every row of logits, float64.
    """

    def __init__(self, aligned: Sequence[Aligned], logsumexp: Tensor) -> None:
        self.aligned = aligned
        self.logsumexp = logsumexp
        self.kl = [torch.zeros_like(s.coefficients, dtype=torch.float64) for s in aligned]
        alone = torch.ones_like(logsumexp, dtype=torch.bool)
        for s in aligned:
            alone[s.rows[s.inside]] = False
        self._alone = alone.nonzero().squeeze(1)
        self._flat: _Flat | None = None

    def add(self, z: Tensor) -> None:
        """Take in a block of the logits, [A, w]."""
        native = self._native(z)
        if native is not None:
            native.add(z)
            return
        for s, kl in zip(self.aligned, self.kl, strict=True):
            for step in self._steps(s, z):
                a, p = self._probabilities(z, s.rows[step])
                a -= a.mean(1, keepdim=True)  # only differences matter, and smaller products
                cross = p @ a.transpose(1, 2)  # [R, K, K]: <p_i, a_j>
                kl[step] += cross.diagonal(dim1=1, dim2=2)[:, :, None] - cross

    def values(self) -> Tensor:
        """sum_{i<j} c_ij (KL(p_i || p_j) + KL(p_j || p_i)) of each of `aligned`, one at least;
        float64."""
        self._collect()
        found = [(s.coefficients * kl).sum() for s, kl in zip(self.aligned, self.kl, strict=True)]
        return torch.stack(found)

    def differentiate(self, blocks: Sequence[Tensor], scale: Tensor, pull: float) -> None:
        """Turn logits, [A, w] each, into scale [A] x softmax + pull x the values' gradient."""
        self._collect()
        constants = [
            scale[s.rows] - pull * (s.coefficients * kl).sum(-1).to(scale.dtype)
            for s, kl in zip(self.aligned, self.kl, strict=True)
        ]
        native = self._native(blocks[0])
        if native is not None:
            native.differentiate(blocks, [*constants, scale[self._alone]], pull)
            return
        for z in blocks:
            for s, constant in zip(self.aligned, constants, strict=True):
                self._differentiate(z, s, constant, pull)
            for rows in torch.split(self._alone, max(1, STEP_BYTES // (z.shape[1] * z.itemsize))):
                z[rows] = self._probabilities(z, rows)[1].mul_(scale[rows][:, None])

    def _differentiate(self, z: Tensor, s: Aligned, constant: Tensor, pull: float) -> None:
        """By torch's operations, the rows of some sets; constant [R, K] is a row's factor of p."""
        for step in self._steps(s, z):
            rows, inside, c = s.rows[step], s.inside[step], pull * s.coefficients[step]
            a, p = self._probabilities(z, rows)
            a -= a.mean(1, keepdim=True)
            differences = torch.diag_embed(c.sum(-1)) - c  # times a: sum_j c_ij (a_i - a_j)
            slope = (differences @ a).add_(constant[step, :, None])
            g = torch.baddbmm(slope.mul_(p), differences, p)
            z[rows[inside]] = g[inside]

    def _probabilities(self, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """log p and p of some rows."""
        shift = self.logsumexp[rows]
        high = shift.to(z.dtype)  # near it the difference is exact
        a = z[rows].sub_(high[..., None]).sub_((shift - high).to(z.dtype)[..., None])
        return a.clamp_(min=LEAST), a.exp()

    def _steps(self, s: Aligned, z: Tensor) -> list[slice]:
        step = max(1, STEP_BYTES // (s.rows.shape[1] * z.shape[1] * z.itemsize))
        return [slice(r, r + step) for r in range(0, s.rows.shape[0], step)]

    def _native(self, z: Tensor) -> _Flat | None:
        if z.device.type != "cpu" or z.dtype != torch.float32 or z.stride(1) != 1:
            return None
        module = native_pairs()
        if module is None or any(s.rows.shape[1] > module.most_compared for s in self.aligned):
            return None
        if self._flat is None:
            self._flat = _Flat(module, self.aligned, self._alone, self.logsumexp)
        return self._flat

    def _collect(self) -> None:
        """What the native module has added up."""
        if self._flat is not None:
            self._flat.move_to(self.kl)


class _Flat:
    """The sets as the native module takes them: one behind another, without what is not inside;
    rows in none of them come last, each alone."""

    def __init__(
        self, module: ModuleType, aligned: Sequence[Aligned], alone: Tensor, logsumexp: Tensor
    ) -> None:
        self._module, self._aligned, self._logsumexp = module, aligned, logsumexp
        self._pairs = [s.inside[:, :, None] & s.inside[:, None, :] for s in aligned]
        sizes = [s.inside.sum(1) for s in aligned]
        self._sets = sum(len(n) for n in sizes)
        counts = torch.cat([*sizes, torch.ones_like(alone)])
        self._cu = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        self._members = torch.cat([*(s.rows[s.inside] for s in aligned), alone])
        found = [s.coefficients[m] for s, m in zip(aligned, self._pairs, strict=True)]
        none = logsumexp.new_zeros(len(alone))
        self._coefficients = torch.cat([*found, none]).float()
        self._kl = torch.zeros_like(self._coefficients, dtype=torch.float64)

    def add(self, z: Tensor) -> None:
        threads = torch.get_num_threads()
        self._module.pair_divergences(*self._of(z, self._sets), self._kl.data_ptr(), threads)

    def move_to(self, kl: Sequence[Tensor]) -> None:
        first = 0
        for into, mask in zip(kl, self._pairs, strict=True):
            end = first + int(mask.sum())
            into[mask] += self._kl[first:end]
            first = end
        self._kl.zero_()

    def differentiate(
        self, blocks: Sequence[Tensor], constants: Sequence[Tensor], pull: float
    ) -> None:
        parts = [c[s.inside] for c, s in zip(constants, self._aligned, strict=False)]
        constant = torch.cat([*parts, constants[-1]]).float()
        c = self._coefficients * pull
        sets, more = len(self._cu) - 1, (constant.data_ptr(), c.data_ptr(), torch.get_num_threads())
        for z in blocks:
            self._module.pair_gradients(*self._of(z, sets), *more)

    def _of(self, z: Tensor, sets: int) -> tuple[int, ...]:
        addresses = (t.data_ptr() for t in (self._cu, self._members, self._logsumexp))
        return z.data_ptr(), z.stride(0), z.shape[1], sets, *addresses


def native_pairs() -> ModuleType | None:
    """The native module, or None; then torch's operations do the same."""
    return native_with("pair_divergences", "answer consistency on a CPU takes longer")
