from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import THINKING, VOCAB, make_rows
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
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
from compact_fast.lean import make_lean
from compact_fast.students import LoraSettings, add_lora
from compact_fast.trainer.batching import question_lengths
from compact_fast.trainer.packing import (
    PADDING,
    Packing,
    choose_packing,
    is_cheaper,
    mask_wanted,
    pack_segments,
    pack_shared,
    refusal,
    shared_mask,
)
from compact_fast.trainer.segments import NAME, attend_by_segments, attending_by_segments
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
WIDER = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
STUDENTS: dict[str, Callable[..., Any]] = {
    "llama": lambda **s: LlamaForCausalLM(LlamaConfig(**s)),
    "llama-mha": lambda **s: LlamaForCausalLM(LlamaConfig(**{**s, "num_key_value_heads": 4})),
    "qwen2": lambda **s: Qwen2ForCausalLM(Qwen2Config(**s)),
    "qwen3": lambda **s: Qwen3ForCausalLM(Qwen3Config(**s)),
    "smollm2": lambda **s: LlamaForCausalLM(LlamaConfig(**s, tie_word_embeddings=True)),
    "gemma": lambda **s: GemmaForCausalLM(GemmaConfig(**s)),
    "gemma3": lambda **s: Gemma3ForCausalLM(Gemma3TextConfig(**s, sliding_window=4)),
    "mistral": lambda **s: MistralForCausalLM(MistralConfig(**s, sliding_window=4)),
}
WINDOWED = ("gemma3", "mistral")
# A great width: the tokens saved outweigh any attention.
SHARED, APART = Packing("segments", shared=True), Packing("segments", shared=False)
MASK, PADDED = Packing("mask", shared=True, width=10**6), Packing()


def make(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    return STUDENTS[name](**{**SIZES, **changes})


def gradients(
    model: Any, rows: list[dict[str, Any]], packing: Packing, weighting: Any = "compact"
) -> tuple[Any, list[Any]]:
    inputs = Collator(tuple(THINKING), 0, packing=packing)(rows)
    assert ("trees" in inputs) is (packing.kind == "segments")
    assert ("segments" in inputs) is (packing.kind == "mask")
    model.zero_grad()
    config = CompactConfig(filter_below=0.0, weighting=weighting)
    with attending_by_segments(model):
        out = compact_step(direct_body(model), model, inputs, config=config)
        out.loss.backward()
    return out, [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("name", STUDENTS)
def test_every_packing_equals_padded_sequences(name: str) -> None:
    """Loss, scores, weights and every adapter gradient, within 1e-5, on 20 random batches.

    In float64 but for norms and rotations, which stay in float32. With adapters as large as here,
    which take over from so narrow a student's weights, float32 is 1e-5 to 1e-4 off in the padded
    gradients already: packed ones must be about as close.
    """
    model = add_lora(make(name), LoraSettings(r=2, dropout=0.0))
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.1)
    kinds = [SHARED, APART] if name in WINDOWED else [SHARED, APART, MASK]
    worst = dict.fromkeys((PADDED, *kinds), 0.0)
    for seed in range(20):
        rows = [r for r in make_rows(6, seed=seed) if len(r["teacher_ids"]) > 1]
        some = kinds if seed < 4 else [SHARED]
        model.double()
        apart, theirs = gradients(model, rows, PADDED)
        for packing in some:
            packed, mine = gradients(model, rows, packing)
            torch.testing.assert_close(packed.loss, apart.loss, rtol=1e-6, atol=0)
            for field in ("token_logp", "nll", "mi", "weights", "consistency"):
                a, b = getattr(packed, field), getattr(apart, field)
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
            for a, b in zip(mine, theirs, strict=True):
                assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9
        model.float()
        for packing in (PADDED, *some):
            rounded, mine = gradients(model, rows, packing)
            torch.testing.assert_close(rounded.loss.double(), apart.loss, rtol=1e-5, atol=0)
            for a, b in zip(mine, theirs, strict=True):
                worst[packing] = max(worst[packing], float((a - b).norm() / b.norm()))
    assert all(worst[packing] <= 1e-5 + 5 * worst[PADDED] for packing in kinds), worst


@pytest.mark.parametrize("name", STUDENTS)
def test_every_packing_equals_padded_sequences_in_single_precision(name: str) -> None:
    """The same within 1e-5 in float32, layers that keep less included, with adapters that are small
    beside the weights, as trained ones are; heads of eight, for a norm of four amplifies rounding.
    """
    model = add_lora(make(name, **WIDER), LoraSettings(r=2, dropout=0.0))
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.01)
    lean = copy.deepcopy(model)
    make_lean(lean)
    kinds = [SHARED, APART] if name in WINDOWED else [SHARED, APART, MASK]
    for seed in range(20):
        rows = [r for r in make_rows(6, seed=seed) if len(r["teacher_ids"]) > 1]
        apart, theirs = gradients(model, rows, PADDED)
        for packing in kinds if seed < 4 else [SHARED]:
            packed, mine = gradients(lean, rows, packing)
            torch.testing.assert_close(packed.loss, apart.loss, rtol=1e-5, atol=0)
            torch.testing.assert_close(packed.weights, apart.weights, rtol=0, atol=1e-5)
            for a, b in zip(mine, theirs, strict=True):
                assert float((a - b).norm()) <= 1e-5 * float(b.norm())


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_recomputed_segments_are_segments_too(name: str) -> None:
    """Gradient checkpointing runs the layers again in the backward pass."""
    rows = make_rows(4)
    model = make(name)
    attend_by_segments(model)
    _, plain = gradients(model, rows, SHARED)
    model.train()
    model.gradient_checkpointing_enable()
    _, checkpointed = gradients(model, rows, SHARED)
    for a, b in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_each_student_gets_the_packing_that_suits_it() -> None:
    for name in STUDENTS:
        model = make(name)
        assert choose_packing(model).kind == "segments", name
        assert choose_packing(model, share=False) == Packing(
            "segments", shared=False, reason="share_prompts is off", width=16
        )
        on_gpu = choose_packing(model, masked=mask_wanted(torch.device("cuda")))
        # a mask of ours would undo a sliding window, which segments keep
        assert on_gpu.kind == ("segments" if name in WINDOWED else "mask"), name
        assert model.config._attn_implementation == "sdpa"  # a trial leaves no trace


