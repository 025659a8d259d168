"""Batches: padded ids and the packed layout agree token by token, on either padding side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compact_fast.data.collate import collate, collate_priors
from compact_fast.layout import IGNORE

PAD = 99


def make_row(index: int = 0, completions: int = 2, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": f"q{index}",
        "index": index,
        "prompt_ids": [1, 2, 3],
        "completion_ids": [[10 + k, 20, 30, 40][: 4 - k % 2] for k in range(completions)],
        "teacher_ids": list(range(completions)),
        "rationale_index": list(range(completions)),
        "answer_spans": [[4, 6] if k % 2 == 0 else [0, 0] for k in range(completions)],
        "correct": [1, 0, -1, 1, 0, -1][:completions],
        "gold_ids": [20, 30],
        "prior_completion_ids": [5, 20, 30, 40],
        "prior_span": [4, 6],
    }
    return {**row, **changes}


def test_worked_example() -> None:
    batch = collate([make_row(7, consensus=[0.5, 1.0])], thinking_ids=[2, 10], pad_id=PAD)
    assert batch.input_ids.tolist() == [[1, 2, 3, 10, 20, 30, 40], [1, 2, 3, 11, 20, 30, PAD]]
    assert batch.attention_mask.tolist() == [[1] * 7, [1] * 6 + [0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 0]]
    assert batch.gather.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    layout = batch.layout
    X = IGNORE
    assert layout.targets.tolist() == [X, X, 10, 20, 30, 40, X, X, X, 11, 20, 30, X]
    assert layout.cu_seqlens.tolist() == [0, 7, 13]
    assert layout.cu_teachers.tolist() == [0, 2]
    assert layout.thinking is not None
    assert layout.thinking.nonzero().flatten().tolist() == [1, 3, 8]
    # tokens 4 and 5 state the answer: they are predicted at positions 3 and 4
    assert layout.answer_spans is not None
    assert layout.answer_spans.tolist() == [[3, 5], [0, 0]]
    assert layout.targets[3:5].tolist() == [20, 30]
    assert layout.gold_ids is not None
    assert layout.gold_ids.tolist() == [20, 30]
    assert layout.question_ids is not None
    assert layout.question_ids.tolist() == [7]
    assert layout.correct is not None
    assert layout.correct.tolist() == [1, 0]
    assert batch.consensus is not None
    assert batch.consensus.tolist() == [0.5, 1.0]
    assert batch.ids == ["q7"]


ROWS = st.lists(
    st.builds(
        lambda prompt, completions, index: make_row(
            index,
            prompt_ids=prompt,
            completion_ids=completions,
            teacher_ids=list(range(len(completions))),
            answer_spans=[
                [len(prompt), len(prompt) + len(c)] if i % 2 else [0, 0]
                for i, c in enumerate(completions)
            ],
            correct=[1] * len(completions),
        ),
        st.lists(st.integers(0, 50), min_size=1, max_size=6),
        st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=6), min_size=1, max_size=4),
        st.integers(0, 1000),
    ),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=60)
@given(ROWS, st.sampled_from(["left", "right"]))
def test_layout_is_the_sequences_one_behind_another(rows: list[dict[str, Any]], side: Any) -> None:
    batch = collate(rows, thinking_ids=[7], pad_id=PAD, padding_side=side)
    layout = batch.layout
    sequences = [(r["prompt_ids"], c) for r in rows for c in r["completion_ids"]]
    ids = [t for p, c in sequences for t in p + c]
    assert batch.input_ids.reshape(-1)[batch.gather].tolist() == ids
    assert layout.input_ids is not None
    assert layout.input_ids.tolist() == ids
    assert layout.targets.tolist() == [
        t for p, c in sequences for t in [IGNORE] * (len(p) - 1) + c + [IGNORE]
    ]
    assert batch.position_ids.reshape(-1)[batch.gather].tolist() == layout.token_index.tolist()
    assert layout.answer_spans is not None
    for s, (start, end) in enumerate(layout.answer_spans.tolist()):
        if end > start:
            assert layout.targets[start:end].tolist() == sequences[s][1]


@settings(deadline=None, max_examples=40)
@given(ROWS, st.sampled_from(["left", "right"]))
def test_padded_layout_holds_the_packed_one(rows: list[dict[str, Any]], side: Any) -> None:
    packed = collate(rows, thinking_ids=[7], pad_id=PAD, padding_side=side)
    padded = collate(rows, thinking_ids=[7], pad_id=PAD, padding_side=side, keep_padding=True)
    assert torch.equal(padded.gather, torch.arange(packed.input_ids.numel()))
    assert torch.equal(padded.layout.targets[packed.gather], packed.layout.targets)
    assert padded.layout.real is not None
    assert torch.equal(padded.layout.real.nonzero().flatten(), packed.gather)
    assert int((padded.layout.targets != IGNORE).sum()) == sum(
        len(c) for r in rows for c in r["completion_ids"]
    )
    assert padded.layout.answer_spans is not None
    assert packed.layout.answer_spans is not None
    for ours, theirs in zip(
        padded.layout.answer_spans.tolist(), packed.layout.answer_spans.tolist(), strict=True
    ):
        a, b = padded.layout.targets[slice(*ours)], packed.layout.targets[slice(*theirs)]
        assert torch.equal(a, b)


def test_priors_label_the_gold_answer_alone() -> None:
    batch = collate_priors([make_row(0), make_row(1)], thinking_ids=[], pad_id=PAD)
    layout = batch.layout
    X = IGNORE
    assert layout.targets.tolist() == [X, X, X, 20, 30, X, X] * 2
    assert layout.cu_teachers.tolist() == [0, 1, 2]


def test_what_no_batch_can_be_made_of_is_named() -> None:
    with pytest.raises(ValueError, match="at least one question"):
        collate([], thinking_ids=[], pad_id=PAD)
    with pytest.raises(ValueError, match="q3: no completions"):
        collate([make_row(3, completions=0)], thinking_ids=[], pad_id=PAD)
    with pytest.raises(ValueError, match=r"q3: answer span \[6, 4\)"):
        collate([make_row(3, answer_spans=[[6, 4], [0, 0]])], thinking_ids=[], pad_id=PAD)
    with pytest.raises(ValueError, match="padding_side='up'"):
        collate([make_row()], thinking_ids=[], pad_id=PAD, padding_side="up")  # type: ignore[arg-type]


def test_scores_are_absent_where_the_rows_hold_none() -> None:
    assert collate([make_row()], thinking_ids=[], pad_id=PAD).consensus is None
