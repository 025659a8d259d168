"""Products by another library: the same numbers but for rounding, and only where it is chosen."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from compact_fast import products
from compact_fast.backends.torch_backend import TorchBackend
from compact_fast.config import CompactConfig
from compact_fast.loss import compact_loss
from compact_fast.native import load_native
from compact_fast.products import add_linear, add_transposed, linear, multiply, quick
from compact_fast.testing import random_batch

native = pytest.mark.skipif(products._native() is None, reason="no native products here")


@pytest.fixture
def elsewhere(monkeypatch):
    """A machine on which the other library is chosen, whatever this one is."""
    monkeypatch.setattr(products, "_onednn", lambda: lambda x, w: x @ w.T)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 33, 65), (496, 1536, 576), (64, 576, 9000)])
def test_it_rounds_as_well_as_torch(shape, transposed):
    product = quick(torch.empty(0))
    if product is None:
        pytest.skip("torch's own products are used on this processor")
    n, out, width = shape
    torch.manual_seed(0)
    x, w = torch.randn(n, width), torch.randn(out, width)
    w = w.T.contiguous().T if transposed else w
    exact = x.double() @ w.double().T
    error = (product(x, w) - exact).abs()
    usual = (x @ w.T - exact).abs()
    # Twice torch's own error, which is the rule for float32; a unit of the last place of the sum
    floor = float(exact.abs().max()) * torch.finfo(torch.float32).eps
    assert float(error.mean()) <= 2 * float(usual.mean()) + floor
    assert float(error.max()) <= 2 * float(usual.max()) + floor
    assert product(x[:0], w).shape == (0, out)


def test_other_dtypes_and_devices_are_left_alone(elsewhere, monkeypatch):
    assert quick(torch.empty(0)) is not None
    assert quick(torch.empty(0, dtype=torch.float64)) is None
    assert quick(torch.empty(0, dtype=torch.bfloat16)) is None
    assert quick(torch.empty(0, device="meta")) is None
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert quick(torch.empty(0)) is None


@pytest.mark.parametrize("vendor", ["GenuineIntel", ""])
def test_where_nothing_is_known_torch_multiplies(vendor, monkeypatch):
    monkeypatch.setattr(products, "_vendor", lambda: vendor)
    assert products._onednn.__wrapped__() is None


def test_a_library_that_multiplies_wrongly_is_not_used(monkeypatch):
    monkeypatch.setattr(products, "_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    wrong = type("Op", (), {"default": staticmethod(lambda x, w, *_: x @ w.T + 1)})
    fake = type("Ops", (), {"_linear_pointwise": wrong})
    monkeypatch.setattr(torch.ops, "mkldnn", fake, raising=False)
    assert products._onednn.__wrapped__() is None


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("skip_below", [0.0, 1e-3])
@pytest.mark.parametrize("bias", [True, False])
def test_the_loss_is_the_same_with_either(frozen, skip_below, bias, monkeypatch):
    batch = random_batch((3, 4), seed=5, dtype=torch.float32)
    config = CompactConfig(skip_below=skip_below)

    def run() -> list[torch.Tensor]:
        hidden = batch.hidden.clone().requires_grad_()
        weight = batch.weight.clone().requires_grad_(not frozen)
        out = compact_loss(
            hidden,
            weight,
            batch.layout,
            consensus=batch.consensus,
            config=config,
            backend=TorchBackend(1 << 14),
            head_bias=torch.linspace(-1, 1, len(weight)) if bias else None,
        )
        out.loss.backward()
        grads = [hidden.grad] if frozen else [hidden.grad, weight.grad]
        return [out.loss.detach(), out.token_logp, out.weights, *grads]

    monkeypatch.setattr(products, "_onednn", lambda: None)
    want = run()
    monkeypatch.setattr(products, "_onednn", lambda: lambda x, w: x @ w.T)
    for a, b in zip(run(), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("n", [0, 5, 64, 77])
def test_gradients_of_a_weight_are_added_up_or_written(n, parts, overwrite, elsewhere, monkeypatch):
    torch.manual_seed(0)
    into, g, x = torch.randn(90, 24), torch.randn(n, 90), torch.randn(n, 24)
    monkeypatch.setattr(products, "PART_BYTES", 24 * 4 * -(-90 // parts))
    expected = g.double().T @ x.double() + (0 if overwrite else into.double())
    if overwrite:
        into.fill_(torch.nan)  # memory as it came
    add_transposed(into, g, x, overwrite=overwrite)
    torch.testing.assert_close(into.double(), expected, rtol=1e-6, atol=1e-5)


def test_the_gradient_of_a_weight_is_as_exact_as_torchs():
    torch.manual_seed(0)
    g, x = torch.rand(768, 4096), torch.randn(768, 576)
    found = torch.empty(4096, 576)
    add_transposed(found, g, x, overwrite=True)
    exact = g.double().T @ x.double()
    error, usual = (found - exact).abs(), (g.T @ x - exact).abs()
    floor = float(exact.abs().max()) * torch.finfo(torch.float32).eps
    assert float(error.mean()) <= 2 * float(usual.mean()) + floor


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("n", [0, 5, 64, 77])
@pytest.mark.parametrize("onednn", [False, True])
def test_products_are_added(onednn, n, transposed, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(products, "_onednn", lambda: (lambda x, w: x @ w.T) if onednn else None)
    into, x, w = torch.randn(n, 90), torch.randn(n, 24), torch.randn(90, 24)
    if transposed:
        w = w.T.contiguous().T
    expected = into.double() + x.double() @ w.double().T
    add_linear(into, x, w)
    torch.testing.assert_close(into.double(), expected, rtol=1e-6, atol=1e-5)


def test_long_sums_are_left_to_torch(elsewhere, monkeypatch):
    def never(x, w):
        raise AssertionError("a sum of too many terms")

    monkeypatch.setattr(products, "_onednn", lambda: never)
    g, x = torch.ones(products.LONGEST + 1, 2), torch.ones(products.LONGEST + 1, 3)
    into = torch.zeros(2, 3)
    add_transposed(into, g, x)
    assert torch.equal(into, torch.full((2, 3), products.LONGEST + 1.0))


def test_lengths_share_products(monkeypatch):
    """The library keeps something for every number of rows it meets: it meets few."""
    met = set()

    class Op:
        @staticmethod
        def default(x, w, *_):
            met.add(x.shape[0])
            return x @ w.T

    monkeypatch.setattr(products, "_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", Op)
    product = products._onednn.__wrapped__()
    assert product is not None
    met.clear()  # of its trial
    torch.manual_seed(0)
    x, w = torch.randn(2, 100, 8), torch.randn(5, 8)
    for n in range(1, 101):
        found = product(x[:, :n], w)
        assert found.is_contiguous()
        torch.testing.assert_close(found, x[:, :n] @ w.T, rtol=1e-5, atol=1e-6)
    assert met <= set(range(0, 225, products.ROWS))


@native
@pytest.mark.parametrize("orders", ["rows rows", "rows columns", "columns rows", "columns columns"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 33, 65), (496, 576, 1536), (64, 9000, 576)])
def test_native_products_round_as_well_as_torchs(shape, orders):
    m, n, k = shape
    torch.manual_seed(0)
    a, b = torch.randn(m, k), torch.randn(k, n)
    a, b = (
        x if order == "rows" else x.T.contiguous().T
        for x, order in zip((a, b), orders.split(), strict=True)
    )
    exact = a.double() @ b.double()
    error, usual = (multiply(torch.empty(m, n), a, b) - exact).abs(), (a @ b - exact).abs()
    # Twice torch's own error, which is the rule for float32; a unit of the last place of the sum
    floor = float(exact.abs().max()) * torch.finfo(torch.float32).eps
    assert float(error.mean()) <= 2 * float(usual.mean()) + floor
    assert float(error.max()) <= 2 * float(usual.max()) + floor


@native
def test_an_entry_depends_on_its_row_and_its_column_alone():
    """The same bits beside any other rows and columns, for any threads."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    a, b = torch.randn(300, 700), torch.randn(700, 500)
    whole = multiply(torch.empty(300, 500), a, b)
    some = multiply(torch.empty(41, 77), a[100:141], b[:, 33:110])
    assert torch.equal(some, whole[100:141, 33:110])
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            assert torch.equal(multiply(torch.empty(300, 500), a, b), whole)
    finally:
        torch.set_num_threads(threads)


