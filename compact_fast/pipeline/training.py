"""One run: train, evaluate before and after, keep the model, write the report."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import set_seed

from compact_fast.atomic import atomic_directory, atomic_write_text
from compact_fast.data.records import Question
from compact_fast.evaluate import (
    EvaluationOptions,
    EvaluationResult,
    PromptBuilder,
    evaluate,
    measures,
    read_text,
)
from compact_fast.evaluate.results import format_value
from compact_fast.pipeline.corpus import evaluation_questions
from compact_fast.pipeline.forecast import forecast
from compact_fast.pipeline.inputs import Inputs, Say, tokenize_options
from compact_fast.pipeline.run_folder import begin, read_json
from compact_fast.report.read import read_run
from compact_fast.run_config import RunConfig
from compact_fast.students import causal_model
from compact_fast.tables import counted, number, percent, table
from compact_fast.trainer import CompactTrainer, CompactTrainingArguments
from compact_fast.trainer.sharding import gather, in_step

Hear = Callable[[str], Callable[[int, int], None]]


@dataclass(frozen=True)
class Outcome:
    """What one run came to."""

    folder: Path
    steps: int
    """Optimizer steps in all."""

    resumed_at: int
    """How many of them an earlier session had made."""

    seconds: float
    """Spent on the others."""

    before: dict[str, Any] | None
    after: dict[str, Any] | None


def training_arguments(
    config: RunConfig,
    *,
    teachers: list[str],
    thinking_ids: list[int],
    fusion: str | None = None,
) -> CompactTrainingArguments:
    """The trainer's arguments for a configuration; `fusion`: what fusion="auto" came to."""
    t = config.training
    values = dict(
        output_dir=config.run.output_dir,
        compact=config.method,
        teachers=teachers,
        thinking_ids=thinking_ids,
        backend=t.backend,
        share_prompts=t.share_prompts,
        fusion=fusion or ("packed" if t.fusion == "auto" else t.fusion),
        sharding=t.sharding,
        progress=t.progress,
        per_device_train_batch_size=t.questions_per_step,
        max_tokens_per_step=t.max_tokens_per_step,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        learning_rate=t.learning_rate,
        lr_scheduler_type=t.lr_scheduler_type,
        num_train_epochs=t.num_train_epochs,
        max_steps=t.max_steps,
        max_grad_norm=t.max_grad_norm,
        bf16=None if t.bf16 == "auto" else t.bf16,
        gradient_checkpointing=t.gradient_checkpointing,
        compile_body=t.compile_body,
        seed=config.method.seed,
        logging_steps=t.logging_steps,
        eval_strategy="no" if t.eval_steps is None else "steps",
        eval_steps=t.eval_steps,
        save_strategy="steps",
        save_steps=t.save_steps,
        save_total_limit=t.save_total_limit,
        report_to=t.report_to,
        **config.extra,
    )
    try:
        return CompactTrainingArguments(**values)
    except ValueError as error:
        # transformers names the value and what is allowed, but not the key
        for key, setting in config.settings.items():
            if str(error).startswith(f"{setting.value} is not"):
                raise setting.error(key, str(error)) from error
        raise


def make_trainer(inputs: Inputs) -> CompactTrainer:
    """A trainer on these inputs; writes nothing yet."""
    config = inputs.config
    fusion = choose_fusion(inputs)
    args = training_arguments(
        config,
        teachers=inputs.corpus.teachers,
        thinking_ids=inputs.train.thinking_ids,
        fusion=fusion,
    )
    held_out = inputs.held_out.rows if inputs.held_out else None
    if config.training.eval_steps is not None and held_out is None:
        raise ValueError("eval_steps: nothing is held out to evaluate on; set holdout")
    try:
        return CompactTrainer(
            inputs.student.model,
            args,
            inputs.train.rows,
            eval_dataset=held_out,
            processing_class=inputs.student.tokenizer,
            run_info={
                "config": config.flat(),
                "consensus_backend": inputs.agreement.backend,
                "fusion": fusion,
            },
        )
    except (RuntimeError, ImportError) as error:
        if "installed" not in str(error):
            raise
        # an experiment tracker, or an optimizer, that is a package of its own
        raise ValueError(str(error)) from error


