from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import make_rows

from compact_fast.trainer.batching import (
    IDLE,
    QuestionBatches,
    QuestionLoader,
    Questions,
    batches_within,
    length_class,
    question_lengths,
)

LENGTHS = st.lists(st.integers(1, 3000), min_size=1, max_size=60)
SHAPES = st.tuples(st.sampled_from([1, 2, 3, 4]), st.integers(1, 4))  # processes, passes a step
MODES = st.sampled_from([{"questions": 1}, {"questions": 3}, {"budget": 900}, {"budget": 5000}])


def steps(
    sizes: Any, world: int, together: int, epoch: int = 0, **mode: Any
) -> list[list[list[list[int]]]]:
    """Of every optimizer step: its passes, and in each the questions of every process."""
    ranks = []
    for rank in range(world):
        batches = QuestionBatches(sizes, together=together, rank=rank, world=world, **mode)
        batches.set_epoch(epoch)
        mine = list(batches)
        assert len(mine) == len(batches)
        ranks.append(mine)
    assert len({len(mine) for mine in ranks}) == 1
    passes = [list(one) for one in zip(*ranks, strict=True)]
    return [passes[i : i + together] for i in range(0, len(passes), together)]


def busy(step: list[list[list[int]]]) -> list[int]:
    return [i for one in step for batch in one for i in batch if i >= 0]


@settings(max_examples=150, deadline=None)
@given(LENGTHS, SHAPES, MODES, st.integers(0, 5))
def test_every_question_once_and_nobody_without_work(
    lengths: list[int], shape: tuple[int, int], mode: dict[str, int], epoch: int
) -> None:
    sizes = np.array(lengths)
    found = steps(sizes, *shape, epoch, **mode)
    assert sorted(i for step in found for i in busy(step)) == list(range(len(lengths)))
    for step in found:
        for one in step:
            assert all(batch for batch in one)
            assert any(i >= 0 for batch in one for i in batch)
            for batch in one:
                if min(batch) < 0:  # idle: a question that another process has
                    assert len(batch) == 1
                    assert len(busy([one])) < shape[0]
    again = steps(sizes, *shape, epoch, **mode)
    assert found == again
    assert len(steps(sizes, *shape, epoch + 1, **mode)) == len(found)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(0, 3), st.integers(100, 6000))
def test_a_pass_stays_within_its_budget(lengths: list[int], epoch: int, budget: int) -> None:
    sizes = np.array(lengths)
    batches = QuestionBatches(sizes, budget=budget)
    batches.set_epoch(epoch)
    for batch in batches:
        assert len(batch) == 1 or sizes[batch].sum() <= budget
    assert batches.oversized == (sizes > budget).sum()


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(0, 3), st.integers(100, 6000), st.data())
def test_padding_counts_towards_the_budget(
    lengths: list[int], epoch: int, budget: int, data: Any
) -> None:
    sizes = np.array(lengths)
    rows = np.array(
        data.draw(st.lists(st.integers(1, 5), min_size=len(sizes), max_size=len(sizes)))
    )
    batches = QuestionBatches(sizes, rows=rows, budget=budget)
    first = len(batches)
    batches.set_epoch(epoch)
    found = list(batches)
    assert len(found) == first
    assert sorted(i for batch in found for i in batch) == list(range(len(sizes)))
    for batch in [*found, *batches_within(sizes, budget, rows)]:
        assert len(batch) == 1 or sizes[batch].max() * rows[batch].sum() <= budget