def test_the_collator_makes_the_student_heed_segments() -> None:
    model, config = make("llama"), CompactConfig()
    collator = Collator.of(model, None, config, THINKING)
    assert collator.packing == Packing("segments", shared=True, width=16)
    assert model.config._attn_implementation == NAME
    assert "attn" not in model.config.to_json_string()
    off = Collator.of(model, None, config, THINKING, share_prompts=False)
    assert not off.packing.shared
    reference = Collator.of(model, None, CompactConfig(mode="reference"), THINKING)
    assert reference.packing.kind == "padded"
    stranger = make("llama")
    with pytest.raises(ValueError, match="packed for another student"):
        compact_step(
            direct_body(stranger), stranger, collator(make_rows(2)), config=CompactConfig()
        )


def test_without_segments_nothing_changes() -> None:
    """Padding, caches and generation are SDPA's."""
    model, other = make("llama").eval(), make("llama").eval()
    attend_by_segments(model)
    ids = torch.tensor([[0, 0, 3, 4, 5], [6, 7, 8, 9, 10]])
    mask = (ids > 0).long()
    kwargs = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **kwargs), other.generate(ids, **kwargs))
    assert torch.equal(model(ids, attention_mask=mask).logits, other(ids, mask).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_padding_side_does_not_matter(side: str) -> None:
    class Tokenizer:
        padding_side, pad_token_id, eos_token_id = side, 3, 1

    rows, model = make_rows(4), make("llama")
    for share in (True, False):
        batch = Collator.of(model, Tokenizer(), CompactConfig(), THINKING, share_prompts=share)(
            rows
        )
        plain = Collator.of(model, None, CompactConfig(), THINKING, share_prompts=share)(rows)
        assert torch.equal(batch["input_ids"], plain["input_ids"])
        assert torch.equal(batch["gather"], plain["gather"])


def test_students_that_cannot_are_refused_with_the_reason() -> None:
    eager = make("llama")
    eager.set_attn_implementation("eager")
    assert "eager attention" in str(refusal(eager))
    assert choose_packing(eager).kind == "padded"
    capped = Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=None))
    assert "eager attention" in str(refusal(capped))
    chunked = make("llama")
    chunked.config.layer_types = ["chunked_attention", "full_attention"]
    assert "does not attend to all tokens" in str(refusal(chunked))


def test_a_window_that_attention_is_not_told_of_is_found_out() -> None:
    """The trial is shorter than any window, so that it alone would not tell."""
    model = make("mistral")
    model.config.layer_types = ["sliding_attention", "full_attention"]
    assert "does not hand its sliding windows" in str(refusal(model))


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
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4))
    assert refusal(model) is None


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(0, 10**6), st.booleans())
def test_gathered_tokens_are_those_of_the_layout(count: int, seed: int, shared: bool) -> None:
    rows = make_rows(count, seed=seed)
    plain = Collator(tuple(THINKING), 0)(rows)
    layout = plain["layout"]
    used = sum(len(r["prompt_ids"]) + sum(map(len, r["completion_ids"])) for r in rows)
    masked, segments = pack_shared(rows, 0), pack_segments(rows, shared=shared)
    for packed in (masked, segments):
        assert torch.equal(packed["input_ids"].reshape(-1)[packed["gather"]], layout.input_ids)
        positions = packed["position_ids"].reshape(-1)[packed["gather"]]
        assert torch.equal(positions, layout.token_index)
    assert int((masked["segments"] != PADDING).sum()) == used
    length = segments["input_ids"].numel()
    assert length == (used if shared else layout.num_tokens)
    assert length == sum(map(sum, segments["trees"]))
    assert length == Packing("segments", shared=shared).positions(*question_lengths(rows)).sum()


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
    masking = Packing("mask", shared=True, width=16)
    assert "segments" not in Collator(tuple(THINKING), 0, packing=masking)(single)
    alone = len(single[0]["prompt_ids"]) + len(single[0]["completion_ids"][0])
    assert masking.positions(*question_lengths(single)).tolist() == [alone]
    some = make_rows(12)
    for width in (1, 16, 1000):
        masking = Packing("mask", shared=True, width=width)
        for row, found in zip(some, masking.positions(*question_lengths(some)), strict=True):
            kind = masking if is_cheaper([row], width) else PADDED
            sizes, rows = kind.sizes(*question_lengths([row]))
            assert rows is not None
            assert found == sizes[0] * rows[0]
