"""What the bench of skip_below counts."""

import sys
from pathlib import Path

import pytest
import torch

from compact_fast.testing import random_batch

sys.path.insert(0, str(Path(__file__).parents[2]))  # for `bench`

from bench import skip_blocks


def test_blocks_with_a_large_entry_are_counted_whole(monkeypatch):
    monkeypatch.setattr(skip_blocks, "ROWS", 2)
    monkeypatch.setattr(skip_blocks, "WIDTHS", (1, 4))
    monkeypatch.setattr(skip_blocks, "LIMITS", (0.5,))
    g = torch.zeros(3, 10)
    g[0, 1] = g[2, 1] = g[1, 9] = 0.7  # rows 0 and 1 are a block, row 2 is another
    g[1, 2] = 0.4
    order = torch.tensor([1, 9, *(v for v in range(10) if v not in (1, 9))])
    blocks = skip_blocks.Blocks({"ids": torch.arange(10), "moved": order})
    blocks.add(g)
    shares = {(r["order"], r["columns"]): r["kept_5.0e-01"] for r in blocks.table()}
    assert shares == {
        ("ids", 1): pytest.approx((2 * 2 + 1) / 30, abs=1e-5),
        ("ids", 4): pytest.approx((2 * (4 + 2) + 4) / 30, abs=1e-5),
        ("moved", 1): pytest.approx((2 * 2 + 1) / 30, abs=1e-5),
        ("moved", 4): pytest.approx((2 * 4 + 4) / 30, abs=1e-5),
        ("entry by entry", 1): pytest.approx(3 / 30),
    }


def test_errors_stay_below_their_bounds_over_a_hundred_batches(monkeypatch):
    monkeypatch.setattr(skip_blocks, "BOUND_LIMITS", (0.01, 0.05))
    found = []
    for seed in range(100):
        b = random_batch((3, 2), seed=seed, scale=1.5, dtype=torch.float32, unlabelled=False)
        given = {
            "hidden": b.hidden, "weight": b.weight, "layout": b.layout, "consensus": b.consensus,
        }  # fmt: skip
        found += skip_blocks.bounds(given)
    assert len(found) == 100 * 2 * len(skip_blocks.BOUND_LIMITS)
    for row in skip_blocks.honesty(found):
        assert row["batches"] == 100
        assert row["largest_error_over_bound"] <= 1
        assert row["median_error_over_bound"] > 0.1  # a bound of anything would hold
