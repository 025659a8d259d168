"""Exponentials held in the memory of the head's gradient are read before they are written over."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compact_fast.backends.gradients import GradientSums
from compact_fast.backends.head import Head
from compact_fast.backends.held_rows import HeldRows, blocks_inside, most_inside


def sums(vocab: int, width: int) -> GradientSums:
    return GradientSums(None, torch.full((vocab, width), torch.nan), None, unwritten=True)


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 60), vocab=st.integers(1, 300), width=st.integers(1, 40),
    block=st.integers(1, 80), cut=st.integers(0, 60),
)  # fmt: skip
def test_gradient_is_the_product_whatever_lies_where(n, vocab, width, block, cut):
    with pytest.MonkeyPatch.context() as patch:
        blocks = [(a, min(a + block, vocab)) for a in range(0, vocab, block)]
        patch.setattr(Head, "blocks", lambda self, rows: blocks)
        torch.manual_seed(n * vocab)
        head, grads = Head(torch.zeros(vocab, width), None, 1), sums(vocab, width)
        asked = []

        def spare(size: int) -> torch.Tensor:
            asked.append(size)
            return torch.full((size,), torch.nan)

        held = HeldRows.arrange(n, head, grads, spare)
        exps, x = torch.rand(n, vocab), torch.randn(n, width)
        for (a, b), place in zip(blocks, held.places, strict=True):
            place.copy_(exps[:, a:b])
            held.peaks.append(torch.zeros(n))
        for (a, b), place in zip(blocks, held.places, strict=True):
            assert torch.equal(place, exps[:, a:b])  # no two blocks share memory
        first = min(cut, n)
        runs = [(a, b) for a, b in ((0, first), (first, n)) if a < b]
        held.add_to(grads, x, torch.ones(n), torch.zeros(n), slice(0, 0), runs)
        torch.testing.assert_close(grads.weight, exps.T @ x, rtol=1e-5, atol=1e-5)
        inside = blocks_inside(n, blocks, width)
        outside = vocab - (blocks[inside - 1][1] if inside else 0)
        assert sum(asked) == n * outside


def test_rows_up_to_the_width_need_little_more_memory():
    head = Head(torch.zeros(49_152, 576), None, 48 << 20)
    assert head.max_rows == 256
    most = most_inside(head, head.max_rows * head.vocab)
    assert 700 <= most <= 576 + 256
    blocks = head.blocks(most)
    start = blocks[blocks_inside(most, blocks, 576) - 1][1]
    assert most * (head.vocab - start) <= head.max_rows * head.vocab


def test_a_gradient_that_is_written_to_holds_nothing():
    head, grads = Head(torch.zeros(300, 20), None, 1 << 20), sums(300, 20)
    grads.settle()
    held = HeldRows.arrange(5, head, grads, lambda size: torch.zeros(size))
    assert grads.weight is not None
    inside = grads.weight.untyped_storage().data_ptr()
    assert all(p.untyped_storage().data_ptr() != inside for p in held.places)


def test_no_rows_with_a_weight_leave_no_trace():
    head, grads = Head(torch.zeros(300, 20), None, 1 << 20), sums(300, 20)
    held = HeldRows.arrange(5, head, grads, lambda size: torch.full((size,), torch.nan))
    held.add_to(grads, torch.ones(5, 20), torch.zeros(5), torch.zeros(5), slice(0, 0), [])
    grads.settle()
    assert grads.weight is not None
    assert not grads.weight.any()
