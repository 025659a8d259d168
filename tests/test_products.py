"""Products by another library: the same numbers but for rounding, and only where it is chosen."""

from __future__ import annotations

import pytest
import torch

from compact_fast import products
from compact_fast.backends.torch_backend import TorchBackend
from compact_fast.config import CompactConfig
from compact_fast.loss import compact_loss
from compact_fast.products import quick
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
