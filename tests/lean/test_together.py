"""Layers of one input in one step: as if each were called, or each is called."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from compact_fast.lean import blocks, linear, make_lean, rotary
from compact_fast.lean.linear import project_together

IDS = torch.tensor([[1, 5, 9, 2, 30, 7, 7, 3, 0, 11]])
SIZES = {
    "vocab_size": 50,
    "hidden_size": 256,
    "intermediate_size": 300,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),  # norms behind its projections
}


def model_of(name: str, kind: str, dropout: float = 0.2) -> nn.Module:
    """trained: all weights; adapted: an adapter on all projections; mixed: on some."""
    torch.manual_seed(0)
    model = MODELS[name]()
    if kind == "trained":
        return model
    targets = ["q_proj", "v_proj", "up_proj"]
    if kind == "adapted":
        targets += ["k_proj", "o_proj", "gate_proj", "down_proj"]
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=targets)
    model = get_peft_model(model, config)
    for parameter_name, p in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(p, std=0.3)
    return model


def run(model: nn.Module) -> list[torch.Tensor]:
    model.train().zero_grad()
    torch.manual_seed(4)
    out = model(input_ids=IDS).logits
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (blocks, rotary):
        monkeypatch.setattr(module, "project_together", lambda layers, x: None)


@pytest.mark.parametrize("kind", ["trained", "adapted", "mixed"])
@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_are_those_of_one_by_one(name, kind, monkeypatch):
    together = model_of(name, kind)
    apart = copy.deepcopy(together)
    for model in (together, apart):
        make_lean(model)
    sizes: list[int] = []
    whole = linear.projected
    monkeypatch.setattr(
        linear, "projected", lambda layers, x: sizes.append(len(layers)) or whole(layers, x)
    )
    found = run(together)
    assert sizes.count(3) == sizes.count(2) == 2  # of two layers
    with monkeypatch.context() as patch:
        one_by_one(patch)
        want = run(apart)
    assert sizes.count(3) == 2
    assert torch.equal(found[0], want[0])  # the same units, too
    for a, b in zip(found[1:], want[1:], strict=True):  # gradients are added in another order
        assert float((a - b).norm()) <= 1e-5 * float(b.norm())


def test_an_output_that_nobody_uses_costs_no_gradient():
    torch.manual_seed(0)
    mlp = make_mlp()
    x = torch.randn(40, 256, requires_grad=True)
    found = project_together((mlp.gate_proj, mlp.up_proj), x)
    assert found is not None
    found[1].sum().backward()
    assert mlp.gate_proj.weight.grad is None
    (want,) = torch.autograd.grad(nn.functional.linear(x, mlp.up_proj.weight).sum(), x)
    torch.testing.assert_close(x.grad, want)


def make_mlp() -> nn.Module:
    model = model_of("llama", "trained")
    make_lean(model)
    return model.model.layers[0].mlp


def test_whoever_watches_a_layer_is_told():
    model = model_of("llama", "adapted", dropout=0.0)
    make_lean(model)
    want = run(model)
    layer = model.get_base_model().model.layers[0]
    told = []
    layer.self_attn.k_proj.register_forward_hook(lambda *given: told.append(given[0]))
    layer.mlp.up_proj.register_forward_pre_hook(lambda *given: told.append(given[0]))
    found = run(model)
    assert told == [layer.self_attn.k_proj, layer.mlp.up_proj]
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_was_replaced_since_is_called():
    model = model_of("llama", "trained")
    make_lean(model)
    attention = model.model.layers[0].self_attn
    attention.v_proj.forward = lambda x: torch.zeros(*x.shape[:-1], 256)
    run(model)
    assert float(attention.o_proj.weight.grad.abs().max()) == 0.0


def test_a_projection_of_anything_else_is_made_when_asked():
    attention = model_of("llama", "trained").model.layers[0].self_attn
    x, other = torch.randn(1, 3, 256), torch.randn(1, 3, 256)
    ready = rotary._Projected(attention, x, {"q_proj": torch.ones(1)})
    assert torch.equal(ready.q_proj(other), attention.q_proj(other))
    assert torch.equal(ready.q_proj(x), torch.ones(1))
    assert torch.equal(ready.q_proj(x), attention.q_proj(x))  # at hand once
    assert torch.equal(ready.k_proj(x), attention.k_proj(x))
    ready.mark = 5  # an attribute of the layer's
    assert attention.mark == ready.mark == 5
