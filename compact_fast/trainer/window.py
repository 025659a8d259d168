"""Figures of all micro-batches since the last log row, added up without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from compact_fast.layout import TokenLayout
from compact_fast.output import CompactOutput
from compact_fast.trainer.fusion import PerTeacherOutput

# Columns of the per-teacher sums; where a figure may be missing its count goes beside it.
_COLUMNS = (
    *("sequences", "weight", "weighted", "nll", "nll_n", "mi", "mi_n", "consensus", "consensus_n"),
    *("nonfinite", "filtered", "right", "right_n", "wrong", "wrong_n"),
)
_TOTALS = (
    *("sft", "consistency", "entropy", "questions", "skipped", "tokens"),
    *("kept", "missing_hidden", "missing_head", "skipping_n"),  # with config.skip_below > 0
)


class LogWindow:
    """Sums in float64 over sequences (by teacher) and over questions."""

    def __init__(self, teachers: Sequence[str], device: torch.device) -> None:
        self.teachers = list(teachers)
        self.by_teacher = torch.zeros(
            (len(teachers), len(_COLUMNS)), dtype=torch.float64, device=device
        )
        self.totals = torch.zeros(len(_TOTALS), dtype=torch.float64, device=device)
        # Where gradients are made apart: sum and count of norms on the diagonal, of cosines off it.
        self.gradients = torch.zeros(
            (2, len(teachers), len(teachers)), dtype=torch.float64, device=device
        )
        self._first_step: int | None = None  # steps done when the window opened; None: not yet
        self._opened = 0.0  # time.perf_counter() then
        self._waited = 0.0  # seconds since, for batches

    def open(self, step: int) -> None:
        """Start to count steps and time, unless that has been done since the last row."""
        if self._first_step is None:
            self._first_step, self._opened = step, time.perf_counter()

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; how long each was waited for counts."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def add(self, out: CompactOutput, layout: TokenLayout) -> None:
        """Count one micro-batch. Layout and output lie on the window's device."""
        weights = out.weights.double()
        live = ~out.skipped[layout.sequence_question]
        correct = layout.correct if layout.correct is not None else torch.full_like(live, -1).long()
        right, wrong = live & (correct == 1), live & (correct == 0)
        columns = [
            torch.ones_like(weights),
            torch.where(live, weights, 0.0),
            live.double(),
            *_finite(out.nll),
            *_finite(out.mi),
            *_finite(out.consensus),
            out.nonfinite.double(),
            out.filtered.double(),
            torch.where(right, weights, 0.0),
            right.double(),
            torch.where(wrong, weights, 0.0),
            wrong.double(),
        ]
        self.by_teacher.index_add_(0, layout.teachers, torch.stack(columns, 1))
        self.totals += torch.stack(
            [
                out.loss_sft.double(),
                out.loss_consistency.double(),
                -torch.special.xlogy(weights, weights)[live].sum(),
                weights.new_tensor(layout.num_questions),
                out.skipped.double().sum(),
                weights.new_tensor(layout.num_tokens),
                *_left_out(out, weights),
            ]
        )
        if isinstance(out, PerTeacherOutput):
            self._add_gradients(out, layout)

    def _add_gradients(self, found: PerTeacherOutput, layout: TokenLayout) -> None:
        each = layout.teachers
        for (a, b), values in (
            ((each, each), found.grad_norms),
            (found.pairs.unbind(1), found.cosines),
        ):
            at = torch.minimum(a, b), torch.maximum(a, b)
            for table, part in zip(self.gradients, _finite(values), strict=True):
                table.index_put_(at, part, accumulate=True)

    def rows(self, step: int, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means since the window opened, by log name; the window is then empty again.

        `reduce` sums a tensor over all processes. Names without any value are left out.
        """
        table = reduce(self.by_teacher).tolist()
        totals = dict(zip(_TOTALS, reduce(self.totals).tolist(), strict=True))
        columns = {name: [row[i] for row in table] for i, name in enumerate(_COLUMNS)}
        assert self._first_step is not None, "open() comes before rows()"
        steps = max(step - self._first_step, 1)
        seconds = max(time.perf_counter() - self._opened, 1e-9)
        out: dict[str, float] = {
            "loss_sft": totals["sft"] / steps,
            "loss_consistency": totals["consistency"] / steps,
        }
        live = totals["questions"] - totals["skipped"]
        _mean(out, "weight_entropy", totals["entropy"], live)
        for kind in ("right", "wrong"):
            _mean(out, f"weight/{kind}", sum(columns[kind]), sum(columns[f"{kind}_n"]))
        _mean(out, "filtered_share", sum(columns["filtered"]), sum(columns["sequences"]))
        out["skipped_questions"] = totals["skipped"]
        batches = totals["skipping_n"]
        _mean(out, "kept_share", totals["kept"], batches)
        _mean(out, "gradient_error/hidden", totals["missing_hidden"], batches)
        _mean(out, "gradient_error/head", totals["missing_head"], batches)
        for k, name in enumerate(self.teachers):
            seen = columns["sequences"][k]
            _mean(out, f"teacher/{name}/weight", columns["weight"][k], columns["weighted"][k])
            for figure in ("nll", "mi", "consensus"):
                total, n = columns[figure][k], columns[f"{figure}_n"][k]
                _mean(out, f"teacher/{name}/{figure}", total, n)
            if seen:
                out[f"teacher/{name}/nonfinite"] = columns["nonfinite"][k]
            _mean(out, f"teacher/{name}/filtered", columns["filtered"][k], seen)
        out.update(self._gradient_rows(reduce(self.gradients)))
        out["tokens_per_second"] = totals["tokens"] / seconds
        out["questions_per_second"] = totals["questions"] / seconds
        out["data_wait_share"] = self._waited / seconds
        self.reset()
        return out

    def _gradient_rows(self, table: Tensor) -> dict[str, float]:
        """Norms by teacher, cosines by pair, and each teacher's mean cosine with the others."""
        out: dict[str, float] = {}
        totals, counts = table.tolist()
        both, seen = (t + t.T - 2 * t.diagonal().diag() for t in table)
        for k, name in enumerate(self.teachers):
            _mean(out, f"teacher/{name}/grad_norm", totals[k][k], counts[k][k])
            _mean(out, f"teacher/{name}/grad_cosine", float(both[k].sum()), float(seen[k].sum()))
        for i, j in combinations(range(len(self.teachers)), 2):
            pair = f"cosine/{self.teachers[i]}/{self.teachers[j]}"
            _mean(out, pair, totals[i][j], counts[i][j])
        return out

    def reset(self) -> None:
        """Forget everything."""
        self.by_teacher.zero_()
        self.gradients.zero_()
        self.totals.zero_()
        self._first_step, self._waited = None, 0.0

    def state(self) -> dict[str, Any]:
        """The sums, exact, and the time spent, as JSON values."""
        return {
            "by_teacher": self.by_teacher.tolist(),
            "gradients": self.gradients.tolist(),
            "totals": self.totals.tolist(),
            "first_step": self._first_step,
            "seconds": time.perf_counter() - self._opened,
            "waited": self._waited,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned."""
        self.by_teacher.copy_(self.by_teacher.new_tensor(state["by_teacher"]))
        self.gradients.copy_(self.gradients.new_tensor(state["gradients"]))
        self.totals.copy_(self.totals.new_tensor(state["totals"]))
        self._first_step = state["first_step"]
        self._opened = time.perf_counter() - state["seconds"]
        self._waited = state.get("waited", 0.0)  # a checkpoint may be older than this figure


def _left_out(out: CompactOutput, like: Tensor) -> tuple[Tensor, ...]:
    """Share of the logit gradients that was multiplied, bounds on the rest, and 1; 0 without."""
    if out.kept_share is None or out.gradient_error is None:
        return (like.new_zeros(()),) * 4
    hidden, *head = out.gradient_error.double().unbind()
    return out.kept_share.double(), hidden, torch.stack(head).norm(), like.new_ones(())


def _finite(values: Tensor) -> tuple[Tensor, Tensor]:
    good = values.isfinite()
    return torch.where(good, values, 0.0).double(), good.double()


def _mean(out: dict[str, float], name: str, total: float, count: float) -> None:
    if count:
        out[name] = total / count
