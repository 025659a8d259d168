"""Lean layers: the numbers of the layers they replace, and less that is kept for the way back."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from compact_fast.lean import make_lean
from compact_fast.students import LoraSettings, add_lora, merged

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.tensor([[1, 5, 9, 2, 30], [7, 7, 3, 0, 11]])


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).double()


def adapted(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    model = add_lora(model, LoraSettings(r=3, dropout=dropout)).double()
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide a wrong gradient of A
            nn.init.normal_(p, std=0.3)
    return model


def run(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train()
    model.zero_grad()
    out = model(input_ids=IDS).logits
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def kept(model: nn.Module) -> int:
    """Bytes kept for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            found[t.data_ptr()] = max(found.get(t.data_ptr(), 0), t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.train()(input_ids=IDS)
    return sum(found.values())


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        llama,
        lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=6)).double(),
        lambda: GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=6)).double(),  # gelu: LoRA alone
    ],
)
def test_outputs_and_all_gradients_are_those_of_the_layers_replaced(make, lora):
    plain = adapted(make()) if lora else make()
    lean = copy.deepcopy(plain)
    changed = make_lean(lean)
    silu = type(plain).__name__ != "GemmaForCausalLM" and "Gemma" not in repr(plain)
    assert changed == 2 * (7 * lora + silu + 2)  # and the attention, and the layer
    assert make_lean(lean) == 0
    want, gradients = run(plain)
    got, found = run(lean)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    assert found.keys() == gradients.keys()
    for name, g in gradients.items():
        assert torch.allclose(found[name], g, rtol=1e-10, atol=1e-12), name


def test_less_is_kept_with_dropout():
    plain = adapted(llama(), dropout=0.1)
    lean = copy.deepcopy(plain)
    make_lean(lean)
    assert kept(lean) < 0.7 * kept(plain)


def test_dropout_follows_the_seed_and_recomputation_repeats_it():
    lean = adapted(llama(), dropout=0.3)
    make_lean(lean)
    torch.manual_seed(3)
    first, gradients = run(lean)
    torch.manual_seed(3)
    again, same = run(lean)
    other, _ = run(lean)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    lean.gradient_checkpointing_enable({"use_reentrant": False})
    lean.enable_input_require_grads()
    torch.manual_seed(3)
    recomputed, found = run(lean)
    assert torch.equal(first, recomputed)
    for name, g in gradients.items():
        assert torch.equal(same[name], g)
        assert torch.allclose(found[name], g, rtol=1e-10, atol=1e-12), name


def test_dropout_gradients_are_those_of_the_mask_that_was_drawn():
    base = nn.Linear(6, 5).double()
    model = nn.Sequential(base)
    from peft import LoraConfig, get_peft_model

    layer = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.4, target_modules=["0"]))
    layer = layer.double().train()
    nn.init.normal_(layer.base_model.model[0].lora_B["default"].weight)
    assert make_lean(layer) == 1
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)

    def f(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(9)  # the same mask in every evaluation
        return layer(x)

    assert torch.autograd.gradcheck(f, (x,))
    mean = torch.stack([layer(x).detach() for _ in range(3000)]).mean(0)
    assert torch.allclose(mean, layer.eval()(x), atol=0.2)


def test_what_is_not_plain_runs_as_it_was():
    model = adapted(llama(), dropout=0.2)
    make_lean(model)
    with torch.no_grad():
        model.eval()
        want = model(input_ids=IDS).logits
    with model.disable_adapter():
        assert not torch.allclose(model(input_ids=IDS).logits, want)
    assert torch.allclose(model(input_ids=IDS).logits, want, atol=1e-12)
    folded = merged(copy.deepcopy(model)).eval()
    assert torch.allclose(folded(input_ids=IDS).logits, want, atol=1e-9)
    from peft import LoraConfig, get_peft_model

    dora = get_peft_model(llama(), LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]))
    plain = copy.deepcopy(dora)
    make_lean(dora)
    assert torch.equal(run(dora)[0], run(plain)[0])


def test_under_bf16_autocast_errors_are_those_of_the_layers_replaced():
    plain = adapted(llama()).float()
    lean = copy.deepcopy(plain)
    make_lean(lean)
    _, exact = run(plain)
    with torch.autocast("cpu", torch.bfloat16):
        _, gradients = run(plain)
        _, found = run(lean)
    assert found.keys() == exact.keys()

    def error(got: dict[str, torch.Tensor]) -> float:
        return sum(float((got[n] - g).norm() / g.norm()) for n, g in exact.items()) / len(exact)

    assert all(g.dtype == torch.float32 for g in found.values())
    assert 0 < error(found) < 1.3 * error(gradients)


def test_copies_use_their_own_weights_and_models_can_be_saved():
    model = adapted(llama())
    make_lean(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert float(run(twin)[0].abs().max()) == 0.0
    assert float(run(model)[0].abs().max()) > 0.0
    torch.save(model.state_dict(), io.BytesIO())


def test_a_checkpointed_layer_alone():
    model = adapted(llama(), dropout=0.1)
    make_lean(model)
    x = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
    mlp = model.get_base_model().model.layers[0].mlp
    torch.manual_seed(0)
    want = torch.autograd.grad(mlp(x).sum(), x)[0]
    torch.manual_seed(0)
    assert torch.allclose(
        torch.autograd.grad(checkpoint(mlp, x, use_reentrant=False).sum(), x)[0], want
    )