def choose_fusion(inputs: Inputs) -> str:
    """What fusion="auto" comes to: as an earlier start of this run had it, else by the forecast."""
    config = inputs.config
    if config.training.fusion != "auto":
        return config.training.fusion
    if config.training.sharding == "fsdp":
        return "packed"
    earlier = read_json(Path(config.run.output_dir) / "run.json") or {}
    if earlier.get("fusion") in ("packed", "per_teacher") and not config.run.overwrite:
        return str(earlier["fusion"])
    return forecast(config, inputs.student.model, inputs.train.rows).fusion


def train(inputs: Inputs, say: Say, hear: Hear, *, resume: str | None) -> Outcome:
    """Train to the end, with evaluations around it where there is something to evaluate on.

    `hear(name)` gives a progress callback. Raises what the trainer raises: NonFiniteError,
    TrainingInterrupted, DiskFullError.
    """
    config = inputs.config
    folder = Path(config.run.output_dir)
    if os.environ.get("RANK", "0") == "0":
        begin(config)
        atomic_write_text(folder / "agreement.json", json.dumps(inputs.teachers, indent=1) + "\n")
    trainer = make_trainer(inputs)
    main = trainer.is_world_process_zero()
    if main:
        say(f"Reading    {trainer.reading['text']}")
    measure = Measurement(inputs, hear) if main else None
    if measure:
        say(f"Evaluate   {measure.description}")
    with in_step(trainer.model):  # a sharded student is read by all processes together
        before = measure.before(folder) if measure else None
    if before:
        say("Before     " + headline(before))
    set_seed(config.method.seed)  # evaluation must not move the random numbers of training
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=resume)
    seconds = time.monotonic() - started
    whole = gather(trainer.model)
    if main:
        save_model(folder / "model", inputs, whole.weights if whole else None)
    with in_step(trainer.model):
        after = measure.after(folder) if measure else None
    return Outcome(
        folder, trainer.state.global_step, trainer.files.first_step, seconds, before, after
    )


def save_model(path: Path, inputs: Inputs, weights: Mapping[str, Any] | None) -> None:
    """The trained student and its tokenizer, whole or not at all; `weights`: of a sharded one."""
    with atomic_directory(path) as folder:
        inputs.student.model.save_pretrained(folder, state_dict=weights)
        inputs.student.tokenizer.save_pretrained(folder)


def check_trainable(inputs: Inputs) -> None:
    """Raise what making the trainer would raise, without touching the output folder.

    In one process, as what is sharded over several is looked at in one.
    """
    with tempfile.TemporaryDirectory() as scratch:
        config = inputs.config.replace(output_dir=scratch, sharding="none")
        make_trainer(replace(inputs, config=config))


class Measurement:
    """The evaluation of one run, done the same way before and after."""

    def __init__(self, inputs: Inputs, hear: Hear) -> None:
        self.inputs, self.hear = inputs, hear
        found = evaluation_questions(inputs.config)
        self.questions = found[0] if found else None
        text = inputs.config.evaluation.forget_text
        self.text = read_text(text) if text else None
        parts = [f"{counted(len(found[0]), 'question')} of {found[1]}"] if found else []
        if inputs.held_out:
            parts.append(f"rationales of {counted(len(inputs.held_out), 'held-out question')}")
        if text:
            parts.append(f"perplexity of {text}")
        self.description = ", ".join(parts) or "nothing"

    @property
    def wanted(self) -> bool:
        return any(x is not None for x in (self.questions, self.text, self.inputs.held_out))

    def before(self, folder: Path) -> dict[str, Any] | None:
        """Measured now, or by an interrupted run of this folder before its first step."""
        kept = read_json(folder / "evaluation.json") or {}
        if kept.get("before") and kept.get("asked") == self._asked():
            before: dict[str, Any] = kept["before"]
            return before
        return self._measure(folder, "before", {"asked": self._asked()})

    def after(self, folder: Path) -> dict[str, Any] | None:
        return self._measure(folder, "after", read_json(folder / "evaluation.json") or {})

    def _asked(self) -> dict[str, Any]:
        flat = self.inputs.config.flat()
        keys = ("eval_data", "eval_questions", "world_seed", "max_new_tokens")
        more = ("generate", "samples", "likelihood", "forget_text", "holdout", "limit")
        return {k: flat[k] for k in (*keys, *more)}

    def _measure(self, folder: Path, when: str, record: Mapping[str, Any]) -> dict[str, Any] | None:
        if not self.wanted:
            return None
        found = self.run(f"{when}: ").to_dict()
        text = json.dumps({**record, when: found}, indent=1, allow_nan=False)
        atomic_write_text(folder / "evaluation.json", text + "\n")
        return found

    def run(self, prefix: str = "") -> EvaluationResult:
        i = self.inputs
        return evaluate_student(
            i.config,
            i.student.model,
            i.student.tokenizer,
            questions=self.questions,
            text=self.text,
            rows=i.held_out.rows if i.held_out else None,
            teachers=i.corpus.teachers,
            hear=lambda name: self.hear(prefix + name),
        )


