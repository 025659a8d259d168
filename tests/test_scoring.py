from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from compact_fast.config import CompactConfig
from compact_fast.scoring import COLUMNS, Done, score_file, score_rows, write_scores

sys.path.insert(0, str(Path(__file__).parent / "trainer"))
from toy import TEACHERS, THINKING, make_rows, make_student, make_trainer

CONFIGS = {
    "compact": CompactConfig(),
    "blend": CompactConfig(filter_below=0.0),
    "paper": CompactConfig(mode="paper"),
    "reference": CompactConfig(mode="reference"),
    "pvi": CompactConfig(mi="pvi", filter_below=0.0),
    "random": CompactConfig(weighting="random"),
}


def score(model: Any, rows: Any, **kwargs: Any) -> list[dict[str, Any]]:
    return list(score_rows(model, None, rows, teachers=TEACHERS, thinking_ids=THINKING, **kwargs))


def first_step(trainer: Any) -> dict[tuple[str, str], dict[str, Any]]:
    """Weight, scores and batch of every rationale in the trainer's first optimizer step."""
    seen: list[Any] = []
    inner = trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
        loss, out = inner(model, inputs, **{**kwargs, "return_outputs": True})
        seen.append((out, inputs["layout"], inputs["ids"]))
        return loss

    trainer.compute_loss = compute_loss
    trainer.train()
    found = {}
    for batch, (out, layout, ids) in enumerate(seen):
        for s in range(layout.num_sequences):
            key = ids[int(layout.sequence_question[s])], TEACHERS[int(layout.teachers[s])]
            found[key] = {
                "batch": batch,
                "weight": out.weights[s].item(),
                "mi": out.mi[s].item(),
                "nll": out.nll[s].item(),
                "consensus": out.consensus[s].item(),
                "filtered": out.filtered[s].item(),
            }
    return found


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_those_of_the_trainers_first_step(tmp_path: Path, name: str, lora: bool) -> None:
    config, rows = CONFIGS[name], make_rows(6)
    trainer = make_trainer(
        tmp_path,
        make_student("qwen2", lora=lora),
        rows,
        config=config,
        max_steps=1,
        gradient_accumulation_steps=3,
        seed=0,
    )
    expected = first_step(trainer)
    order = list(dict.fromkeys((v["batch"], int(q[1:])) for (q, _), v in expected.items()))
    batches = [[i for b, i in order if b == batch] for batch in range(3)]
    assert sorted(i for b in batches for i in b) == list(range(6))
    scored = score(make_student("qwen2", lora=lora), rows, config=config, batches=batches)
    assert len(scored) == len(expected)
    for row in scored:
        of_training = expected[row["id"], row["teacher"]]
        assert {key: row[key] for key in of_training if key != "batch"} == {
            key: value for key, value in of_training.items() if key != "batch"
        }


def test_any_batching_gives_the_same_scores_in_the_order_of_the_rows() -> None:
    rows, model = make_rows(13), make_student()
    expected = score(model, rows, batch_tokens=1)
    assert [r["id"] for r in expected] == [r["id"] for r in rows for _ in r["teacher_ids"]]
    for window, tokens in ((13, 10**6), (4, 60), (1, 100)):
        found = score(model, rows, window=window, batch_tokens=tokens)
        assert [(r["id"], r["teacher"]) for r in found] == [
            (r["id"], r["teacher"]) for r in expected
        ]
        for a, b in zip(found, expected, strict=True):
            assert a["tokens"] == b["tokens"]
            assert a["filtered"] == b["filtered"]
            for key in ("mi", "nll", "weight", "consensus"):
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6)


def test_weights_of_a_question_sum_to_one_and_the_rest_is_copied() -> None:
    rows = make_rows(9)
    scored = score(make_student(), rows)
    for row in rows:
        mine = [r for r in scored if r["id"] == row["id"]]
        assert sum(r["weight"] for r in mine) == pytest.approx(1.0, abs=1e-6)
        assert [r["teacher"] for r in mine] == [TEACHERS[k] for k in row["teacher_ids"]]
        assert [r["correct"] for r in mine] == [
            {1: True, 0: False, -1: None}[c] for c in row["correct"]
        ]
        assert [r["tokens"] for r in mine] == [len(c) for c in row["completion_ids"]]
        assert [r["consensus"] for r in mine] == pytest.approx(row["consensus"])


def test_neither_the_student_nor_gradients_are_touched() -> None:
    model = make_student(attention_dropout=0.5).train()
    before = [p.detach().clone() for p in model.parameters()]
    first, second = score(model, make_rows(4)), score(model, make_rows(4))
    assert first == second
    assert model.training
    assert torch.is_grad_enabled()
    for p, q in zip(model.parameters(), before, strict=True):
        assert p.grad is None
        assert torch.equal(p, q)


def test_gradients_stay_on_for_the_caller_between_rows() -> None:
    rows = score_rows(
        make_student(), None, make_rows(4), teachers=TEACHERS, thinking_ids=THINKING, batch_tokens=1
    )
    next(rows)
    assert torch.is_grad_enabled()


def test_progress_counts_questions_and_tokens() -> None:
    calls: list[Done] = []
    rows = make_rows(7)
    score(make_student(), rows, batch_tokens=1, window=3, progress=calls.append)
    tokens = sum(len(r["prompt_ids"]) + len(c) for r in rows for c in r["completion_ids"])
    assert [(done.questions, done.of_questions) for done in calls] == [(i, 7) for i in range(1, 8)]
    assert {done.of_tokens for done in calls} == {tokens}
    assert [done.tokens for done in calls] == sorted(done.tokens for done in calls)
    assert calls[-1].tokens == tokens
    assert calls[-1].seconds_left == 0
    assert calls[2].seconds_left > 0
    assert calls[2].tokens_per_second == pytest.approx(calls[2].tokens / calls[2].seconds)


