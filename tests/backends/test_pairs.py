"""Divergences of compared rows and their gradients, against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compact_fast.backends import pairs
from compact_fast.backends.pairs import Aligned, Comparison
from compact_fast.native import load_native

needs_native = pytest.mark.skipif(
    pairs.native_pairs() is None, reason="the native module is not installed"
)
WAYS = [pytest.param("native", marks=needs_native), "torch"]


def problem(seed: int, teachers: list[int], tokens: int, vocab: int, spread: float, alone: int):
    """Questions with so many teachers whose stretches have different lengths; some rows more."""
    torch.manual_seed(seed)
    aligned, count = [], 0
    for K in teachers:
        lengths = torch.randint(1, tokens + 1, (K,))
        inside = torch.arange(tokens)[:, None] < lengths
        rows = torch.zeros(tokens, K, dtype=torch.long)
        rows[inside] = count + torch.randperm(int(inside.sum()))
        count += int(inside.sum())
        c = torch.rand(tokens, K, K)
        c = (c + c.transpose(1, 2)) * (inside[:, :, None] & inside[:, None, :])
        aligned.append(Aligned(rows, inside, c * (1 - torch.eye(K))))
    z = torch.randn(count + alone, vocab) * spread + torch.randn(count + alone, 1) * 20
    return aligned, z


def judged(aligned: list[Aligned], z: torch.Tensor, scale: torch.Tensor, pull: float):
    """Values and gradients by autograd, pair by pair."""
    z = z.double().requires_grad_()
    a = z.log_softmax(-1)
    values = []
    for s in aligned:
        total = z.new_zeros(())
        for rows, inside, c in zip(s.rows, s.inside, s.coefficients, strict=True):
            for i in range(len(rows)):
                for j in range(i):
                    if inside[i] and inside[j]:
                        p, q = a[rows[i]], a[rows[j]]
                        total = total + c[i, j] * ((p.exp() - q.exp()) * (p - q)).sum()
        values.append(total)
    value = torch.stack(values)
    gradient = z.detach().softmax(-1) * scale[:, None]
    if value.requires_grad:
        gradient = gradient + pull * torch.autograd.grad(value.sum(), z)[0]
    return value.detach(), gradient


def found(aligned, z, scale, pull, width):
    blocks = [b.clone() for b in torch.split(z, width, 1)]
    comparison = Comparison(aligned, z.double().logsumexp(-1))
    for block in blocks:
        comparison.add(block)
    values = comparison.values()
    comparison.differentiate(blocks, scale, pull)
    return values, torch.cat(blocks, 1)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), teachers=st.lists(st.integers(2, 17), min_size=1, max_size=3),
    tokens=st.integers(1, 3), vocab=st.integers(1, 90), width=st.integers(1, 90),
    spread=st.sampled_from([0.0, 0.1, 3.0, 30.0]), alone=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_values_and_gradients_are_autograds(
    way, seed, teachers, tokens, vocab, width, spread, alone, dtype
):
    """17 teachers are more than the native module takes at once."""
    with pytest.MonkeyPatch.context() as patch:
        if way == "torch":
            patch.setattr(pairs, "native_pairs", lambda: None)
        aligned, z = problem(seed, teachers, tokens, vocab, spread, alone)
        z = z.to(dtype)
        aligned = [Aligned(s.rows, s.inside, s.coefficients.to(dtype)) for s in aligned]
        scale, pull = torch.rand(len(z), dtype=dtype), 0.3
        values, gradient = found(aligned, z, scale, pull, width)
        want_values, want = judged(aligned, z, scale, pull)
        # rounding of what is added up: coefficients times how far apart rows are
        eps = torch.finfo(dtype).eps
        reach = max(float(s.coefficients.sum(-1).max()) for s in aligned)
        size = 1 + want_values.abs().max() + (1 + spread) * reach
        if dtype == torch.float64:  # logsumexp is no wider then, and is rounded as it is large
            size += float(z.abs().max())
        assert (values - want_values).abs().max() <= 20 * eps * size
        assert (gradient.double() - want).abs().max() <= 20 * eps * size


@pytest.mark.parametrize("way", WAYS)
def test_nearly_equal_rows_lose_nothing_to_cancellation(way, monkeypatch):
    """A divergence of 1e-8 among logits of 80 and its gradient, to a thousandth."""
    if way == "torch":
        monkeypatch.setattr(pairs, "native_pairs", lambda: None)
    torch.manual_seed(3)
    base = torch.randint(-80, 80, (1, 500)).float()
    z = base + torch.randint(-8, 9, (4, 500)) * 2.0**-16  # exact in float32
    c = 1 - torch.eye(4)
    aligned = [Aligned(torch.arange(4)[None], torch.ones(1, 4, dtype=torch.bool), c[None])]
    zeros = torch.zeros(4)
    values, gradient = found(aligned, z, zeros, 1.0, 200)
    want_values, want = judged(aligned, z, zeros.double(), 1.0)
    assert 0 < float(want_values) < 1e-6
    torch.testing.assert_close(values, want_values, rtol=1e-3, atol=0)
    torch.testing.assert_close(gradient.double(), want, rtol=1e-3, atol=1e-3 * want.abs().max())


@pytest.mark.parametrize("way", WAYS)
def test_entries_that_all_rows_mask_count_for_nothing(way, monkeypatch):
    if way == "torch":
        monkeypatch.setattr(pairs, "native_pairs", lambda: None)
    aligned, z = problem(5, [3], 1, 40, 2.0, 1)
    masked = torch.cat([z[:, :25], torch.full_like(z[:, :9], -torch.inf), z[:, 25:]], 1)
    scale = torch.rand(len(z))
    values, gradient = found(aligned, masked, scale, 0.5, 20)
    want_values, want = found(aligned, z, scale, 0.5, 20)
    torch.testing.assert_close(values, want_values)
    assert not gradient[:, 25:34].any()
    torch.testing.assert_close(torch.cat([gradient[:, :25], gradient[:, 34:]], 1), want)


@pytest.mark.parametrize("way", WAYS)
def test_a_row_that_is_not_a_number_spoils_its_own_set_alone(way, monkeypatch):
    if way == "torch":
        monkeypatch.setattr(pairs, "native_pairs", lambda: None)
    aligned, z = problem(7, [3, 3], 1, 40, 2.0, 0)
    z[aligned[0].rows[0, 1]] = torch.nan
    values, gradient = found(aligned, z, torch.ones(len(z)), 0.5, 20)
    assert values.isnan().tolist() == [True, False]
    bad = aligned[0].rows[aligned[0].inside]
    assert gradient[bad].isnan().any(1).all()
    good = aligned[1].rows[aligned[1].inside]
    assert gradient[good].isfinite().all()


@needs_native
def test_native_results_are_the_same_bits_for_any_threads_and_instructions():
    aligned, z = problem(9, [4, 2, 5], 3, 9000, 4.0, 2)
    module, threads = load_native(), torch.get_num_threads()
    scale = torch.rand(len(z))
    first = found(aligned, z, scale, 0.5, 5000)
    try:
        for level, count in ((0, 1), (0, 3), (1, 2), (-1, 2), (-1, 1)):
            module.force_simd_level(level)
            torch.set_num_threads(count)
            again = found(aligned, z, scale, 0.5, 5000)
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    finally:
        module.force_simd_level(-1)
        torch.set_num_threads(threads)
