"""What a run would take, before it runs: steps, tokens, memory. Estimates, and labelled so."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from compact_fast.backends import Choice, choose, gradients
from compact_fast.backends.torch_backend import CHUNK_BYTES, HOLD_BYTES, answer_bytes
from compact_fast.heap import resident_bytes, trim
from compact_fast.lean import make_lean
from compact_fast.lean.kept import give_back, own_bytes
from compact_fast.run_config import RunConfig
from compact_fast.students import body_and_head, causal_model
from compact_fast.trainer.batching import (
    Ints,
    QuestionBatches,
    question_lengths,
    sequence_tokens,
)
from compact_fast.trainer.fusion import gradient_bytes
from compact_fast.trainer.packing import Packing, packing_on
from compact_fast.trainer.step import (
    Collator,
    direct_body,
    heeding,
    packed_hidden,
    run_spec,
    to_device,
)

_MOST_TRIED = 2048  # positions; a longer question's pass would take too long on a CPU
_TOLD_BY_GROWTH = 8 << 20  # bytes kept by a trial below which the process's growth is mostly noise


@dataclass(frozen=True)
class Memory:
    """Peak bytes on the training device, by what they hold. Estimates."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    process: int
    """Python and its libraries, where training shares their memory (on the CPU)."""

    @property
    def peak_bytes(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Forecast:
    """What a run would take."""

    steps: int
    questions_per_update: int
    epochs: float
    tokens: int
    """Tokens read over the whole run, without padding."""

    packed: Memory
    per_teacher: Memory
    fusion: Literal["packed", "per_teacher"]
    """As configured; "auto": packed unless only per_teacher fits `available`."""

    available: int
    """Bytes that the training device has in all."""

    @property
    def chosen(self) -> Memory:
        """The memory of the fusion that will run."""
        return self.packed if self.fusion == "packed" else self.per_teacher


def forecast(config: RunConfig, model: Any, rows: Sequence[Mapping[str, Any]]) -> Forecast:
    """Steps and tokens exactly; memory from what the student takes for one of the questions.

    Activations are those of the largest batch that can occur: the `questions_per_step` questions
    with the most positions, or, one rationale at a time, the longest rationale. From now on the
    student's layers are lean (`make_lean`), as in training.
    """
    t = config.training
    rows = trainable_rows(config, rows)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    lengths = question_lengths(rows)
    steps, epochs = count_steps(config, len(rows), processes, budgeted(config, model, lengths))
    per_update = t.questions_per_step * t.gradient_accumulation_steps * processes
    if t.max_tokens_per_step is not None:
        per_update = round(len(rows) * epochs / steps)  # on average
    packed, per_teacher = memory(config, model, rows, lengths)
    available = device_memory()
    fusion: Literal["packed", "per_teacher"]
    if t.fusion == "auto":
        fits = can_be_apart(config) and packed.peak_bytes > available >= per_teacher.peak_bytes
        fusion = "per_teacher" if fits else "packed"
    else:
        fusion = t.fusion
    return Forecast(
        steps=steps,
        questions_per_update=per_update,
        epochs=epochs,
        tokens=round(int(sequence_tokens(*lengths).sum()) * epochs),
        packed=packed,
        per_teacher=per_teacher,
        fusion=fusion,
        available=available,
    )


def memory(
    config: RunConfig,
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    lengths: tuple[Ints, Ints, Ints, Ints],
) -> tuple[Memory, Memory]:
    """Peaks of training all rationales at once, and one at a time.

    `lengths` are those of `question_lengths`.
    """
    t = config.training
    make_lean(model)
    vocabulary, width = body_and_head(model).weight.shape
    taken = packing_of(config, model).positions(*lengths)
    falling = np.argsort(-taken, kind="stable")
    if t.max_tokens_per_step is None:
        largest = int(taken[falling[: t.questions_per_step]].sum())
    else:
        largest = max(int(taken.max()), min(t.max_tokens_per_step, int(taken.sum())))
    prompts, completions, long, counts = lengths
    read = sequence_tokens(*lengths)
    longest, teachers = int((prompts + long).max()), int(counts.max())
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    trained_bytes = sum(p.numel() * p.element_size() for p in trained)
    weight_bytes = sum(p.numel() * p.element_size() for p in parameters)
    _give_back()
    process = 0 if torch.cuda.is_available() else resident_bytes() - weight_bytes
    # The allocator's holes grow with the tensors, so that the largest question is tried.
    short = np.flatnonzero(taken <= _MOST_TRIED)
    trial = rows[int(short[taken[short].argmax()] if short.size else taken.argmin())]
    token_bytes = activation_bytes_per_token(config, model, trial)

    def of(tokens: int, positions: int, question: int, gradients: int) -> Memory:
        return Memory(
            weights=weight_bytes,
            gradients=gradients,
            optimizer=2 * trained_bytes,
            activations=tokens * token_bytes,
            loss=loss_bytes(config, model, positions, question, vocabulary, width),
            process=max(process, 0),
        )

    # what is accumulated, what a pass back has just made, one a teacher, and their sum
    apart = 2 * trained_bytes + (teachers + 1) * gradient_bytes(model) if trained else 0
    repeated = int((largest * (read / taken).max()).round())
    return (
        of(largest, repeated, int(completions.max()), trained_bytes),
        of(longest, longest, int(long.max()), apart),
    )


def can_be_apart(config: RunConfig) -> bool:
    """Whether fusion="per_teacher" takes this method, on processes that hold whole students."""
    whole = config.training.sharding == "none" and not config.training.compile_body
    return whole and config.method.mode != "reference" and config.method.consistency != "all"


def device_memory() -> int:
    """Bytes of the GPU, or of the machine or container; a very large number where unknown."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's share, or "max"
    with contextlib.suppress(OSError, ValueError):
        found.append(int(limit.read_text()))
    return min(found)


def trainable_rows(
    config: RunConfig, rows: Sequence[Mapping[str, Any]]
) -> Sequence[Mapping[str, Any]]:
    """The rows that training will use; weighting="correct" leaves out those with none right."""
    if config.method.weighting != "correct":
        return rows
    return [row for row in rows if 1 in row["correct"]]


def packing_of(config: RunConfig, model: Any) -> Packing:
    """How training will pack rationales."""
    return packing_on(
        model,
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        share=config.training.share_prompts,
        keep_padding=config.method.mode == "reference",
        compiled=config.training.compile_body,
        autocast=torch.bfloat16 if bf16_autocast(config) else None,
    )


def budgeted(config: RunConfig, model: Any, lengths: tuple[Ints, Ints, Ints, Ints]) -> int | None:
    """Forward passes of an epoch under max_tokens_per_step; None without it.

    `lengths` are those of `question_lengths`.
    """
    if config.training.max_tokens_per_step is None:
        return None
    sizes, padded = packing_of(config, model).sizes(*lengths)
    return len(QuestionBatches(sizes, rows=padded, budget=config.training.max_tokens_per_step))


def count_steps(
    config: RunConfig, questions: int, processes: int = 1, passes: int | None = None
) -> tuple[int, float]:
    """Optimizer steps of the run, and how many times it passes over the questions.

    `passes`: forward passes of an epoch, where they are not of `questions_per_step` each.
    """
    t = config.training
    passes = math.ceil(questions / t.questions_per_step) if passes is None else passes
    batches = math.ceil(passes / processes)
    per_epoch = max(math.ceil(batches / t.gradient_accumulation_steps), 1)
    if t.max_steps > 0:
        return t.max_steps, t.max_steps / per_epoch
    return math.ceil(t.num_train_epochs * per_epoch), t.num_train_epochs


def loss_bytes(
    config: RunConfig, model: Any, positions: int, question: int, vocabulary: int, width: int
) -> int:
    """Logits held at once, gradients of the hidden states and of a trained head.

    `positions`: of the batch, prompts counted for each rationale; `question`: labels of the
    largest question, whose logits a trained head holds where they fit.
    """
    row, states = 4 * vocabulary, 2 * positions * width * 4
    head = body_and_head(model)
    backend = backend_choice(config, model).backend
    if backend.name == "reference":
        return 4 * positions * row + states
    held = int(getattr(backend, "chunk_bytes", CHUNK_BYTES))
    if head.trainable:
        most = int(getattr(backend, "hold_bytes", HOLD_BYTES))
        held = question * row if held < question * row <= most else held
        held += min(answer_bytes(vocabulary * width * 4), positions * row)
        states += vocabulary * width * 4
    return min(held, 3 * positions * row) + states


def activation_bytes_per_token(config: RunConfig, model: Any, row: Mapping[str, Any]) -> int:
    """Bytes that a training pass keeps for its backward pass, by position of `row`'s question.

    With recomputation a layer keeps its input alone, and one layer at a time the rest. On a CPU
    the C library's allocator also keeps holes that it cannot use, so there the process's own
    growth over the pass counts, where it is more.
    """
    autocast, recomputed = bf16_autocast(config), config.training.gradient_checkpointing
    with _trial(config, model, row) as (run, tokens):
        kept = kept_bytes(model, run, autocast=autocast)
        grown = 0
        if kept >= _TOLD_BY_GROWTH and not torch.cuda.is_available():
            grown = grown_bytes(model, run, autocast=autocast, recomputed=recomputed)
    kept //= tokens
    if recomputed:
        shape = causal_model(model).config.get_text_config()
        size = 2 if autocast else next(model.parameters()).element_size()
        layers = int(shape.num_hidden_layers)
        kept = layers * int(shape.hidden_size) * size + kept // layers
    return max(kept, grown // tokens)


@contextlib.contextmanager
def _trial(
    config: RunConfig, model: Any, row: Mapping[str, Any]
) -> Iterator[tuple[Callable[[], Tensor], int]]:
    """A pass over one question as training makes it, and the positions it reads.

    Passes back belong inside too: what they recompute must attend as the pass did.
    """
    weight = body_and_head(model).weight
    collator = Collator.of(
        *(model, None, config.method, ()),
        share_prompts=config.training.share_prompts,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        lasting=False,
        autocast=torch.bfloat16 if bf16_autocast(config) else None,
    )
    inputs = to_device(collator([row]), weight.device)
    with heeding(model, collator.packing):
        yield lambda: packed_hidden(direct_body(model), inputs), inputs["input_ids"].numel()


def kept_bytes(model: Any, run: Callable[[], Tensor], *, autocast: bool = False) -> int:
    """Bytes that `run`, a pass of the body, keeps for its backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}  # by address; held, so that none is used twice

    def keep(value: Tensor) -> Tensor:
        value = value.detach()  # or nodes would hold their own results, and nothing would be freed
        address, size = own_bytes(value)
        if value.untyped_storage().data_ptr() not in weights:
            kept[address] = (size, value)
        return value

    with (
        _trying(model, autocast, recomputed=False),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
    ):
        run()
    return sum(size for size, _ in kept.values())


