"""What the benches of whole steps feed their variants."""

from __future__ import annotations

import time

from bench.end_to_end import with_neighbour
from bench.file_size import write_file
from bench.parts import Clock
from compact_fast.data import read_questions
from compact_fast.data.collate import collate


def row(i: int, prompt: int) -> dict:
    first = 10 * i + 1
    return {
        "id": f"q{i}",
        "index": i,
        "prompt_ids": list(range(first, first + prompt)),
        "completion_ids": [[50, 51, 52], [60, 61, 62, 63]],
        "teacher_ids": [0, 1],
        "answer_spans": [[prompt + 1, prompt + 3], [0, 0]],
        "correct": [1, 0],
        "gold_ids": [3],
        "consensus": [1.0, 0.5],
    }


def test_neighbours_rationales_keep_their_answers_behind_another_prompt():
    both = with_neighbour(row(0, 3), row(1, 5))
    batch = collate([both], thinking_ids=[], pad_id=0)
    layout = batch.layout
    assert layout.teachers.tolist() == [0, 1, 2, 3]
    starts, spans = layout.cu_seqlens.tolist(), layout.answer_spans.tolist()
    for s, (a, b) in enumerate(spans):
        answer = layout.targets[a:b].tolist()
        assert answer == ([51, 52] if s in (0, 2) else [])
        assert b <= starts[s + 1]


def test_questions_are_written_in_the_record_format(tmp_path):
    write_file(tmp_path / "3.jsonl", 3)
    found = list(read_questions(str(tmp_path / "3.jsonl")))
    assert len(found) == 3
    assert all(len(q.rationales) == 5 and q.answer for q in found)


def test_the_clock_gives_every_second_to_one_part():
    clock = Clock()
    with clock.round():
        for part in ("data", "body_forward", "head_and_loss", "scores", "data"):
            clock.enter(part)
            time.sleep(0.01)
    spent = clock.rounds[0]
    parts = sum(v for k, v in spent.items() if k not in ("wall", "cpu"))
    assert 0.05 <= parts <= spent["wall"]
    assert spent["data"] > spent["scores"] > 0
