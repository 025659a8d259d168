"""A layer's work between its products: either engine against float64, and edges of the numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compact_fast.lean import rows
from compact_fast.native import load_native

SHAPES = [(1, 1, 1), (3, 5), (2, 7, 17), (1, 33, 64), (1, 70, 576), (4, 1000)]


@pytest.fixture(params=["native", "torch"])
def engine(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(rows, "_native", lambda: None)
    elif rows._native() is None:
        pytest.skip("no native module")


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def close(found: Tensor, exact: Tensor, usual: Tensor, size: Tensor | None = None) -> None:
    """At most twice torch's own error in float32, and some units of the last place of what is
    added up: terms of either sign may cancel."""
    size = exact.abs() if size is None else size
    floor = 4 * torch.finfo(torch.float32).eps * size + 1e-30
    error, own = (found.double() - exact).abs(), (usual.double() - exact).abs()
    assert bool((error <= 2 * own.max() + floor).all())
    assert float(error.mean()) <= 2 * float(own.mean()) + float(floor.mean())


def tensors(shape: tuple[int, ...], scale: float, count: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [scale * torch.randn(shape) for _ in range(count)]


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_gates_forwards_and_back(shape, scale, engine):
    gate, up, grad = tensors(shape, scale, 3)
    leaves = [t.double().requires_grad_() for t in (gate, up)]
    exact = gated(*leaves)
    wanted = torch.autograd.grad(exact, leaves, grad.double())
    plain = [t.clone().requires_grad_() for t in (gate, up)]
    usual = torch.nn.functional.silu(plain[0]) * plain[1]
    own = torch.autograd.grad(usual, plain, grad)
    close(rows.gated(gate, up), exact.detach(), usual.detach())
    # silu's derivative is a sum, near zero where its terms cancel
    size = (grad * up).abs().double() * (1 + gate.abs().double())
    found = rows.gated_gradients(grad, gate, up)
    close(found[0], wanted[0], own[0], size)
    close(found[1], wanted[1], own[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_norms_forwards_back_and_again(shape, engine):
    x, grad = tensors(shape, 3.0, 2)
    x[0] *= 1e-4
    x[-1] = 0  # rms is eps alone
    weight = torch.randn(shape[-1])
    leaf = x.double().requires_grad_()
    exact = norm(leaf, weight.double())
    (wanted,) = torch.autograd.grad(exact, leaf, grad.double())
    plain = x.clone().requires_grad_()
    usual = norm(plain, weight)
    (own,) = torch.autograd.grad(usual, plain, grad)
    found, inverse = rows.norm(x, weight, 1e-5)
    assert inverse.shape == (*shape[:-1], 1)
    close(found, exact.detach(), usual.detach())
    assert torch.equal(rows.norm_again(x, inverse, weight), found)
    size = (grad * weight).abs().double().amax(-1, keepdim=True) * inverse.double() * 4
    g_x = rows.norm_gradient(grad, x, inverse, weight)
    close(g_x, wanted, own, size.expand(shape))
    more = torch.randn(shape)
    assert torch.equal(rows.norm_gradient(grad, x, inverse, weight, more), g_x + more)


def test_gates_at_the_ends_of_the_numbers(engine):
    gate = torch.tensor([-torch.inf, -1e4, -100.0, -88.0, 0.0, -0.0, 88.0, 1e4, 3e38, torch.nan])
    gate = gate.repeat(7)
    one = torch.ones_like(gate)
    found = rows.gated(gate, one)
    want = gate.double() * torch.sigmoid(gate.double())
    assert bool(found[9::10].isnan().all())
    finite = want.isfinite()
    torch.testing.assert_close(found[finite].double(), want[finite], rtol=1e-6, atol=1e-35)
    g_gate, g_up = rows.gated_gradients(one, gate, one)
    assert bool(g_gate[9::10].isnan().all() and g_up[9::10].isnan().all())
    torch.testing.assert_close(
        g_gate[[3, 4, 6, 7, 8]], torch.tensor([0, 0.5, 1, 1, 1]), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("x", [torch.inf, torch.nan])
def test_what_is_no_number_does_not_become_one(x, engine):
    given = torch.ones(3, 20)
    given[1, 4] = x
    found, _ = rows.norm(given, torch.ones(20), 1e-5)
    assert bool(found[1, 4].isnan() and not found[[0, 2]].isnan().any())


def everything() -> list[Tensor]:
    a, b, c = tensors((1, 129, 320), 2.0, 3)
    weight = torch.linspace(-1, 1, 320)
    found, inverse = rows.norm(a, weight, 1e-6)
    q = torch.randn(1, 129, 5, 64).transpose(1, 2)
    angles = torch.randn(1, 129, 64)
    rotations = [
        rows.rotate(q, angles.cos(), angles.sin(), torch.empty(1, 129, 5, 64), back=back)
        for back in (False, True)
    ]
    return [
        rows.gated(a, b), *rows.gated_gradients(c, a, b), found, inverse,
        rows.norm_again(a, inverse, weight), rows.norm_gradient(c, a, inverse, weight, b),
        *rotations,
    ]  # fmt: skip


@pytest.mark.skipif(rows._native() is None, reason="no native module")
def test_threads_and_instructions_change_no_bit():
    module, threads = load_native(), torch.get_num_threads()
    torch.manual_seed(0)
    want = everything()
    try:
        for level in (0, 1, 2):
            for count in (1, 3):
                module.force_simd_level(level)
                torch.set_num_threads(count)
                assert all(map(torch.equal, everything(), want)), (level, count)
    finally:
        module.force_simd_level(-1)
        torch.set_num_threads(threads)


def test_other_dtypes_and_layouts_are_torchs(monkeypatch):
    monkeypatch.setattr(rows, "_native", lambda: pytest.fail("not for these"))
    a, b = tensors((6, 8), 1.0, 2)
    assert torch.equal(rows.gated(a.T, b.T), (torch.nn.functional.silu(a) * b).T)
    x = a.double()
    found, inverse = rows.norm(x, torch.ones(8).double(), 1e-5)
    torch.testing.assert_close(found, norm(x, torch.ones(8).double()))
    assert inverse.dtype == torch.float64
    assert not rows.can_rotate(x.view(1, 2, 3, 8), x[None, :3], x[None, :3])
