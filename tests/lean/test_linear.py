"""Plain linear layers: the numbers of torch's, and less that is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from compact_fast.lean import lean_inference, make_lean
from compact_fast.students import LoraSettings, add_lora

SIZES = {
    "vocab_size": 50,
    "hidden_size": 256,
    "intermediate_size": 300,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
IDS = torch.tensor([[1, 5, 9, 2, 30], [7, 7, 3, 0, 11]])


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def qwen() -> nn.Module:  # biases
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    return model


def run(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train().zero_grad()
    out = model(input_ids=IDS).logits
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [(), ("mlp",), ("self_attn", "norm", "embed")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("make", [llama, qwen])
def test_outputs_and_gradients_are_those_of_torch(make, dtype, frozen):
    plain = make().to(dtype)
    for name, p in plain.named_parameters():
        p.requires_grad_(not any(part in name for part in frozen))
    lean = copy.deepcopy(plain)
    make_lean(lean)
    assert "forward" in vars(lean.model.layers[0].self_attn.q_proj)
    (want, gradients), (got, found) = run(plain), run(lean)
    assert found.keys() == gradients.keys()
    # float64 through norms and rotations that compute in float32, both alike
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    assert float((got - want).norm()) <= tolerance * float(want.norm())
    for name, g in gradients.items():
        assert float((found[name] - g).norm()) <= 10 * tolerance * float(g.norm()), name
        assert found[name].is_contiguous()


def test_gradients_add_up_over_passes():
    plain, lean = llama(), llama()
    make_lean(lean)
    for model in (plain, lean):
        model.train()
        for i in range(3):
            model(input_ids=IDS + i).logits.square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), lean.parameters(), strict=True):
        assert float((a.grad - b.grad).norm()) <= 1e-3 * float(a.grad.norm()), name


def kept(model: nn.Module) -> int:
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            found[t.data_ptr()] = max(found.get(t.data_ptr(), 0), t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.train()(input_ids=IDS)
    return sum(found.values())


def test_less_is_kept():
    plain, lean = llama(), llama()
    make_lean(lean)
    assert kept(lean) < 0.75 * kept(plain)


def test_small_layers_and_what_an_adapted_layer_holds_stay():
    assert make_lean(nn.Linear(100, 100)) == 0
    assert make_lean(nn.Linear(300, 300)) == 1
    model = add_lora(llama(), LoraSettings(r=3))
    make_lean(model)
    for name, module in model.named_modules():
        if "base_layer" in name or "lora_" in name:
            assert "forward" not in vars(module), name


def test_scoring_has_the_numbers_of_training_and_leaves_nothing_behind():
    model = llama()
    lean = copy.deepcopy(model)
    make_lean(lean)
    want = lean.train()(input_ids=IDS).logits
    with torch.no_grad(), lean_inference(model):
        assert torch.equal(model(input_ids=IDS).logits, want)
    assert all("forward" not in vars(m) for m in model.modules())


def test_autocast_and_other_dtypes_run_as_they_were():
    plain, lean = nn.Linear(300, 300), nn.Linear(300, 300)
    lean.load_state_dict(plain.state_dict())
    make_lean(lean)
    x = torch.randn(4, 300)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lean(x), plain(x))
    with pytest.raises(RuntimeError, match="dtype"):
        lean(x.double())
