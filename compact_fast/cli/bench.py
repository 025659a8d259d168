"""`compact-fast bench`: how quick the loss and the step graphs are on the device at hand."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compact_fast.cli.arguments import Arguments, Option
from compact_fast.cli.train import say
from compact_fast.cli.verb import Verb
from compact_fast.tables import indent, number, table

if TYPE_CHECKING:
    import torch

    from compact_fast.benchmark.loss import Shape

# one chunk of questions and a small student's head on a CPU; what a GPU needs to be busy
CPU_SHAPE = {"rows": 512, "vocab": 49152, "width": 576}
GPU_SHAPE = {"rows": 8192, "vocab": 151936, "width": 1536}


def run(arguments: Arguments) -> int:
    device = _device(arguments.option("device"))
    usual = GPU_SHAPE if device.type == "cuda" else CPU_SHAPE
    sizes = {name: _count(arguments, name, size) for name, size in usual.items()}
    threads, rounds = _count(arguments, "threads", 1), _count(arguments, "rounds", 3)
    target = arguments.option("output")
    if target is not None and not target.endswith(".csv"):
        raise ValueError(f"--output: {target}: expected a file name that ends in .csv")
    from compact_fast.benchmark.graphs import rates
    from compact_fast.benchmark.loss import Shape

    rows = _loss(device, Shape(**sizes), arguments.option("backend") or "auto", rounds)
    say(f"\nStep graphs of the built-in world, {threads} thread{'s' * (threads > 1)}")
    found = rates(threads)
    lines = [[rate.task, f"{rate.per_second:,.0f}", rate.unit] for rate in found]
    say(indent(table(["", "a second", "of"], lines)))
    if target is not None:
        rows += [
            {"task": r.task, "unit": f"{r.unit}/s", "value": r.per_second, "threads": threads}
            for r in found
        ]
        _write(Path(target), rows, device)
        say(f"\nWrote {target}")
    return 0


def _loss(device: torch.device, shape: Shape, backend: str, rounds: int) -> list[dict[str, Any]]:
    import torch

    from compact_fast.backends import RunSpec, choose
    from compact_fast.benchmark.loss import eager, make_problem, own_variants
    from compact_fast.benchmark.timing import measure

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    choice = choose(backend, RunSpec(device, dtype, shape.vocab, shape.width))
    name = str(dtype).removeprefix("torch.")
    say(f"Loss on {_named(device)}, {name}; backend {choice.backend.name} ({choice.reason})")
    rows: list[dict[str, Any]] = []
    for frozen in (False, True):
        problem = make_problem(shape, frozen=frozen, dtype=dtype, device=device)
        variants = own_variants(problem, choice.backend) | {"full logits, autograd": eager(problem)}
        figures = measure(variants, device, clear=problem.clear, rounds=rounds)
        head = "frozen" if frozen else "trained"
        say(f"\n{problem.shape}, {head} head ({'2' if frozen else '3'} products)")
        bare = figures["bare products"].milliseconds
        lines = []
        for task, found in figures.items():
            ratio = found.milliseconds / bare if found.milliseconds and bare else None
            rows.append(
                {
                    "task": task, "shape": str(problem.shape), "head": head, "unit": "ms",
                    "value": found.milliseconds, "times_bare": ratio, "peak_mb": found.peak_mb,
                    "backend": choice.backend.name, "note": found.error or "",
                }
            )  # fmt: skip
            times = [number(v, d) for v, d in ((found.milliseconds, 1), (ratio, 2))]
            lines.append([task, *times, number(found.peak_mb, 0), found.error or ""])
        say(indent(table(["", "ms", "x bare", "peak, MB", ""], lines)))
    return rows


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: {name}: expected cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: {name}: torch sees no CUDA or ROCm device here")
    return device


def _count(arguments: Arguments, name: str, usual: int) -> int:
    text = arguments.option(name)
    if text is None:
        return usual
    if not text.isdigit() or int(text) == 0:
        raise ValueError(f"--{name}: {text}: expected a whole number above 0")
    return int(text)


def _named(device: torch.device) -> str:
    import platform

    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = platform.processor() or platform.machine()
    return f"{device.type} ({cpu}, {torch.get_num_threads()} threads)"


def _write(path: Path, rows: Sequence[Mapping[str, Any]], device: torch.device) -> None:
    import datetime
    import platform

    import torch

    from compact_fast._version import __version__

    where = {
        "device": _named(device),
        "compact_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }
    stamped = [{**row, **where} for row in rows]
    columns = list(dict.fromkeys(name for row in stamped for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(stamped)


VERB = Verb(
    name="bench",
    summary="Measure the loss and the step graphs on this machine; under two minutes.",
    details=(
        "The loss with its gradients, in milliseconds and as a multiple of the bare matrix "
        "products that it cannot do without, beside full logits with autograd; then how many "
        "rationales are read and how many pairs matched a second. Random data: no student is "
        "loaded. The peak is memory beyond the inputs, gradients included."
    ),
    run=run,
    options=(
        Option("device", "cpu, cuda or cuda:N. Default: cuda where there is one.", "NAME"),
        Option("backend", "The loss's backend. Default: auto.", "NAME"),
        Option("rows", "Positions with a label. Default: 512, on a GPU 8192.", "N"),
        Option("vocab", "Vocabulary. Default: 49152, on a GPU 151936.", "N"),
        Option("width", "Hidden width. Default: 576, on a GPU 1536.", "N"),
        Option("rounds", "Rounds that the medians are taken over. Default: 3.", "N"),
        Option("threads", "Threads for the step graphs. Default: 1.", "N"),
        Option("output", "Also write the figures to this file.", "FILE.csv", short="o"),
    ),
)
