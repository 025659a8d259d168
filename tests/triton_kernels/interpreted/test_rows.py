"""Logits GEMM, row statistics and the in-place row kernel against float64."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from compact_fast.triton_kernels import launch, logits_gemm
from compact_fast.triton_kernels.row_softmax import row_softmax, row_softmax_ref
from compact_fast.triton_kernels.row_statistics import row_dot, row_dot_ref, row_statistics_ref
from compact_fast.triton_kernels.soft_cap import soft_cap, soft_cap_ref, soft_cap_slope
from compact_fast.triton_kernels.token_logp import exps_buffer, measure_rows, measure_rows_ref

CONFIG = launch.LOGITS_GEMM["interpreter"]


def problem(n=45, V=149, D=60, dtype=torch.float32, scale=1.0, seed=0):
    """Nothing a multiple of a tile; every sixth row without a label."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=g).to(dtype)
    w = (scale * torch.randn(V, D, generator=g)).to(dtype)
    b = torch.randn(V, generator=g).to(dtype)
    y = torch.randint(0, V, (n,), generator=g)
    y[::6] = -100
    return x, w, b, y


def check_rows(out, x, w, b, y, exps=None, tolerance=2e-5, cap=0.0):
    """Against float64 from the same inputs."""
    logits, slope = x.double() @ w.double().T, torch.ones(())
    if b is not None:
        logits = logits + b.double()
    if cap:
        logits, slope = soft_cap_ref(logits, cap)
    logp, lse, entropy, correct = row_statistics_ref(logits, y)
    near = {"atol": tolerance, "rtol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(out.logp, logp, **near)
    torch.testing.assert_close(out.logsumexp, lse, **near)
    if out.entropy is not None:
        torch.testing.assert_close(out.entropy, entropy, **near)
        assert torch.equal(out.correct, correct)
    if exps is not None:
        labelled = (y >= 0).nonzero().squeeze(1)
        expected = logits.softmax(1)
        expected[labelled, y[labelled]] -= 1
        expected *= slope
        got = exps.double() / out.total.double()[:, None]
        step = 2.0**-8 if exps.dtype == torch.bfloat16 else 2e-6
        assert (got - expected).abs().div(expected.abs() + 1e-30).max() < step + 4 * tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("cap", [0.0, 15.0])
def test_fused_rows(dtype, bias, tma, cap, monkeypatch):
    # 64 columns of x: what bulk copies can describe
    x, w, b, y = problem(D=64 if tma else 60, dtype=dtype)
    monkeypatch.setitem(launch.LOGITS_GEMM, "interpreter", replace(CONFIG, tma=tma))
    exps = exps_buffer(len(y), w)
    b = b if bias else None
    out = measure_rows(x, w, b, y, exps=exps, statistics=True, softcap=cap)
    check_rows(out, x, w, b, y, exps, cap=cap)
    plain = measure_rows(x, w, b, y, softcap=cap)  # forward only: no E, no entropy
    assert torch.equal(plain.logp, out.logp)
    assert torch.equal(plain.logsumexp, out.logsumexp)


def test_gemm_partials():
    x, w, b, y = problem()
    offset = row_dot(x, w, y, bias=b)
    torch.testing.assert_close(
        offset.double(),
        row_dot_ref(x.double(), w.double(), y, bias=b.double()),
        atol=1e-5,
        rtol=0,
        check_dtype=False,
    )
    exps = exps_buffer(len(y), w)
    partials = logits_gemm.new_partials(len(y), w, CONFIG, statistics=True)
    logits_gemm.logits_exp(x, w, b, y, offset, exps, partials, CONFIG, statistics=True)
    e, expected = logits_gemm.logits_exp_ref(
        x.double(), w.double(), b.double(), y, offset.double(), block_n=CONFIG.block_n
    )
    torch.testing.assert_close(exps.double(), e, rtol=2e-5, atol=0)
    for got, want in zip(partials, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("tma", [False, True])
def test_rows_whose_sum_overflows_are_redone(tma, monkeypatch):
    monkeypatch.setitem(launch.LOGITS_GEMM, "interpreter", replace(CONFIG, tma=tma))
    x, w, _, y = problem(D=64)
    x[3] *= 40  # logits of some 300: the label lies far below the likeliest token
    x[40] *= 40
    x[12] *= 40  # no label, and an offset of 0
    y[3], y[40] = (x[[3, 40]] @ w.T).argmin(1)
    exps = exps_buffer(len(y), w)
    out = measure_rows(x, w, None, y, exps=exps, statistics=True)
    assert out.redo.nonzero().flatten().tolist() == [3, 12, 40]
    check_rows(out, x, w, None, y, exps, tolerance=3e-4)
    assert exps.isfinite().all()


def test_confident_rows_keep_their_digits():
    x, w, _, y = problem(n=8, D=64)
    w = torch.nn.functional.normalize(w)
    y = y.clamp(min=0)
    x = 16 * w[y]  # p of 1 - 1e-5 and closer
    exps = exps_buffer(len(y), w)
    out = measure_rows(x, w, None, y, exps=exps)
    logp = measure_rows_ref(x.double(), w.double(), None, y)[0]
    torch.testing.assert_close(out.logp.double(), logp, rtol=2e-5, atol=0)
    entry = exps[torch.arange(8), y].double() / out.total
    torch.testing.assert_close(entry, logp.exp() - 1, rtol=2e-5, atol=0)


def test_nan_stays_in_its_row():
    x, w, _, y = problem()
    x[5] = torch.nan
    out = measure_rows(x, w, None, y)
    assert out.logp.isnan().nonzero().flatten().tolist() == [5]


def test_a_row_does_not_depend_on_the_others():
    x, w, _, y = problem(dtype=torch.bfloat16)
    out = measure_rows(x, w, None, y, statistics=True)
    some = torch.tensor([1, 7, 33])
    alone = measure_rows(x[some], w, None, y[some], statistics=True)
    for name in ("logp", "logsumexp", "entropy", "total"):
        assert torch.equal(getattr(alone, name), getattr(out, name)[some])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("cap", [0.0, 15.0])
def test_row_softmax(dtype, scale, cap):
    x, w, b, y = problem(n=13, V=5003, D=8, scale=scale)  # two blocks, the second ragged
    logits = x @ w.T + b
    buffer = torch.full((13, 5056), torch.nan)
    buffer[:, :5003] = logits
    exps, out = row_softmax(buffer[:, :5003], y, dtype, statistics=True, softcap=cap)
    wide, slope = logits.double(), torch.ones(())
    if cap:
        wide, slope = soft_cap_ref(wide, cap)
    assert exps.data_ptr() == buffer.data_ptr()
    tolerance = {"atol": 2e-5 * max(1, scale / 10), "rtol": 1e-5, "check_dtype": False}
    for got, want in zip(
        (out.logp, out.logsumexp, out.entropy), row_statistics_ref(wide, y), strict=False
    ):
        torch.testing.assert_close(got, want, **tolerance)
    if not cap:  # which lets the largest logits of a row become equal
        assert torch.equal(out.correct, row_statistics_ref(logits, y)[3])
    e, total = row_softmax_ref(wide, y)
    e *= slope
    torch.testing.assert_close(out.total.double(), total, rtol=1e-5, atol=0)
    step = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    # where the cap is all but reached, its slope is a difference of two numbers near 1
    least = 1e-6 * total[:, None] if cap else torch.tensor(1e-30)
    assert bool(((exps.double() - e).abs() <= (step + 1e-5) * e.abs() + least).all())


@triton.jit
def _soft_cap_kernel(z_ptr, c_ptr, slope_ptr, n, CAP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    z = tl.load(z_ptr + at, mask=at < n)
    c = soft_cap(z, CAP)
    tl.store(c_ptr + at, c, mask=at < n)
    tl.store(slope_ptr + at, soft_cap_slope(c, CAP), mask=at < n)


@pytest.mark.parametrize("cap", [1.0, 30.0])
def test_soft_cap(cap):
    """Both sides of where its formula changes, and far beyond the cap."""
    z = torch.linspace(-1, 1, 999) ** 3 * 8 * cap
    z = torch.cat([z, torch.tensor([0.0, 0.1999999, 0.2, 0.2000001]) * cap, torch.tensor([1e4])])
    c, slope = torch.empty_like(z), torch.empty_like(z)
    _soft_cap_kernel[(1,)](z, c, slope, z.numel(), CAP=cap, BLOCK=1024)
    expected, steep = soft_cap_ref(z.double(), cap)
    ulps = torch.finfo(torch.float32).eps * torch.maximum(expected.abs(), torch.tensor(cap / 5))
    assert bool(((c - expected).abs() <= 3 * ulps).all())
    assert bool((c[z == 0] == 0).all())
    torch.testing.assert_close(slope.double(), steep, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_float16_rows_neither_overflow_nor_vanish(scale):
    """Uniform rows of a large vocabulary, whose S is above 65,504, and labels of p = 0 and 1."""
    V = 70_001
    x, w, _, y = problem(n=4, V=V, D=8, scale=scale)
    logits = x @ w.T
    logits[1] = 0.0
    y[1:3] = torch.tensor([5, int(logits[2].argmax())])
    logits[3] = torch.nan
    exps, out = row_softmax(logits.clone(), y, torch.float16, statistics=False)
    assert out.total[:3].tolist() == [2.0**14] * 3
    assert out.total[3].isnan()
    e, total = row_softmax_ref(logits[:3].double(), y[:3])
    got = exps[:3].double() / out.total[:3, None]
    # half a unit in the last place, and below 2^-28 half of the smallest number
    torch.testing.assert_close(got, e / total[:, None], rtol=2.0**-11 + 2e-5, atol=2.0**-39)


def test_addresses_beyond_two_to_the_31():
    """One row every 2^27 elements: 21 rows span 2.7e9 elements, of which few pages are touched."""
    x, w, _, y = problem(n=21, V=70, D=32, dtype=torch.bfloat16)
    stride = 2**27
    exps = torch.empty(21 * stride, dtype=torch.bfloat16).view(21, stride)[:, :70]
    out = measure_rows(x, w, None, y, exps=exps)
    check_rows(out, x, w, None, y, exps)
    logits = torch.empty(21 * stride).view(21, stride)[:, :70]
    logits.copy_(x.float() @ w.float().T)
    exps, out = row_softmax(logits, y, torch.bfloat16, statistics=False)
    check_rows(out, x, w, None, y, exps)
