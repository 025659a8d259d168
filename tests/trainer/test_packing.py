from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import THINKING, VOCAB, make_rows
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from compact_fast.config import CompactConfig
from compact_fast.students import LoraSettings, add_lora
from compact_fast.trainer.packing import PADDING, is_cheaper, pack_shared, refusal, shared_mask
from compact_fast.trainer.step import Collator, compact_step, direct_body

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
}
STUDENTS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama-mha": lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 4})),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES)),
}


def make(name: str) -> Any:
    torch.manual_seed(0)
    return STUDENTS[name]()


def gradients(model: Any, rows: list[dict[str, Any]], *, width: int) -> tuple[Any, list[Any]]:
    collator = Collator(tuple(THINKING), 0, shared_width=width)
    inputs = collator(rows)
    assert ("segments" in inputs) is bool(width)
    config = CompactConfig(filter_below=0.0)
    out = compact_step(direct_body(model), model, inputs, config=config)
    out.loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return out, grads


@pytest.mark.parametrize("name", STUDENTS)
def test_shared_prompts_equal_separate_sequences(name: str) -> None:
    """Loss, scores, weights and every adapter gradient, on 20 random batches, in float64
    (the bodies' norms and rotations stay in float32)."""
    model = add_lora(make(name), LoraSettings(r=2, dropout=0.0)).double()
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.1)
    for seed in range(20):
        rows = [r for r in make_rows(6, seed=seed) if len(r["teacher_ids"]) > 1]
        one, two = copy.deepcopy(model), copy.deepcopy(model)
        # A great width: the tokens saved outweigh any attention.
        shared, mine = gradients(one, rows, width=10**6)
        apart, theirs = gradients(two, rows, width=0)
        torch.testing.assert_close(shared.loss, apart.loss, rtol=1e-7, atol=0)
        for field in ("token_logp", "nll", "mi", "weights", "consistency"):
            a, b = getattr(shared, field), getattr(apart, field)
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
        for a, b in zip(mine, theirs, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9


def test_the_students_of_the_other_tests_do_share() -> None:
    for name in STUDENTS:
        assert refusal(make(name)) is None, name
    config = CompactConfig()
    assert Collator.of(make("llama"), None, config, THINKING).shared_width == 16
    off = Collator.of(make("llama"), None, config, THINKING, share_prompts=False)
    assert off.shared_width == 0
    reference = Collator.of(make("llama"), None, CompactConfig(mode="reference"), THINKING)
    assert reference.shared_width == 0


def test_students_that_cannot_are_refused_with_the_reason() -> None:
    sliding = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8))
    assert "does not attend to all tokens" in str(refusal(sliding))
    eager = make("llama")
    eager.set_attn_implementation("eager")
    assert "eager attention" in str(refusal(eager))


def test_a_student_that_ignores_positions_is_found_out() -> None:
    class Careless(LlamaForCausalLM):
        pass

    model = Careless(LlamaConfig(**SIZES, initializer_range=0.5))
    inner = model.model.forward

    def forward(*args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    model.model.forward = forward
    assert "makes other hidden states" in str(refusal(model))


def test_learned_positions_work_too() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4))
    assert refusal(model) is None


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(0, 10**6))
def test_gathered_tokens_are_those_of_the_layout(count: int, seed: int) -> None:
    rows = make_rows(count, seed=seed)
    plain = Collator(tuple(THINKING), 0)(rows)
    packed = pack_shared(rows, 0)
    layout = plain["layout"]
    assert torch.equal(packed["input_ids"].reshape(-1)[packed["gather"]], layout.input_ids)
    positions = packed["position_ids"].reshape(-1)[packed["gather"]]
    assert torch.equal(positions, layout.token_index)
    used = sum(len(r["prompt_ids"]) + sum(map(len, r["completion_ids"])) for r in rows)
    assert int((packed["segments"] != PADDING).sum()) == used


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(0, 10**6))
def test_the_mask_is_that_of_the_sentence_above_it(count: int, seed: int) -> None:
    segments = pack_shared(make_rows(count, seed=seed), 0)["segments"]
    mask = shared_mask(segments)
    assert mask.shape == (count, 1, segments.shape[1], segments.shape[1])
    for q in range(count):
        for i, mine in enumerate(segments[q].tolist()):
            for j, theirs in enumerate(segments[q].tolist()):
                assert bool(mask[q, 0, i, j]) == (j <= i and theirs in (0, mine))
    assert mask.diagonal(dim1=2, dim2=3).all()


def test_sharing_is_left_where_it_costs_more() -> None:
    def row(prompt: int, *completions: int) -> dict[str, Any]:
        return {"prompt_ids": [1] * prompt, "completion_ids": [[1] * n for n in completions]}

    assert is_cheaper([row(100, 50, 50, 50, 50)], 64)
    assert is_cheaper([row(10, 30, 200)], 256)  # saves padding, if little prompt
    assert not is_cheaper([row(10, 100)], 256)  # one rationale has nobody to share with
    assert not is_cheaper([row(1, *[500] * 8)], 16)  # attention among strangers, for one token
    single = make_rows(1)[:1]
    single[0].update(completion_ids=single[0]["completion_ids"][:1], teacher_ids=[0], correct=[1])
    single[0].update(answer_spans=single[0]["answer_spans"][:1], consensus=[1.0])
    assert "segments" not in Collator(tuple(THINKING), 0, shared_width=16)(single)
