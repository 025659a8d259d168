"""The consistency term on a few rows a question, with its gradient.

D_ij is the mean divergence of teachers i and j over the r tokens of their stretches that are
aligned, so c_ij = alpha_i alpha_j / n_ij in the sets of rows that `pairs.py` compares.

Answer spans are a few rows of the pass over the logits: `AnswerRows` has those logits, where the
pass has kept them, and turns them into the rows' gradients, of the likelihood and of this term
together. consistency="all" compares whole sequences: `add_consistency` makes their logits again,
some aligned tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compact_fast.backends.head import Head
from compact_fast.backends.pairs import STEP_BYTES, Aligned, Comparison
from compact_fast.config import CompactConfig
from compact_fast.layout import TokenLayout
from compact_fast.reference import consistency_spans
from compact_fast.softcap import slope

# (rows [n], hidden of the rows [n, D], gradient of their logits [n, V], scale [n])
AddGradient = Callable[[Head, Tensor, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Spans:
    """What consistency compares, on the host: a stretch of each sequence, by question."""

    starts: list[int]  # [S] packed positions
    lengths: list[int]  # [S]; 0: nothing to compare
    teachers: list[int]  # [Q+1]

    @classmethod
    def of(cls, layout: TokenLayout, config: CompactConfig) -> Spans | None:
        """None where the term is off."""
        if config.consistency == "off":
            return None
        return cls(*consistency_spans(layout, config), layout.cu_teachers.tolist())

    def members(self, q: int, alpha: Sequence[float]) -> list[int]:
        """Sequences of question q that can be compared; weight 0 cannot, it may be NaN."""
        sequences = range(self.teachers[q], self.teachers[q + 1])
        return [s for s in sequences if self.lengths[s] > 0 and alpha[s] > 0]

    def positions(self, q: int, live: Sequence[bool]) -> list[int]:
        """Packed positions of the stretches of question q's live sequences, as far as any two are
        aligned."""
        sequences = [s for s in range(self.teachers[q], self.teachers[q + 1]) if live[s]]
        longest = sorted(self.lengths[s] for s in sequences)[-2:]
        n = longest[0] if len(longest) == 2 else 0
        return [
            p
            for s in sequences
            for p in range(self.starts[s], self.starts[s] + min(n, self.lengths[s]))
        ]


@dataclass
class AnswerRows:
    """Logits of some questions' answer spans, which become their gradients.

    `live` sequences may get a weight; the others' rows are not here.
    """

    spans: Spans
    live: Sequence[bool]  # [S]
    at: Tensor  # [A]; rising packed positions
    head: Head
    logits: list[Tensor] = field(default_factory=list)  # [A, w] of every block of the vocabulary

    @classmethod
    def of(
        cls,
        spans: Spans | None,
        questions: Sequence[int],
        live: Sequence[bool],
        rows: Tensor,
        head: Head,
        limit: int,
    ) -> AnswerRows | None:
        """None where there is nothing to compare, or more than `limit` bytes of it, or a span
        that lies outside of `rows`, the rising positions with a label. Without memory as yet."""
        if spans is None:
            return None
        wanted = [p for q in questions for p in spans.positions(q, live)]
        if not wanted or len(wanted) * head.row_bytes > limit:
            return None
        at = torch.tensor(sorted(wanted), device=rows.device)
        if not bool(torch.isin(at, rows).all()):
            return None
        return cls(spans, live, at, head)

    def compare(
        self,
        questions: Sequence[int],
        alpha: Sequence[float],
        config: CompactConfig,
        out: Tensor,  # [Q]
        logsumexp: Tensor,  # [A] float64
        scale: Tensor | None,  # [A]
        targets: Tensor,  # [A]
        pull: float,
    ) -> list[int]:
        """Write these questions' values to `out`; turn logits into gradients.

        With `scale`, a row's logits become scale x (softmax - onehot(target)) + pull x the
        gradient of its question's value, by the head's products. Returns the questions that were
        left out because a teacher that was not live has a weight after all.
        """
        left_over, compared, aligned = [], [], []
        for q in questions:
            if not all(self.live[s] for s in self.spans.members(q, alpha)):
                left_over.append(q)
            elif (found := _aligned(self.spans, q, alpha, config.pair_floor, out)) is not None:
                compared.append(q)
                rows = torch.searchsorted(self.at, found.rows)
                aligned.append(Aligned(rows, found.inside, found.coefficients))
        comparison = Comparison(aligned, logsumexp)
        if compared:
            for z in self.logits:
                comparison.add(z)
            out[compared] = comparison.values().to(out.dtype)
        if scale is not None:
            slopes = [self.head.slope(z) for z in self.logits]
            comparison.differentiate(self.logits, scale, pull)
            self._subtract(targets, scale)
            for z, steep in zip(self.logits, slopes, strict=True):
                if steep is not None:
                    z.mul_(steep)
        return left_over

    def _subtract(self, targets: Tensor, amount: Tensor) -> None:
        """amount [A] from the targets' entries of the logits."""
        widths = torch.tensor([z.shape[1] for z in self.logits], device=targets.device)
        ends = widths.cumsum(0)
        block = torch.searchsorted(ends, targets, right=True)
        column = targets - (ends - widths)[block]
        for i in sorted(set(block.tolist())):
            here = (block == i).nonzero().squeeze(1)
            self.logits[i][here, column[here]] -= amount[here]


