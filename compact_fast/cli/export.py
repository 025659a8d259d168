"""`compact-fast export`: a run's student as a model folder that other software loads."""

from __future__ import annotations

from compact_fast.cli.arguments import Arguments, Option
from compact_fast.cli.train import say
from compact_fast.cli.verb import Verb
from compact_fast.tables import size


def run(arguments: Arguments) -> int:
    target = arguments.option("output")
    if target is None:
        raise ValueError("--output: missing; name the folder to write, -o DIR")
    merge, alone = arguments.switch("merge"), arguments.switch("adapter-only")
    if merge == alone:
        what = "exclude each other" if merge else "one of them must be given"
        raise ValueError(f"--merge and --adapter-only: {what}")
    dtype = arguments.option("dtype")
    if alone and dtype is not None:
        raise ValueError("--dtype: an adapter is copied as it is; leave it out with --adapter-only")
    if dtype not in (None, "fp32", "bf16"):
        raise ValueError(f"--dtype: {dtype!r}: expected fp32 or bf16")
    from compact_fast.pipeline.export import export_adapter, export_merged, find_model

    source = find_model(arguments.positionals[0])
    say(f"Student    {source}")
    if alone:
        done = export_adapter(source, target)
    else:
        done = export_merged(source, target, dtype=dtype)
        say(f"Compared   loaded again, its logits differ by {done.difference:.1e} of the largest")
    say(f"Wrote      {done.folder}: {done.what}, {size(done.bytes)}")
    return 0


VERB = Verb(
    name="export",
    summary="Write a run's student as a model folder: adapter merged into its base, or alone.",
    details=(
        "RUN is a run's folder (its trained model, or the newest good checkpoint of one that was "
        "not finished), or a model's folder. A merged model is loaded again and its logits are "
        "compared with the trained student's; the folder appears only when they agree."
    ),
    run=run,
    names=("RUN",),
    required=1,
    options=(
        Option("output", "The folder to write; it must not exist.", "DIR", short="o"),
        Option("merge", "Merge the adapter; a fully trained student is written as it is."),
        Option("adapter-only", "The adapter and the tokenizer; the base is found by its name."),
        Option("dtype", "fp32 or bf16. Default: as stored; fp32 for a sum.", "DTYPE"),
    ),
)
