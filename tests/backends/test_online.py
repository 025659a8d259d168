"""Softmax statistics block by block: ties, masked entries, one entry only."""

from __future__ import annotations

import pytest
import torch

from compact_fast.backends import online
from compact_fast.backends.online import OnlineRows
from compact_fast.native import load_native

NATIVE = pytest.param("native", marks=pytest.mark.skipif(
    online.native_rows() is None, reason="the native module is not installed"
))  # fmt: skip


@pytest.fixture(params=[NATIVE, "torch"])
def passes(request, monkeypatch):
    """The native module's two passes over float32, and torch's."""
    if request.param == "torch":
        monkeypatch.setattr(online, "native_rows", lambda: None)


def through(z: torch.Tensor, targets: torch.Tensor, width: int, infinite: bool = False):
    rows = OnlineRows(targets, z.dtype, full=True, infinite=infinite)
    for a in range(0, z.shape[1], width):
        rows.update(z[:, a : a + width].clone(), a)
    return rows.finish()


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 3, 4, 7, 30])
@pytest.mark.parametrize("cache", [1, 200, 1 << 20], ids=["a row", "some rows", "all rows"])
def test_first_of_equal_logits_is_the_prediction(width, cache, dtype, monkeypatch):
    monkeypatch.setattr(online, "CACHE_BYTES", cache)
    torch.manual_seed(0)
    z = torch.randint(0, 3, (400, 20)).to(dtype)  # nearly every row has ties
    targets = torch.randint(0, 20, (400,))
    found = through(z, targets, width)
    assert torch.equal(found.correct, z.argmax(-1) == targets)
    assert 0 < int(found.correct.sum()) < 400


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 5, 70, 200])
def test_statistics_are_those_of_the_softmax(width, dtype):
    torch.manual_seed(1)
    z = torch.randn(50, 200, dtype=dtype) * 30
    targets = torch.randint(0, 200, (50,))
    targets[7] = -100
    found = through(z, targets, width)
    logp = z.double().log_softmax(-1)
    own = logp.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    own[7] = 0.0
    entropy = -(logp.exp() * logp).sum(-1)
    entropy[7] = 0.0
    for name, want in (
        ("logp", own),
        ("entropy", entropy),
        ("logsumexp", z.double().logsumexp(-1)),
    ):
        torch.testing.assert_close(
            getattr(found, name).to(dtype), want.to(dtype), msg=lambda m, n=name: n + m
        )


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_entries_and_an_otherwise_masked_vocabulary(dtype):
    z = torch.tensor([[0.5, -torch.inf, 2.0, -torch.inf], [1.0] + [-torch.inf] * 3], dtype=dtype)
    found = through(z, torch.tensor([2, 0]), 2, infinite=True)
    logp = z.log_softmax(-1)
    torch.testing.assert_close(found.logp.to(dtype), torch.stack([logp[0, 2], logp[1, 0]]))
    p = logp.exp()
    entropy = -torch.where(p > 0, p * logp, 0.0).sum(-1)
    torch.testing.assert_close(found.entropy, entropy)
    assert found.correct.tolist() == [True, True]


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_raw_rows_keep_their_logits_and_have_the_same_statistics(dtype):
    torch.manual_seed(4)
    z, targets = torch.randn(9, 70, dtype=dtype) * 5, torch.randint(0, 70, (9,))
    rows, plain, raw = OnlineRows(targets, dtype, True), OnlineRows(targets, dtype, True), []
    for a in range(0, 70, 33):
        block, other = z[:, a : a + 33].clone(), z[:, a : a + 33].clone()
        rows.update(block, a, slice(2, 5))
        plain.update(other, a)
        raw.append(block[2:5])
        assert torch.equal(block[:2], other[:2])
        assert torch.equal(block[5:], other[5:])
    assert torch.equal(torch.cat(raw, 1), z[2:5])
    found, want = rows.finish(), plain.finish()
    for name in ("logp", "logsumexp", "entropy", "correct", "factor", "rest", "peak"):
        assert torch.equal(getattr(found, name), getattr(want, name)), name


@pytest.mark.usefixtures("passes")
def test_huge_logits():
    z = torch.tensor([[1e30, 2e30, -1e30], [80.0, -80.0, 0.0]])
    found = through(z, torch.tensor([1, 0]), 2)
    assert found.correct.tolist() == [True, True]
    assert found.logp.tolist() == pytest.approx([0.0, 0.0], abs=1e-30)
    assert found.entropy.isfinite().all()


@pytest.mark.skipif(online.native_rows() is None, reason="the native module is not installed")
def test_native_passes_agree_with_torchs_and_with_themselves(monkeypatch):
    """Same statistics to rounding; the same bits for any thread count and instruction set."""
    torch.manual_seed(2)
    z, targets = torch.randn(300, 1000) * 8, torch.randint(-1, 1000, (300,))

    def run():
        rows = OnlineRows(targets, z.dtype, full=True)
        parts = [z[:, a : a + 300].clone() for a in range(0, 1000, 300)]
        shrinks = [rows.update(part, 300 * i).clone() for i, part in enumerate(parts)]
        found = rows.finish()
        return [torch.cat(parts, 1), *shrinks, found.logp, found.entropy, found.rest, found.peak]

    module, threads = load_native(), torch.get_num_threads()
    first = run()
    try:
        for level, count in ((0, 1), (0, 3), (1, 2), (-1, 2), (-1, 1)):
            module.force_simd_level(level)
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    finally:
        module.force_simd_level(-1)
        torch.set_num_threads(threads)
    monkeypatch.setattr(online, "native_rows", lambda: None)
    for a, b in zip(run(), first, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


@pytest.mark.usefixtures("passes")
def test_not_a_number_reaches_the_row_and_no_other():
    z = torch.randn(3, 50)
    z[1, 30] = torch.nan
    found = through(z, torch.tensor([3, 4, 5]), 20)
    for name in ("logp", "logsumexp", "factor"):
        assert getattr(found, name).isnan().tolist() == [False, True, False], name
    assert not found.correct[1]