def add_consistency(
    head: Head,
    hidden: Tensor,  # [T, D]
    spans: Spans,
    alpha: Sequence[float],
    config: CompactConfig,
    questions: Sequence[int],
    add_gradient: AddGradient | None,
    pull: float,
    out: Tensor,  # [Q]
) -> None:
    """Write sum_{i<j} alpha_i alpha_j D_ij of these questions to `out`, add `pull` times its
    gradient; logits are made for it."""
    for q in questions:
        found = _aligned(spans, q, alpha, config.pair_floor, out)
        if found is None:
            continue
        step = max(1, head.max_rows // found.rows.shape[1])
        for r in range(0, found.rows.shape[0], step):
            block = slice(r, r + step)
            at, inside = found.rows[block], found.inside[block]
            z = head.logits(hidden[at.reshape(-1)])
            wanted, steep = (None, None) if add_gradient is None else (pull, head.slope(z))
            out[q] += _compare(z, inside, found.coefficients[block], wanted)
            if add_gradient is not None:
                rows = at[inside]
                gradient = (z if steep is None else z * steep)[inside.reshape(-1)]
                add_gradient(head, rows, hidden[rows], gradient, gradient.new_ones(rows.shape))


def compare_stretches(
    logits: Sequence[Tensor],  # [n_k, V] of teacher k, one at least
    alpha: Sequence[float],  # all > 0
    floor: float,
    softcap: float = 0.0,
) -> tuple[Tensor, dict[int, Tensor]]:
    """(sum_{i<j} alpha_i alpha_j D_ij, its gradient [n_k, V] by the head's products of those it
    reads, whose logits are capped)."""
    lengths = torch.tensor([z.shape[0] for z in logits], device=logits[0].device)
    found = _alignment(logits[0].new_tensor(alpha), lengths, floor)
    if found is None:
        return logits[0].new_zeros(()), {}
    index, inside, coefficients = found
    at = torch.where(inside, index, 0)
    together = torch.stack([z[at[:, k]] for k, z in enumerate(logits)], 1)
    value = _compare(together.flatten(0, 1), inside, coefficients, 1.0)
    pulls = {}
    for k, z in enumerate(logits):
        if bool((coefficients[:, k] > 0).any()):
            pulls[k] = torch.zeros_like(z)
            n = min(z.shape[0], len(inside))
            pulls[k][:n] = together[:n, k]
            if softcap:
                pulls[k] *= slope(z, softcap)
    return value, pulls


def _compare(
    z: Tensor,  # [R * K, V]
    inside: Tensor,  # [R, K]
    coefficients: Tensor,  # [R, K, K]
    pull: float | None,
) -> Tensor:
    """The value, of logits that lie as R sets of K. With `pull` they become so many times its
    gradient."""
    step = max(1, STEP_BYTES // (z.shape[1] * z.itemsize))
    logsumexp = []
    for part in torch.split(z, step):  # float64: float32 rounds it more than a logit's distance
        top = part.amax(-1, keepdim=True)
        total = (part - top).exp_().sum(-1, dtype=torch.float64)
        logsumexp.append(top.squeeze(1).double() + total.log())
    rows = torch.arange(z.shape[0], device=z.device).view_as(inside)
    comparison = Comparison([Aligned(rows, inside, coefficients)], torch.cat(logsumexp))
    comparison.add(z)
    value = comparison.values().squeeze(0)
    if pull is not None:
        comparison.differentiate([z], z.new_zeros(z.shape[0]), pull)
    return value.to(z.dtype)


def _aligned(
    spans: Spans, q: int, alpha: Sequence[float], floor: float, like: Tensor
) -> Aligned | None:
    """Packed positions of question q's sets; None if no pair has anything aligned and weight
    enough."""
    members = spans.members(q, alpha)
    lengths = torch.tensor([spans.lengths[s] for s in members], device=like.device)
    found = _alignment(like.new_tensor([alpha[s] for s in members]), lengths, floor)
    if found is None:
        return None
    index, inside, coefficients = found
    first = torch.tensor([spans.starts[s] for s in members], device=like.device)
    return Aligned(torch.where(inside, first + index, first), inside, coefficients)


def _alignment(
    alpha: Tensor,  # [K]
    lengths: Tensor,  # [K], all > 0
    floor: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Places in a stretch [R, 1], whether teacher k's has that many [R, K], coefficients
    [R, K, K]. None if no pair has weight enough."""
    if len(lengths) < 2:
        return None
    pairs = _pair_coefficients(alpha, lengths, floor)
    if not bool((pairs > 0).any()):
        return None
    longest = int(lengths.sort().values[-2])  # beyond the second longest nothing is aligned
    index = torch.arange(longest, device=lengths.device)[:, None]
    inside = index < lengths
    return index, inside, pairs * (inside[:, :, None] & inside[:, None, :])


def _pair_coefficients(alpha: Tensor, lengths: Tensor, floor: float) -> Tensor:
    """alpha_i alpha_j / n_ij for i != j, [K, K]; 0 for pairs below the floor."""
    product = alpha[:, None] * alpha[None, :]
    aligned = torch.minimum(lengths[:, None], lengths[None, :])
    product = torch.where(product >= floor, product, 0.0).fill_diagonal_(0.0)
    return product / aligned.clamp(min=1)
