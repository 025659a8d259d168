"""`compact-fast eval`: what a student knows, by generation, by likelihood, and on a text."""

from __future__ import annotations

from pathlib import Path

from compact_fast.cli.arguments import Arguments, Option
from compact_fast.cli.train import hear, say
from compact_fast.cli.verb import CONFIG, Verb
from compact_fast.flat_yaml import Setting
from compact_fast.run_config import load


def run(arguments: Arguments) -> int:
    overrides = list(arguments.overrides)
    if text := arguments.option("forget"):
        overrides.append(("forget_text", Setting(text, "--forget")))
    config = load(arguments.option("config"), overrides)
    config.require("student")
    if config.run.data is not None and config.evaluation.eval_data is None:
        config = config.replace(eval_data=config.run.data)
    target = arguments.option("output")
    if target is not None and Path(target).is_dir():
        raise ValueError(f"--output: {target} is a folder; name a file")
    from compact_fast.atomic import atomic_write_text
    from compact_fast.data import teachers_of, tokenize_questions
    from compact_fast.evaluate import read_text
    from compact_fast.pipeline.corpus import evaluation_questions
    from compact_fast.pipeline.inputs import on_device, student_of, tokenize_options
    from compact_fast.pipeline.training import evaluate_student

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


VERB = Verb(
    name="eval",
    summary="Measure a student: accuracy, option likelihood, rationale NLL, perplexity of a text.",
    details=(
        "--data names the questions (a file, a dataset id, or arithmetic); where they come with "
        "rationales, the student's loss on those is measured too."
    ),
    run=run,
    options=(
        Option("forget", "A text file; its perplexity is measured.", "TEXT"),
        Option("output", "Also write the figures as JSON.", "FILE", short="o"),
        CONFIG,
    ),
    groups=("run", "data", "world", "evaluation"),
)
