"""Layers whose arithmetic is another one stay as they are, however alike they look."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OlmoConfig, OlmoForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from compact_fast.lean import make_lean
from compact_fast.students import LoraSettings, add_lora

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIG = LlamaConfig(**SIZES)
IDS = torch.tensor([[1, 5, 9, 2, 30, 7]])


class ClampedMLP(LlamaMLP):
    """As models clamp them: at values that small inputs never reach."""

    def forward(self, x):
        up = self.up_proj(x).clamp(min=-10, max=10)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up)


class DroppedMLP(LlamaMLP):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, training=self.training)


class GatedNorm(LlamaRMSNorm):
    def forward(self, hidden_states, gate=None):
        found = super().forward(hidden_states)
        return found if gate is None else found * gate.sigmoid()


class ScaledNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) * 1.0


@pytest.mark.parametrize("kind", [ClampedMLP, DroppedMLP])
def test_other_mlps(kind):
    assert make_lean(LlamaMLP(CONFIG)) == 1
    assert make_lean(kind(CONFIG)) == 0


@pytest.mark.parametrize("kind", [GatedNorm, ScaledNorm])
def test_other_norms(kind):
    assert make_lean(LlamaRMSNorm(8)) == 1
    assert make_lean(kind(8)) == 0


def test_nobody_is_called_while_layers_are_looked_at():
    model, calls = LlamaForCausalLM(CONFIG), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    make_lean(model)
    assert calls == []


def llama(lora: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    if lora:
        model = add_lora(model, LoraSettings(r=3, dropout=0.0))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.3)
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    out = model(input_ids=IDS).logits
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same_gradients(plain: nn.Module, lean: nn.Module) -> None:
    want, got = gradients(plain), gradients(lean)
    assert got.keys() == want.keys()
    for name, g in want.items():
        # float32 through two layers; what these tests are about differs by more than a tenth
        assert float((got[name] - g).norm()) <= 1e-3 * float(g.norm()), name


@pytest.mark.parametrize(
    "part", ["mlp.act_fn", "q_proj.lora_A.default", "v_proj.lora_B.default", "k_proj.base_layer"]
)
def test_hooks_inside_of_layers_are_heeded(part):
    lean = llama()
    for name, module in lean.named_modules():
        if name.endswith(part):
            module.register_forward_hook(lambda m, a, out: out * 1.5)
    plain = copy.deepcopy(lean)
    make_lean(lean)
    same_gradients(plain, lean)


def test_a_forward_of_its_own_inside_of_a_layer_is_heeded():
    plain, lean = llama(), llama()
    for model in (plain, lean):
        for name, module in model.named_modules():
            if name.endswith("o_proj.base_layer"):
                was = module.forward
                module.forward = lambda x, was=was: 2 * was(x)
    make_lean(lean)
    same_gradients(plain, lean)


@pytest.mark.parametrize("layer", ["input_layernorm", "post_attention_layernorm"])
def test_a_norm_changed_in_place_is_not_made_again_as_it_was(layer):
    plain, lean = llama(), llama()
    make_lean(lean)
    for model in (plain, lean):
        for name, module in model.named_modules():
            if name.endswith(layer):
                module.register_forward_hook(lambda m, a, out: out.mul_(1.5).add_(0.3))
    same_gradients(plain, lean)


def test_autograd_notices_that_what_was_kept_is_changed_in_place():
    norm = LlamaRMSNorm(8)
    make_lean(norm)
    layer = make_settled(torch.randn(3, 8, requires_grad=True))
    out = norm(layer)
    layer += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def make_settled(x: torch.Tensor) -> torch.Tensor:
    from compact_fast.lean.kept import settle

    return settle(x * 1)


def test_outputs_may_be_changed_in_place():
    def olmo() -> nn.Module:
        torch.manual_seed(0)
        model = OlmoForCausalLM(OlmoConfig(**SIZES, clip_qkv=0.2))  # clamps queries in place
        return add_lora(model, LoraSettings(r=3, dropout=0.0))

    plain, lean = olmo(), olmo()
    make_lean(lean)
    same_gradients(plain, lean)


@pytest.mark.parametrize("lora", [True, False])
def test_a_lean_model_can_be_stored_whole(lora):
    model, file = llama(lora), io.BytesIO()
    make_lean(model)
    torch.save(model, file)
    again = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert make_lean(again) == 0
    with torch.no_grad():
        for p in again.parameters():
            p.mul_(2)  # its own, not the first one's
    assert not torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    same_gradients(llama(lora), model)


def test_a_hidden_state_can_be_stored_alone():
    model, file = llama(), io.BytesIO()
    make_lean(model)
    hidden = model.base_model.model.model(input_ids=IDS).last_hidden_state
    torch.save(hidden.detach().clone(), file)
    assert len(file.getvalue()) < 10_000
    torch.save(hidden, io.BytesIO())
