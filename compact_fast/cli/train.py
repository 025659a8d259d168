"""`compact-fast train`: from a configuration to a trained, evaluated student and its report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from compact_fast.cli.arguments import Arguments
from compact_fast.cli.verb import Verb
from compact_fast.run_config import GROUPS, RunConfig, load
from compact_fast.tables import ProgressLine, counted, duration, indent

if TYPE_CHECKING:
    from compact_fast.pipeline.inputs import Inputs
    from compact_fast.pipeline.training import Outcome


def run(arguments: Arguments) -> int:
    _run(arguments)
    from compact_fast.trainer.launcher import leave

    leave()
    return 0


def _run(arguments: Arguments) -> None:
    path = arguments.positionals[0] if arguments.positionals else None
    config = load(path, arguments.overrides)
    config.require("student", "data")
    from compact_fast.pipeline import run_folder
    from compact_fast.trainer.launcher import ALONE, launched_sharding, processes

    if launched_sharding():
        config = config.replace(sharding="fsdp")
    if config.training.sharding == "fsdp" and processes() == 1:
        raise ValueError(ALONE)
    if config.run.compare:
        _compare(config)
        return
    if run_folder.is_finished(config):
        say(
            f"{config.run.output_dir} holds this very run, finished. Its report: compact-fast "
            f"report {config.run.output_dir}; to train it again: --overwrite"
        )
        return
    resume = run_folder.resume_point(config)
    inputs = read(config, quarantine=Path(config.run.output_dir) / "quarantine.jsonl")
    _introduce(inputs)
    _finish(_train(inputs, resume))


def say(line: str) -> None:
    """Print on the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def hear(name: str) -> ProgressLine:
    return ProgressLine(name)


def read(
    config: RunConfig, *, quarantine: Path | None = None, write: bool = True, training: bool = True
) -> Inputs:
    """Look for what is named and absent, then read the data, so that what is wrong with it shows
    at once, then all the rest."""
    from compact_fast.pipeline.corpus import cache_folder, read_corpus, refuse_absent

    refuse_absent(config)
    kept = cache_folder(config) / "questions" if write else None
    corpus = read_corpus(config, quarantine=quarantine, cache_dir=kept)
    held = f", {len(corpus.held_out):,} held out" if corpus.held_out else ""
    say(f"Data       {corpus.source}: {counted(len(corpus.train), 'question')}{held}")
    if corpus.quarantined:
        where = f" (see {quarantine})" if quarantine else ""
        say(f"           {counted(corpus.quarantined, 'broken record')} left out{where}")
    from compact_fast.pipeline.inputs import prepare

    return prepare(config, corpus, say, write=write, training=training)


def _introduce(inputs: Inputs) -> None:
    from compact_fast.pipeline.forecast import (
        backend_choice,
        budgeted,
        count_steps,
        trainable_rows,
    )
    from compact_fast.pipeline.inputs import method_line, teachers_text
    from compact_fast.trainer.batching import question_lengths

    config = inputs.config
    choice = backend_choice(config, inputs.student.model)
    t = config.training
    rows = trainable_rows(config, inputs.train.rows)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    passes = None
    if t.max_tokens_per_step is not None:
        passes = budgeted(config, inputs.student.model, question_lengths(rows))
    steps, epochs = count_steps(config, len(rows), processes, passes)
    per_step = counted(t.questions_per_step * t.gradient_accumulation_steps * processes, "question")
    if t.max_tokens_per_step is not None:
        most = t.max_tokens_per_step * t.gradient_accumulation_steps * processes
        per_step = f"at most {counted(most, 'token')}"
    say(f"Method     {method_line(config)}")
    say(f"Backend    {choice.backend.name} ({choice.reason})")
    say(f"Steps      {steps:,} of {per_step}, {epochs:.3g} {'epoch' if epochs == 1 else 'epochs'}")
    say("")
    say(indent(teachers_text(inputs)))
    say("")


def _train(inputs: Inputs, resume: str | None) -> Outcome:
    from compact_fast.pipeline.training import train

    return train(inputs, say, hear, resume=resume)


def _finish(outcome: Outcome) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    from compact_fast.pipeline.training import before_after_text, weights_text
    from compact_fast.report import write_report

    say(f"Trained    {_trained(outcome)}")
    say("")
    if weights := weights_text(outcome.folder):
        say(indent(weights) + "\n")
    if outcome.before and outcome.after:
        say(indent(before_after_text(outcome.before, outcome.after)) + "\n")
    page = write_report(outcome.folder)
    say(f"Model      {outcome.folder / 'model'}")
    say(f"Report     {page}")


def _trained(outcome: Outcome) -> str:
    """Steps and time of this session alone, and where it began."""
    made = outcome.steps - outcome.resumed_at
    if not made:
        return f"nothing: all {counted(outcome.steps, 'step')} had been made before"
    speed = f"{outcome.seconds / made:.2f} s a step"
    words = f"{counted(made, 'step')} in {duration(outcome.seconds)}, {speed}"
    if outcome.resumed_at:
        words += f"; resumed at step {outcome.resumed_at:,}, now at {outcome.steps:,}"
    return words


def _compare(config: RunConfig) -> None:
    from compact_fast.pipeline import run_folder
    from compact_fast.pipeline.comparison import (
        comparison_table,
        hand_over_before,
        inputs_of,
        variants,
    )
    from compact_fast.report import write_comparison

    inputs = read(config, quarantine=Path(config.run.output_dir) / "quarantine.jsonl")
    _introduce(inputs)
    runs = variants(inputs)
    folders = {v.label: Path(v.config.run.output_dir) for v in runs}
    first = folders[runs[0].label]
    for number, variant in enumerate(runs, 1):
        say(f"---- {number} of {len(runs)}: {variant.label}, into {folders[variant.label]}")
        if run_folder.is_finished(variant.config):
            say("finished earlier\n")
            continue
        resume = run_folder.resume_point(variant.config)
        hand_over_before(first, folders[variant.label])
        _finish(_train(inputs_of(inputs, variant), resume))
        say("")
    if os.environ.get("RANK", "0") == "0":
        say(indent(comparison_table(folders)) + "\n")
        target = Path(config.run.output_dir) / "report"
        page = write_comparison(list(folders.values()), target, names=list(folders))
        say(f"Report     {page}")


VERB = Verb(
    name="train",
    summary="Train a student on several teachers' rationales, evaluate it, and write a report.",
    details=(
        "CONFIG is a YAML file of keys; without it the flags alone must name student and data. An "
        "interrupted run goes on where it was when the same command is given again."
    ),
    run=run,
    names=("CONFIG",),
    groups=tuple(GROUPS),
)
