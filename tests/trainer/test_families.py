"""Families of students, tiny ones of their own classes: each is read as suits it, trains as padded,
and takes the default adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy import BLEND, THINKING, VOCAB, make_rows
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from compact_fast.lean import make_lean
from compact_fast.students import LoraSettings, add_lora, check_head
from compact_fast.trainer.packing import Packing, choose_packing
from compact_fast.trainer.step import Collator, compact_step, direct_body, heeding

# Family: how its prompts are read on a CPU.
FAMILIES = {
    "arcee": "segments",
    "bloom": "padded",
    "cohere": "segments",
    "cohere2": "segments",
    "deepseek_v3": "segments",
    "exaone4": "segments",
    "falcon": "mask",
    "gemma": "segments",
    "gemma2": "padded",
    "gemma3_text": "segments",
    "gemma3n_text": "segments",
    "gemma4_text": "segments",
    "glm4": "segments",
    "gpt2": "segments",
    "gpt_neox": "segments",
    "granite": "segments",
    "llama": "segments",
    "minicpm3": "segments",
    "mistral": "segments",
    "mixtral": "segments",
    "nemotron": "mask",
    "olmo2": "segments",
    "opt": "segments",
    "phi": "segments",
    "phi3": "segments",
    "qwen2": "segments",
    "qwen3": "segments",
    "qwen3_5_text": "padded",
    "qwen3_moe": "segments",
    "smollm3": "segments",
    "stablelm": "mask",
    "starcoder2": "segments",
}
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
# What their defaults leave neutral, or would leave untried with two layers.
OWN: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.5},
    "deepseek_v3": {"num_key_value_heads": 4},
    "gemma2": {"final_logit_softcapping": 1.0},
    "gemma3n_text": {
        "activation_sparsity_pattern": [0.0] * 5,
        "final_logit_softcapping": 1.0,
        "hidden_size_per_layer_input": 4,
        "intermediate_size": [48] * 5,
        "laurel_rank": 4,
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCAB,
    },
    "gemma4_text": {
        "final_logit_softcapping": 1.0,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 4,
        "num_hidden_layers": 6,
        "vocab_size_per_layer_input": VOCAB,
    },
    "granite": {"logits_scaling": 0.25},
    "minicpm3": {"num_key_value_heads": 4},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
}


def make(family: str) -> Any:
    if family not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this version of transformers has no {family}")
    usual = AutoConfig.for_model(family)
    sizes = {n: value for n, value in SIZES.items() if n in vars(usual) or n in usual.attribute_map}
    config = AutoConfig.for_model(family, **{**sizes, **OWN.get(family, {})})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) < 3e6
    return model.eval()


def step(model: Any, rows: list[dict[str, Any]], packing: Packing) -> tuple[Any, Any]:
    """The output, and every gradient there is."""
    inputs = Collator(tuple(THINKING), 0, packing=packing)(rows)
    model.zero_grad()
    with heeding(model, packing):
        out = compact_step(direct_body(model), model, inputs, config=BLEND)
        out.loss.backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains(family: str) -> None:
    model, rows = make(family), make_rows(5)
    check_head(model)
    packing = choose_packing(model)
    assert packing.kind == FAMILIES[family], packing.reason
    padded, expected = step(model, rows, Packing())
    make_lean(model)
    out, found = step(model, rows, packing)
    torch.testing.assert_close(out.loss, padded.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.weights, padded.weights, rtol=1e-4, atol=1e-6)
    assert found.keys() == expected.keys()
    # some are 0 but for rounding, as a key's bias is: softmax does not see it
    largest = max(float(g.norm()) for g in expected.values())
    for name, g in expected.items():
        assert float((found[name] - g).norm()) <= 1e-4 * float(g.norm()) + 1e-7 * largest, name


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_a_family_trains(family: str) -> None:
    model = add_lora(make(family), LoraSettings(r=2, dropout=0.0))
    make_lean(model)
    _, found = step(model, make_rows(3), choose_packing(model))
    moved = {n.split(".lora_B")[0].rsplit(".", 1)[-1] for n, g in found.items() if g.any()}
    assert moved == set(model.peft_config["default"].target_modules)
