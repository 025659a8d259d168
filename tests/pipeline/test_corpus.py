"""Which questions a run trains on, holds out, and is evaluated on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compact_fast.data.records import Question, Rationale
from compact_fast.flat_yaml import Setting
from compact_fast.pipeline.corpus import evaluation_questions, read_corpus, share_right, split
from compact_fast.run_config import RunConfig, build


def config(**keys) -> RunConfig:
    return build({k: Setting(v, f"--{k}") for k, v in keys.items()})


def questions(n: int) -> list[Question]:
    return [Question(f"q{i}", "?", "1", [Rationale("a", "1", "1", True)]) for i in range(n)]


@given(st.integers(1, 60), st.floats(0, 0.99), st.integers(0, 5), st.randoms())
def test_split_parts_the_questions(n, share, seed, random):
    train, held_out = split(questions(n), share, seed)
    ids = {q.id for q in train} | {q.id for q in held_out}
    assert len(ids) == len(train) + len(held_out) == n
    assert len(train) >= 1
    assert bool(held_out) == (share > 0 and n > 1)
    assert abs(len(held_out) - share * n) <= 1
    # whatever the order of the file, the same questions are held out
    shuffled = questions(n)
    random.shuffle(shuffled)
    assert {q.id for q in split(shuffled, share, seed)[1]} == {q.id for q in held_out}


def test_split_keeps_the_order_and_follows_the_seed():
    train, held_out = split(questions(50), 0.2, 0)
    assert [q.id for q in train] == sorted((q.id for q in train), key=lambda i: int(i[1:]))
    assert {q.id for q in held_out} != {q.id for q in split(questions(50), 0.2, 1)[1]}


def test_the_world_is_read_without_a_file():
    corpus = read_corpus(config(data="arithmetic", world_questions=20, holdout=0.1))
    assert (len(corpus.train), len(corpus.held_out)) == (18, 2)
    assert corpus.teachers == ["strong", "terse", "verbose", "misleading", "misled"]
    assert "built-in world" in corpus.source
    limited = read_corpus(config(data="arithmetic", limit=5, holdout=0.0))
    assert len(limited.questions) == 5


def test_evaluation_problems_are_new(tmp_path):
    keys = {"data": "arithmetic", "world_questions": 200, "eval_questions": 50}
    found = evaluation_questions(config(**keys))
    assert found is not None
    trained = {q.question for q in read_corpus(config(**keys)).questions}
    assert len(found[0]) == 50
    assert not trained & {q.question for q in found[0]}
    assert evaluation_questions(config(data="arithmetic", eval_questions=0)) is None
    assert len(evaluation_questions(config(data="arithmetic"))[0]) == 300
    assert evaluation_questions(config(data=str(tmp_path / "x.jsonl"))) is None


def test_as_many_questions_of_a_file_are_evaluated_on_as_asked_for(tmp_path):
    lines = [f'{{"question": "What is {i} + 1?", "answer": "{i + 1}"}}' for i in range(5)]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n")

    def found(**keys):
        return evaluation_questions(config(data="x", eval_data=str(path), **keys))

    assert len(found()[0]) == 5
    assert [q.answer for q in found(eval_questions=2)[0]] == ["1", "2"]
    assert found(eval_questions=0) is None


def test_teachers_are_selected_and_ordered():
    corpus = read_corpus(
        config(data="arithmetic", world_questions=5, teachers=["misleading", "strong"])
    )
    assert corpus.teachers == ["misleading", "strong"]
    assert {r.teacher for q in corpus.questions for r in q.rationales} == {"misleading", "strong"}


def test_fixed_weights_must_fit_the_teachers():
    with pytest.raises(ValueError, match=r"3 weights for 5 teachers \(strong, terse"):
        read_corpus(config(data="arithmetic", world_questions=5, weighting=[1, 2, 3]))


def test_share_right_counts_only_what_is_known():
    one = Question("1", "?", "1", [Rationale("a", "1", "1", True), Rationale("b", "x")])
    two = Question("2", "?", "1", [Rationale("a", "2", "2", False), Rationale("b", "x")])
    assert share_right([one, two], ["a", "b", "c"]) == {"a": 0.5, "b": None, "c": None}
