"""Row scaling and the consistency term against plain torch."""

import pytest
import torch
from compact_fast.triton_kernels import products
from compact_fast.triton_kernels.consistency import consistency, consistency_ref
from compact_fast.triton_kernels.gradient_rows import (
    clear_rows,
    clear_rows_ref,
    row_factors,
    row_factors_ref,
    scale_rows,
    scale_rows_ref,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products(dtype, monkeypatch):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 33, generator=g).to(dtype), torch.randn(33, 20, generator=g).to(dtype)
    start = torch.randn(50, 20, generator=g)
    near = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(products.product(a, b).double(), products.product_ref(a, b), **near)
    into = torch.empty(50, 24)[:, :20]
    products.product(a, b, out=into)
    torch.testing.assert_close(into.double(), products.product_ref(a, b), **near)
    monkeypatch.setattr(products, "BLOCK_BYTES", 7 * 4 * 20)  # 7 rows a block
    want = start.double() + products.product_ref(a, b)
    for add in (products.add_product, products.add_product_by_blocks):
        out = start.clone()
        add(out, a, b)
        torch.testing.assert_close(out.double(), want, **near)


def test_row_factors():
    g = torch.Generator().manual_seed(0)
    weights = torch.tensor([0.7, 0.0, 0.3])
    labels = torch.tensor([3, 100, 0])
    sequence = torch.randint(4, 7, (300,), generator=g)
    targets = torch.randint(-1, 3, (300,), generator=g)
    total = torch.rand(300, generator=g) + 1
    total[sequence == 5] = torch.nan  # a teacher with weight 0
    got = row_factors(weights, labels, sequence, targets, total, first_sequence=4)
    want = row_factors_ref(weights, labels, sequence, targets, total, first_sequence=4)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_rows(dtype, add):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, 70, generator=g).to(dtype)
    factor = torch.randn(5, generator=g)
    factor[2] = 0
    source, to = torch.tensor([8, 0, 4, 3, 1]), torch.tensor([2, 6, 5, -1, 0])
    x[4] = torch.nan  # factor 0
    out = torch.randn(7, 70, generator=g)
    want = scale_rows_ref(x.float(), factor, out.clone(), source=source, to=to, add=add)
    got = scale_rows(x, factor, out.clone(), source=source, to=to, add=add)
    assert torch.equal(got, want)
    plain = scale_rows(x[:5], factor, torch.empty_like(x[:5]))
    assert torch.equal(plain[:2], (x[:2].float() * factor[:2, None]).to(dtype))


def test_clear_rows():
    exps = torch.ones(4, 10)
    factor, total = (
        torch.tensor([0.0, 1.0, 0.0, 0.0]),
        torch.tensor([1.0, torch.nan, torch.nan, torch.inf]),
    )
    want = exps.clone()
    clear_rows(exps, factor, total)
    clear_rows_ref(want, factor, total)
    assert torch.equal(exps, want)
    assert exps.sum(1).tolist() == [10, 10, 0, 0]


@pytest.mark.parametrize("teachers", [2, 3, 5])
def test_consistency(teachers):
    g = torch.Generator().manual_seed(teachers)
    blocks, V = 2, {2: 8300, 3: 4300, 5: 2100}[teachers]  # two stretches, the second one ragged
    n = blocks * teachers
    z = 3 * torch.randn(n, V, generator=g)
    alpha = torch.rand(n, generator=g) / teachers
    lengths = torch.randint(1, 4, (n,), generator=g)
    lengths[1] = 0  # absent
    alpha[teachers] = 0.0  # left out, and not finite
    z[teachers] = torch.nan
    alpha[-1] = 1e-3  # pairs with it fall below the floor
    grad = torch.empty_like(z)
    value = consistency(z, alpha, lengths, grad, teachers=teachers, pair_floor=1e-3)
    clean = z.double()
    clean[teachers] = 0
    want, want_grad = consistency_ref(
        clean, alpha.double(), lengths, teachers=teachers, pair_floor=1e-3
    )
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-4, atol=1e-8)
    again = torch.empty_like(z)
    consistency(z, alpha, lengths, again, teachers=teachers, pair_floor=1e-3)
    assert torch.equal(again, grad)


def test_equal_teachers_agree_exactly():
    row = torch.randn(1, 200).expand(4, 200).contiguous()
    grad = torch.empty_like(row)
    ones = torch.ones(4, dtype=torch.long)
    value = consistency(row, torch.full((4,), 0.25), ones, grad, teachers=4, pair_floor=1e-4)
    assert value.tolist() == [0.0]
    assert grad.abs().max() < 1e-8


def test_addresses_beyond_two_to_the_31():
    """One row every 2^27 elements: the last of 20 rows begins at 2.5e9."""
    g = torch.Generator().manual_seed(0)
    z, alpha = torch.randn(20, 70, generator=g), torch.full((20,), 0.25)
    lengths = torch.ones(20, dtype=torch.long)
    far, far_grad = (torch.empty(20 * 2**27).view(20, 2**27)[:, :70] for _ in range(2))
    far.copy_(z)
    grad = torch.empty_like(z)
    results = [
        consistency(logits, alpha, lengths, out, teachers=4, pair_floor=0.0)
        for logits, out in ((z, grad), (far, far_grad))
    ]
    assert torch.equal(*results)
    assert torch.equal(grad, far_grad)
    factor = torch.rand(20, generator=g)
    near = scale_rows(z, factor, torch.empty_like(z))
    assert torch.equal(scale_rows(far, factor, far_grad), near)
    clear_rows(far, torch.zeros(20), torch.full((20,), torch.nan))
    assert not far.any()