def evaluate_student(
    config: RunConfig,
    model: Any,
    tokenizer: Any,
    *,
    questions: list[Question] | None = None,
    text: str | None = None,
    rows: Any = None,
    teachers: list[str] | None = None,
    hear: Hear,
) -> EvaluationResult:
    """Everything the configuration's evaluation keys ask for, on what is given."""
    e = config.evaluation
    longest = getattr(causal_model(model).config.get_text_config(), "max_position_embeddings", None)
    window = min(EvaluationOptions.window, longest or EvaluationOptions.window)
    options = EvaluationOptions(
        window=window,
        stride=window // 2,
        generate=e.generate,
        samples=e.samples,
        likelihood=e.likelihood,
        max_new_tokens=e.max_new_tokens,
        batch_size=e.eval_batch_size,
        seed=config.method.seed,
        backend=config.training.backend,
    )
    return evaluate(
        model,
        tokenizer,
        questions=questions,
        prompts=PromptBuilder(tokenizer, tokenize_options(config)) if questions else None,
        rows=rows,
        teachers=teachers or [],
        text=text,
        options=options,
        progress=hear,
    )


def headline(result: Mapping[str, Any]) -> str:
    """The main figures of an evaluation on one line."""
    wanted = ("exact_match", "exact_match_sampled", "options/letter/sum", "rationale_nll")
    lines = {m.key: m for m in measures(result)}
    parts = []
    for key in (*wanted, "perplexity"):
        if (m := lines.get(key)) is not None:
            parts.append(f"{m.label} {format_value(m.kind, m.value)}")
    return ", ".join(parts)


def before_after_text(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """One line a measure, before and after training, with the interval or standard error after."""
    old = {m.key: m for m in measures(before)}
    rows = []
    for m in measures(after):
        was = old.get(m.key)
        error = ""
        if m.interval is not None:
            error = f"{100 * m.interval[0]:.1f} to {100 * m.interval[1]:.1f} %"
        elif m.standard_error is not None:
            error = f"s.e. {m.standard_error:.4f}"
        earlier = "-" if was is None else format_value(was.kind, was.value)
        rows.append([m.label, earlier, format_value(m.kind, m.value), error])
    return table(["measure", "before", "after", "uncertainty (95 %)"], rows)


def weights_text(folder: Path) -> str:
    """One line a teacher: what it weighed at first and at last, and its figures over the run."""
    run = read_run(folder)
    rows = []
    for name in run.teachers:
        weights = run.series(f"teacher/{name}/weight")[1]
        if not weights:
            continue
        part = max(len(weights) // 5, 1)
        row = [name, number(_mean(weights[:part])), number(_mean(weights[-part:]))]
        for measure, digits in (("nll", 3), ("mi", 2), ("consensus", 2)):
            row.append(number(_mean(run.series(f"teacher/{name}/{measure}")[1]), digits))
        row.append(percent(_mean(run.series(f"teacher/{name}/filtered")[1])))
        rows.append(row)
    headers = ["teacher", "weight, first fifth", "last fifth", "NLL", "MI", "consensus", "filtered"]
    return table(headers, rows) if rows else ""


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
