"""Numbers that are not finite stop a run before the update."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import (
    BLEND,
    TEACHERS,
    make_rows,
    make_student,
    make_trainer,
    metrics,
    same,
)
from transformers import TrainerCallback

from compact_fast.students import causal_model
from compact_fast.trainer import NonFiniteError


def poison(trainer: Any, question: str, teacher: int | None) -> None:
    """From step 2 on, NaN activations for one rationale of a question (None: for all)."""
    inner = trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
        layout, ids = inputs["layout"], inputs["ids"]
        if question not in ids or trainer.state.global_step < 1:
            return inner(model, inputs, **kwargs)
        bad = layout.sequence_question == ids.index(question)
        if teacher is not None:
            bad &= layout.teachers == teacher
        factor = torch.ones(inputs["input_ids"].shape)
        read = bad[layout.token_sequence] & layout.assistant_mask
        factor.view(-1)[inputs["gather"][read]] = torch.nan
        factor = factor[..., None]
        embedding = causal_model(model).get_input_embeddings()
        hook = embedding.register_forward_hook(lambda m, a, out: out * factor)
        try:
            return inner(model, inputs, **kwargs)
        finally:
            hook.remove()

    trainer.compute_loss = compute_loss


@pytest.mark.parametrize("teacher", [1, None])
def test_a_non_finite_number_stops_the_run_before_the_update(
    tmp_path: Path, teacher: int | None
) -> None:
    rows = make_rows()
    model = make_student()
    trainer = make_trainer(tmp_path, model, rows, config=BLEND, logging_steps=1)
    poison(trainer, "q3", teacher)  # q3 has all three teachers
    snapshots = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            snapshots[state.global_step] = copy.deepcopy(model.state_dict())

    trainer.add_callback(Keep())
    with pytest.raises(NonFiniteError, match="The update was not made") as caught:
        trainer.train()
    error = caught.value
    assert error.question == "q3"
    assert error.teacher == TEACHERS[teacher or 0]
    assert f"step {error.step}: " in str(error)
    assert repr(error.question) in str(error)
    assert error.step == trainer.state.global_step + 1
    assert error.step - 1 in snapshots
    assert all(p.isfinite().all() for p in model.state_dict().values())
    assert same(snapshots[error.step - 1], model.state_dict())
    assert [r["step"] for r in metrics(tmp_path)] == list(range(1, error.step))
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["status"].startswith(f"stopped: step {error.step}")


def test_a_gradient_alone_can_stop_the_run(tmp_path: Path) -> None:
    model = make_student()
    trainer = make_trainer(tmp_path, model, max_steps=3)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda g: torch.full_like(g, torch.inf))
    before = weight.detach().clone()
    with pytest.raises(
        NonFiniteError, match=r"step 1: the gradient norm is .*every score is finite"
    ):
        trainer.train()
    assert torch.equal(weight, before)


def test_waiting_for_the_update_keeps_no_gradients(tmp_path: Path) -> None:
    """What is kept of a step's micro-batches must not hold their graphs, and gradients in them."""
    trainer = make_trainer(tmp_path)
    trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    [(kept, _, _)] = trainer._guard._pending
    assert kept.loss.grad_fn is None


def test_a_step_of_which_nothing_is_left_stops_the_run(tmp_path: Path) -> None:
    """No loss and no gradient is non-finite when every question is skipped; it is useless."""
    rows = make_rows(4)
    for row in rows:
        row["consensus"] = [float("nan")] * len(row["consensus"])
    trainer = make_trainer(tmp_path, make_student(), rows, config=BLEND)
    with pytest.raises(NonFiniteError, match="every question's scores are not finite"):
        trainer.train()


def test_a_single_lost_score_is_counted_and_training_goes_on(tmp_path: Path) -> None:
    rows = make_rows(4)
    rows[0]["consensus"][0] = float("nan")
    rows[3]["consensus"] = [float("nan")] * 3
    trainer = make_trainer(
        tmp_path, make_student(), rows, config=BLEND, max_steps=1, logging_steps=1
    )
    trainer.train()
    row = metrics(tmp_path)[0]
    assert row["skipped_questions"] == 1
    assert row["teacher/ann/nonfinite"] == 2
    assert row["teacher/bob/nonfinite"] == 1