def score_to(path: Path, model: Any, rows: Any, **kwargs: Any) -> dict[str, dict[str, float]]:
    settings: dict[str, Any] = {"window": 3, "batch_tokens": 80, **kwargs}
    return score_file(path, model, None, rows, teachers=TEACHERS, thinking_ids=THINKING, **settings)


@pytest.mark.parametrize("kind", ["list", "dataset"])
def test_a_killed_file_is_taken_up_and_ends_in_the_same_bytes(tmp_path: Path, kind: str) -> None:
    from datasets import Dataset

    rows: Any = make_rows(11) if kind == "list" else Dataset.from_list(make_rows(11))
    whole, killed = tmp_path / "whole.parquet", tmp_path / "killed.parquet"
    summary = score_to(whole, make_student(), rows)
    assert [p.name for p in tmp_path.iterdir()] == ["whole.parquet"]

    def stop(done: Done) -> None:
        if done.questions >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_to(killed, make_student(), rows, progress=stop)
    assert not killed.exists()
    calls: list[Done] = []
    assert score_to(killed, make_student(), rows, progress=calls.append) == summary
    assert calls[0].questions > 6  # two windows of three were whole
    assert 0 < calls[0].resumed_tokens < calls[0].tokens
    assert killed.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed.parquet", "whole.parquet"]


@pytest.mark.parametrize("what", ["student", "rows", "config"])
def test_parts_of_another_scoring_are_thrown_away(tmp_path: Path, what: str) -> None:
    path = tmp_path / "scores.parquet"

    def stop(done: Done) -> None:
        if done.questions >= 8:
            raise KeyboardInterrupt

    model, rows = make_student(), make_rows(11)
    with pytest.raises(KeyboardInterrupt):
        score_to(path, model, rows, progress=stop)
    kwargs: dict[str, Any] = {}
    if what == "student":
        with torch.no_grad():
            model.lm_head.weight[3, 3] += 0.01
    elif what == "rows":
        rows[0]["completion_ids"][0][0] += 1
    else:
        kwargs["config"] = CompactConfig(tau=2.0)
    calls: list[Done] = []
    score_to(path, model, rows, progress=calls.append, **kwargs)
    assert calls[0].resumed_tokens == 0
    assert calls[0].questions < 6


def test_scoring_leaves_the_students_attention_as_it_was() -> None:
    model, eager = make_student(), make_student()
    eager.set_attn_implementation("eager")
    for a, b in zip(score(model, make_rows(5)), score(eager, make_rows(5)), strict=True):
        assert a["nll"] == pytest.approx(b["nll"], rel=1e-5)
    assert model.config._attn_implementation == "sdpa"
    assert eager.config._attn_implementation == "eager"


def test_a_batch_stays_within_its_tokens() -> None:
    rows, sizes = make_rows(30), []
    model = make_student()
    model.model.register_forward_pre_hook(
        lambda m, a, kw: sizes.append(kw["input_ids"].numel()), with_kwargs=True
    )
    score(model, rows, batch_tokens=120)
    sizes = [n for n in sizes if n != 3]  # the check of the head
    assert max(sizes) <= 120
    assert len(sizes) < 20


def test_parquet_has_the_rows_and_the_summary_their_means(tmp_path: Path) -> None:
    rows = make_rows(9)
    rows[0]["consensus"][0] = float("nan")
    config = CompactConfig(filter_below=0.0)
    scored = score(make_student(), rows, config=config)
    path = tmp_path / "scores.parquet"
    summary = write_scores(path, iter(scored), info={"student": "toy"})
    table = pq.read_table(path)
    assert table.column_names == list(COLUMNS)
    assert table.to_pylist() == [{name: row[name] for name in COLUMNS} for row in scored]
    assert table.schema.metadata[b"student"] == b"toy"
    lost = [r for r in scored if r["nonfinite"]]
    assert [(r["id"], r["teacher"], r["consensus"], r["weight"]) for r in lost] == [
        ("q0", "ann", None, 0.0)
    ]
    for teacher in TEACHERS:
        mine = [r for r in scored if r["teacher"] == teacher]
        assert summary[teacher]["rationales"] == len(mine)
        assert summary[teacher]["weight"] == pytest.approx(
            sum(r["weight"] for r in mine) / len(mine)
        )
    assert summary["ann"]["right"] == 1.0
    assert "right" not in summary["bob"]  # nobody knows
    assert [p.name for p in tmp_path.iterdir()] == ["scores.parquet"]


def test_a_failure_half_way_leaves_no_file(tmp_path: Path) -> None:
    def broken() -> Any:
        yield from score(make_student(), make_rows(2))
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_scores(tmp_path / "scores.parquet", broken())
    assert list(tmp_path.iterdir()) == []


def test_empty_files_are_files(tmp_path: Path) -> None:
    assert write_scores(tmp_path / "none.parquet", []) == {}
    assert pq.read_table(tmp_path / "none.parquet").num_rows == 0


def test_rows_of_a_dataset_score_as_a_list_does() -> None:
    from datasets import Dataset

    rows = make_rows(5)
    assert score(make_student(), rows) == score(make_student(), Dataset.from_list(rows))
