"""One evaluation of the loss on a GPU, without waiting for the device in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compact_fast.backends.assembly import TokenStatistics, assemble
from compact_fast.backends.gold_logits import mean_capped, segment_mean
from compact_fast.backends.protocol import LossResult, Needs
from compact_fast.backends.triton_plan import (
    ConsistencyPlan,
    Group,
    Plan,
    information_of,
    weight_rule,
)
from compact_fast.backends.triton_rows import DeviceHead, GradientSums, say_once
from compact_fast.backends.triton_skip import SkippingProducts
from compact_fast.config import CompactConfig
from compact_fast.softcap import slope
from compact_fast.triton_kernels.consistency import consistency
from compact_fast.triton_kernels.gradient_rows import clear_rows, row_factors, scale_rows
from compact_fast.triton_kernels.row_statistics import RowStatistics, row_dot
from compact_fast.triton_kernels.teacher_weights import Weights, sequence_scores, teacher_weights


@dataclass(frozen=True)
class _Scores:
    mi: Tensor  # [S]
    nll: Tensor  # [S]
    shares: Weights


@dataclass(frozen=True)
class TritonPass:
    """One evaluation of the loss. Everything is on the device."""

    head: DeviceHead
    plan: Plan
    consensus: Tensor | None
    attention: Tensor | None
    config: CompactConfig
    normalizer: float | None
    statistics: bool
    skipping: SkippingProducts | None = None  # with config.skip_below > 0

    def run(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs) -> LossResult:
        """Loss, figures, and the gradients that are needed."""
        unit = self.head.unit(1 / self.plan.least_labels)  # of alpha / |A|
        grads = GradientSums.zeros(hidden, weight, bias, needs, unit)
        stats = TokenStatistics.empty(self.plan.targets, torch.float32, full=self.statistics)
        gold_logit = self._gold_logit(hidden)
        if grads.head:
            parts = [
                self._trained_group(group, hidden, stats, gold_logit, grads)
                for group in self.plan.groups
            ]
        else:
            parts = [self._frozen(hidden, stats, gold_logit, grads.hidden)]
        scores = _join(parts)
        shares, alpha = scores.shares, scores.shares.weights
        divergence = self._consistency(hidden, alpha, grads)
        normalizer: Any = self.normalizer
        if normalizer is None:
            normalizer = (~shares.skipped).sum().clamp(min=1)
        kept_share = gradient_error = None
        if self.skipping is not None:
            rows = self.plan.rows
            factor = self._factors(self._everything, rows, self._ones(rows), scores)
            kept_share, gradient_error = self.skipping.report(grads, rows, factor, normalizer)
        return assemble(
            self.config,
            nll=scores.nll,
            mi=scores.mi,
            shares=shares,
            divergence=divergence,
            normalizer=normalizer,
            gradients=grads.finish(normalizer, hidden, weight, bias),
            stats=stats,
            kept_share=kept_share,
            gradient_error=gradient_error,
            dtype=torch.float32,
        )

    # ---- rows --------------------------------------------------------------------------------

    def _frozen(
        self, hidden: Tensor, stats: TokenStatistics, gold_logit: Tensor | None, out: Tensor | None
    ) -> _Scores:
        """A frozen head: rows are made without their weights, which multiply them at the end."""
        plan, rows = self.plan, self.plan.rows
        for at in self.head.chunks(rows):
            x, y = self.head.take(hidden, at), plan.targets[at]
            exps, measured = self.head.measure(
                x, y, keep=out is not None, statistics=self.statistics
            )
            stats.record(at, measured)
            if out is not None and exps is not None:
                unscaled = GradientSums(out, None, None)
                factor = measured.total.reciprocal()
                self._add_rows(unscaled, at, x, exps, factor, measured.total)
        scores = self._score(self._everything, stats, gold_logit)
        if out is not None:
            factor = self._factors(self._everything, rows, self._ones(rows), scores)
            scale_rows(out, factor, out, source=rows, to=rows)
        return scores

    def _trained_group(
        self,
        group: Group,
        hidden: Tensor,
        stats: TokenStatistics,
        gold_logit: Tensor | None,
        grads: GradientSums,
    ) -> _Scores:
        """A trained head needs the weights before its product: rows are held, or made twice."""
        targets = self.plan.targets
        rows = self.plan.rows[group.rows]
        n = rows.numel()
        if 0 < n <= self.head.most_held_rows:
            x, y = self.head.take(hidden, rows), targets[rows]
            exps, measured = self.head.measure(x, y, keep=True, statistics=self.statistics)
            stats.record(rows, measured)
            scores = self._score(group, stats, gold_logit)
            assert exps is not None
            self._add(group, rows, x, exps, measured, scores, grads)
            return scores
        if n:
            say_once(
                f"a question of {n:,} rows does not fit hold_bytes={self.head.hold_bytes:,}: "
                "with a trained head its logits are made twice"
            )
        chunks = self.head.chunks(rows) if n else ()
        for at in chunks:
            x, y = self.head.take(hidden, at), targets[at]
            stats.record(at, self.head.measure(x, y, keep=False, statistics=self.statistics)[1])
        scores = self._score(group, stats, gold_logit)
        for at in chunks:
            x, y = self.head.take(hidden, at), targets[at]
            exps, measured = self.head.measure(x, y, keep=True, statistics=False)
            assert exps is not None
            self._add(group, at, x, exps, measured, scores, grads)
        return scores

    def _add(
        self,
        group: Group,
        rows: Tensor,
        x: Tensor,
        exps: Tensor,
        measured: RowStatistics,
        scores: _Scores,
        grads: GradientSums,
    ) -> None:
        factor = self._factors(group, rows, measured.total, scores)
        clear_rows(exps, factor, measured.total)
        self._add_rows(grads, rows, x, exps, factor, measured.total)

    def _add_rows(
        self,
        grads: GradientSums,
        at: Tensor,
        x: Tensor,
        exps: Tensor,
        factor: Tensor,
        total: Tensor,
    ) -> None:
        if self.skipping is None:
            self.head.add_gradients(grads, at, x, exps, factor, add=False)
        else:
            self.skipping.add(grads, at, x, exps, factor, total)

    @property
    def _everything(self) -> Group:
        plan = self.plan
        return Group(slice(0, plan.num_questions), slice(0, plan.num_sequences), slice(0))

    @staticmethod
    def _ones(rows: Tensor) -> Tensor:
        return torch.ones_like(rows, dtype=torch.float32)

    def _factors(self, group: Group, rows: Tensor, total: Tensor, scores: _Scores) -> Tensor:
        """alpha / |A| / total of each row; 0 without a label or a weight, [n]."""
        plan, s = self.plan, group.sequences
        factor: Tensor = row_factors(
            scores.shares.weights,
            plan.label_counts[s],
            plan.token_sequence[rows],
            plan.targets[rows],
            total,
            first_sequence=s.start,
        )
        return factor

    # ---- scores ------------------------------------------------------------------------------

    def _gold_logit(self, hidden: Tensor) -> Tensor | None:
        """<h_t, mean of the question's gold rows> where MI needs it, 0 elsewhere, [T]; with a cap
        the mean of their capped logits."""
        plan, head, counts = self.plan, self.head, self.plan.gold_counts
        if plan.gold_ids is None or counts is None:
            return None
        rows = head.weight[plan.gold_ids].float()
        out = torch.zeros_like(plan.targets, dtype=torch.float32)
        if head.softcap:
            bias = None if head.bias is None else head.bias[plan.gold_ids].float()
            for at, q in zip(
                head.chunks(plan.information_rows),
                head.chunks(plan.information_question),
                strict=True,
            ):
                out[at] = mean_capped(hidden[at].float(), rows, bias, counts, q, head.softcap)
            return out
        gold = segment_mean(rows, counts)  # [Q, D]
        out[plan.information_rows] = row_dot(
            hidden.detach(), gold, plan.information_question, rows=plan.information_rows
        )
        return out

    def _score(self, group: Group, stats: TokenStatistics, gold_logit: Tensor | None) -> _Scores:
        """Scores and weights of the group's sequences, once their statistics are there."""
        plan, config, s, q = self.plan, self.config, group.sequences, group.questions
        mi, nll = sequence_scores(
            stats.logp,
            plan.targets,
            plan.cu_seqlens[s.start : s.stop + 1],
            information_of(plan, config, gold_logit, stats.logsumexp, s),
        )
        rule, consensus = weight_rule(config, self.consensus, self.attention)
        weights = teacher_weights(
            mi,
            nll,
            None if consensus is None else consensus[s],
            None if self.attention is None else self.attention[s],
            None if plan.shares is None else plan.shares[s],
            plan.cu_teachers[q.start : q.stop + 1],
            rule,
            most_teachers=self.plan.most_teachers,
            first_sequence=s.start,
        )
        return _Scores(mi, nll, weights)

    # ---- consistency and the loss ------------------------------------------------------------

    def _consistency(self, hidden: Tensor, alpha: Tensor, grads: GradientSums) -> Tensor:
        """sum_{i<j} alpha_i alpha_j D_ij of each question, [Q]; lambda x its gradient is added."""
        plan = self.plan.consistency
        if plan is None:
            return alpha.new_zeros(self.plan.num_questions)
        step = max(1, self.head.chunk_bytes // (4 * self.head.vocab * plan.teachers))
        step *= plan.teachers
        values = [
            self._consistency_block(hidden, alpha, plan, slice(a, a + step), grads)
            for a in range(0, plan.rows.numel(), step)
        ]
        value = torch.cat(values).double()
        return torch.segment_reduce(value, "sum", lengths=plan.tokens, unsafe=True).float()

    def _consistency_block(
        self,
        hidden: Tensor,
        alpha: Tensor,
        plan: ConsistencyPlan,
        block: slice,
        grads: GradientSums,
    ) -> Tensor:
        rows, lengths = plan.rows[block], plan.lengths[block]
        weight = alpha[plan.sequences[block]]
        x = self.head.take(hidden, rows.clamp(min=0))
        logits = self.head.logits(x)
        # these are few rows; their smallest entries would vanish in float16
        dtype = torch.bfloat16 if self.head.dtype == torch.bfloat16 else torch.float32
        cap = self.head.softcap
        # rounded once, after the last factor
        grad = torch.empty_like(logits, dtype=torch.float32 if cap else dtype)
        value: Tensor = consistency(
            logits,
            weight,
            lengths,
            grad,
            teachers=plan.teachers,
            pair_floor=self.config.pair_floor,
        )
        if cap:
            grad = grad.mul_(slope(logits, cap)).to(dtype)
        there = (lengths > 0) & (weight > 0)
        factor = torch.where(there, self.config.consistency_weight, 0.0).float()
        self.head.add_gradients(grads, rows, x, grad, factor, add=True)
        return value


def _join(parts: list[_Scores]) -> _Scores:
    """Groups of questions, one behind another."""
    names = ("weights", "score", "consensus", "filtered", "nonfinite", "skipped")
    return _Scores(
        torch.cat([part.mi for part in parts]),
        torch.cat([part.nll for part in parts]),
        Weights(**{n: torch.cat([getattr(part.shares, n) for part in parts]) for n in names}),
    )