@native
def test_not_a_number_stays_in_its_row():
    a, b = torch.randn(30, 20), torch.randn(20, 50)
    a[17, 3] = torch.nan
    found = multiply(torch.empty(30, 50), a, b)
    assert found.isnan().any(1).nonzero().flatten().tolist() == [17]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("add", [False, True])
def test_products_are_written_or_added_wherever_they_lie(add, dtype):
    """Views of any strides: those that the native module cannot take go to torch."""
    torch.manual_seed(0)
    a, b = torch.randn(12, 40, dtype=dtype), torch.randn(40, 60, dtype=dtype)
    for x in (a[:, ::2], a[:, :20]):
        for y in (b[::2], b[:20], b[::2, ::3]):
            for out in (torch.full((12, y.shape[1]), torch.nan), torch.zeros(12, 130)[:, ::2]):
                out = out.to(dtype)[:, : y.shape[1]]
                start = torch.randn(out.shape, dtype=dtype)
                if add:
                    out.copy_(start)
                result = multiply(out, x, y, add=add)
                assert result is out
                want = x.double() @ y.double() + (start.double() if add else 0)
                torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    nothing = torch.full((3, 4), 2.0)
    assert multiply(nothing, torch.empty(3, 0), torch.empty(0, 4)).tolist() == [[0.0] * 4] * 3
    assert multiply(torch.empty(0, 4), torch.empty(0, 5), torch.empty(5, 4)).shape == (0, 4)


def test_without_the_native_module_torch_multiplies(monkeypatch):
    monkeypatch.setattr(products, "load_native", lambda: "not installed")
    assert products._native.__wrapped__() is None
    monkeypatch.setattr(products, "_native", lambda: None)
    assert (
        multiply(torch.empty(2, 2), torch.ones(2, 3), torch.ones(3, 2)).tolist() == [[3.0] * 2] * 2
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(5,), (0, 5), (3, 5), (2, 40, 5), (products.FEW, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layers_product_is_torchs(shape, transposed, dtype):
    torch.manual_seed(0)
    x, w = torch.randn(shape, dtype=dtype), torch.randn(7, 5, dtype=dtype)
    w = w.T.contiguous().T if transposed else w
    found = linear(x, w)
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.nn.functional.linear(x, w), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(isinstance(load_native(), str), reason="no native module")
@pytest.mark.parametrize(("named", "most"), [("avx2", 1), ("default", 0), (None, 2)])
def test_who_limits_torch_limits_the_native_module(named, most):
    """A comparison of the two under ATEN_CPU_CAPABILITY is one of equals."""
    env = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
    if named is not None:
        env["ATEN_CPU_CAPABILITY"] = named
    ask = "from compact_fast import _native as m; print(m.simd_level(), m.can_multiply())"
    told = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True)
    level, can = told.stdout.split()
    assert int(level) <= most, told.stderr
    assert can == str(int(level) > 1)
