"""Forecasts: steps as the trainer counts them, memory that adds up and moves the right way."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compact_fast.flat_yaml import Setting
from compact_fast.lean.kept import own_bytes
from compact_fast.pipeline import forecast as forecast_module
from compact_fast.pipeline.forecast import (
    activation_bytes_per_token,
    backend_choice,
    count_steps,
    forecast,
    kept_bytes,
    loss_bytes,
)
from compact_fast.pipeline.training import training_arguments
from compact_fast.run_config import RunConfig, build
from compact_fast.students import body_and_head
from compact_fast.trainer.batching import question_lengths, sequence_tokens
from compact_fast.trainer.packing import Packing


def config(**keys) -> RunConfig:
    return build({k: Setting(v, f"--{k}") for k, v in keys.items()})


def tokens(row: dict) -> int:
    return int(sequence_tokens(*question_lengths([row])).sum())


def row(i: int = 0, prompt: int = 5, completions: tuple[int, ...] = (3, 6)) -> dict:
    return {
        "id": f"q{i}",
        "index": i,
        "prompt_ids": [n % 31 + 1 for n in range(prompt)],
        "completion_ids": [[7] * n for n in completions],
        "teacher_ids": list(range(len(completions))),
        "answer_spans": [[0, 0]] * len(completions),
        "correct": [1] + [0] * (len(completions) - 1),
        "gold_ids": [3],
        "consensus": [1.0] * len(completions),
    }


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=False,
        )
    )


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return llama()


@pytest.mark.parametrize("questions", [1, 7, 20])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"questions_per_step": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 2.5},
        {"questions_per_step": 2, "gradient_accumulation_steps": 1, "max_steps": 9},
    ],
)
def test_steps_are_the_trainers_own(questions, keys, model, tmp_path):
    from compact_fast.trainer import CompactTrainer

    c = config(output_dir=str(tmp_path), **keys)
    args = training_arguments(c, teachers=["a", "b"], thinking_ids=[])
    trainer = CompactTrainer(model, args, [row(i) for i in range(questions)])
    counted = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    assert count_steps(c, questions)[0] == counted[-1]


def test_tokens_of_a_question():
    assert tokens(row()) == 5 + 3 + 5 + 6
    assert Packing().positions(*question_lengths([row()])).tolist() == [2 * (5 + 6)]


def test_memory_adds_up(model):
    rows = [row(0), row(1, prompt=30), row(2)]
    f = forecast(config(lora=False, num_train_epochs=2.0), model, rows)
    assert f.tokens == 2 * sum(map(tokens, rows))
    parameters = sum(p.numel() for p in model.parameters())
    memory = f.packed
    assert memory.weights == memory.gradients == 4 * parameters
    assert memory.optimizer == 8 * parameters
    assert torch.cuda.is_available() or memory.process > 100e6
    for m in (f.packed, f.per_teacher):
        parts = (m.weights, m.gradients, m.optimizer, m.activations, m.loss, m.process)
        assert m.peak_bytes == sum(parts)
    # the largest question counts, and two of them in a pass count twice
    two = forecast(config(lora=False, questions_per_step=2), model, rows + rows)
    assert two.packed.activations == 2 * memory.activations
    less = forecast(config(lora=False, gradient_checkpointing=True), model, rows)
    assert less.packed.activations < memory.activations


def test_one_teacher_at_a_time_takes_its_activations_and_all_gradients(model):
    rows = [row(0), row(1, prompt=30, completions=(20, 25, 10))]
    f = forecast(config(lora=False, questions_per_step=2), model, rows)
    parameters = sum(p.numel() for p in model.parameters())
    assert f.per_teacher.gradients == (2 + 3 + 1) * 4 * parameters
    a_token = f.packed.activations / (30 + 20 + 25 + 10 + 5 + 3 + 6)
    assert f.per_teacher.activations == 55 * a_token


@pytest.mark.parametrize(
    ("available", "keys", "chosen"),
    [
        (1 << 60, {}, "packed"),
        (0, {}, "packed"),  # neither fits: the one that is quicker
        ("between", {}, "per_teacher"),
        ("between", {"fusion": "packed"}, "packed"),
        ("between", {"mode": "reference"}, "packed"),
        (1 << 60, {"fusion": "per_teacher"}, "per_teacher"),
    ],
)
def test_the_forecast_chooses_when_memory_would_not_do(model, monkeypatch, available, keys, chosen):
    long = [row(0, prompt=300, completions=(400, 400, 400, 400, 400))]
    # between two forecasts this process grows by more than so small a student takes
    monkeypatch.setattr("compact_fast.pipeline.forecast.resident_bytes", lambda: 1_000_000_000)
    if available == "between":
        f = forecast(config(lora=False, **keys), model, long)
        assert f.per_teacher.peak_bytes < f.packed.peak_bytes
        available = (f.per_teacher.peak_bytes + f.packed.peak_bytes) // 2
    monkeypatch.setattr("compact_fast.pipeline.forecast.device_memory", lambda: available)
    assert forecast(config(lora=False, **keys), model, long).fusion == chosen


def test_what_a_pass_keeps_is_seen_with_dropout_and_leaves_no_trace(model):
    from compact_fast.students import LoraSettings, add_lora

    adapted = add_lora(copy.deepcopy(model), LoraSettings(r=2, dropout=0.1)).eval()
    plain = add_lora(copy.deepcopy(model), LoraSettings(r=2, dropout=0.0)).eval()
    state = torch.get_rng_state()

    def kept(model: torch.nn.Module, tokens: int) -> int:
        ids = torch.arange(tokens)[None] % 32
        return kept_bytes(model, lambda: body_and_head(model).body(ids))

    assert kept(adapted, 16) > kept(plain, 16) > 0
    assert kept(adapted, 32) == 2 * kept(adapted, 16)

    def tensors() -> int:
        gc.collect()
        return sum(type(o) is torch.Tensor for o in gc.get_objects())

    before = tensors()
    kept(adapted, 16)
    assert tensors() == before  # the trial's activations are freed
    bytes_a_token = activation_bytes_per_token(config(), adapted, row(prompt=6))
    less = activation_bytes_per_token(config(gradient_checkpointing=True), adapted, row(prompt=6))
    assert 0 < less < bytes_a_token
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module.training for module in adapted.modules())
    assert not any(getattr(m, "gradient_checkpointing", False) for m in adapted.modules())


def test_activations_are_those_of_training(model, tmp_path):
    """Bytes kept by the trainer's own step, weights left out, of the largest pass."""
    from compact_fast.trainer import CompactTrainer

    rows = [row(i, prompt=20 + i, completions=(30, 41, 17)) for i in range(3)]
    c = config(output_dir=str(tmp_path), questions_per_step=2, lora=False)
    found = forecast(c, model, rows).packed.activations
    args = training_arguments(c, teachers=["a", "b", "c"], thinking_ids=[])
    trainer = CompactTrainer(model.train(), args, rows[1:])
    batch = next(iter(trainer.get_train_dataloader()))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(value):
        if value.untyped_storage().data_ptr() not in weights:
            address, size = own_bytes(value)
            kept[address] = (size, value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        trainer.compute_loss(model, batch)
    measured = sum(size for size, _ in kept.values())
    # the loss keeps its gradients too, which `loss` counts
    assert 0.9 * measured < found < 1.1 * measured


def test_recomputation_in_the_trial_attends_as_the_pass_did(monkeypatch):
    """The pass back belongs to the trial: outside, segments would be read as one sequence."""
    monkeypatch.setattr(forecast_module, "_TOLD_BY_GROWTH", 0)
    keys = {"gradient_checkpointing": True, "lora": False}
    assert activation_bytes_per_token(config(**keys), llama(), row(prompt=6)) > 0


@pytest.mark.parametrize("lora", [True, False])
def test_the_loss_takes_a_chunk_of_logits_and_the_head_s_gradient(model, lora):
    from compact_fast.backends.torch_backend import CHUNK_BYTES, HOLD_BYTES

    wide, D = 50_000, 16
    frozen = copy.deepcopy(model).requires_grad_(not lora)
    states = 2 * 3000 * D * 4
    found = loss_bytes(config(), frozen, 3000, 500, wide, D)
    if lora:
        assert found == CHUNK_BYTES + states
        return
    assert found - states - wide * D * 4 >= 4 * wide * 500  # a question's logits are held
    fewer = loss_bytes(config(), frozen, 3000, HOLD_BYTES // (4 * wide) + 1, wide, D)
    assert fewer < found  # it does not fit, and is passed over twice
    small = loss_bytes(config(), frozen, 30, 20, 100, D)
    assert small == 3 * 30 * 400 + 2 * 30 * D * 4 + 100 * D * 4
    whole = loss_bytes(config(backend="reference"), frozen, 3000, 500, wide, D)
    assert whole > 3000 * wide * 4


def test_the_backend_is_chosen_for_the_dtype_that_training_multiplies_in(model, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "compact_fast.pipeline.forecast.choose", lambda name, spec: seen.append(spec.dtype)
    )
    backend_choice(config(), model)
    backend_choice(config(bf16=True), model)
    assert seen == [torch.float32, torch.bfloat16]


def test_weighting_correct_leaves_questions_out(model):
    wrong = {**row(1), "correct": [0, -1]}
    f = forecast(config(weighting="correct", num_train_epochs=1.0), model, [row(0), wrong])
    assert f.tokens == tokens(row(0))
    assert math.isclose(f.epochs, 1.0)


def test_frozen_weights_have_no_gradient(model):
    for p in model.parameters():
        p.requires_grad_(False)
    try:
        f = forecast(config(), model, [row()])
    finally:
        for p in model.parameters():
            p.requires_grad_(True)
    assert f.packed.gradients == f.packed.optimizer == f.per_teacher.gradients == 0
    assert torch.is_grad_enabled()
