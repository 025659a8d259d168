"""Products by another library: the same numbers but for rounding, and only where it is chosen."""

from __future__ import annotations

import pytest
import torch

from compact_fast import products
from compact_fast.backends.torch_backend import TorchBackend
from compact_fast.config import CompactConfig
from compact_fast.loss import compact_loss
from compact_fast.products import add_transposed, quick
from compact_fast.testing import random_batch


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
