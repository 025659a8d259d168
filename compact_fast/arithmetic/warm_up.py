"""Make the shipped student: `python -m compact_fast.arithmetic.warm_up [FOLDER]`.

It learns single operations and whole problems, in every style, from clean texts, but with one word
only for a gain and one for a loss. What all the other words of the world mean is left for the
teachers to teach. On one machine the same command gives the same bits.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from compact_fast.arithmetic.steps import OPERATORS, apply, compute, reorder
from compact_fast.arithmetic.student import CHECKPOINT, make_config, make_tokenizer
from compact_fast.arithmetic.styles import STYLES
from compact_fast.arithmetic.world import WorldOptions, generator, make_problem

STEPS = 3000
ROWS = {1: 24, 2: 20, 3: 16, 4: 13, 5: 11}  # texts in a batch, by its problems' number of steps
SIZE_WEIGHTS = (3, 4, 4, 3, 2)  # how often a batch has problems of 1, 2, ... 5 steps
FACT_SHARE = 0.2  # of the texts in a batch
FACTS_PER_TEXT = 8
LEARNING_RATE = 3e-3
SEED = 20
KNOWN_WORDS = WorldOptions(new_word_share=0)
IGNORE = -100

Example = tuple[list[int], list[int]]  # token ids, labels


def facts(rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> Example:
    """Equations one behind another; only their results are learnt."""
    texts: list[str] = []
    while len(texts) < FACTS_PER_TEXT:
        operator = rng.choice(OPERATORS)
        left = rng.randint(0, 60)
        right = rng.randint(2, 3) if operator in "*/" else rng.randint(1, rng.choice((9, 50)))
        result = apply(operator, left, right)
        if result is not None:
            texts.append(f"{left} {operator} {right} = {result}.")
    ids = tokenizer.encode(f"<assistant>{' '.join(texts)}", add_special_tokens=False)
    equals = tokenizer.convert_tokens_to_ids("=")
    labels = [
        now if before == equals else IGNORE
        for before, now in zip([-1, *ids[:-1]], ids, strict=True)
    ]
    return ids, labels


def worked_problem(rng: random.Random, tokenizer: PreTrainedTokenizerFast, size: int) -> Example:
    """A problem of `size` steps in known words, with a right rationale in a random style."""
    problem = make_problem(rng, replace(KNOWN_WORDS, min_steps=size, max_steps=size))
    steps = reorder(problem.steps) if rng.random() < 0.5 else problem.steps
    solution = compute(steps)
    assert solution is not None
    rationale = STYLES[rng.choice(list(STYLES))](solution)
    prompt = tokenizer.encode(f"<user>{problem.question}<assistant>", add_special_tokens=False)
    completion = tokenizer.encode(f"{rationale}<end>", add_special_tokens=False)
    return prompt + completion, [IGNORE] * len(prompt) + completion


def batch(step: int, tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Token ids and labels [rows, L], padded on the right. All problems of a batch have one size,
    so that little of it is padding."""
    rng = generator(SEED, "batch", step)
    size = rng.choices(list(ROWS), SIZE_WEIGHTS)[0]
    number = round(FACT_SHARE * ROWS[size])
    rows = [facts(rng, tokenizer) for _ in range(number)]
    rows += [worked_problem(rng, tokenizer, size) for _ in range(ROWS[size] - number)]
    length = max(len(ids) for ids, _ in rows)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([i + [pad] * (length - len(i)) for i, _ in rows])
    labels = torch.tensor([y + [IGNORE] * (length - len(y)) for _, y in rows])
    return ids, labels


def warm_up(
    steps: int = STEPS, *, report: Callable[[int, float, LlamaForCausalLM], None] | None = None
) -> LlamaForCausalLM:
    """Train a fresh student; changes torch's global seed.

    `report(step, loss, model)` is called every 100 steps.
    """
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(make_config())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    for step in range(steps):
        ids, labels = batch(step, tokenizer)
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        kept = labels[:, 1:] != IGNORE
        loss = F.cross_entropy(model.lm_head(hidden[kept]), labels[:, 1:][kept])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if report is not None and (step + 1) % 100 == 0:
            report(step + 1, loss.item(), model)
    return model


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """A folder that any loader of pretrained models reads; weights in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save_pretrained(folder)
    config = make_config()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    weights = {n: t.detach().to(torch.float16) for n, t in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the built-in world's student.")
    parser.add_argument("folder", nargs="?", type=Path, default=CHECKPOINT)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default {STEPS}")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums, and so every bit, depends on it
    torch.use_deterministic_algorithms(True)
    start = time.perf_counter()

    def report(step: int, loss: float, _: LlamaForCausalLM) -> None:
        seconds = time.perf_counter() - start
        print(f"step {step}/{options.steps}  loss {loss:.4f}  {seconds:.0f} s", flush=True)

    model = warm_up(options.steps, report=report)
    save(model, options.folder)
    size = (options.folder / "model.safetensors").stat().st_size
    print(f"{options.folder}: {model.num_parameters():,} parameters, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
