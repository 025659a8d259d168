"""Softmax statistics block by block: ties, masked entries, one entry only."""

from __future__ import annotations

import pytest
import torch

from compact_fast.backends import online
from compact_fast.backends.online import OnlineRows


def through(z: torch.Tensor, targets: torch.Tensor, width: int, infinite: bool = False):
    rows = OnlineRows(targets, z.dtype, full=True, infinite=infinite)
    for a in range(0, z.shape[1], width):
        rows.update(z[:, a : a + width].clone(), a)
    return rows.finish()


@pytest.mark.parametrize("width", [1, 3, 4, 7, 30])
@pytest.mark.parametrize("cache", [1, 200, 1 << 20], ids=["a row", "some rows", "all rows"])
def test_first_of_equal_logits_is_the_prediction(width, cache, monkeypatch):
    monkeypatch.setattr(online, "CACHE_BYTES", cache)
    torch.manual_seed(0)
    z = torch.randint(0, 3, (400, 20)).double()  # nearly every row has ties
    targets = torch.randint(0, 20, (400,))
    found = through(z, targets, width)
    assert torch.equal(found.correct, z.argmax(-1) == targets)
    assert 0 < int(found.correct.sum()) < 400


@pytest.mark.parametrize("width", [1, 5, 20])
def test_statistics_are_those_of_the_softmax(width):
    torch.manual_seed(1)
    z = torch.randn(50, 20, dtype=torch.float64) * 30
    targets = torch.randint(0, 20, (50,))
    found = through(z, targets, width)
    logp = z.log_softmax(-1)
    torch.testing.assert_close(found.logp, logp.gather(1, targets[:, None]).squeeze(1))
    torch.testing.assert_close(found.entropy, -(logp.exp() * logp).sum(-1))
    torch.testing.assert_close(found.logsumexp, z.logsumexp(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_entries_and_an_otherwise_masked_vocabulary(dtype):
    z = torch.tensor([[0.5, -torch.inf, 2.0, -torch.inf], [1.0] + [-torch.inf] * 3], dtype=dtype)
    found = through(z, torch.tensor([2, 0]), 2, infinite=True)
    logp = z.log_softmax(-1)
    torch.testing.assert_close(found.logp, torch.stack([logp[0, 2], logp[1, 0]]))
    p = logp.exp()
    entropy = -torch.where(p > 0, p * logp, 0.0).sum(-1)
    torch.testing.assert_close(found.entropy, entropy)
    assert found.correct.tolist() == [True, True]


def test_huge_logits():
    z = torch.tensor([[1e30, 2e30, -1e30], [80.0, -80.0, 0.0]])
    found = through(z, torch.tensor([1, 0]), 2)
    assert found.correct.tolist() == [True, True]
    assert found.logp.tolist() == pytest.approx([0.0, 0.0], abs=1e-30)
    assert found.entropy.isfinite().all()
