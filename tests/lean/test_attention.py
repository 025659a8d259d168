"""Attention by segments in one step of autograd: torch's attention over what each token sees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from compact_fast.lean.attention import Masks, attend, can_attend, segments

TREES = [
    ((4, 3, 5),),
    ((7,),),  # a plain sequence
    ((4, 3), (2, 6, 1, 1)),
    ((0, 3, 2),),  # no prompt
    ((1, 1), (5,), (3, 2)),
    ((3, 0, 2), (0, 0, 1), (2, 0)),  # empty ones
]


def seen(trees: tuple[tuple[int, ...], ...], window: int | None) -> torch.Tensor:
    """[N, N] bool, token by token."""
    N = sum(map(sum, trees))
    mask = torch.zeros(N, N, dtype=torch.bool)
    start = 0
    for prompt, *rationales in trees:
        own = list(range(start, start + prompt))
        for i in own:
            mask[i, start : i + 1] = True
        at = start + prompt
        for n in rationales:
            for i in range(at, at + n):
                mask[i, start : start + prompt] = True
                mask[i, at : i + 1] = True
                if window is not None:  # distance counted along the rationale's own sequence
                    order = [*own, *range(at, i + 1)]
                    mask[i, order[:-window]] = False
            at += n
        for k, i in enumerate(own):
            if window is not None:
                mask[i, own[: max(0, k + 1 - window)]] = False
        start = at
    return mask


def inputs(trees, heads, kv, dtype=torch.float64, d=8, seed=0):
    N, g = sum(map(sum, trees)), torch.Generator().manual_seed(seed)
    make = [torch.randn(1, N, h, d, dtype=dtype, generator=g) for h in (heads, kv, kv)]
    return [x.transpose(1, 2).requires_grad_() for x in make]


def judge(query, key, value, mask, scale):
    r = query.shape[1] // key.shape[1]
    k, v = (x.repeat_interleave(r, 1) for x in (key, value))
    return scaled_dot_product_attention(query, k, v, mask[None, None], scale=scale).transpose(1, 2)


def compare(trees, heads, kv, window, scale, seed=0):
    x = inputs(trees, heads, kv, seed=seed)
    got = attend(*x, trees, window, scale)
    want = judge(*x, seen(trees, window), scale)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    g = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(seed + 1))
    for a, b in zip(torch.autograd.grad(got, x, g), torch.autograd.grad(want, x, g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("trees", TREES)
def test_values_and_gradients_are_those_of_a_mask_over_the_row(trees, heads, kv, window):
    compare(trees, heads, kv, window, None)
    compare(trees, heads, kv, window, 0.3)


@settings(max_examples=25, deadline=None)
@given(
    trees=st.lists(
        st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple), min_size=1, max_size=4
    ).map(tuple),
    grouped=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    window=st.none() | st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_of_any_trees(trees, grouped, window, seed):
    compare(trees, *grouped, window, None, seed)


def test_segments_cover_the_row_once():
    trees = ((4, 3), (2, 6, 1))
    found = [(s.root.stop - s.root.start, s.own.start, s.own.stop, s.sees) for s in segments(trees)]
    assert found == [(0, 0, 4, 4), (4, 4, 7, 7), (0, 7, 9, 2), (2, 9, 15, 8), (2, 15, 16, 3)]


def test_without_gradients_nothing_is_kept_and_numbers_stay():
    x = inputs(TREES[2], 6, 2)
    want = attend(*x, TREES[2], None, None)
    with torch.no_grad():
        got = attend(*x, TREES[2], None, None)
    assert got.grad_fn is None
    assert torch.equal(got, want)


def test_half_precision_is_left_to_torch():
    x, half = torch.empty(1), torch.empty(1, dtype=torch.bfloat16)
    assert can_attend(x, x, x)
    assert not can_attend(half, half, half)
    assert not can_attend(x, x, half)
    assert not can_attend(*[torch.empty(1, device="meta")] * 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_attend(x, x, x)


def test_masks_of_one_kind_are_parts_of_one_matrix():
    masks = Masks()
    cpu = torch.device("cpu")
    for window in (None, 5):
        parts = []
        for new, root in [(3, 2), (40, 90), (7, 0), (100, 10), (1, 1), (64, 128)]:
            for dtype in (torch.bool, torch.float64):
                part = masks.of(new, root, window, cpu, dtype)[0, 0]
                want = seen(((root, new),), window)[root:]
                assert torch.equal(part == 0 if dtype == torch.float64 else part, want)
            parts.append(part)
        last = parts[-1].untyped_storage().data_ptr()
        again = [masks.of(*n, window, cpu, torch.float64) for n in [(3, 2), (100, 10), (64, 128)]]
        assert {a.untyped_storage().data_ptr() for a in again} == {last}


def test_other_widths_of_values_are_left_to_torch():
    q, k, v = inputs(((3, 2),), 2, 2)
    assert can_attend(q, k, v)
    assert not can_attend(q, k, v[..., :4])
