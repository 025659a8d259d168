"""`compact-fast check`: what `train` would do, without doing it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compact_fast.cli.arguments import Arguments
from compact_fast.cli.train import hear, read, say
from compact_fast.cli.verb import Verb
from compact_fast.run_config import GROUPS, load
from compact_fast.tables import indent, size, table

if TYPE_CHECKING:
    from compact_fast.pipeline.forecast import Forecast


def run(arguments: Arguments) -> int:
    path = arguments.positionals[0] if arguments.positionals else None
    config = load(path, arguments.overrides)
    config.require("student", "data")
    from compact_fast.pipeline import run_folder

    run_folder.resume_point(config)
    inputs = read(config, write=False)
    from compact_fast.pipeline.forecast import backend_choice, forecast
    from compact_fast.pipeline.inputs import method_line, teachers_text
    from compact_fast.pipeline.training import Measurement, check_trainable

    check_trainable(inputs)
    choice = backend_choice(config, inputs.student.model)
    say(f"Method     {method_line(config)}")
    say(f"Backend    {choice.backend.name} ({choice.reason})")
    say(f"Evaluate   {Measurement(inputs, hear).description}")
    say(f"Output     {config.run.output_dir}")
    if config.run.compare:
        say(f"Compare    the same run again, weighted by {', '.join(config.run.compare)}")
    say("\n" + indent(teachers_text(inputs)) + "\n")
    f = forecast(config, inputs.student.model, inputs.train.rows)
    say("Forecast (nothing was trained or written)")
    rows = [
        ["optimizer steps", f"{f.steps:,}"],
        ["questions a step", f"{f.questions_per_update:,}"],
        ["epochs", f"{f.epochs:.3g}"],
        ["tokens read", f"{f.tokens:,}"],
    ]
    say(indent(table(rows[0], rows[1:])))
    say("\n" + indent(_memory_text(f)))
    return 0


def _memory_text(f: Forecast) -> str:
    """Both ways of fusing teachers side by side, the one that would run marked."""
    ways = {"packed": f.packed, "per_teacher": f.per_teacher}
    head = ["memory, about", *(f"{name} *" if name == f.fusion else name for name in ways)]
    lines = [
        ("weights", "weights"),
        ("gradients", "gradients"),
        ("optimizer", "optimizer"),
        ("activations of the largest pass", "activations"),
        ("loss", "loss"),
        ("Python and libraries", "process"),
        ("at the peak", "peak_bytes"),
    ]
    rows = [[label, *(size(getattr(m, name)) for m in ways.values())] for label, name in lines]
    why = (
        f"* would run; the device has {size(f.available)} (fusion: packed or per_teacher to choose)"
    )
    if f.chosen.peak_bytes > f.available:
        why += (
            "\nwarning: more than the device has; lower questions_per_step or max_length, or set "
        )
        why += "gradient_checkpointing"
    return table(head, rows) + "\n" + why


VERB = Verb(
    name="check",
    summary="Read everything, show what would run (tokens, steps, memory, backend), write nothing.",
    details="CONFIG is a YAML file of keys; without it the flags alone must name student and data.",
    run=run,
    names=("CONFIG",),
    groups=tuple(GROUPS),
)
