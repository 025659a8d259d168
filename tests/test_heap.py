"""The heap's watch: it trims when memory has grown, and less often where that gives nothing."""

from __future__ import annotations

import os
import subprocess
import sys

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


def nothing(wanted: int) -> int:
    """Of other memory, none is free."""
    return 0


@pytest.fixture
def memory(monkeypatch):
    return Memory(monkeypatch)


def test_holes_never_grow_far(memory):
    watch, most = Heap(), 0
    for _ in range(100):
        memory.holes += 3 * MEGABYTE
        watch.tidy(0, nothing)
        most = max(most, memory.holes)
    assert most < LEAST_GROWTH + 3 * MEGABYTE
    assert memory.trims == 100 * 3 * MEGABYTE // LEAST_GROWTH


def test_what_is_held_is_soon_left_alone(memory):
    watch = Heap()
    for _ in range(1000):
        memory.held += 5 * MEGABYTE
        watch.tidy(0, nothing)
    assert memory.trims < 9  # 24 MB, 48 MB, ... 5 GB


def test_a_useful_trim_makes_it_watchful_again(memory):
    watch = Heap()
    for _ in range(100):
        memory.held += 5 * MEGABYTE
        watch.tidy(0, nothing)
    memory.holes = 600 * MEGABYTE
    watch.tidy(0, nothing)
    assert memory.holes == 0
    memory.holes = LEAST_GROWTH
    watch.tidy(0, nothing)
    assert memory.holes == 0


def test_what_is_accounted_for_is_no_growth(memory):
    watch = Heap()
    for i in range(50):
        memory.held += 5 * MEGABYTE
        watch.tidy(i * 5 * MEGABYTE, nothing)
    assert memory.trims == 0


def test_memory_that_went_lowers_the_floor(memory):
    watch = Heap()
    watch.tidy(0, nothing)
    memory.held -= 100 * MEGABYTE
    watch.tidy(0, nothing)
    memory.holes = LEAST_GROWTH
    watch.tidy(0, nothing)
    assert memory.trims == 1


def test_free_memory_beside_goes_before_holes(memory):
    """A backward pass: what was kept beside the heap is free bit by bit, and holes grow."""
    watch, beside = Heap(), 300 * MEGABYTE
    memory.held += beside

    def let_go(wanted: int) -> int:
        nonlocal beside
        gone = min(beside, -(-wanted // (32 * MEGABYTE)) * 32 * MEGABYTE)
        beside -= gone
        memory.held -= gone
        return gone

    watch.tidy(beside, let_go)
    peak = memory.held
    for _ in range(50):
        memory.holes += 3 * MEGABYTE
        watch.tidy(beside, let_go)
        assert memory.held + memory.holes < peak + LEAST_GROWTH
    assert memory.trims == 0
    assert beside == (300 - 4 * 32) * MEGABYTE  # by so much holes passed what is bearable


def test_holes_may_take_what_there_once_was_beside(memory):
    watch = Heap()
    memory.held += 300 * MEGABYTE
    watch.tidy(300 * MEGABYTE, nothing)
    memory.held -= 300 * MEGABYTE
    memory.holes = 300 * MEGABYTE + LEAST_GROWTH - 1
    watch.tidy(0, nothing)
    assert memory.trims == 0
    memory.holes += 1
    watch.tidy(0, nothing)
    assert memory.trims == 1


def test_holes_go_where_what_is_free_beside_is_not_enough(memory):
    watch = Heap()
    memory.held += 10 * MEGABYTE
    watch.tidy(10 * MEGABYTE, nothing)

    def let_go(wanted: int) -> int:
        memory.held -= 10 * MEGABYTE
        return 10 * MEGABYTE

    memory.holes = LEAST_GROWTH + 11 * MEGABYTE
    watch.tidy(10 * MEGABYTE, let_go)
    assert (memory.trims, memory.holes) == (1, 0)
    memory.holes = LEAST_GROWTH + 10 * MEGABYTE  # the peak allows ten more from now on
    watch.tidy(0, nothing)
    assert memory.trims == 2


def test_systems_that_tell_nothing_or_cannot_trim_are_left_alone(memory, monkeypatch):
    watch = Heap()
    watch.tidy(0, nothing)
    memory.holes = 10 * LEAST_GROWTH
    monkeypatch.setattr(heap, "can_trim", lambda: False)
    watch.tidy(0, nothing)
    monkeypatch.setattr(heap, "can_trim", lambda: True)
    monkeypatch.setattr(heap, "resident_bytes", lambda: 0)
    watch.tidy(0, nothing)
    assert memory.trims == 0


@pytest.mark.skipif(not heap.can_trim() or not heap.resident_bytes(), reason="not glibc on Linux")
def test_real_holes_are_given_back():
    heap.trim()  # holes that earlier tests left would take the tensors, and nothing would grow
    watch = Heap()
    watch.tidy(0, nothing)
    before = heap.resident_bytes()
    tensors = [torch.ones(25_000) for _ in range(1000)]  # 100 kB each: from the heap
    pins = tensors[::10]
    grown = heap.resident_bytes() - before
    del tensors
    watch.tidy(0, nothing)
    assert grown > 60 * MEGABYTE
    assert heap.resident_bytes() - before < grown / 2
    assert all(float(t.sum()) == 25_000 for t in pins)


KEPT = """
import ctypes, resource, sys
from compact_fast.heap import keep_top
if sys.argv[1] == "kept":
    keep_top()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def round_of(sizes):
    blocks = [ctypes.c_void_p(libc.malloc(size)) for size in sizes]
    for block, size in zip(blocks, sizes):
        libc.memset(block, 1, size)
    for block in blocks:
        libc.free(block)
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    round_of([2 << 20] * 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **settings: str) -> int:
    """Page faults of the last of thirty rounds that take and free 42 MB."""
    free = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUN"))}
    given = [sys.executable, "-c", KEPT, how]
    run = subprocess.run(given, env=free | settings, capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(not heap.can_trim() or sys.platform != "linux", reason="not glibc on Linux")
def test_the_heaps_end_is_kept():
    assert faults("as it is") > 5000  # all pages of 4 KiB come anew
    assert faults("kept") < 100
    assert faults("kept", MALLOC_TRIM_THRESHOLD_="131072") > 5000  # what a user set stays