def grown_bytes(
    model: Any, run: Callable[[], Tensor], *, autocast: bool = False, recomputed: bool = False
) -> int:
    """How much `run`, a pass of the body, lets this process grow; 0 where the system does not tell.

    With recomputation the pass back counts too, which makes activations, its gradients left out.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        return 0
    with _trying(model, autocast, recomputed=recomputed):
        with torch.no_grad():
            # weights that were only mapped so far are read now
            body_and_head(model).body(
                torch.arange(8, device=body_and_head(model).weight.device)[None]
            )
        _give_back()  # holes that loading left would hide the growth
        before = resident_bytes()
        hidden = run()
        grown = resident_bytes() - before
        if recomputed:
            torch.autograd.grad(hidden.sum(), trained, allow_unused=True)
            gradients = sum(p.numel() * p.element_size() for p in trained)
            grown = max(grown, resident_bytes() - before - gradients)
    return max(grown, 0)


def _give_back() -> None:
    """Return freed memory to the system, where the C library can."""
    gc.collect()
    give_back()
    gradients.give_back()
    trim()


@contextlib.contextmanager
def _trying(model: Any, autocast: bool, *, recomputed: bool) -> Iterator[None]:
    """Inside, the model is as in training, dropout on; mode and random numbers are put back."""
    resting = [module for module in model.modules() if not module.training]
    device, causal = body_and_head(model).weight.device, causal_model(model)
    was = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    _recompute(causal, recomputed, was)
    model.train()
    try:
        with (
            torch.random.fork_rng(),
            torch.autocast(device.type, torch.bfloat16, enabled=autocast),
        ):
            yield
    finally:
        for module in resting:
            module.training = False
        _recompute(causal, was, recomputed)


def _recompute(causal: Any, wanted: bool, now: bool) -> None:
    """Switch recomputation on or off, unless it is so now."""
    if wanted == now:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers renames these two
        if wanted:
            causal.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            causal.gradient_checkpointing_disable()


def bf16_autocast(config: RunConfig) -> bool:
    """Whether training will run under bf16 autocast."""
    if config.training.bf16 == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return config.training.bf16


def backend_choice(config: RunConfig, model: Any) -> Choice:
    """The backend the loss would run on, with the reason."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if bf16_autocast(config) else None
    return choose(config.training.backend, run_spec(model, device, dtype))
