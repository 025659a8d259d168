"""A student of a few thousand weights and random questions, for the tests of the trainer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)

from compact_fast.config import CompactConfig
from compact_fast.students import LoraSettings, add_lora
from compact_fast.trainer import CompactTrainer, CompactTrainingArguments

VOCAB = 48
# The logits of the last two are capped and scaled.
CAP, SCALE = 0.7, 4.0
STUDENTS: dict[str, Callable[..., Any]] = {
    "llama": lambda **s: LlamaForCausalLM(LlamaConfig(**s)),
    "qwen2": lambda **s: Qwen2ForCausalLM(Qwen2Config(**s)),
    "gemma2": lambda **s: Gemma2ForCausalLM(
        Gemma2Config(**s, head_dim=4, final_logit_softcapping=CAP)
    ),
    "granite": lambda **s: GraniteForCausalLM(GraniteConfig(**s, logits_scaling=1 / SCALE)),
}
TEACHERS = ["ann", "bob", "cyd"]
THINKING = [5, 6]
# A method whose weights depend on everything, without a filter that leaves one teacher alone.
BLEND = CompactConfig(filter_below=0.0)


def make_student(kind: str = "llama", *, lora: bool = False, seed: int = 0, **changes: Any) -> Any:
    """A two-layer student; grouped-query attention, tied embeddings unless changed."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        **changes,
    }
    torch.manual_seed(seed)
    model = STUDENTS[kind](**settings)
    return add_lora(model, LoraSettings(r=4, dropout=0.0)) if lora else model


def make_rows(count: int = 12, *, seed: int = 1) -> list[dict[str, Any]]:
    """Questions of 1 to 3 teachers; the first teacher is always right, the last always wrong."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(2, VOCAB, (length,), generator=generator).tolist()

    rows = []
    for i in range(count):
        prompt, gold = tokens(3, 7), tokens(1, 3)
        K = 1 + (i + 2) % 3
        completions, spans = [], []
        for _ in range(K):
            body = tokens(3, 9)
            spans.append([len(prompt) + len(body), len(prompt) + len(body) + len(gold)])
            completions.append([*body, *gold, 1])
        rows.append(
            {
                "id": f"q{i}",
                "index": i,
                "prompt_ids": prompt,
                "completion_ids": completions,
                "teacher_ids": list(range(K)),
                "answer_spans": spans,
                "correct": [1, -1, 0][:K],
                "gold_ids": gold,
                "prior_completion_ids": [*gold, 1],
                "prior_span": [len(prompt), len(prompt) + len(gold)],
                "consensus": torch.rand(K, generator=generator).tolist(),
            }
        )
    return rows


def make_trainer(
    output_dir: Path,
    model: Any = None,
    rows: list[dict[str, Any]] | None = None,
    *,
    config: CompactConfig | None = None,
    eval_rows: list[dict[str, Any]] | None = None,
    run_info: dict[str, Any] | None = None,
    **changes: Any,
) -> CompactTrainer:
    """Two questions a forward pass, two passes a step, log and save out of step with each other."""
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "progress": "none",
        **changes,
    }
    return CompactTrainer(
        make_student() if model is None else model,
        CompactTrainingArguments(
            compact=config or CompactConfig(),
            teachers=TEACHERS,
            thinking_ids=THINKING,
            **settings,
        ),
        make_rows() if rows is None else rows,
        eval_rows,
        run_info=run_info,
    )


def trained(trainer: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    trainer.train(**kwargs)
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    timed = ("time", "runtime", "per_second", "wait")
    return {k: v for k, v in row.items() if not any(word in k for word in timed)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class Seen(TrainerCallback):
    """Keeps every logged row, as an experiment tracker would get it."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.rows.append(dict(logs))
