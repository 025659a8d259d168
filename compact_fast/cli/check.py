"""`compact-fast check`: what `train` would do, without doing it."""

from __future__ import annotations

from compact_fast.cli.arguments import Arguments
from compact_fast.cli.train import hear, read, say
from compact_fast.cli.verb import Verb
from compact_fast.run_config import GROUPS, load
from compact_fast.tables import indent, size, table


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
        ["weights", size(f.weight_bytes)],
        ["gradients", size(f.gradient_bytes)],
        ["optimizer", size(f.optimizer_bytes)],
        ["activations of the largest batch", size(f.activation_bytes)],
        ["loss", size(f.loss_bytes)],
        ["Python and libraries", size(f.process_bytes)],
        ["memory at the peak, about", size(f.peak_bytes)],
    ]
    say(indent(table(rows[0], rows[1:])))
    return 0


VERB = Verb(
    name="check",
    summary="Read everything, show what would run (tokens, steps, memory, backend), write nothing.",
    details="CONFIG is a YAML file of keys; without it the flags alone must name student and data.",
    run=run,
    names=("CONFIG",),
    groups=tuple(GROUPS),
)
