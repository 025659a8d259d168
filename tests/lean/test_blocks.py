"""Norms and what is made again instead of being kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from compact_fast.lean import make_lean
from compact_fast.lean.blocks import normed
from compact_fast.lean.sources import source_of


def norm(kind=LlamaRMSNorm, width=6, trained=True) -> nn.Module:
    made = kind(width)
    torch.manual_seed(0)
    nn.init.normal_(made.weight)
    return made.requires_grad_(trained)


def lean_norm(**options) -> nn.Module:
    made = norm(**options)
    assert make_lean(made) == 1
    return made


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
def test_norms_have_the_numbers_they_had(kind, trained):
    plain, lean = norm(kind, trained=trained), norm(kind, trained=trained)
    assert make_lean(lean) == 1
    x = 3 * torch.randn(2, 5, 6)
    x[0, 0] = 0  # rms is eps alone
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    want, got = plain(a), lean(b)
    assert torch.equal(got, want)
    g = torch.randn_like(want)
    want.backward(g)
    got.backward(g)
    # rounded in another order: some units of the last place of terms that cancel
    torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-6)
    if trained:
        torch.testing.assert_close(lean.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-6)


def test_a_norm_is_made_again_bit_for_bit():
    lean = norm()
    make_lean(lean)
    y = lean(torch.randn(3, 6, requires_grad=True))
    source = source_of(y)
    assert torch.equal(source.make(*source.parts), y)
    assert source_of(y * 1) is None


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("used", ["both", "norm", "input"])
def test_an_input_with_two_uses_gets_both_gradients(used, trained):
    torch.manual_seed(0)
    plain = norm(trained=trained)
    ours = lean_norm(trained=trained)
    found = []
    for layer in (plain, ours):
        x = torch.linspace(-2, 3, 30).view(5, 6).requires_grad_()
        out, again = normed(layer, x)
        assert (again is x) == (layer is plain)
        loss = out.square().sum() if used != "input" else 0.0
        loss = loss + again.sin().sum() if used != "norm" else loss
        loss.backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_a_norm_that_is_watched_is_called():
    layer, told = lean_norm(), []
    layer.register_forward_hook(lambda *given: told.append(given[0]))
    x = torch.randn(5, 6, requires_grad=True)
    assert normed(layer, x)[1] is x
    assert told == [layer]


def test_other_norms_stay():
    other = norm(GemmaRMSNorm)  # 1 + weight
    other.variance_epsilon = other.eps
    assert make_lean(other) == 0
    assert make_lean(nn.LayerNorm(4)) == 0
    assert make_lean(norm().to(torch.bfloat16)) == 0


def test_without_gradients_and_in_other_dtypes_a_norm_runs_as_it_was():
    lean = norm()
    make_lean(lean)
    with torch.no_grad():
        assert source_of(lean(torch.ones(2, 6))) is None
    lean.double()
    assert source_of(lean(torch.ones(2, 6, dtype=torch.float64, requires_grad=True))) is None
