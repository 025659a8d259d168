"""Exact match of generated final answers, by batched generation."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig as _GenerationConfig

from compact_fast.data.extract import answers_equal, extract_answer
from compact_fast.data.records import Question
from compact_fast.evaluate.likelihood import Progress, evaluation_mode, model_device
from compact_fast.evaluate.prompts import PromptBuilder
from compact_fast.evaluate.results import Answer, ExactMatch, Share
from compact_fast.students import causal_model


def exact_match(
    model: Any,
    questions: Sequence[Question],
    prompts: PromptBuilder,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> ExactMatch:
    """Generates a completion a question and compares its final answer with the gold one.

    `temperature=0` is greedy; above it, `samples` completions a question are drawn from the whole
    distribution (no top-k, no top-p) and a question scores its share of right ones. Draws repeat
    for the same seed, batch size and questions, whatever the random state outside. Nothing of the
    student's own generation settings but its end tokens is used. Batches are of similar length,
    padded on the left here, whatever the tokenizer does. Raises ValueError without questions.
    """
    if not questions:
        raise ValueError("no questions to evaluate")
    if temperature < 0 or samples < 1 or batch_size < 1 or max_new_tokens < 1:
        raise ValueError(
            f"temperature={temperature}, samples={samples}, batch_size={batch_size}, "
            f"max_new_tokens={max_new_tokens}: expected temperature >= 0, the others >= 1"
        )
    if temperature == 0 and samples > 1:
        raise ValueError(f"samples={samples}: greedy completions are all equal; set temperature")
    started = time.perf_counter()
    encoded = [prompts.ids(q) for q in questions]
    completions = generate(
        model,
        [ids for ids in encoded for _ in range(samples)],
        stop_ids=[*prompts.stop_ids, *own_stop_ids(model)],
        pad_id=prompts.pad_id,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
        progress=progress,
    )
    answers = []
    for i, (ids, finished) in enumerate(completions):
        question = questions[i // samples]
        text = prompts.decode(ids)
        answer = extract_answer(text, question.choices)
        right = answer is not None and answers_equal(answer, question.answer, question.choices)
        answers.append(Answer(question.id, question.answer, answer, right, finished, text))
    scores = [
        sum(a.right for a in answers[i : i + samples]) / samples
        for i in range(0, len(answers), samples)
    ]
    words = "greedy" if temperature == 0 else f"sampled at temperature {temperature:g}"
    return ExactMatch(
        share=Share.of(scores),
        decoding=words if samples == 1 else f"{words}, {samples} a question",
        samples=samples,
        unanswered=sum(a.answer is None for a in answers),
        unfinished=sum(not a.finished for a in answers),
        max_new_tokens=max_new_tokens,
        tokens=sum(len(ids) for ids, _ in completions),
        seconds=time.perf_counter() - started,
        answers=answers,
    )


def own_stop_ids(model: Any) -> list[int]:
    """The end tokens of the student's own generation settings."""
    own = getattr(causal_model(model).generation_config, "eos_token_id", None)
    return [] if own is None else [own] if isinstance(own, int) else [int(i) for i in own]


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    batch_size: int = 32,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[tuple[list[int], bool]]:
    """For every prompt: the new token ids before the stop token, and whether it was reached."""
    device = model_device(model)
    causal = causal_model(model)
    limit = getattr(causal.config, "max_position_embeddings", None)
    longest = max(len(p) for p in prompts)
    if limit is not None and longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the "
            f"student's {limit} positions; lower max_new_tokens"
        )
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    out: list[tuple[list[int], bool]] = [([], False)] * len(prompts)
    stops = set(stop_ids)
    settings = _settings(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        eos_token_id=sorted(stops) or None,
        pad_token_id=pad_id,
        use_cache=True,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
    )
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        evaluation_mode(model),
        _own_settings(causal),
    ):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            length = len(prompts[batch[0]])
            input_ids = torch.full((len(batch), length), pad_id, dtype=torch.long)
            attention_mask = torch.zeros_like(input_ids)
            for row, i in enumerate(batch):
                ids = torch.as_tensor(prompts[i], dtype=torch.long)
                input_ids[row, length - len(ids) :] = ids
                attention_mask[row, length - len(ids) :] = 1
            produced = causal.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=settings,
                synced_gpus=False,  # of a sharded student, `in_step` sees to that
            )
            for i, new in zip(batch, produced[:, length:].tolist(), strict=True):
                end = next((k for k, token in enumerate(new) if token in stops), None)
                out[i] = (new if end is None else new[:end], end is not None)
            if progress is not None:
                progress(start + len(batch), len(order))
    return out


def _settings(**values: Any) -> Any:
    make: Any = _GenerationConfig
    return make(**values)


@contextmanager
def _own_settings(causal: Any) -> Iterator[None]:
    # transformers fills what a call leaves open from the model's generation_config: a repetition
    # penalty in there would make "greedy" something else.
    own = causal.generation_config
    causal.generation_config = _settings()
    try:
        yield
    finally:
        causal.generation_config = own
