"""Attention by segments in one step of autograd: torch's attention over what each token sees.

In float32 the native module does it: against float64, and against torch's operator in float32.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from compact_fast.lean import attention
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


native = attention._native()
needs_native = pytest.mark.skipif(native is None, reason="no native module")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run(x, trees, window=None, scale=None, seed=7):
    """(out, the gradients by query, key and value), by a gradient drawn token by token."""
    out = attend(*x, trees, window, scale)
    g = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return [out.detach(), *torch.autograd.grad(out, x, g.to(out.dtype))]


def of_float32(trees, heads, kv, d, spread=1.0, seed=0):
    x = inputs(trees, heads, kv, torch.float32, d, seed)
    return [(spread * t.detach()).requires_grad_() for t in x]


def errors(found, exact):
    """[(root of the mean square, largest)] of each tensor."""
    gaps = [(a.double() - b).abs() for a, b in zip(found, exact, strict=True)]
    return [(float(gap.square().mean().sqrt()), float(gap.max())) for gap in gaps]


RAGGED = [
    ((110, 50, 85, 120, 149),),
    ((7, 1, 3), (0, 5, 9), (40, 1, 1, 33), (5,), (1, 1)),
    ((64, 32, 31, 33),),
]
SHAPES = [(9, 3, 64), (4, 4, 32), (4, 1, 80), (3, 3, 16), (2, 1, 128), (2, 2, 256)]


def exact(x, trees, window, scale=None):
    leaves = [t.detach().double().requires_grad_() for t in x]
    out = judge(*leaves, seen(trees, window), scale)
    g = torch.randn(
        out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7)
    ).float()
    return [out.detach(), *torch.autograd.grad(out, leaves, g.double())]


def check_errors(x, trees, window, monkeypatch, scale=None):
    """No larger than those of torch's operator; of a few numbers, chance decides a little."""
    want = exact(x, trees, window, scale)
    assert attention._native_for(*x, trees) is native
    found = errors(run(x, trees, window, scale), want)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_native", lambda: None)
        usual = errors(run(x, trees, window, scale), want)
    floor = [2e-7 * float(t.abs().max()) for t in want]
    for (mean, largest), (usual_mean, usual_largest), least in zip(
        found, usual, floor, strict=True
    ):
        assert mean <= 1.05 * usual_mean + 0.1 * least
        assert largest <= 1.5 * usual_largest + least


@needs_native
@pytest.mark.parametrize("window", [None, 5, 60])
@pytest.mark.parametrize(("heads", "kv", "d"), SHAPES)
@pytest.mark.parametrize("trees", RAGGED)
def test_native_errors_are_no_larger_than_torchs(trees, heads, kv, d, window, monkeypatch):
    check_errors(of_float32(trees, heads, kv, d), trees, window, monkeypatch)


@needs_native
@pytest.mark.parametrize("window", [None, 300])
def test_native_errors_of_one_long_segment(window, monkeypatch):
    check_errors(of_float32(((1500,),), 3, 1, 64), ((1500,),), window, monkeypatch)


@needs_native
def test_native_errors_of_large_scores(monkeypatch):
    x = of_float32(RAGGED[0], 4, 2, 64, spread=2.5)
    scores = 0.3 * (x[0].detach()[0, 0] @ x[1].detach()[0, 0].T)
    assert 70 < float(scores.abs().max()) < 120
    check_errors(x, RAGGED[0], None, monkeypatch, 0.3)


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    trees=st.lists(
        st.lists(st.integers(0, 40), min_size=1, max_size=5).map(tuple), min_size=1, max_size=3
    )
    .map(tuple)
    .filter(lambda trees: sum(map(sum, trees)) > 0),
    grouped=st.sampled_from([(2, 2), (4, 2), (3, 1), (5, 1)]),
    window=st.none() | st.integers(1, 50),
    scale=st.sampled_from([None, 0.3, -0.3]),
    level=st.sampled_from([0, 1, 2]),
    seed=st.integers(0, 1000),
)
def test_native_of_any_trees(trees, grouped, window, scale, level, seed):
    x = of_float32(trees, *grouped, 16, seed=seed)
    assert native is not None
    native.force_simd_level(level)
    try:
        found = run(x, trees, window, scale)
    finally:
        native.force_simd_level(-1)
    for a, b in zip(found, exact(x, trees, window, scale), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5)


@needs_native
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("heads", "kv"), [(9, 3), (4, 4), (4, 1)])
def test_threads_change_no_bit(heads, kv, window, threads):
    trees = ((60, 50, 200), (0, 3, 7), (300,))
    x = of_float32(trees, heads, kv, 32)
    threads(1)
    want = run(x, trees, window)
    for count in (1, 2, 3, 4, 4):
        threads(count)
        assert all(map(torch.equal, run(x, trees, window), want)), count


