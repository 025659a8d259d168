"""Graph agreement of a run: cached by content, and summed up by teacher."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from compact_fast.data.records import Question, Rationale
from compact_fast.pipeline.agreement import (
    Agreement,
    filtered_share,
    graph_agreement,
    mean_with_others,
    teacher_table,
)


def question(name: str, **texts: str) -> Question:
    return Question(name, "?", "7", [Rationale(t, text) for t, text in texts.items()])


QUESTIONS = [
    question(
        "one",
        a="3 + 4 = 7. The answer is 7.",
        b="Adding 4 to 3 gives 3 + 4 = 7. The answer is 7.",
        c="3 - 4 = 1. The answer is 1.",
    ),
    question("two", a="2 * 5 = 10. The answer is 10.", c="2 * 5 = 10. The answer is 10."),
    question("three", b="9 / 3 = 3. The answer is 3."),
]


def same(left: Agreement, right: Agreement) -> bool:
    return all(
        np.array_equal(x, y)
        for name in ("scores", "matrices")
        for x, y in zip(getattr(left, name), getattr(right, name), strict=True)
    )


def test_the_odd_one_out_scores_least():
    found = graph_agreement(QUESTIONS)
    assert [len(s) for s in found.scores] == [3, 2, 1]
    assert [m.shape for m in found.matrices] == [(3, 3), (2, 2), (1, 1)]
    assert found.scores[0].argmin() == 2
    assert found.no_evidence.tolist()[2]
    assert not found.cached


LONG = "".join(f"{i} + 1 = {i + 1}\n" for i in range(513)) + "The answer is 7."


def test_a_rationale_beyond_the_limits_counts_by_its_answer(tmp_path):
    texts = {"b": "3 + 4 = 7. The answer is 7.", "c": "3 - 4 = 1. The answer is 1."}
    long = question("long", a=LONG, **texts)
    long.source = "in.jsonl:4"
    for rationale, answer in zip(long.rationales, "771", strict=True):
        rationale.answer = answer
    found = graph_agreement([*QUESTIONS, long], cache_dir=tmp_path)
    assert found.answer_only == ["in.jsonl:4: question long, teacher a"]
    plain = graph_agreement(QUESTIONS)
    assert plain.answer_only == []
    for ours, theirs in zip(found.scores[:3], plain.scores, strict=True):
        assert np.array_equal(ours, theirs)
    assert found.matrices[3][0].tolist() == [1.0, 1.0, 0.0]
    again = graph_agreement([*QUESTIONS, long], cache_dir=tmp_path)
    assert again.cached
    assert again.answer_only == found.answer_only


def test_the_same_texts_come_from_the_cache(tmp_path):
    first = graph_agreement(QUESTIONS, cache_dir=tmp_path)
    second = graph_agreement(QUESTIONS, cache_dir=tmp_path)
    assert second.cached
    assert same(first, second)
    assert second.backend == first.backend
    assert second.undecidable.tolist() == first.undecidable.tolist()
    other = graph_agreement(QUESTIONS[:2], cache_dir=tmp_path)
    assert not other.cached
    assert len(list((tmp_path / "consensus").iterdir())) == 2


@pytest.mark.parametrize("damage", [0, 10, 300, "flip"])
def test_a_damaged_cache_is_named_and_computed_anew(damage, tmp_path, caplog):
    first = graph_agreement(QUESTIONS, cache_dir=tmp_path)
    (path,) = (tmp_path / "consensus").iterdir()
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[200] ^= 4  # inside the first array
    path.write_bytes(data if damage == "flip" else data[:damage])
    with caplog.at_level(logging.WARNING):
        logging.getLogger("compact_fast").propagate = True
        again = graph_agreement(QUESTIONS, cache_dir=tmp_path)
    assert not again.cached
    assert same(first, again)
    assert str(path) in caplog.text
    assert graph_agreement(QUESTIONS, cache_dir=tmp_path).cached


def made(matrices: list[list[list[float]]], scores: list[list[float]]) -> Agreement:
    n = len(scores)
    return Agreement(
        scores=[np.array(s) for s in scores],
        matrices=[np.array(m) for m in matrices],
        no_evidence=np.array([False] * (n - 1) + [True]),
        undecidable=np.zeros(n, dtype=bool),
        backend="made",
        cached=False,
    )


def test_table_by_hand():
    agreement = made(
        [
            [[1, 0.8, 0.2], [0.8, 1, 0.4], [0.2, 0.4, 1]],
            [[1, 0.6], [0.6, 1]],
            [[1]],
        ],
        [[0.5, 0.6, 0.3], [0.6, 0.6], [1.0]],
    )
    table = teacher_table(QUESTIONS, ["a", "b", "c", "d"], agreement)
    assert table["counts"] == [[2, 1, 2, 0], [1, 2, 1, 0], [2, 1, 2, 0], [0, 0, 0, 0]]
    assert table["matrix"][0][:3] == pytest.approx([1, 0.8, 0.4])
    assert table["matrix"][0][3] is None
    # a met b once (0.8) and c twice (mean 0.4)
    assert mean_with_others(table) == pytest.approx([1.6 / 3, 0.6, 1.2 / 3, None])
    shares = filtered_share(QUESTIONS, ["a", "b", "c", "d"], agreement, 0.8)
    assert shares == [0.0, 0.0, 0.5, 0.0]  # 0.3 < 0.8 * 0.6; a kept: 0.5 >= 0.48
    assert filtered_share(QUESTIONS, ["a", "b", "c"], agreement, 0.0) == [0, 0, 0]
