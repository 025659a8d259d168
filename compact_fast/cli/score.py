"""`compact-fast score`: every rationale's scores and weight for a student as it is."""

from __future__ import annotations

import time
from pathlib import Path

from compact_fast.cli.arguments import Arguments, Option
from compact_fast.cli.train import hear, read, say
from compact_fast.cli.verb import CONFIG, Verb
from compact_fast.flat_yaml import Setting
from compact_fast.run_config import load
from compact_fast.tables import duration, indent, number, percent, table


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
    from compact_fast.scoring import score_rows, write_scores

    say(f"Method     {method_line(config)}")
    student = on_device(inputs.student)
    started = time.monotonic()
    scored = score_rows(
        student.model,
        student.tokenizer,
        inputs.train.rows,
        teachers=inputs.corpus.teachers,
        thinking_ids=inputs.train.thinking_ids,
        config=config.method,
        backend=config.training.backend,
        share_prompts=config.training.share_prompts,
        progress=hear("scoring questions"),
    )
    info = {"student": str(config.run.student), "data": str(config.run.data)}
    summary = write_scores(target, scored, info=info)
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
    speed = inputs.train.report["tokens"] / max(spent, 1e-9)
    say("\n" + indent(table(headers, rows)))
    say(f"\nWrote {target}: {duration(spent)}, {speed:,.0f} tokens/s")
    return 0


VERB = Verb(
    name="score",
    summary="Score and weigh every rationale for a student as it is, without training.",
    details=(
        "DATA is a file, a dataset id, or arithmetic. The parquet file has one row a rationale: "
        "id, teacher, mi, consensus, nll (nats a token), weight, filtered, nonfinite, correct, "
        "tokens. Weights are those of the first training step."
    ),
    run=run,
    names=("DATA",),
    required=1,
    options=(Option("output", "The parquet file to write.", "FILE", short="o"), CONFIG),
    groups=("run", "data", "world", "method", "training"),
)
