"""`compact-fast report`: the page and the pictures of a run."""

from __future__ import annotations

from pathlib import Path

from compact_fast.cli.arguments import Arguments, Option
from compact_fast.cli.verb import Verb


def run(arguments: Arguments) -> int:
    from compact_fast.report import write_comparison, write_report

    runs = [Path(p) for p in arguments.positionals]
    for folder in runs:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder; give the output_dir of a run")
    if len(runs) == 1:
        if arguments.option("output"):
            raise ValueError("--output: only for several runs; one run's report lies in its folder")
        print(f"Wrote {write_report(runs[0])}")
    else:
        out = Path(arguments.option("output") or "comparison")
        print(f"Wrote {write_comparison(runs, out)}")
    return 0


VERB = Verb(
    name="report",
    summary="Write the HTML page and the pictures of a run, or compare several runs.",
    details="RUN is the output_dir of a run; its page is RUN/report/index.html.",
    run=run,
    names=("RUN", "RUN..."),
    required=1,
    options=(
        Option("output", "Folder of the comparison. Default: comparison.", "FOLDER", short="o"),
    ),
)
