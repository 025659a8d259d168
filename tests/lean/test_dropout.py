"""Dropout by a seed: the rate, the seed, and one result with and without the native module."""

from __future__ import annotations

import pytest
import torch

from compact_fast.lean import dropout
from compact_fast.native import load_native

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=["native", "numpy"])
def engine(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(dropout, "_native", lambda: None)
    elif isinstance(load_native(), str):
        pytest.skip(load_native())


def kept(units: dropout.Units, n: int) -> torch.Tensor:
    return dropout.apply(torch.ones(n), units) != 0


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1, 0.0, 1.0, 1e-9, 1 - 1e-9])
def test_units_are_kept_at_their_rate(share, engine):
    torch.manual_seed(0)
    x = torch.ones(301, 333)
    units = dropout.draw(x, share)
    assert abs(units.share - share) < 1e-5
    found = dropout.apply(x, units)
    spread = (share * (1 - share) / x.numel()) ** 0.5
    assert abs(float(found.mean()) - share) < 5 * spread + 1e-5
    columns = found.mean(0)  # no pattern along the generators' turns
    assert float((columns - share).abs().max()) < 6 * (share * (1 - share) / 301) ** 0.5 + 1e-5


def test_neighbours_and_repetitions_are_independent(engine):
    torch.manual_seed(1)
    x = torch.ones(200_000)
    first = dropout.apply(x, dropout.draw(x, 0.5))
    second = dropout.apply(x, dropout.draw(x, 0.5))
    shifts = (1, 2, 4, 8, 16, 32, dropout._BLOCK)
    for a, b in [(first, second)] + [(first[d:], first[:-d]) for d in shifts]:
        assert abs(float((a * b).mean()) - 0.25) < 5 * (3 / 16 / a.numel()) ** 0.5


@pytest.mark.parametrize("n", [1, 7, 8, 9, 31, 32, 33, 1000, 70_001])
@pytest.mark.parametrize("share", [0.95, 0.3])
def test_both_engines_draw_and_apply_the_same(n, share, monkeypatch):
    if isinstance(load_native(), str):
        pytest.skip(load_native())
    found = []
    for native in (True, False):
        if not native:
            monkeypatch.setattr(dropout, "_native", lambda: None)
        torch.manual_seed(5)
        units = dropout.draw(torch.empty(n), share)
        x = torch.randn(n)
        outputs = [dropout.apply(x.to(t), units).double() for t in DTYPES]
        found.append((units, outputs))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_threads_and_instructions_change_no_bit():
    module, threads = load_native(), torch.get_num_threads()
    if isinstance(module, str):
        pytest.skip(module)
    x, units = torch.randn(170_003), dropout.draw(torch.empty(170_003), 0.9)
    found = []
    try:
        for level in (-1, 1, 0):
            for count in (1, 2, 3):
                module.force_simd_level(level)
                torch.set_num_threads(count)
                added = dropout.add(torch.ones(170_003), x.clone(), units)
                found.append((dropout.apply(x, units), added))
    finally:
        module.force_simd_level(-1)
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, *others in zip(*found, strict=True) for b in others)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_kept_is_zero_and_the_rest_untouched(dtype, engine):
    torch.manual_seed(3)
    x = torch.randn(37, 21).to(dtype)
    x[3] = -torch.inf  # times 0 it would be nan
    before = x.clone()
    units = dropout.draw(x, 0.6)
    want = torch.where(kept(units, x.numel()).view(x.shape), x, torch.zeros((), dtype=dtype))
    assert torch.equal(dropout.apply(x, units), want)
    assert torch.equal(x, before)
    assert dropout.apply(x, units, in_place=True) is x
    assert torch.equal(x, want)


@pytest.mark.parametrize("n", [1, 15, 16, 33, 32_768, 70_001])
def test_what_is_kept_is_added(n, engine):
    torch.manual_seed(6)
    for dtype in (torch.float32, torch.float64):
        x, into = torch.randn(n, dtype=dtype), torch.randn(n, dtype=dtype)
        units = dropout.draw(x, 0.6)
        want = into + dropout.apply(x, units)
        assert dropout.add(into, x, units) is into
        assert torch.equal(into, want)


def test_strides_do_not_matter(engine):
    torch.manual_seed(4)
    x = torch.randn(12, 40)
    units = dropout.draw(x, 0.5)
    want = dropout.apply(x, units)
    across = x.T.contiguous().T
    assert not across.is_contiguous()
    assert torch.equal(dropout.apply(across, units), want)
    dropout.apply(across, units, in_place=True)
    assert torch.equal(across, want)


def test_the_seed_fixes_the_units(engine):
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(kept(dropout.draw(torch.empty(999), 0.7), 999))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
