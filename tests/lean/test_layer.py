"""Decoder layers: the same numbers, sums where they will be kept, other layers as they were."""

from __future__ import annotations

import pytest
import torch
from replaced import of_kind, trained, with_forward
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from compact_fast.lean import kept, layer
from compact_fast.lean.layer import is_layer, layer_forward

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
CONFIG = LlamaConfig(**SIZES)
IDS = torch.tensor([[1, 5, 9, 2, 30, 7]])


def layers(model: nn.Module) -> list[nn.Module]:
    return of_kind(model, "DecoderLayer")


def with_ours(model: nn.Module) -> nn.Module:
    return with_forward(model, "DecoderLayer", is_layer, layer_forward)


def run(model: nn.Module) -> list[torch.Tensor]:
    return trained(model, input_ids=IDS, use_cache=False)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [lambda: LlamaForCausalLM(CONFIG), lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES))],
)
def test_the_numbers_are_the_same_bits(make, dtype, recomputed):
    torch.manual_seed(0)
    plain = make().to(dtype)
    ours = with_ours(plain)
    if recomputed:
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(map(torch.equal, run(ours), run(plain)))


@pytest.mark.parametrize("recomputed", [False, True])
def test_sums_lie_where_they_are_kept(recomputed, monkeypatch):
    ours, found = with_ours(LlamaForCausalLM(CONFIG)), []
    monkeypatch.setattr(
        layer, "added", lambda *a, **k: found.append(kept.added(*a, **k)) or found[-1]
    )
    if recomputed:
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    ours.train()(input_ids=IDS, use_cache=False)
    assert len(found) == 6
    assert all(t in kept._CHUNKS for t in found)
    outputs = found[1::2]
    of_recomputed = {t.untyped_storage().data_ptr() for t in outputs}
    assert recomputed == of_recomputed.isdisjoint(
        t.untyped_storage().data_ptr() for t in found[::2]
    )


def test_what_is_changed_in_place_later_is_noticed():
    a = torch.randn(3, 4, requires_grad=True)
    out = kept.added(a, a)
    loss = out.pow(2).sum()
    with torch.no_grad():
        out.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_shapes_that_spread_are_torchs():
    a, b = torch.randn(2, 3, 4), torch.randn(1, 3, 4)
    assert torch.equal(kept.added(a, b), a + b)
    assert kept.added(a, a.double()).dtype == torch.float64


def test_caches_and_positional_arguments_run_as_they_did():
    torch.manual_seed(0)
    plain = LlamaForCausalLM(CONFIG).eval()
    ours = with_ours(plain).eval()
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(IDS, **options), plain.generate(IDS, **options))
    x = torch.randn(1, 6, 24)
    turned = plain.model.rotary_emb(x, torch.arange(6)[None])
    want = layers(plain)[0](x, None, None, None, False, turned)
    assert torch.equal(layers(ours)[0](x, None, None, None, False, turned), want)


class Scaled(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
        hidden_states = residual + hidden_states
        residual = hidden_states
        return residual + 0.5 * self.mlp(self.post_attention_layernorm(hidden_states))


class Hooked(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs)


def test_other_layers_stay():
    assert is_layer(LlamaDecoderLayer(CONFIG, 0))
    assert not is_layer(Scaled(CONFIG, 0))
    assert not is_layer(Hooked(CONFIG, 0))
    assert not is_layer(nn.Linear(2, 2))
    assert not is_layer(LlamaDecoderLayer(CONFIG, 0).to("meta"))
    for model in (Olmo2ForCausalLM(Olmo2Config(**SIZES)), Gemma2ForCausalLM(Gemma2Config(**SIZES))):
        assert not any(map(is_layer, layers(model)))
