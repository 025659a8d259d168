"""`compact-fast eval`: what a student knows, by generation, by likelihood, and on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compact_fast.cli.arguments import Arguments, Option
from compact_fast.cli.train import hear, say
from compact_fast.cli.verb import CONFIG, Verb
from compact_fast.flat_yaml import Setting
from compact_fast.run_config import RunConfig, load


def run(arguments: Arguments) -> int:
    overrides = list(arguments.overrides)
    if text := arguments.option("forget"):
        overrides.append(("forget_text", Setting(text, "--forget")))
    config = load(arguments.option("config"), overrides)
    config.require("student")
    config = _on_eval_keys(config)
    target = arguments.option("output")
    if target is not None and Path(target).is_dir():
        raise ValueError(f"--output: {target} is a folder; name a file")
    from compact_fast.atomic import atomic_write_text
    from compact_fast.data import teachers_of, tokenize_questions
    from compact_fast.evaluate import read_text
    from compact_fast.pipeline.corpus import evaluation_questions, refuse_absent
    from compact_fast.pipeline.inputs import on_device, student_of, tokenize_options
    from compact_fast.pipeline.training import evaluate_student

    refuse_absent(config)
    found = evaluation_questions(config)
    if found is None and config.evaluation.forget_text is None:
        raise ValueError("nothing to evaluate on: give --data FILE, or --forget TEXT")
    if found:
        say(f"Questions  {len(found[0]):,} of {found[1]}")
    text = read_text(config.evaluation.forget_text) if config.evaluation.forget_text else None
    student = on_device(student_of(config, training=False))
    say(f"Student    {student.description}")
    questions = found[0] if found else None
    answered = [q for q in questions or [] if q.rationales]
    rows = None
    if answered:
        rows = tokenize_questions(
            answered,
            student.tokenizer,
            teachers=teachers_of(answered),
            options=tokenize_options(config),
        ).rows
    result = evaluate_student(
        config,
        student.model,
        student.tokenizer,
        questions=questions,
        text=text,
        rows=rows,
        teachers=teachers_of(answered),
        hear=hear,
    )
    say("\n" + result.table())
    if target is not None:
        atomic_write_text(target, result.to_json())
        say(f"\nWrote {target}")
    return 0


def _on_eval_keys(config: RunConfig) -> RunConfig:
    """`data` and `limit` name what is measured on, unless eval_data and eval_questions do.

    A limit in a file is that of the training data, and counts only where those are measured on.
    """
    e, limit = config.evaluation, config.settings.get("limit")
    flag = limit is not None and limit.place.startswith("--")
    questions = config.settings.get("eval_questions")
    if flag and questions is not None and questions.place.startswith("--"):
        raise ValueError(
            f"--limit={config.data.limit} and --eval-questions={e.eval_questions}: give one of "
            "the two"
        )
    on_data = e.eval_data is None and config.run.data is not None
    changes: dict[str, Any] = {}
    if on_data:
        changes["eval_data"] = config.run.data
    if flag or (on_data and questions is None):
        changes["eval_questions"] = config.data.limit
    return config.replace(**changes) if changes else config


VERB = Verb(
    name="eval",
    summary="Measure a student: accuracy, option likelihood, rationale NLL, perplexity of a text.",
    details=(
        "--data names the questions (a file, a dataset id, or arithmetic), --limit how many of "
        "them; where they come with rationales, the student's loss on those is measured too."
    ),
    run=run,
    options=(
        Option("forget", "A text file; its perplexity is measured.", "TEXT"),
        Option("output", "Also write the figures as JSON.", "FILE", short="o"),
        CONFIG,
    ),
    groups=("evaluation",),
    keys=(
        *("student", "student_dtype", "data", "split", "limit", "on_error", "max_length"),
        *("truncation", "system_prompt", "system_role"),
        *("world_seed", "world_scenario", "world_shuffle_styles", "seed", "backend"),
    ),
)
