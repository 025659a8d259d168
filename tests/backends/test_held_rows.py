"""Exponentials held in the memory of the head's gradient are read before they are written over."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compact_fast.backends import held_rows
from compact_fast.backends.gradients import GradientSums
from compact_fast.backends.head import Head
from compact_fast.backends.held_rows import (
    HeldRows,
    columns_inside,
    least_spare,
    most_asked,
    most_inside,
)


def sums(vocab: int, width: int) -> GradientSums:
    return GradientSums(None, torch.full((vocab, width), torch.nan), None, unwritten=True)


@pytest.mark.parametrize("product", [None, torch.nn.functional.linear], ids=["into", "own"])
@settings(max_examples=300, deadline=None)
@given(
    n=st.integers(1, 60), vocab=st.integers(1, 300), width=st.integers(1, 40),
    block=st.integers(1, 80), cut=st.integers(0, 60), most=st.integers(0, 20_000),
    aligned=st.integers(1, 90), least=st.integers(1, 40), raw=st.tuples(*[st.integers(0, 60)] * 2),
)  # fmt: skip
def test_gradient_is_the_product_whatever_lies_where(
    product, n, vocab, width, block, cut, most, aligned, least, raw
):
    """product: None where logits are written into given memory, else they have their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compact_fast.backends.head.quick", lambda like: product)
        patch.setattr(Head, "block_width", lambda self, rows: block)
        patch.setattr(held_rows, "LINE", aligned)
        patch.setattr(held_rows, "LEAST_INSIDE", least)
        patch.setattr(held_rows, "SCRATCH", block)
        patch.setattr(held_rows, "OWN", block)
        torch.manual_seed(n * vocab)
        head, grads = Head(torch.zeros(vocab, width), None, 1), sums(vocab, width)
        asked = []

        def spare(size: int) -> torch.Tensor:
            asked.append(size)
            return torch.full((size,), torch.nan)

        raw = slice(*(min(n, place) for place in sorted(raw)))
        held = HeldRows.arrange(n, head, grads, most, spare, raw)
        exps, x = torch.rand(n, vocab), torch.randn(n, width)
        inside = columns_inside(n, head)
        assert most_asked([n], head, True, most) == sum(asked)
        blocks = held.blocks
        assert [a for a, _ in blocks] + [vocab] == [0, *(b for _, b in blocks)]
        for i, (a, b) in enumerate(blocks):
            if held.places[i] is not None or not head.makes_memory:
                held.room(i).copy_(exps[:, a:b])
            held.logits[i].copy_(exps[raw, a:b])
            held.peaks[i] = 0
        for (a, b), place in zip(blocks, held.places, strict=True):
            # no two blocks share memory, and none with what others are made again in
            assert place is None or torch.equal(place, exps[:, a:b])

        def again(i: int) -> torch.Tensor:
            a, b = blocks[i]
            made = exps[:, a:b].clone()
            made[raw] = torch.nan  # the raw rows' own were kept
            return made if head.makes_memory else held.room(i).copy_(made)

        first = min(cut, n)
        runs = [(a, b) for a, b in ((0, first), (first, n)) if a < b]
        held.add_to(grads, x, torch.ones(n), torch.zeros(n), runs, again)
        torch.testing.assert_close(grads.weight, exps.T @ x, rtol=1e-5, atol=1e-5)
        kept = n * sum(
            b - a for (a, b), p in zip(blocks, held.places, strict=True) if p is not None
        )
        outside = n * (vocab - inside)
        beside = min(outside, -(-most // (n * aligned)) * n * aligned)  # in whole columns
        assert kept == n * inside + beside
        assert beside <= sum(asked) <= beside + n * block


def test_rows_up_to_the_width_need_little_more_memory():
    head = Head(torch.zeros(49_152, 576), None, 48 << 20)
    assert head.max_rows == 256
    most = most_inside(head, head.max_rows * head.vocab)
    assert 700 <= most <= 576 + 256
    assert most * (head.vocab - columns_inside(most, head)) <= head.max_rows * head.vocab
    for n in (100, 500, 576, 768, 3000):  # all but what is written before the first is read
        found = n * columns_inside(n, head) / (576 * head.vocab)
        assert min(n / 576, 1) - 0.02 <= found <= 1


def test_a_gradient_that_is_written_to_holds_nothing():
    head, grads = Head(torch.zeros(300, 20), None, 1 << 20), sums(300, 20)
    grads.settle()
    held = HeldRows.arrange(5, head, grads, 5 * 300, torch.zeros, slice(0, 0))
    assert grads.weight is not None
    inside = grads.weight.untyped_storage().data_ptr()
    assert all(p.untyped_storage().data_ptr() != inside for p in held.places)


def test_no_rows_with_a_weight_leave_no_trace():
    head, grads = Head(torch.zeros(300, 20), None, 1 << 20), sums(300, 20)
    held = HeldRows.arrange(5, head, grads, 1500, torch.zeros, slice(0, 0))
    x, zeros = torch.ones(5, 20), torch.zeros(5)
    held.add_to(grads, x, zeros, zeros, [], lambda i: torch.ones(5, 300))
    grads.settle()
    assert grads.weight is not None
    assert not grads.weight.any()


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=6), inside=st.booleans(),
    share=st.floats(0, 1),
)  # fmt: skip
def test_no_less_would_do(sizes, inside, share):
    head = Head(torch.zeros(300, 20), None, 1 << 20)
    outside = [300 * n for n in sizes]
    if inside:
        outside[0] -= sizes[0] * columns_inside(sizes[0], head)

    def again(spare):
        return sum(max(0, n - spare) for n in outside)

    found, most = least_spare(sizes, head, inside, share), share * 300 * sum(sizes)
    assert again(found) <= most
    assert found == 0 or again(found - 1) > most - 1e-6
