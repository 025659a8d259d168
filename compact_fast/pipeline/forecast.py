"""What a run would take, before it runs: steps, tokens, memory. Estimates, and labelled so."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compact_fast.backends import Choice, RunSpec, choose
from compact_fast.backends.torch_backend import CHUNK_BYTES
from compact_fast.run_config import RunConfig
from compact_fast.students import body_and_head, causal_model
from compact_fast.trainer.packing import is_cheaper, refusal

# Logits the torch backend holds at once, and what it makes of them (bench/loss_memory.py).
LOSS_CHUNK_BYTES = 3 * CHUNK_BYTES


@dataclass(frozen=True)
class Forecast:
    """Estimates; bytes are peaks on the training device."""

    steps: int
    questions_per_update: int
    epochs: float
    tokens: int
    """Tokens read over the whole run, without padding."""

    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    loss_bytes: int
    process_bytes: int
    """Python and its libraries, where training shares their memory (on the CPU)."""

    @property
    def peak_bytes(self) -> int:
        return (
            self.weight_bytes
            + self.gradient_bytes
            + self.optimizer_bytes
            + self.activation_bytes
            + self.loss_bytes
            + self.process_bytes
        )


def forecast(config: RunConfig, model: Any, rows: Sequence[Mapping[str, Any]]) -> Forecast:
    """Steps and tokens exactly, memory by a formula over the student's shape.

    Activations are those of the largest batch that can occur: the `questions_per_step` questions
    with the most positions.
    """
    t = config.training
    rows = trainable_rows(config, rows)
    width = body_and_head(model).weight.shape[1]
    share = t.share_prompts and config.method.mode != "reference" and refusal(model) is None

    def positions(row: Mapping[str, Any]) -> int:
        return shared_tokens(row) if share and is_cheaper([row], width) else padded_tokens(row)

    largest = sum(sorted(map(positions, rows), reverse=True)[: t.questions_per_step])
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    steps, epochs = count_steps(config, len(rows), processes)
    tokens = sum(real_tokens(row) for row in rows)
    head = body_and_head(model)
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    trained_bytes = sum(p.numel() * p.element_size() for p in trained)
    weight_bytes = sum(p.numel() * p.element_size() for p in parameters)
    on_cpu = not torch.cuda.is_available()
    head_gradient = width * head.weight.shape[0] * 4 if head.trainable else 0
    return Forecast(
        steps=steps,
        questions_per_update=t.questions_per_step * t.gradient_accumulation_steps * processes,
        epochs=epochs,
        tokens=round(tokens * epochs),
        weight_bytes=weight_bytes,
        gradient_bytes=trained_bytes,
        optimizer_bytes=2 * trained_bytes,
        activation_bytes=largest * activation_bytes_per_token(config, model),
        loss_bytes=LOSS_CHUNK_BYTES + head_gradient + largest * width * 4,
        process_bytes=max(resident_bytes() - weight_bytes, 0) if on_cpu else 0,
    )


def trainable_rows(
    config: RunConfig, rows: Sequence[Mapping[str, Any]]
) -> Sequence[Mapping[str, Any]]:
    """The rows that training will use; weighting="correct" leaves out those with none right."""
    if config.method.weighting != "correct":
        return rows
    return [row for row in rows if 1 in row["correct"]]


def count_steps(config: RunConfig, questions: int, processes: int = 1) -> tuple[int, float]:
    """Optimizer steps of the run, and how many times it passes over the questions."""
    t = config.training
    batches = math.ceil(questions / (t.questions_per_step * processes))
    per_epoch = max(math.ceil(batches / t.gradient_accumulation_steps), 1)
    if t.max_steps > 0:
        return t.max_steps, t.max_steps / per_epoch
    return math.ceil(t.num_train_epochs * per_epoch), t.num_train_epochs


def padded_tokens(row: Mapping[str, Any]) -> int:
    """Positions a question takes in a batch of its own."""
    lengths = [len(c) for c in row["completion_ids"]]
    return (len(row["prompt_ids"]) + max(lengths)) * len(lengths)


def shared_tokens(row: Mapping[str, Any]) -> int:
    """Positions a question takes when its rationales share one prompt."""
    return len(row["prompt_ids"]) + sum(len(c) for c in row["completion_ids"])


def real_tokens(row: Mapping[str, Any]) -> int:
    lengths = [len(c) for c in row["completion_ids"]]
    return len(row["prompt_ids"]) * len(lengths) + sum(lengths)


def activation_bytes_per_token(config: RunConfig, model: Any) -> int:
    """Bytes kept for the backward pass, a token, for a decoder of the Llama kind.

    In hidden widths D and feed-forward widths F a layer keeps 2 D of norm inputs, 4 D of queries,
    keys, values and attention output, and 3 F of gate and up. Trained weights add their inputs,
    4 D + F. Adapters instead keep an input each after dropout, with its mask: 6 D + F. With
    recomputation a layer keeps its input alone, and one layer at a time the rest.
    """
    shape = causal_model(model).config.get_text_config()
    width = shape.hidden_size
    inner = getattr(shape, "intermediate_size", None) or 4 * width
    size = 2 if bf16_autocast(config) else next(model.parameters()).element_size()
    layer = (6 * width + 3 * inner) * size
    if not config.lora.lora:
        layer += (4 * width + inner) * size
    elif config.lora.lora_dropout > 0:
        # the CPU keeps the mask as numbers of the weights' own size
        mask = 1 if torch.cuda.is_available() else size
        layer += (6 * width + inner) * (size + mask)
    else:
        layer += (2 * width + inner) * size
    layers = shape.num_hidden_layers
    if config.training.gradient_checkpointing:
        return int(layers * width * size + layer)
    return int(layers * layer)


def resident_bytes() -> int:
    """Memory of this process, 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def bf16_autocast(config: RunConfig) -> bool:
    """Whether training will run under bf16 autocast."""
    if config.training.bf16 == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return config.training.bf16


def backend_choice(config: RunConfig, model: Any) -> Choice:
    """The backend the loss would run on, with the reason."""
    head = body_and_head(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vocabulary, width = head.weight.shape
    has_bias = head.bias is not None
    spec = RunSpec(device, head.weight.dtype, vocabulary, width, head_bias=has_bias)
    return choose(config.training.backend, spec)
