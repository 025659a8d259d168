"""The gradient products over kept columns against plain torch."""

import pytest
import torch
from compact_fast.triton_kernels.kept_columns import (
    keep_columns,
    kept_products_ref,
    kept_to_head,
    kept_to_rows,
    move_together,
)


def problem(dtype, n=75, V=700, D=40, seed=0):
    """E with few large entries a row, one row that does not count, one that is not finite."""
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, V, generator=g)
    exps = (logits - logits.amax(1, keepdim=True)).exp()
    total = exps.sum(1)
    factor = torch.rand(n, generator=g) / total
    factor[3] = 0
    exps[3, 17] = 50 * total[3]  # large, but of no weight
    x = torch.randn(n, D, generator=g)
    weight = torch.randn(V, D, generator=g)
    return exps.to(dtype), total, factor, x.to(dtype), weight.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "head"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
    ids=str,
)
def test_kept_products(dtype, head):
    exps, total, factor, x, weight = problem(dtype)
    weight = weight.to(head)
    eps, block_rows = 0.05, 32  # three blocks of rows, the last one ragged
    scaled = (x.float() * factor[:, None]).to(dtype)
    wide = (exps.double(), total.double(), factor.double(), x.double(), scaled.double())
    threshold = eps * (1 - torch.finfo(dtype).eps)
    want = kept_products_ref(*wide, weight.double(), threshold, block_rows=block_rows)
    kept_mask, rows, of_head, missing, bound = want
    assert 0.02 < kept_mask.double().mean() < 0.5
    kept = keep_columns(exps, total, factor, x.float().norm(dim=1), eps, block_rows=block_rows)
    for b in range(3):
        inside = kept_mask[b * block_rows].nonzero().flatten()
        assert kept.count[b] == len(inside)
        assert torch.equal(kept.columns[b, : len(inside)], inside)
        assert torch.equal(kept.place[b, inside], torch.arange(len(inside), dtype=torch.int32))
        assert int((kept.place[b] >= 0).sum()) == len(inside)
    assert not kept_mask[0, 17]
    near = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(kept.bound, bound, **near)
    lengths = weight.float().norm(dim=1)
    torch.testing.assert_close(
        move_together(exps, total, lengths, kept, block_rows=block_rows), missing, **near
    )
    torch.testing.assert_close(
        kept_to_rows(exps, weight, kept, block_rows=block_rows), rows, **near
    )
    start = torch.randn(of_head.shape, generator=torch.Generator().manual_seed(1))
    out = start.clone()
    kept_to_head(exps, scaled, kept, out, block_rows=block_rows)
    torch.testing.assert_close(out, start.double() + of_head, **near)
    assert torch.equal(out[17], start[17])  # left out by every block: not touched


def test_nothing_kept_and_all_kept():
    for eps, share in ((2.0, 0.0), (0.0, 1.0)):
        exps, total, factor, x, weight = problem(torch.float32, n=5, V=70, D=8)
        plain = exps.double() @ weight.double()
        kept = keep_columns(exps, total, factor, x.norm(dim=1), eps)
        assert kept.count.tolist() == [round(70 * share)]
        missing = move_together(exps, total, weight.norm(dim=1), kept)
        rows = kept_to_rows(exps, weight, kept)
        torch.testing.assert_close(rows.double(), share * plain, rtol=1e-4, atol=1e-4)
        assert (missing == 0).all() == (share == 1)


def test_addresses_beyond_two_to_the_31():
    exps, total, factor, x, weight = problem(torch.bfloat16, n=21, V=70, D=32)
    far = torch.empty(21 * 2**27, dtype=torch.bfloat16).view(21, 2**27)[:, :70]
    far.copy_(exps)
    results = []
    for e in (exps, far):
        kept = keep_columns(e, total, factor, x.float().norm(dim=1), 0.05)
        move_together(e, total, weight.float().norm(dim=1), kept)
        head = torch.zeros(70, 32)
        kept_to_head(e, x, kept, head)
        results.append((kept.bound, kept_to_rows(e, weight, kept), head))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