@pytest.mark.parametrize("mode", [{"questions": 1}, {"budget": 700}])
def test_processes_share_the_same_steps(mode: dict[str, int]) -> None:
    """1, 2 and 4 processes make the same updates of the same questions."""
    sizes = np.random.default_rng(0).integers(20, 400, 101)
    found = []
    for world in (1, 2, 4):
        shape = {"questions": 4 // world} if "questions" in mode else {}
        together = 1 if "questions" in mode else 4 // world
        every = steps(sizes, world, together, **{**mode, **shape})
        found.append([sorted(busy(step)) for step in every])
    assert found[0] == found[1] == found[2]


def test_an_order_is_of_its_seed_and_epoch() -> None:
    sizes = np.random.default_rng(0).integers(20, 400, 200)

    def order(seed: int, epoch: int, sizes: Any = sizes, **mode: int) -> list[list[int]]:
        batches = QuestionBatches(sizes, seed=seed, **mode)
        batches.set_epoch(epoch)
        return list(batches)

    for mode in ({"questions": 2}, {"budget": 1500}):
        assert order(0, 1, **mode) == order(0, 1, **mode)
        assert order(0, 1, **mode) != order(0, 2, **mode)
        assert order(0, 1, **mode) != order(1, 1, **mode)
    # Questions meet other questions in every epoch, where there are many.
    many = np.random.default_rng(0).integers(200, 400, 4000)
    pairs = [
        {(a, b) for batch in order(0, e, many, budget=1500) for a in batch for b in batch if a < b}
        for e in (0, 1)
    ]
    assert len(pairs[0] & pairs[1]) < 0.2 * len(pairs[0])


def test_budgets_are_used_and_processes_balanced() -> None:
    sizes = np.random.default_rng(0).lognormal(6.0, 0.5, 4000).astype(int)
    found = steps(sizes, 4, 2, budget=8192)
    loads = np.array([[sizes[b].sum() for b in one] for step in found[:-1] for one in step])
    assert loads.mean() > 0.9 * 8192
    assert (loads.max(1) / loads.mean(1)).mean() < 1.03
    counted = steps(sizes, 4, 1, questions=8)
    loads = np.array([[sizes[b].sum() for b in one] for step in counted[:-1] for one in step])
    assert (loads.max(1) / loads.mean(1)).mean() < 1.1


def test_length_classes_round_up_a_little() -> None:
    lengths = np.arange(1, 5000)
    classes = length_class(lengths)
    assert (classes >= lengths).all()
    assert (classes <= lengths * (1 + 1 / 16)).all()
    assert (np.diff(classes) >= 0).all()


def test_lengths_of_a_dataset_are_those_of_its_rows() -> None:
    from datasets import Dataset

    rows = make_rows(9)
    expected = question_lengths(rows)
    dataset = Dataset.from_list(rows)
    for found in (question_lengths(dataset), question_lengths(dataset.select(range(8, -1, -1)))):
        for a, b in zip(expected, found, strict=True):
            assert sorted(a.tolist()) == sorted(b.tolist())
    assert [x.tolist() for x in question_lengths(dataset)] == [x.tolist() for x in expected]
    assert expected[0].tolist() == [len(r["prompt_ids"]) for r in rows]
    assert expected[3].tolist() == [len(r["completion_ids"]) for r in rows]


def test_idle_rows_are_marked() -> None:
    rows = Questions(make_rows(3))
    assert rows[-2][IDLE]
    assert rows[-2]["id"] == "q1"
    assert IDLE not in rows[1]
    loader = QuestionLoader(
        rows,
        batch_sampler=QuestionBatches(np.ones(3, int), rank=1, world=2),
        collate_fn=lambda batch: [(row["id"], IDLE in row) for row in batch],
    )
    assert len(list(loader)) == 2
    assert list(loader)[-1][0][1]


def test_the_next_batch_is_made_while_one_is_used() -> None:
    made: list[int] = []
    second = threading.Event()

    def collate(batch: list[dict[str, Any]]) -> int:
        made.append(len(made))
        if len(made) == 2:
            second.set()
        if len(made) == 4:
            raise ValueError("question q3: no completions")
        return made[-1]

    def loader() -> QuestionLoader:
        batches = QuestionBatches(np.ones(6, int))
        return QuestionLoader(Questions(make_rows(6)), batch_sampler=batches, collate_fn=collate)

    batches = iter(loader())
    assert next(batches) == 0
    assert second.wait(10)
    assert [next(batches), next(batches)] == [1, 2]
    with pytest.raises(ValueError, match="question q3"):
        next(batches)
    made[:] = range(4, 10)
    before = threading.active_count()
    for _ in loader():
        break  # as at max_steps
    assert threading.active_count() == before
    assert len(made) <= 12
