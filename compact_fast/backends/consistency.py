"""The consistency term on a few rows a question, with its gradient.

For the aligned tokens r of teachers i, j with log-probabilities a_i = log p_i:

    D_ij        = mean_r sum_v (p_i - p_j)(a_i - a_j)
    dD_ij/dz_i  = [p_i (a_i - a_j - KL(p_i || p_j)) + p_i - p_j] / n_ij

so with coefficients c_ij, all pairs of a question come from three products with the K x K matrix.

Answer spans are a few rows of the pass over the logits: `AnswerRows` keeps those logits as they
are made and turns them into the rows' gradients, of the likelihood and of this term together.
consistency="all" compares whole sequences: `add_consistency` makes their logits again, some
aligned tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compact_fast.backends.head import Head
from compact_fast.config import CompactConfig
from compact_fast.layout import TokenLayout
from compact_fast.reference import consistency_spans

STEP_BYTES = 1 << 20  # logits compared at a time

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
    logits: Tensor  # [A, V]

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
        that lies outside of `rows`, the rising positions with a label."""
        if spans is None:
            return None
        wanted = [p for q in questions for p in spans.positions(q, live)]
        if not wanted or len(wanted) * head.row_bytes > limit:
            return None
        at = torch.tensor(sorted(wanted), device=rows.device)
        if not bool(torch.isin(at, rows).all()):
            return None
        logits = head.weight.new_empty((at.numel(), head.vocab), dtype=head.dtype)
        return cls(spans, live, at, logits)

    def compare(
        self,
        questions: Sequence[int],
        alpha: Sequence[float],
        config: CompactConfig,
        out: Tensor,  # [Q]
        scale: Tensor | None,  # [A]
        targets: Tensor,  # [A]
        pull: float,
    ) -> list[int]:
        """Write these questions' values to `out`; turn logits into gradients.

        With `scale`, a row's logits become scale x (softmax - onehot(target)) + pull x the
        gradient of its question's value. Returns the questions that were left out because a
        teacher that was not live has a weight after all.
        """
        done = torch.zeros_like(self.at, dtype=torch.bool)
        left_over = []
        for q in questions:
            if not all(self.live[s] for s in self.spans.members(q, alpha)):
                left_over.append(q)
                continue
            found = _aligned(self.spans, q, alpha, config.pair_floor, self.logits)
            if found is None:
                continue
            at, inside, pairs = found
            places = torch.searchsorted(self.at, at)
            step = max(1, STEP_BYTES // (at.shape[1] * self._row_bytes))
            for r in range(0, at.shape[0], step):
                block = slice(r, r + step)
                value, p, gradient = _block(self.logits[places[block]], pairs[block])
                out[q] += value
                if scale is not None:
                    p.mul_(scale[places[block]][:, :, None]).add_(gradient, alpha=pull)
                    there = inside[block]
                    self.logits[places[block][there]] = p[there]
            done[places[inside]] = True
        if scale is not None:
            step = max(1, STEP_BYTES // self._row_bytes)
            for rows in torch.split((~done).nonzero().squeeze(1), step):
                self.logits[rows] = self.logits[rows].softmax(-1).mul_(scale[rows][:, None])
            self.logits[torch.arange(len(targets), device=targets.device), targets] -= scale
        return left_over

    @property
    def _row_bytes(self) -> int:
        return self.logits.shape[1] * self.logits.itemsize


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
        aligned, within, pairs = found
        step = max(1, head.max_rows // aligned.shape[1])
        for r in range(0, aligned.shape[0], step):
            block = slice(r, r + step)
            at, inside = aligned[block], within[block]
            logits = head.logits(hidden[at.reshape(-1)]).view(*at.shape, head.vocab)
            value, _, gradient = _block(logits, pairs[block])
            out[q] += value
            if add_gradient is None:
                continue
            rows = at[inside]
            scale = gradient.new_full(rows.shape, pull)
            add_gradient(head, rows, hidden[rows], gradient[inside], scale)


def _aligned(
    spans: Spans, q: int, alpha: Sequence[float], floor: float, like: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Positions [R, K], whether they lie inside their stretch [R, K], coefficients [R, K, K].

    None if no pair of question q has anything aligned and weight enough.
    """
    members = spans.members(q, alpha)
    lengths = torch.tensor([spans.lengths[s] for s in members], device=like.device)
    found = _alignment(like.new_tensor([alpha[s] for s in members]), lengths, floor)
    if found is None:
        return None
    index, inside, coefficients = found
    first = torch.tensor([spans.starts[s] for s in members], device=like.device)
    return torch.where(inside, first + index, first), inside, coefficients


def compare_stretches(
    logits: Sequence[Tensor],  # [n_k, V] of teacher k, one at least
    alpha: Sequence[float],  # all > 0
    floor: float,
) -> tuple[Tensor, dict[int, Tensor]]:
    """(sum_{i<j} alpha_i alpha_j D_ij, its gradient by the logits [n_k, V] of those it reads)."""
    lengths = torch.tensor([z.shape[0] for z in logits], device=logits[0].device)
    found = _alignment(logits[0].new_tensor(alpha), lengths, floor)
    if found is None:
        return logits[0].new_zeros(()), {}
    index, inside, coefficients = found
    at = torch.where(inside, index, 0)
    together = torch.stack([z[at[:, k]] for k, z in enumerate(logits)], 1)
    value, _, gradient = _block(together, coefficients)
    pulls = {}
    for k, z in enumerate(logits):
        if bool((coefficients[:, k] > 0).any()):
            pulls[k] = torch.zeros_like(z)
            n = min(z.shape[0], len(inside))
            pulls[k][:n] = gradient[:n, k]
    return value, pulls


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


def _block(logits: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits [R, K, V], symmetric c [R, K, K] -> (sum_{i<j} c_ij D_ij, softmax, the sum's
    gradient [R, K, V]). The logits are overwritten: three of their size are held, no more."""
    a = logits.sub_(logits.amax(-1, keepdim=True))
    p = a.exp()
    sums = p.sum(-1, keepdim=True)
    p /= sums
    a -= sums.log()
    # only differences of a matter: without their mean, products stay of the differences' size
    a -= a.mean(1, keepdim=True)
    cross = p @ a.transpose(1, 2)  # [R, K, K]: <p_i, a_j>
    own = cross.diagonal(dim1=1, dim2=2)
    kl = own[:, :, None] - cross  # KL(p_i || p_j)
    value = (c * kl).sum()  # every unordered pair twice, once for each direction
    total = c.sum(-1, keepdim=True)  # [R, K, 1]
    # total x a - c a is one product with total - c
    bracket = (torch.diag_embed(total.squeeze(-1)) - c) @ a
    bracket += total - (c * kl).sum(-1, keepdim=True)
    return value, p, bracket.mul_(p).baddbmm_(c, p, alpha=-1)
