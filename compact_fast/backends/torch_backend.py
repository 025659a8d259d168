"""The `torch` backend: log-likelihoods, scores, weights, loss and gradients in one pass over the
logits, chunk by chunk. Runs wherever torch does; the default on a CPU.

Gradients are made in the forward pass, while a chunk's logits are at hand:

    d NLL_t / d h_t = softmax_t W - W[y_t]         [n, D]
    d NLL_t / d W   = (softmax_t - onehot) (x) h_t

and alpha / |A| multiplies the [n, D] side of both. Alpha needs whole questions, so chunks hold
whole questions, and rows that get weight 0 are never multiplied back. A question larger than a
chunk: with a frozen head its rows are made unscaled and scaled afterwards; with a trained head it
is held if it fits `hold_bytes`, else passed over twice, first for its scores.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from compact_fast.backends.consistency import AnswerRows, Spans, add_consistency
from compact_fast.backends.head import Head, Statistics, subtract_targets
from compact_fast.backends.protocol import ABI, Gradients, LossResult, Needs, RunSpec
from compact_fast.config import CompactConfig
from compact_fast.layout import TokenLayout
from compact_fast.reference import mean_gold
from compact_fast.scores import (
    TeacherWeights,
    adaptability,
    difficulty,
    information_positions,
    pointwise_information,
    teacher_weights,
)

CHUNK_BYTES = 48 << 20  # logits held at once; 256 rows of a 49,152-word vocabulary in float32
HOLD_BYTES = 160 << 20  # the same for one question that does not fit a chunk


@dataclass(frozen=True)
class TorchBackend:
    """Chunked, in plain torch, on any device."""

    chunk_bytes: int = CHUNK_BYTES
    hold_bytes: int = HOLD_BYTES
    name: str = "torch"
    abi: int = ABI

    def can_run(self, spec: RunSpec) -> bool | str:
        """Always: it is the backend that others fall back to."""
        return True

    def score_and_loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layout: TokenLayout,
        consensus: Tensor | None,
        attention: Tensor | None,
        config: CompactConfig,
        normalizer: float | None,
        needs: Needs,
        statistics: bool,
    ) -> LossResult:
        """See CompactBackend."""
        work = _Pass(self, layout, consensus, attention, config, normalizer, statistics)
        return work.run(hidden, weight, bias, needs)

    def token_logp(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        statistics: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See CompactBackend."""
        head = Head(weight, bias, self.chunk_bytes)
        stats = Statistics.empty(targets.numel(), head.dtype, targets.device, statistics)
        for rows in torch.split((targets >= 0).nonzero().squeeze(1), head.max_rows):
            stats.measure(head.logits(hidden[rows]), rows, targets[rows])
        return stats.logp, stats.entropy, stats.correct

    def token_logp_gradients(
        self,
        grad_logp: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        needs: Needs,
    ) -> Gradients:
        """See CompactBackend; logits are made again."""
        head = Head(weight, bias, self.chunk_bytes)
        grads = _GradientSums.zeros(hidden, weight, bias, needs, head.dtype)
        stats = Statistics.empty(targets.numel(), head.dtype, targets.device, full=False)
        wanted = (targets >= 0) & (grad_logp != 0)
        for rows in torch.split(wanted.nonzero().squeeze(1), head.max_rows):
            x, y = hidden[rows], targets[rows]
            exps = head.logits(x)
            totals = stats.measure(exps, rows, y)
            subtract_targets(exps, totals, y)
            grads.add(head, rows, x, exps, -grad_logp[rows] / totals)
        return grads.finish(1.0, hidden, weight, bias)


