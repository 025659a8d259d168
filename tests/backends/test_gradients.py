"""The memory of a head's gradient: used again once the gradient is gone, and only then."""

from __future__ import annotations

import pytest
import torch

from compact_fast.backends import gradients
from compact_fast.backends.gradients import GradientSums
from compact_fast.backends.protocol import Needs
from compact_fast.chunks import Chunks
from compact_fast.loss import compact_loss
from compact_fast.testing import random_batch


@pytest.fixture
def chunks(monkeypatch):
    """Every head's gradient is a large one."""
    own = Chunks()
    monkeypatch.setattr(gradients, "MOST_IN_HEAP", 0)
    monkeypatch.setattr(gradients, "_CHUNKS", own)
    return own


def head_gradient(seed: int) -> torch.Tensor:
    batch = random_batch((3, 2), seed=seed, dtype=torch.float32)
    weight = batch.weight.clone().requires_grad_()
    compact_loss(
        batch.hidden, weight, batch.layout, consensus=batch.consensus, backend="torch"
    ).loss.backward()
    assert weight.grad is not None
    return weight.grad


def test_a_gradient_that_somebody_has_is_not_written_over(chunks):
    first = head_gradient(0)
    was = first.clone()
    second = head_gradient(1)
    assert torch.equal(first, was)
    assert second.data_ptr() != first.data_ptr()
    assert first in chunks
    assert second in chunks
    assert len(chunks.all) == 2


def test_its_memory_is_used_again_once_it_is_gone(chunks):
    first = head_gradient(0)
    was, address = first.clone(), first.data_ptr()
    del first
    again = head_gradient(0)
    assert again.data_ptr() == address
    assert torch.equal(again, was)  # nothing of what lay there is left
    assert len(chunks.all) == 1
    del again
    gradients.give_back()
    assert chunks.size == 0


def test_small_ones_and_other_dtypes_are_torchs(chunks, monkeypatch):
    hidden, weight = torch.ones(3, 4), torch.ones(5, 4)
    needs = Needs(hidden=True, weight=True, bias=False)
    sums = GradientSums.empty(hidden, weight.bfloat16(), None, needs, torch.float32)
    assert sums.weight is not None
    assert sums.weight in chunks
    assert sums.weight.dtype == torch.float32
    monkeypatch.setattr(gradients, "MOST_IN_HEAP", 1 << 20)
    sums = GradientSums.empty(hidden, weight, None, needs, torch.float32)
    assert sums.weight is not None
    assert sums.weight not in chunks
    sums = GradientSums.empty(hidden.to("meta"), weight.to("meta"), None, needs, torch.float32)
    assert sums.weight is not None
    assert sums.weight.device.type == "meta"
