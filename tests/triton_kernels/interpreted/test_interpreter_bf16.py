"""The interpreter's bfloat16, as repaired, has the bits of the hardware's."""

import torch
import triton
import triton.language as tl


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def _round_kernel(x_ptr, out_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n).to(tl.bfloat16), mask=i < n)


def test_bf16_dot_multiplies_values():
    torch.manual_seed(0)
    a, b = (torch.randint(-8, 9, (32, 32)).bfloat16() / 4 for _ in range(2))  # exact products
    out = torch.empty(32, 32)
    _dot_kernel[(1,)](a, b, out, N=32)
    assert torch.equal(out, a.float() @ b.float())


def test_bf16_rounding_is_to_nearest_even():
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64).int()
    ties = (torch.randint(-(2**15), 2**15, (2048,)).int() << 16) | 0x8000  # halfway, both parities
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3.4e38, 1e-45, 9.2e-41])
    x = torch.cat([bits.view(torch.float32), ties.view(torch.float32), special])
    out = torch.empty_like(x, dtype=torch.bfloat16)
    _round_kernel[(1,)](x, out, x.numel(), N=8192)
    expected = x.bfloat16()
    nan = x.isnan()
    assert torch.equal(out[~nan].view(torch.int16), expected[~nan].view(torch.int16))
    assert out[nan].isnan().all()
