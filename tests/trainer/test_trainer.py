"""What the trainer logs, evaluates and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import (
    BLEND,
    TEACHERS,
    Seen,
    make_rows,
    make_student,
    make_trainer,
    metrics,
    same,
    trained,
)

from compact_fast.config import CompactConfig
from compact_fast.students import body_and_head
from compact_fast.trainer import CompactTrainingArguments

# ---- logs ------------------------------------------------------------------------------------


def recorded(trainer: Any) -> list[Any]:
    """(output, layout) of every micro-batch to come."""
    outputs: list[Any] = []
    inner = trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
        loss, out = inner(model, inputs, **{**kwargs, "return_outputs": True})
        outputs.append((out, inputs["layout"]))
        return loss

    trainer.compute_loss = compute_loss
    return outputs


def test_a_log_row_is_the_mean_over_all_its_micro_batches(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, config=BLEND, logging_steps=3, max_steps=3)
    outputs = recorded(trainer)
    seen = Seen()
    trainer.add_callback(seen)
    trainer.train()
    assert len(outputs) == 6
    row = metrics(tmp_path)[0]
    assert row["step"] == 3

    def every(name: str) -> torch.Tensor:
        return torch.cat([getattr(out, name) for out, _ in outputs]).double()

    teachers = torch.cat([layout.teachers for _, layout in outputs])
    correct = torch.cat([layout.correct for _, layout in outputs])
    for k, name in enumerate(TEACHERS):
        for key, field in (
            *(("weight", "weights"), ("nll", "nll"), ("mi", "mi")),
            *(("consensus", "consensus"), ("filtered", "filtered")),
        ):
            expected = float(every(field)[teachers == k].mean())
            assert row[f"teacher/{name}/{key}"] == pytest.approx(expected, rel=1e-6), (name, key)
    assert row["weight/right"] == pytest.approx(float(every("weights")[correct == 1].mean()))
    assert row["weight/wrong"] == pytest.approx(float(every("weights")[correct == 0].mean()))
    entropy = -torch.special.xlogy(every("weights"), every("weights")).sum() / 12
    assert row["weight_entropy"] == pytest.approx(float(entropy), rel=1e-6)
    assert row["loss"] == pytest.approx(
        sum(float(out.loss.detach()) for out, _ in outputs) / 3, rel=1e-6
    )
    assert row["loss"] == pytest.approx(row["loss_sft"] + row["loss_consistency"], rel=1e-5)
    assert row["loss_consistency"] > 0
    assert row["tokens_per_second"] > 0
    assert 0 < row["data_wait_share"] < 1
    assert {k: v for k, v in row.items() if k not in ("step", "time")} == seen.rows[0]


@pytest.mark.parametrize(("steps", "rows"), [(2, [2]), (5, [3, 5]), (6, [3, 6])])
def test_the_last_step_is_logged_whatever_the_window(
    tmp_path: Path, steps: int, rows: list[int]
) -> None:
    trainer = make_trainer(tmp_path, logging_steps=3, max_steps=steps)
    outputs = recorded(trainer)
    trainer.train()
    found = metrics(tmp_path)
    assert [row["step"] for row in found] == rows
    last = outputs[-2 * (rows[-1] - (rows[-2] if len(rows) > 1 else 0)) :]
    mean = sum(float(out.loss.detach()) for out, _ in last) / (len(last) / 2)
    assert found[-1]["loss"] == pytest.approx(mean, rel=1e-6)


def test_fixed_names_of_a_row(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=2).train()
    row = metrics(tmp_path)[0]
    names = {
        *("step", "epoch", "time", "loss", "loss_sft", "loss_consistency", "weight_entropy"),
        *("learning_rate", "grad_norm", "tokens_per_second", "questions_per_second"),
        *("data_wait_share", "weight/right", "weight/wrong", "filtered_share", "skipped_questions"),
        *(
            f"teacher/{teacher}/{figure}"
            for teacher in TEACHERS
            for figure in ("weight", "nll", "mi", "consensus", "nonfinite", "filtered")
        ),
    }
    assert set(row) == names


def test_run_json(tmp_path: Path) -> None:
    info = {"config": {"a": 1}, "consensus_backend": "native"}
    make_trainer(tmp_path, max_steps=1, run_info=info).train()
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["config"] == {"a": 1}
    assert run["consensus_backend"] == "native"
    assert run["backend"]["name"] == "torch"
    assert "cpu" in run["backend"]["reason"]
    assert run["teachers"] == TEACHERS
    assert run["status"] == "finished"
    assert run["versions"]["torch"] == torch.__version__
    assert run["started"] <= run["finished"]
    make_trainer(tmp_path, max_steps=1).train()
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["config"]["mode"] == "compact"
    assert run["config"]["learning_rate"] == 1e-2


def test_a_fresh_run_starts_the_metrics_anew(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=4).train()
    make_trainer(tmp_path, max_steps=2).train()
    assert [row["step"] for row in metrics(tmp_path)] == [2]


def test_the_host_settings_cannot_break_the_log(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, max_steps=2, logging_first_step=True, include_num_input_tokens_seen=True
    )
    trainer.train()
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2]


def test_arguments_serialise(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, config=CompactConfig(weighting=(1.0, 2.0, 0.0)))
    assert json.loads(trainer.args.to_json_string())["compact"]["weighting"] == [1.0, 2.0, 0.0]


# ---- evaluation ------------------------------------------------------------------------------


def test_held_out_nll_for_every_teacher(tmp_path: Path) -> None:
    rows = make_rows(5, seed=8)
    model = make_student()
    trainer = make_trainer(tmp_path, model, eval_rows=rows)
    found = trainer.evaluate()
    losses: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for row in rows:
        for k, completion in zip(row["teacher_ids"], row["completion_ids"], strict=True):
            ids = torch.tensor([row["prompt_ids"] + completion])
            labels = ids.clone()
            labels[:, : len(row["prompt_ids"])] = -100
            with torch.no_grad():
                losses[k].append(float(model(input_ids=ids, labels=labels).loss))
    every = [x for one in losses.values() for x in one]
    assert found["eval_nll"] == pytest.approx(sum(every) / len(every), rel=1e-5)
    for k, name in enumerate(TEACHERS):
        expected = sum(losses[k]) / len(losses[k])
        assert found[f"eval/teacher/{name}/nll"] == pytest.approx(expected, rel=1e-5)


def test_the_best_checkpoint_is_that_of_the_lowest_held_out_nll(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        eval_rows=make_rows(3, seed=8),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        learning_rate=0.05,  # learns twelve random questions by heart, and unlearns the rest
        load_best_model_at_end=True,
    )
    trainer.train()
    values = {row["step"]: row["eval_nll"] for row in metrics(tmp_path) if "eval_nll" in row}
    best = min(values, key=values.__getitem__)
    assert best != max(values)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_nll"] == pytest.approx(values[best], rel=1e-6)


# ---- what is refused or left out -------------------------------------------------------------


def test_correct_only_leaves_out_questions_without_a_right_rationale(tmp_path: Path) -> None:
    rows = make_rows(6)
    rows[0]["correct"] = [0] * len(rows[0]["correct"])
    rows[4]["correct"] = [-1] * len(rows[4]["correct"])
    config = CompactConfig(weighting="correct")
    trainer = make_trainer(tmp_path, make_student(), rows, config=config)
    assert [row["id"] for row in trainer.train_dataset] == ["q1", "q2", "q3", "q5"]
    assert trainer.notes == [
        'weighting="correct": 2 of 6 questions left out, none of their rationales is right'
    ]
    trainer.train()
    assert all(row["weight/right"] == 1.0 for row in metrics(tmp_path))
    for row in rows:
        row["correct"] = [0] * len(row["correct"])
    with pytest.raises(ValueError, match="no question has a rationale known to be right"):
        make_trainer(tmp_path, make_student(), rows, config=config)


def test_rows_of_a_dataset_train_as_a_list_does(tmp_path: Path) -> None:
    from datasets import Dataset

    config = CompactConfig(weighting="correct")
    rows = make_rows(8)
    rows[2]["correct"] = [0] * len(rows[2]["correct"])
    a = trained(make_trainer(tmp_path / "a", make_student(), rows, config=config))
    b = trained(
        make_trainer(tmp_path / "b", make_student(), Dataset.from_list(rows), config=config)
    )
    assert same(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1: the loss has no label"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True"),
        ({"torch_compile": True}, "torch_compile=True"),
        ({"fp16": True}, "fp16=True: fp16 is not supported; use bf16"),
        ({"fsdp": "full_shard"}, "fsdp='full_shard'"),
        (
            {"train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy='group_by_length'",
        ),
        ({"remove_unused_columns": True}, "remove_unused_columns=True"),
        ({"progress": "dots"}, "progress='dots': expected auto, bar, lines or none"),
        (
            {"report_to": ["no-such-tracker"]},
            "report_to='no-such-tracker': unknown, or its package",
        ),
        ({"backend": "cuda-magic"}, "backend='cuda-magic'"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **changes)


def test_rows_and_configuration_must_go_together(tmp_path: Path) -> None:
    rows = make_rows(2)
    for row in rows:
        del row["consensus"]
    with pytest.raises(ValueError, match="consensus='graph' needs the column `consensus`"):
        make_trainer(tmp_path, make_student(), rows)
    make_trainer(tmp_path, make_student(), rows, config=CompactConfig(weighting="uniform"))
    make_trainer(tmp_path, make_student(), rows, config=CompactConfig(mode="paper"))
    with pytest.raises(ValueError, match="2 fixed weights for 3 teachers"):
        make_trainer(tmp_path, config=CompactConfig(weighting=(1.0, 2.0)))
    with pytest.raises(ValueError, match="train_dataset holds no question"):
        make_trainer(tmp_path, make_student(), [])
    with pytest.raises(ValueError, match=r"teachers=\[\]"):
        CompactTrainingArguments(output_dir=str(tmp_path))


def test_the_authors_set_up_is_the_default(tmp_path: Path) -> None:
    args = CompactTrainingArguments(output_dir=str(tmp_path), teachers=["a"], use_cpu=True)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (1, 4)
    assert (args.learning_rate, args.lr_scheduler_type.value) == (1e-5, "constant")
    assert (args.num_train_epochs, args.max_grad_norm) == (5, 1.0)


def test_a_trained_head_is_seen(tmp_path: Path) -> None:
    assert body_and_head(make_trainer(tmp_path).model).trainable
    assert not body_and_head(make_trainer(tmp_path, make_student(lora=True)).model).trainable


@pytest.mark.parametrize("fusion", ["packed", "per_teacher"])
def test_what_is_left_out_of_gradients_is_logged(tmp_path: Path, fusion: str) -> None:
    config = CompactConfig(skip_below=0.1)
    trainer = make_trainer(tmp_path, max_steps=2, config=config, fusion=fusion)
    outputs = recorded(trainer)
    trainer.train()
    row = metrics(tmp_path)[0]
    assert 0 < row["kept_share"] < 1
    found = [out for out, _ in outputs]
    mean = sum(float(out.kept_share) for out in found) / len(found)
    assert row["kept_share"] == pytest.approx(mean, rel=1e-6)
    bounds = torch.stack([out.gradient_error for out in found]).double()
    assert row["gradient_error/hidden"] == pytest.approx(float(bounds[:, 0].mean()), rel=1e-6)
    assert row["gradient_error/head"] == pytest.approx(float(bounds[:, 1].mean()), rel=1e-6)
    assert row["gradient_error/head"] > 0