@needs_native
@pytest.mark.parametrize("window", [None, 40])
def test_what_else_is_in_the_row_changes_no_bit(window, threads):
    """Of a rationale; the gradients by the prompt's keys and values are sums over all of them."""
    threads(2)
    P, lengths = 37, (5, 150, 64, 1, 20)
    whole = ((P, *lengths),)
    q, k, v = (t.detach() for t in of_float32(whole, 6, 2, 32))
    g = torch.randn(1, P + sum(lengths), 6, 32)
    ends = [P + sum(lengths[:i]) for i in range(len(lengths) + 1)]
    parts = [slice(a, b) for a, b in pairwise(ends)]

    def of(order, before):
        """Each rationale's results in a row of some of them, with another tree before it."""
        places = [*range(P), *(i for n in order for i in range(parts[n].start, parts[n].stop))]
        extra = torch.arange(before)
        at = torch.cat([extra, torch.tensor(places)])
        trees = ((before,), (P, *(lengths[n] for n in order)))
        x = [t[:, :, at].transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
        x = [t.requires_grad_() for t in x]
        out = attend(*x, trees, window, None)
        found = [out.transpose(1, 2), *torch.autograd.grad(out, x, g[:, at])]
        start, results = before + P, {}
        for n in order:
            results[n] = [t.detach()[:, :, start : start + lengths[n]] for t in found]
            start += lengths[n]
        return results

    want = of(range(len(lengths)), 0)
    for order, before in [([3, 1, 0], 0), ([4, 2, 1, 3, 0], 11), ([2], 70), ([1], 0), ([0], 3)]:
        for n, found in of(order, before).items():
            assert all(map(torch.equal, found, want[n])), (order, n)


@needs_native
def test_rows_and_gradients_may_lie_anyhow():
    trees, N = ((20, 30), (9,)), 59
    whole = torch.randn(1, N, 8 + 4, 48)
    apart = [whole[:, :, a:b].transpose(1, 2) for a, b in [(0, 8), (8, 10), (10, 12)]]
    assert attention._native_for(*apart, trees) is native
    close = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in apart]
    x, y = ([t.requires_grad_() for t in ts] for ts in ([t.detach() for t in apart], close))
    assert all(map(torch.equal, run(x, trees), run(y, trees)))
    heads = [t.detach().contiguous().requires_grad_() for t in apart]  # one behind another
    assert all(map(torch.equal, run(heads, trees), run(y, trees)))
    with torch.no_grad():
        want = attend(*y, trees, None, None)
        assert all(torch.equal(attend(*t, trees, None, None), want) for t in (x, heads))
    found = torch.autograd.grad(attend(*x, trees, None, None).sum(), x)
    one = torch.ones(1, N, 8, 48)
    want = torch.autograd.grad(attend(*x, trees, None, None), x, one)
    assert all(map(torch.equal, found, want))


@needs_native
def test_either_pass_may_be_torchs(monkeypatch):
    x, trees = of_float32(RAGGED[0], 6, 2, 32), RAGGED[0]
    want = run(x, trees, 70)
    module = attention._native
    for forth, back in [(module, lambda: None), (lambda: None, module)]:
        monkeypatch.setattr(attention, "_native", forth)
        out = attend(*x, trees, 70, None)
        g = torch.randn(
            out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7)
        ).float()
        monkeypatch.setattr(attention, "_native", back)
        found = [out.detach(), *torch.autograd.grad(out, x, g)]
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_native
def test_what_the_native_module_does_not_take():
    def taken(d=32, dtype=torch.float32, trees=((4, 3),), change=lambda x: x, count=None):
        x = [t.detach() for t in inputs(trees, 4, 2, dtype, d)]
        return attention._native_for(*map(change, x), count or trees) is native

    most = native.most_seen
    assert all([taken(), taken(d=16), taken(d=256), taken(trees=((most,),), d=16)])
    assert not taken(dtype=torch.float64)
    assert not any(taken(d=d) for d in (8, 24, 272))
    assert not taken(trees=((most, 1),), d=16)
    assert not taken(change=lambda x: x.expand(2, -1, -1, -1))
    assert not any(taken(count=((4, n),)) for n in (2, 4))  # not the row's


@needs_native
def test_what_is_no_number_stays_in_its_segment():
    trees = ((4, 40), (50,))
    q, k, v = (t.detach() for t in of_float32(trees, 2, 1, 16))
    v[0, 0, 10] = torch.nan
    q[0, 1, 50] = torch.inf
    bad = attend(q, k, v, trees, None, None)[0].isnan()
    assert bool(bad[10:44].all() and bad[50, 1].all())
    bad[50, 1] = False
    assert not bool(bad[:4].any() or bad[44:].any())
