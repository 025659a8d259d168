"""Scaling of whole gradients against plain torch, to the bit."""

import pytest
import torch
from compact_fast.triton_kernels.gradient_scale import (
    BLOCK,
    divide_into,
    divide_into_ref,
    multiply_unless_one,
    multiply_unless_one_ref,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [0, 1, BLOCK, 2 * BLOCK + 7]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("by", [torch.tensor(3.7), torch.tensor(3), torch.tensor(1 / 3)])
def test_division(size, dtype, by):
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    out = torch.full((size,), torch.nan, dtype=dtype)
    want = divide_into_ref(x, by, out.clone())
    assert torch.equal(divide_into(x, by, out), want)
    if dtype == torch.float32:
        assert torch.equal(divide_into(x, by, x), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("by", [1.0, -0.3, 0.0])
def test_multiplication(size, dtype, by):
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = multiply_unless_one_ref(x.clone(), torch.tensor(by))
    assert torch.equal(multiply_unless_one(x, torch.tensor(by)), want)


def test_what_is_not_finite_shows():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])
    assert torch.equal(divide_into(x, torch.tensor(2.0), x.clone()).isfinite(), x.isfinite())
    assert multiply_unless_one(x.clone(), torch.tensor(torch.nan)).isnan().all()
