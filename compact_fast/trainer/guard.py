"""Stops a run before an update that would ruin the weights, and says whose numbers they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from compact_fast.layout import TokenLayout
from compact_fast.output import CompactOutput


class NonFiniteError(ValueError):
    """A loss or gradient is not finite; no update was made of it.

    `step` is the step that would have been next, `question` and `teacher` the first ones that a
    non-finite number belongs to (None where none can be blamed).
    """

    def __init__(self, message: str, step: int, question: str | None, teacher: str | None) -> None:
        super().__init__(message)
        self.step, self.question, self.teacher = step, question, teacher


class NonFiniteGuard:
    """Keeps the figures of one optimizer step's micro-batches until the update is due."""

    def __init__(self, teachers: Sequence[str], device: torch.device) -> None:
        self._teachers, self._device = list(teachers), device
        self._pending: list[tuple[CompactOutput, TokenLayout, list[str]]] = []

    def add(self, out: CompactOutput, layout: TokenLayout, ids: list[str]) -> None:
        """Remember one micro-batch; nothing is read from the device yet."""
        # Without the graph: it holds the gradients of the hidden states and of the head.
        self._pending.append((replace(out, loss=out.loss.detach()), layout, ids))

    def check(
        self, step: int, grad_norm: float | Tensor, total: Callable[[Tensor], Tensor]
    ) -> None:
        """Raise NonFiniteError unless the update may be made. `total` sums over all processes.

        All processes raise or none does, also those that had no question in this step.
        """
        pending, self._pending = self._pending, []
        nothing = torch.zeros((), dtype=torch.bool, device=self._device)
        bad_loss = torch.stack([nothing, *(~out.loss.isfinite() for out, _, _ in pending)]).any()
        useless = torch.stack([~nothing, *(_all_lost(out, lay) for out, lay, _ in pending)]).all()
        norm = torch.as_tensor(grad_norm, device=self._device)
        found = total(torch.stack([bad_loss, ~norm.isfinite(), ~useless]).double())
        losses, norms, useful = found.tolist()
        if losses:
            what = "the loss is not finite"
        elif norms:
            what = f"the gradient norm is {float(norm)}"
        elif not useful:
            what = "every question's scores are not finite"
        else:
            return
        question, teacher, why = self._blame(pending)
        where = f"; first seen in question {question!r}" if question is not None else ""
        whom = f", teacher {teacher!r}" if teacher is not None else ""
        raise NonFiniteError(
            f"step {step}: {what}{where}{whom}{why}. The update was not made; the weights are "
            f"those after step {step - 1}",
            step,
            question,
            teacher,
        )

    def _blame(
        self, pending: list[tuple[CompactOutput, TokenLayout, list[str]]]
    ) -> tuple[str | None, str | None, str]:
        for out, layout, ids in pending:
            bad = out.nonfinite | ~out.nll.isfinite()
            if bool(bad.any()):
                s = int(bad.nonzero()[0])
                name = self._teachers[int(layout.teachers[s])]
                question = ids[int(layout.sequence_question[s])]
                return question, name, f" (NLL {float(out.nll[s]):.4g}, MI {float(out.mi[s]):.4g})"
            terms = ~out.consistency.isfinite()
            if bool(terms.any()):
                return ids[int(terms.nonzero()[0])], None, " (in its consistency term)"
        ids = [i for _, _, names in pending for i in names]
        more = ", ..." if len(ids) > 4 else ""
        return None, None, f", though every score is finite; questions {', '.join(ids[:4])}{more}"


def _all_lost(out: CompactOutput, layout: TokenLayout) -> Tensor:
    """Whether every question of the batch was skipped, and each for a score that is not finite."""
    bad = torch.zeros_like(out.skipped, dtype=torch.long)
    bad = bad.index_add(0, layout.sequence_question, out.nonfinite.long())
    return (out.skipped & (bad > 0)).all()
