"""Memory for tensors that come and go: used again, of about their size, not kept for ever."""

from __future__ import annotations

import random

import torch

from compact_fast import chunks
from compact_fast.chunks import Recycled

MEGABYTE = 1 << 20


def whole(pool: Recycled, size: int) -> torch.Tensor:
    return pool.whole((size,), torch.uint8)


def test_a_layer_after_another_needs_no_more():
    pool = Recycled()
    for _ in range(50):
        for width in (3 * MEGABYTE, 3 * MEGABYTE, MEGABYTE):
            a, b = whole(pool, width), whole(pool, MEGABYTE)
            del a, b
    assert pool.size == 5 * MEGABYTE  # 3 and 1; the narrow pair has another 1


def test_what_lives_keeps_its_memory():
    pool = Recycled()
    first = whole(pool, MEGABYTE).fill_(7)
    view = first[5:9]
    del first
    for _ in range(20):
        whole(pool, MEGABYTE).fill_(1)
    assert view.tolist() == [7, 7, 7, 7]
    assert view in pool


def test_a_chunk_is_not_twice_what_lies_in_it():
    pool = Recycled()
    del_me = whole(pool, 4 * MEGABYTE)
    del del_me
    small = whole(pool, MEGABYTE)
    assert small.untyped_storage().nbytes() == MEGABYTE
    near = whole(pool, 3 * MEGABYTE)
    assert near.untyped_storage().nbytes() == 4 * MEGABYTE


def test_lengths_that_change_leave_nothing_behind(monkeypatch):
    monkeypatch.setattr(chunks, "LONG", 64)
    pool, rng, most = Recycled(), random.Random(0), 0
    for _ in range(60):
        tokens = rng.randint(200, 1000)
        for _ in range(8):
            live = [whole(pool, 1000 * tokens), whole(pool, 4000 * tokens)]
            del live
        most = max(most, pool.size)
    assert most < 3 * 5000 * 1000  # two lengths that are no twice of each other, and one between
    pool.give_back()
    assert pool.all == []
