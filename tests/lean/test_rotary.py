"""Rotary positions in one pass: the same bits, where the function is the usual one."""

from __future__ import annotations

from types import FunctionType

import pytest
import torch
from replaced import trained, with_forward
from torch import nn
from transformers import (
    GPTJConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.models.gptj.modeling_gptj import GPTJAttention
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention

from compact_fast.lean import rotary, rows
from compact_fast.lean.rotary import is_rotary, rotary_forward

SIZES = {
    "vocab_size": 40,
    "hidden_size": 96,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=22)),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**SIZES)),  # some layers do not rotate
}
native = pytest.mark.skipif(rows._native() is None, reason="no native module")


def with_ours(model: nn.Module) -> nn.Module:
    return with_forward(model, "Attention", is_rotary, rotary_forward)


def run(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    return trained(model, input_ids=ids)


@native
@pytest.mark.parametrize("batch", [1, 3])  # with several rows theirs runs
@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_are_the_same_bits(name, batch):
    torch.manual_seed(0)
    plain = MODELS[name]()
    ids = torch.randint(40, (batch, 50))
    for want, found in zip(run(plain, ids), run(with_ours(plain), ids), strict=True):
        # attention may multiply what lies otherwise in another order
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)


@native
@pytest.mark.parametrize("d", [2, 6, 32, 64, 80])
@pytest.mark.parametrize("heads", [1, 5])
def test_rotation_alone_has_the_same_bits_each_way(heads, d, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(1, 37, heads, d).transpose(1, 2)
    cos, sin = torch.randn(1, 37, d), torch.randn(1, 37, d)
    upstream = torch.randn(1, heads, 37, d)
    found = []
    calls = []
    monkeypatch.setattr(rotary, "rotate", lambda *a, **k: calls.append(0) or rows.rotate(*a, **k))
    ours = rotary._with_ours.__wrapped__(LlamaAttention.forward).__globals__[rotary._NAME]
    for function in (modeling_llama.apply_rotary_pos_emb, ours):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out, again = function(leaf, leaf, cos, sin)
        (out + 0 * again).backward(upstream)
        found.append((out.detach(), leaf.grad))
    assert len(calls) == 4
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-6, atol=1e-6)


def test_generation_and_caches_run_as_they_did():
    torch.manual_seed(0)
    plain = MODELS["llama"]().eval()
    ours = with_ours(plain).eval()
    ids = torch.randint(1, 40, (1, 5))
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(ids, **options), plain.generate(ids, **options))


class Other(LlamaAttention):
    """Its module's function of that name turns neighbours, not halves."""


def test_other_rotations_stay():
    layer = LlamaAttention(LlamaConfig(**SIZES), 0)
    assert is_rotary(layer)
    theirs = LlamaAttention.forward

    def neighbours(q, k, cos, sin, unsqueeze_dim=1):
        turned = [torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) for x in (q, k)]
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return tuple(x * cos + t * sin for x, t in zip((q, k), turned, strict=True))

    changed = {**theirs.__globals__, "apply_rotary_pos_emb": neighbours}
    Other.forward = FunctionType(theirs.__code__, changed, "forward", theirs.__defaults__)
    assert not is_rotary(Other(LlamaConfig(**SIZES), 0))
    assert not is_rotary(GPTJAttention(GPTJConfig(n_embd=32, n_head=2, rotary_dim=4)))
    assert not is_rotary(nn.Linear(3, 3))
    assert not is_rotary(LlamaAttention(LlamaConfig(**SIZES), 0).to("meta"))
