"""The heap's watch: it trims when memory has grown, and less often where that gives nothing."""

from __future__ import annotations

import pytest
import torch

from compact_fast import heap
from compact_fast.heap import LEAST_GROWTH, Heap

MEGABYTE = 1 << 20


class Memory:
    """What a process takes: what it holds, and holes that trimming removes."""

    def __init__(self, monkeypatch) -> None:
        self.held, self.holes, self.trims = 500 * MEGABYTE, 0, 0
        monkeypatch.setattr(heap, "resident_bytes", lambda: self.held + self.holes)
        monkeypatch.setattr(heap, "can_trim", lambda: True)
        monkeypatch.setattr(heap, "trim", self.trim)

    def trim(self) -> None:
        self.trims += 1
        self.holes = 0


@pytest.fixture
def memory(monkeypatch):
    return Memory(monkeypatch)


def test_holes_never_grow_far(memory):
    watch, most = Heap(), 0
    for _ in range(100):
        memory.holes += 3 * MEGABYTE
        watch.tidy(0)
        most = max(most, memory.holes)
    assert most < LEAST_GROWTH + 3 * MEGABYTE
    assert memory.trims == 100 * 3 * MEGABYTE // LEAST_GROWTH


def test_what_is_held_is_soon_left_alone(memory):
    watch = Heap()
    for _ in range(1000):
        memory.held += 5 * MEGABYTE
        watch.tidy(0)
    assert memory.trims < 9  # 24 MB, 48 MB, ... 5 GB


def test_a_useful_trim_makes_it_watchful_again(memory):
    watch = Heap()
    for _ in range(100):
        memory.held += 5 * MEGABYTE
        watch.tidy(0)
    memory.holes = 600 * MEGABYTE
    watch.tidy(0)
    assert memory.holes == 0
    memory.holes = LEAST_GROWTH
    watch.tidy(0)
    assert memory.holes == 0


def test_what_is_accounted_for_is_no_growth(memory):
    watch = Heap()
    for i in range(50):
        memory.held += 5 * MEGABYTE
        watch.tidy(i * 5 * MEGABYTE)
    assert memory.trims == 0


def test_memory_that_went_lowers_the_floor(memory):
    watch = Heap()
    watch.tidy(0)
    memory.held -= 100 * MEGABYTE
    watch.tidy(0)
    memory.holes = LEAST_GROWTH
    watch.tidy(0)
    assert memory.trims == 1


def test_systems_that_tell_nothing_or_cannot_trim_are_left_alone(memory, monkeypatch):
    watch = Heap()
    watch.tidy(0)
    memory.holes = 10 * LEAST_GROWTH
    monkeypatch.setattr(heap, "can_trim", lambda: False)
    watch.tidy(0)
    monkeypatch.setattr(heap, "can_trim", lambda: True)
    monkeypatch.setattr(heap, "resident_bytes", lambda: 0)
    watch.tidy(0)
    assert memory.trims == 0


@pytest.mark.skipif(not heap.can_trim() or not heap.resident_bytes(), reason="not glibc on Linux")
def test_real_holes_are_given_back():
    heap.trim()  # holes that earlier tests left would take the tensors, and nothing would grow
    watch = Heap()
    watch.tidy(0)
    before = heap.resident_bytes()
    tensors = [torch.ones(25_000) for _ in range(1000)]  # 100 kB each: from the heap
    pins = tensors[::10]
    grown = heap.resident_bytes() - before
    del tensors
    watch.tidy(0)
    assert grown > 60 * MEGABYTE
    assert heap.resident_bytes() - before < grown / 2
    assert all(float(t.sum()) == 25_000 for t in pins)