@dataclass
class _GradientSums:
    """Gradients of the sum over questions, in the statistics' dtype. None: not needed."""

    hidden: Tensor | None  # [T, D]
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]

    @classmethod
    def zeros(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs, dtype: torch.dtype
    ) -> _GradientSums:
        return cls(
            torch.zeros_like(hidden, dtype=dtype) if needs.hidden else None,
            torch.zeros_like(weight, dtype=dtype) if needs.weight else None,
            torch.zeros_like(bias, dtype=dtype) if needs.bias and bias is not None else None,
        )

    @property
    def head(self) -> bool:
        return self.weight is not None or self.bias is not None

    def add(self, head: Head, at: Tensor, x: Tensor, g: Tensor, scale: Tensor) -> None:
        """Rows `at` [n], with hidden x [n, D] and logit gradients g [n, V] times scale [n]."""
        if self.hidden is not None:
            self.hidden.index_add_(0, at, head.back_to_rows(g) * scale[:, None])
        if self.weight is not None:
            self.weight.addmm_(g.T, x.to(head.dtype) * scale[:, None])
        if self.bias is not None:
            self.bias.addmv_(g.T, scale)

    def finish(
        self, normalizer: float, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Gradients:
        """Divided by the normalizer, in the dtype of what they belong to."""
        sums, owners = (self.hidden, self.weight, self.bias), (hidden, weight, bias)
        return Gradients(
            *(
                None if g is None or owner is None else g.div_(normalizer).to(owner.dtype)
                for g, owner in zip(sums, owners, strict=True)
            )
        )


@dataclass(frozen=True)
class _Group:
    """Consecutive whole questions."""

    questions: slice
    sequences: slice
    rows: Tensor  # packed positions that need logits


@dataclass
class _Work:
    """What the groups of one evaluation share."""

    head: Head
    hidden: Tensor  # [T, D]
    stats: Statistics
    gold_logit: Tensor | None  # [T]
    grads: _GradientSums
    spans: Spans | None
    divergence: Tensor  # [Q]; consistency of each question
    left_over: list[int] = field(default_factory=list)  # questions whose consistency comes last


@dataclass
class _Pass:
    """One evaluation of the loss."""

    backend: TorchBackend
    layout: TokenLayout
    consensus: Tensor | None
    attention: Tensor | None
    config: CompactConfig
    normalizer: float | None
    want_statistics: bool

    def run(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs) -> LossResult:
        layout, config = self.layout, self.config
        head = Head(weight, bias, self.backend.chunk_bytes)
        grads = _GradientSums.zeros(hidden, weight, bias, needs, head.dtype)
        stats = Statistics.empty(layout.num_tokens, head.dtype, layout.device, self.want_statistics)
        gold_logit = self._gold_logit(hidden, weight, head.dtype)
        spans = Spans.of(layout, config)
        divergence = torch.zeros(layout.num_questions, dtype=head.dtype, device=layout.device)
        work = _Work(head, hidden, stats, gold_logit, grads, spans, divergence)
        scored = [self._run_group(group, work) for group in self._groups(head)]
        mi = torch.cat([part[0] for part in scored])
        nll = torch.cat([part[1] for part in scored])
        shares = _join([part[2] for part in scored])
        alpha = shares.weights
        if spans is not None and work.left_over:
            left_over = work.left_over
            add_consistency(
                head, hidden, spans, alpha.tolist(), config, left_over, grads.add, divergence
            )
        normalizer = self.normalizer
        if normalizer is None:
            normalizer = max(1, int((~shares.skipped).sum()))
        sft = torch.where(alpha > 0, alpha * nll, 0.0).double().sum() / normalizer
        pull = config.consistency_weight * divergence.double().sum() / normalizer
        return LossResult(
            loss=(sft + pull).to(nll.dtype),
            loss_sft=sft.to(nll.dtype, copy=True),
            loss_consistency=pull.to(nll.dtype, copy=True),
            gradients=grads.finish(normalizer, hidden, weight, bias),
            weights=alpha,
            nll=nll,
            mi=mi,
            consensus=shares.consensus,
            score=shares.score,
            token_logp=stats.logp,
            consistency=divergence,
            filtered=shares.filtered,
            nonfinite=shares.nonfinite,
            skipped=shares.skipped,
            token_entropy=stats.entropy,
            token_correct=stats.correct,
        )

    def _run_group(self, group: _Group, work: _Work) -> tuple[Tensor, Tensor, TeacherWeights]:
        """Scores of a group's sequences; its share of statistics and gradients is added."""
        head, hidden, grads = work.head, work.hidden, work.grads
        n, needs_gradient = group.rows.numel(), grads.hidden is not None or grads.head
        questions = range(group.questions.start, group.questions.stop)
        labelled = group.rows[self.layout.labelled[group.rows]]
        answers = AnswerRows.of(
            work.spans, questions, labelled, head, self.backend.chunk_bytes // 4
        )
        if answers is None:
            work.left_over.extend(questions)
        hold = n <= head.max_rows or (
            needs_gradient and grads.head and n * head.row_bytes <= self.backend.hold_bytes
        )
        unscaled = needs_gradient and not hold and not grads.head
        exps = totals = hidden.new_empty(0)
        for rows in torch.split(group.rows, n if hold and n else head.max_rows):
            exps, totals = self._measure(rows, work, answers)
            if unscaled:
                assert grads.hidden is not None
                subtract_targets(exps, totals, self.layout.targets[rows])
                grads.hidden[rows] = head.back_to_rows(exps) / totals[:, None]
        scores = self._score(group, work.stats, work.gold_logit)
        pulls = self._pull(answers, questions, scores[2], group, work.divergence)
        if not needs_gradient:
            return scores
        scale = self._row_scale(group.rows, group, scores[2])
        if hold:
            self._add(group.rows, exps, totals, scale, work, pulls)
            return scores
        if unscaled:
            assert grads.hidden is not None
            scaled = grads.hidden[group.rows] * scale[:, None]
            grads.hidden[group.rows] = torch.where(scale[:, None] > 0, scaled, 0.0)
        else:  # a trained head and too many rows to hold: make the logits again
            kept = scale > 0
            rows_scale = zip(
                torch.split(group.rows[kept], head.max_rows),
                torch.split(scale[kept], head.max_rows),
                strict=True,
            )
            for rows, part in rows_scale:
                exps, totals = self._measure(rows, work, None)
                self._add(rows, exps, totals, part, work, [])
        for at, gradient in pulls:
            factor = gradient.new_full(at.shape, self.config.consistency_weight)
            grads.add(head, at, hidden[at], gradient, factor)
        return scores

    def _measure(
        self, rows: Tensor, work: _Work, answers: AnswerRows | None
    ) -> tuple[Tensor, Tensor]:
        """exp(logits - max) of some rows, in the head's buffer, and their sums."""
        logits = work.head.logits(work.hidden[rows])
        if answers is not None:
            answers.keep(rows, logits)
        return logits, work.stats.measure(logits, rows, self.layout.targets[rows])

    def _pull(
        self,
        answers: AnswerRows | None,
        questions: range,
        shares: TeacherWeights,
        group: _Group,
        divergence: Tensor,
    ) -> list[tuple[Tensor, Tensor]]:
        """Consistency of the group: its values into `divergence`; (rows, logit gradients)."""
        if answers is None:
            return []
        alpha = [0.0] * group.sequences.start + shares.weights.tolist()
        pulls = []
        for q in questions:
            found = answers.pull(q, alpha, self.config.pair_floor)
            if found is not None:
                divergence[q] = found[0]
                pulls.append(found[1:])
        return pulls

    def _add(
        self,
        rows: Tensor,
        exps: Tensor,
        totals: Tensor,
        scale: Tensor,
        work: _Work,
        pulls: list[tuple[Tensor, Tensor]],
    ) -> None:
        """Add the gradients of rows whose exps and totals are at hand; weight 0 is left out.

        The pull on answer rows joins their logit gradients before the products, so it costs none.
        """
        subtract_targets(exps, totals, self.layout.targets[rows])
        factor = scale / totals
        for at, gradient in pulls:
            where = torch.searchsorted(rows, at)
            joined = gradient * (self.config.consistency_weight / factor[where])[:, None]
            exps.index_add_(0, where, joined)
        for a, b in _runs(scale > 0):
            at = rows[a:b]
            work.grads.add(work.head, at, work.hidden[at], exps[a:b], factor[a:b])

    def _row_scale(self, rows: Tensor, group: _Group, shares: TeacherWeights) -> Tensor:
        """alpha / |A| of each row's sequence; 0 where the row has no label."""
        layout = self.layout
        sequence = layout.token_sequence[rows]
        alpha = shares.weights[sequence - group.sequences.start]
        scale = alpha / layout.label_counts[sequence].clamp(min=1).to(alpha.dtype)
        return torch.where(layout.labelled[rows], scale, 0.0)

    def _groups(self, head: Head) -> list[_Group]:
        """Whole questions, as many as fit a chunk; a question that does not fit stands alone."""
        layout, config = self.layout, self.config
        needed = layout.labelled
        if config.mi == "logprob":
            needed = needed | information_positions(layout, config)
        all_rows = needed.nonzero().squeeze(1)
        teachers = layout.cu_teachers.tolist()
        token_bounds = layout.cu_seqlens[layout.cu_teachers]
        row_bounds = torch.searchsorted(all_rows, token_bounds).tolist()
        groups, first = [], 0
        for q in range(layout.num_questions):
            last = q + 1 == layout.num_questions
            if last or row_bounds[q + 2] - row_bounds[first] > head.max_rows:
                rows = all_rows[row_bounds[first] : row_bounds[q + 1]]
                sequences = slice(teachers[first], teachers[q + 1])
                groups.append(_Group(slice(first, q + 1), sequences, rows))
                first = q + 1
        return groups

    def _gold_logit(self, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """<h_t, mean of the question's gold rows> where MI needs it, 0 elsewhere, [T].

        The head's bias would add a constant, which the difference along the sequence cancels.
        """
        layout = self.layout
        if layout.gold_ids is None or layout.cu_gold is None or self.config.mi == "pvi":
            return None
        gold = mean_gold(weight[layout.gold_ids].to(dtype), layout.cu_gold)  # [Q, D]
        out = torch.zeros(layout.num_tokens, dtype=dtype, device=layout.device)
        at = information_positions(layout, self.config).nonzero().squeeze(1)
        question = layout.sequence_question[layout.token_sequence[at]]
        out[at] = (hidden[at].to(dtype) * gold[question]).sum(-1)
        return out

    def _score(
        self, group: _Group, stats: Statistics, gold_logit: Tensor | None
    ) -> tuple[Tensor, Tensor, TeacherWeights]:
        """(mi, nll, weights) of the group's sequences, once their statistics are there."""
        layout, config, s = self.layout, self.config, group.sequences
        nll = difficulty(stats.logp, layout)[s]
        if config.mi == "pvi" and layout.prior_logp is not None:
            mi = pointwise_information(stats.logp, layout)[s]
        elif gold_logit is None:
            mi = torch.full_like(nll, torch.nan)
        elif config.mi == "logit":
            mi = adaptability(gold_logit, layout, config)[s]
        else:
            mi = adaptability(gold_logit - stats.logsumexp, layout, config)[s]
        start = layout.cu_teachers[group.questions.start]
        cut = {
            name: None if value is None else value[s]
            for name, value in (
                ("consensus", self.consensus),
                ("attention", self.attention),
                ("correct", layout.correct),
            )
        }
        q = group.questions
        shares = teacher_weights(
            mi,
            nll,
            cut["consensus"],
            cut["attention"],
            layout.cu_teachers[q.start : q.stop + 1] - start,
            config,
            teachers=layout.teachers[s],
            question_ids=None if layout.question_ids is None else layout.question_ids[q],
            correct=cut["correct"],
        )
        return mi, nll, shares


def _runs(keep: Tensor) -> list[tuple[int, int]]:
    """Maximal runs of True in a mask [n], as (start, end)."""
    edge = torch.nn.functional.pad(keep.to(torch.int8), (1, 1)).diff()
    starts, ends = (edge == 1).nonzero().flatten(), (edge == -1).nonzero().flatten()
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def _join(parts: list[TeacherWeights]) -> TeacherWeights:
    """Groups of questions, one behind another."""
    names = ("weights", "score", "consensus", "filtered", "nonfinite", "skipped")
    return TeacherWeights(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names})
