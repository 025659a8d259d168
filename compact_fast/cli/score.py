"""`compact-fast score`: every rationale's scores and weight for a student as it is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from compact_fast.cli.arguments import Arguments, Option
from compact_fast.cli.train import read, say
from compact_fast.cli.verb import CONFIG, Verb
from compact_fast.flat_yaml import Setting
from compact_fast.run_config import load
from compact_fast.tables import ProgressLine, duration, indent, number, percent, table

if TYPE_CHECKING:
    from compact_fast.scoring import Done


def run(arguments: Arguments) -> int:
    overrides = [
        *arguments.overrides,
        ("data", Setting(arguments.positionals[0], "DATA")),
        ("holdout", Setting(0.0, "score")),
    ]
    config = load(arguments.option("config"), overrides)
    config.require("student")
    target = arguments.option("output")
    if target is None:
        raise ValueError("--output: missing; name the file to write, such as -o scores.parquet")
    if not target.endswith(".parquet") or Path(target).is_dir():
        raise ValueError(f"--output: {target}: expected a file name that ends in .parquet")
    inputs = read(config, training=False)
    from compact_fast.pipeline.inputs import method_line, on_device
    from compact_fast.scoring import score_file

    say(f"Method     {method_line(config)}")
    student = on_device(inputs.student)
    started = time.monotonic()
    line = _ScoreLine()
    summary = score_file(
        target,
        student.model,
        student.tokenizer,
        inputs.train.rows,
        teachers=inputs.corpus.teachers,
        thinking_ids=inputs.train.thinking_ids,
        config=config.method,
        backend=config.training.backend,
        share_prompts=config.training.share_prompts,
        progress=line,
        info={"student": str(config.run.student), "data": str(config.run.data)},
    )
    line.close()
    spent = time.monotonic() - started
    rows = [
        [
            name,
            f"{one['rationales']:,.0f}",
            number(one.get("weight")),
            number(one.get("mi"), 2),
            number(one.get("consensus"), 2),
            number(one.get("nll")),
            percent(one.get("filtered")),
            percent(one.get("right")),
        ]
        for name, one in summary.items()
    ]
    headers = ["teacher", "rationales", "weight", "MI", "consensus", "NLL", "filtered", "right"]
    say("\n" + indent(table(headers, rows)))
    speed = f", {line.speed:,.0f} tokens/s" if line.speed else ""
    say(f"\nWrote {target}: {duration(spent)}{speed}")
    return 0


class _ScoreLine(ProgressLine):
    """Questions done, tokens a second and time left; now and then a line without a terminal."""

    def __init__(self) -> None:
        super().__init__("scoring")
        self.speed = 0.0

    def __call__(self, done: Done) -> None:  # type: ignore[override]
        self.speed = done.tokens_per_second
        self.show(
            f"scoring: {done.questions:,} of {done.of_questions:,} questions, "
            f"{done.tokens_per_second:,.0f} tokens/s, {duration(done.seconds_left)} left"
        )


VERB = Verb(
    name="score",
    summary="Score and weigh every rationale for a student as it is, without training.",
    details=(
        "DATA is a file, a dataset id, or arithmetic. The parquet file has one row a rationale: "
        "id, teacher, mi, consensus, nll (nats a token), weight, filtered, nonfinite, correct, "
        "tokens. Weights are those of the first training step. Killed, the same command goes on "
        "where it was and ends in the same file."
    ),
    run=run,
    names=("DATA",),
    required=1,
    options=(Option("output", "The parquet file to write.", "FILE", short="o"), CONFIG),
    groups=("world", "method"),
    keys=(
        *("student", "student_dtype", "split", "limit", "teachers", "on_error", "max_length"),
        *("truncation", "system_prompt", "system_role", "cache_dir"),
        *("backend", "share_prompts", "consensus_backend", "consensus_threads"),
    ),
)
