"""The `torch` backend: log-likelihoods, scores, weights, loss and gradients in one pass over the
logits. Runs wherever torch does; the default on a CPU.

Gradients are made in the forward pass, while logits are at hand:

    d NLL_t / d h_t = softmax_t W - W[y_t]         [n, D]
    d NLL_t / d W   = (softmax_t - onehot) (x) h_t

and alpha / |A| multiplies the [n, D] side of both. Alpha needs whole questions, so rows go through
in groups of whole questions, and logits come a block of the vocabulary at a time:

- a frozen head needs alpha at the very end: a block's logits are multiplied back at once and
  dropped, whatever the size of the group;
- a trained head needs it before the second product: a group's exponentials are held, or made
  again where that takes little time or `hold_bytes` are not enough;
- with `skip_below` only the large exponentials are held, for either head.

Rows that get weight 0 whatever the student says (filtered, fixed) are never multiplied back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compact_fast.backends.assembly import TokenStatistics, assemble
from compact_fast.backends.consistency import AnswerRows, Spans, add_consistency
from compact_fast.backends.gold_logits import gold_logits
from compact_fast.backends.gradients import GradientSums
from compact_fast.backends.head import BLOCK_BYTES, LEAST_ROWS, LEAST_WIDTH, Head
from compact_fast.backends.held_rows import least_spare, most_asked, most_inside
from compact_fast.backends.online import Softmax
from compact_fast.backends.protocol import ABI, Gradients, LossResult, Needs, RunSpec
from compact_fast.backends.question_groups import Group, weightless
from compact_fast.backends.row_pass import RowPass, runs
from compact_fast.backends.sparse_rows import Left, SparseRows
from compact_fast.config import CompactConfig
from compact_fast.heap import can_trim, trim
from compact_fast.layout import TokenLayout
from compact_fast.scores import (
    TeacherWeights,
    adaptability,
    difficulty,
    information_positions,
    layout_weights,
    pointwise_information,
)

CHUNK_BYTES = 48 << 20  # exponentials held at once; 256 rows of a 49,152-word vocabulary in float32
HOLD_BYTES = 160 << 20  # the same for one question that does not fit a chunk
AGAIN = 0.14  # share of the logits that a trained head may make again, to hold less
HELD_SHARE = 0.26  # of its gradient's size: so much is held whatever that saves
AGAIN_QUICK, HELD_SHARE_QUICK = 1 / 2, 0.03  # where products take half the time, and own memory
WORTH_SAVING = 1 << 20  # bytes; for less nothing is made again
ANSWER_BYTES, WAITING_BYTES = 24 << 20, 4 << 20  # of what a small head keeps


def answer_bytes(head_bytes: int) -> int:
    """Of logits of answer spans, kept until their questions' weights are known, at most."""
    return max(ANSWER_BYTES, head_bytes // 8)


def waiting_bytes(head_bytes: int, trained: bool) -> int:
    """Of their gradients, kept until there are enough of them for a product; beside the gradient
    of a trained head, less."""
    return max(WAITING_BYTES, head_bytes // (20 if trained else 10))


@dataclass(frozen=True)
class TorchBackend:
    """Blocked, in plain torch, on any device."""

    chunk_bytes: int = CHUNK_BYTES
    hold_bytes: int = HOLD_BYTES
    name: str = "torch"
    abi: int = ABI
    skips_blocks: bool = True
    caps_logits: bool = True

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
        softcap: float = 0.0,
    ) -> LossResult:
        """See CompactBackend."""
        head = Head(weight, bias, self.chunk_bytes, softcap)
        grads = GradientSums.empty(hidden, weight, bias, needs, head.dtype)
        rows = RowPass(head, hidden, layout.targets, self._stream_rows(head), statistics)
        work = _Pass(self, layout, consensus, attention, config, normalizer, rows, grads)
        return work.run(bias)

    def token_logp(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        statistics: bool,
        softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See CompactBackend."""
        head = Head(weight, bias, self.chunk_bytes, softcap)
        work = RowPass(head, hidden, targets, self._stream_rows(head), statistics)
        for rows in torch.split((targets >= 0).nonzero().squeeze(1), work.most):
            work.measure(rows)
        stats = work.stats
        entropy = None if stats.entropy is None else stats.entropy.to(head.dtype)
        return stats.logp.to(head.dtype), entropy, stats.correct

    def token_logp_gradients(
        self,
        grad_logp: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        needs: Needs,
        softcap: float = 0.0,
    ) -> Gradients:
        """See CompactBackend; logits are made again."""
        head = Head(weight, bias, self.chunk_bytes, softcap)
        grads = GradientSums.empty(hidden, weight, bias, needs, head.dtype)
        work = RowPass(head, hidden, targets, self._stream_rows(head), statistics=False)
        wanted = (targets >= 0) & (grad_logp != 0)
        work.add_again(grads, wanted.nonzero().squeeze(1), -grad_logp)
        return grads.finish(1.0, hidden, weight, bias)

    def _stream_rows(self, head: Head) -> int:
        """So many rows that blocks of the vocabulary have their least width."""
        block = min(LEAST_WIDTH, head.vocab) * head.dtype.itemsize
        return max(LEAST_ROWS, min(2 * BLOCK_BYTES, self.chunk_bytes) // block)


_Part = tuple[SparseRows, tuple[int, Softmax]]  # and where its rows begin among the group's


@dataclass
class _Pass:
    """One evaluation of the loss."""

    backend: TorchBackend
    layout: TokenLayout
    consensus: Tensor | None
    attention: Tensor | None
    config: CompactConfig
    normalizer: float | None
    work: RowPass
    grads: GradientSums

    def run(self, bias: Tensor | None) -> LossResult:
        layout, config, head, grads = self.layout, self.config, self.work.head, self.grads
        stats, hidden = self.work.stats, self.work.hidden
        # what gradients are divided by while they are made; corrected if questions turn out empty
        self.assumed = float(self.normalizer or layout.num_questions)
        self.gold_logit = gold_logits(head, hidden, layout, config)
        self.spans = Spans.of(layout, config)
        self.divergence = torch.zeros(layout.num_questions, dtype=head.dtype, device=layout.device)
        self.left_over: list[int] = []  # questions whose consistency comes last
        self.live = ~weightless(layout, self.consensus, self.attention, config)
        skips = config.skip_below > 0 and grads.any
        self.left = Left.nothing(config.skip_below, head, grads) if skips else None

        self.waiting: list[tuple[Tensor, Tensor]] = []  # rows [n] and their gradients [n, V]

        if grads.head and self.left is None:
            sizes = [n for _, rows in self._parts() if (n := rows.numel())]
            self.spare = self._room_beside(sizes)
            self.work.reserve(most_asked(sizes, head, grads.unwritten, self.spare))

        scored = []
        for part in self._parts():
            scored.append(self._run_group(self._group(*part)))
            if part[0].start == 0 and grads.head and layout.device.type == "cpu" and can_trim():
                trim()  # the first group is the largest; the others would not fit its holes
        self._add_waiting()
        mi = torch.cat([part[0] for part in scored])
        nll = torch.cat([part[1] for part in scored])
        shares = _join([part[2] for part in scored])
        alpha = shares.weights
        pull = config.consistency_weight / self.assumed
        if self.spans is not None and self.left_over:
            add = grads.add if grads.any else None
            add_consistency(
                head, hidden, self.spans, alpha.tolist(), config, self.left_over, add, pull,
                self.divergence,
            )  # fmt: skip
        normalizer = self.normalizer
        if normalizer is None:
            normalizer = max(1, int((~shares.skipped).sum()))
        correction = normalizer / self.assumed
        kept_share = gradient_error = None
        if config.skip_below > 0:
            kept_share, gradient_error = nll.new_ones(()), nll.new_zeros(3)
        if self.left is not None:
            kept_share, gradient_error = self.left.report()
            gradient_error = gradient_error / correction
        return assemble(
            config,
            nll=nll,
            mi=mi,
            shares=shares,
            divergence=self.divergence,
            normalizer=normalizer,
            gradients=grads.finish(correction, hidden, head.weight, bias),
            stats=stats,
            kept_share=kept_share,
            gradient_error=gradient_error,
            dtype=head.dtype,
        )

    def _run_group(self, group: Group) -> tuple[Tensor, Tensor, TeacherWeights]:
        """Scores of a group's sequences; its share of statistics and gradients is added."""
        work, grads, answers = self.work, self.grads, group.answers
        rows, n = group.rows, group.rows.numel()
        held = sparse = None
        back = group.plain if grads.hidden is not None else 0
        if self.left is not None:
            sparse = self._measure_streamed(group, back=False)
        elif grads.head and n:
            held = work.room_to_hold(n, grads, self.spare, group.answer_slice)
            soft = work.measure(rows, back=back, out=grads.hidden, held=held)
            if answers is not None:
                answers.logits = held.logits
        else:
            self._measure_streamed(group, back=not grads.head)
        scores = self._score(group, work.stats, self.gold_logit)
        alpha = scores[2].weights.to(work.head.dtype)
        scale = self._row_scale(rows, group, scores[2])
        found = group.answer_slice
        if answers is not None:
            self.left_over += answers.compare(
                group.questions,
                [0.0] * group.sequences.start + alpha.tolist(),
                self.config,
                self.divergence,
                work.stats.logsumexp[answers.at],
                scale[found] if grads.any else None,
                self.layout.targets[answers.at],
                self.config.consistency_weight / self.assumed,
            )
        if not grads.any:
            return scores
        stop = found.stop
        if sparse is not None:
            for part, (first, found_soft) in sparse:
                end = first + part.at.numel()
                part.add_to(grads, found_soft, scale[first:end], alpha / self.assumed)
            self._add_answers(answers, scale[found])
        elif held is not None:
            if back:
                self._scale_streamed(rows[:back], scale[:back])
            self._add_answer_rows(answers, scale[found])  # before they are written over
            within = torch.where(torch.arange(n, device=scale.device) < stop, scale, 0.0)
            work.add_held(grads, rows, held, soft, within)
        else:
            if not grads.head:
                self._scale_streamed(rows[: group.plain], scale[: group.plain])
            self._await_answers(answers, scale[found])
        self._again(rows[stop:], scale[stop:])
        return scores

    # ---- rows --------------------------------------------------------------------------------

    def _measure_streamed(self, group: Group, back: bool) -> list[_Part]:
        """Statistics, kept answers, and unscaled gradients of plain rows if `back`; with skip_below
        the large exponentials of plain rows."""
        work, found, parts, logits = self.work, group.answer_slice, [], None
        if group.answers is not None:
            size = (found.stop - found.start, work.head.vocab)
            logits = work.head.weight.new_empty(size, dtype=work.head.dtype)
            group.answers.logits = [logits]
        for first in range(0, group.rows.numel(), work.most):
            end = min(first + work.most, group.rows.numel())
            kept, at = None, max(found.start, first) - first
            if logits is not None and found.start < end and found.stop > first:
                kept = logits[max(found.start, first) - found.start : end - found.start]
            plain = max(0, min(end, group.plain) - first)
            sparse = self._sparse(group, first, plain) if self.left is not None and plain else None
            soft = work.measure(
                group.rows[first:end],
                back=plain if back else 0,
                out=self.grads.hidden,
                sparse=sparse,
                kept=kept,
                at=at,
            )
            if sparse is not None:
                parts.append((sparse, (first, soft.select(slice(0, plain)))))
        return parts

    def _sparse(self, group: Group, first: int, count: int) -> SparseRows:
        """Where the large exponentials of some of a group's rows go."""
        layout, work, s = self.layout, self.work, group.sequences
        assert self.left is not None
        at = group.rows[first : first + count]
        sequence = layout.token_sequence[at]
        member = torch.zeros(count, s.stop - s.start, dtype=work.head.dtype, device=at.device)
        share = layout.label_counts[sequence].to(member.dtype).reciprocal()
        member.scatter_(1, (sequence - s.start)[:, None], share[:, None])
        return SparseRows(self.left, work.head, at, work.take(at), layout.targets[at], member)

    def _scale_streamed(self, rows: Tensor, scale: Tensor) -> None:
        out = self.grads.hidden
        assert out is not None
        # torch.where: a NaN row of weight 0 has no gradient
        out[rows] = torch.where(scale[:, None] > 0, out[rows] * scale[:, None], 0.0)

    def _again(self, rows: Tensor, scale: Tensor) -> None:
        """Gradients of rows that were not kept: two passes, or a weight where none was likely."""
        at = rows[scale > 0]
        if at.numel():
            whole = scale.new_zeros(self.layout.num_tokens)
            whole[rows] = scale
            self.work.add_again(self.grads, at, whole)

    def _add_answers(self, answers: AnswerRows | None, scale: Tensor) -> None:
        """Answer rows, whose logits have become their gradients."""
        if answers is None:
            return
        head, grads, (logits,) = self.work.head, self.grads, answers.logits
        for a, b in runs(scale > 0):
            at, g = answers.at[a:b], logits[a:b]
            x = self.work.take(at)
            if self.left is not None:
                self.left.add_finished(grads, head, at, x, g, scale[a:b])
            else:
                grads.add(head, at, x, g, torch.ones_like(scale[a:b]))

    def _add_answer_rows(self, answers: AnswerRows | None, scale: Tensor) -> None:
        """The hidden states' share of answer rows whose gradients lie among the held rows."""
        if answers is None or self.grads.hidden is None:
            return
        for a, b in runs(scale > 0):
            at, blocks = answers.at[a:b], [g[a:b] for g in answers.logits]
            if not self._may_wait((b - a) * self.work.head.row_bytes):
                self._add_waiting(at, blocks)
            else:
                self.waiting.append((at, torch.cat(blocks, 1)))

    def _await_answers(self, answers: AnswerRows | None, scale: Tensor) -> None:
        """Keep the answer rows' gradients for a product back to rows with those of other groups:
        for a few rows it costs as much to read the head as to multiply."""
        if answers is None or self.grads.hidden is None:
            return
        (logits,) = answers.logits
        for a, b in runs(scale > 0):
            self.waiting.append((answers.at[a:b], logits[a:b]))
        if not self._may_wait(0):
            self._add_waiting()

    def _may_wait(self, more: int) -> bool:
        """Whether so many bytes may wait beside those that do."""
        most = waiting_bytes(self.work.head.bytes, self.grads.head)
        return sum(g.nbytes for _, g in self.waiting) + more <= most

    def _add_waiting(self, at: Tensor | None = None, blocks: Sequence[Tensor] = ()) -> None:
        """Multiply the gradients kept so far back to rows, and those `blocks` of the rows `at`."""
        into = self.grads.hidden
        if into is None or not (self.waiting or blocks):
            return
        product = self.work.head.back_to_rows([g for _, g in self.waiting], blocks)
        places = [place for place, _ in self.waiting] + ([] if at is None else [at])
        into.index_add_(0, torch.cat(places), product)
        self.waiting.clear()

    def _row_scale(self, rows: Tensor, group: Group, shares: TeacherWeights) -> Tensor:
        """alpha / |A| / normalizer of each row's sequence; 0 where the row has no label."""
        layout = self.layout
        sequence = layout.token_sequence[rows]
        alpha = shares.weights[sequence - group.sequences.start] / self.assumed
        scale = alpha / layout.label_counts[sequence].clamp(min=1)
        return torch.where(layout.labelled[rows], scale, 0.0).to(self.work.head.dtype)

    # ---- groups ------------------------------------------------------------------------------

    def _room_beside(self, sizes: list[int]) -> int:
        """Elements to hold beside the head's gradient, for groups of so many rows in turn."""
        head, inside = self.work.head, self.grads.unwritten
        again = AGAIN_QUICK if head.makes_memory else AGAIN
        all_of_them = least_spare(sizes, head, inside, 0.0)
        wanted = max(
            least_spare(sizes, head, inside, again),
            min(all_of_them, self._held_anyway()),
            WORTH_SAVING // head.dtype.itemsize,
        )
        return min(wanted, self.backend.hold_bytes // head.dtype.itemsize)

    def _held_anyway(self) -> int:
        """Exponentials that are held beside the head's gradient even if little is made again."""
        head = self.work.head
        share = HELD_SHARE_QUICK if head.makes_memory else HELD_SHARE
        most = self.backend.hold_bytes // head.dtype.itemsize
        return min(int(share * head.vocab * head.width), most)

    def _most_together(self, first: bool) -> int:
        """Rows of whole questions that go through at a time, as things stand."""
        head = self.work.head
        if self.left is not None:
            return self.left.rows_together(head.max_rows)
        if not self.grads.head:
            return self.work.most
        inside = first and self.grads.weight is not None
        room = max(head.max_rows * head.vocab, self._held_anyway())
        return most_inside(head, room) if inside else max(head.max_rows, room // head.vocab)

    def _parts(self) -> Iterator[tuple[range, Tensor]]:
        """Whole questions, as many as go through together, and their rows; a larger one stands
        alone."""
        layout, config = self.layout, self.config
        needed = layout.labelled
        if config.mi == "logprob":
            needed = needed | information_positions(layout, config)
        all_rows = needed.nonzero().squeeze(1)
        token_bounds = layout.cu_seqlens[layout.cu_teachers]
        row_bounds = torch.searchsorted(all_rows, token_bounds).tolist()
        live = self.live.tolist()
        head = self.work.head
        room = answer_bytes(head.bytes) // head.row_bytes
        sizes = [
            0 if self.spans is None else len(self.spans.positions(q, live))
            for q in range(layout.num_questions)
        ]
        first, most = 0, self._most_together(True)
        for q in range(layout.num_questions):
            last = q + 1 == layout.num_questions
            if (
                last
                or row_bounds[q + 2] - row_bounds[first] > most
                or sum(sizes[first : q + 2]) > room
            ):
                yield range(first, q + 1), all_rows[row_bounds[first] : row_bounds[q + 1]]
                first, most = q + 1, self._most_together(False)

    def _group(self, questions: range, rows: Tensor) -> Group:
        layout, head, live = self.layout, self.work.head, self.live.tolist()
        teachers = layout.cu_teachers[[questions.start, questions.stop]].tolist()
        labelled = layout.labelled[rows]
        most = answer_bytes(head.bytes)
        answers = AnswerRows.of(self.spans, questions, live, rows[labelled], head, most)
        if answers is None and self.spans is not None:
            self.left_over.extend(questions)
        plain = labelled & self.live[layout.token_sequence[rows]] & self.grads.any
        kind = torch.where(plain, 0, 2)
        if answers is not None:
            kind[torch.searchsorted(rows, answers.at)] = 1
        order = kind.argsort(stable=True)
        count = int((kind == 0).sum())
        return Group(questions, slice(*teachers), rows[order], count, answers)

    def _score(
        self, group: Group, stats: TokenStatistics, gold_logit: Tensor | None
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
        consensus, attention = (
            None if value is None else value[s] for value in (self.consensus, self.attention)
        )
        q = slice(group.questions.start, group.questions.stop)
        shares = layout_weights(mi, nll, consensus, attention, layout, config, q)
        return mi, nll, shares


def _join(parts: list[TeacherWeights]) -> TeacherWeights:
    """Groups of questions, one behind another."""
    names = ("weights", "score", "consensus", "filtered", "nonfinite", "skipped")
    return TeacherWeights(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names})
