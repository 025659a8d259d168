"""How the benches measure and keep results.

Machines are noisy: variants run in turns (A B C C B A ...), medians are compared, and what is
reported is a ratio inside one run. Every row of a result file says where and when it was measured.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def interleaved(
    variants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 7,
    warm_up: int = 1,
    processor: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each variant's runs, taken in turns; of the processor's time if `processor`.

    Every other turn goes backwards: what ran before leaves the caches to the next one, and always
    coming after the same one would count for or against it.
    """
    clock = time.process_time if processor else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warm_up + rounds):
        order = list(variants.items())
        for name, run in reversed(order) if turn % 2 else order:
            start = clock()
            run()
            took = clock() - start
            if turn >= warm_up:
                times[name].append(took)
    return times


def median(values: Sequence[float]) -> float:
    """Median, under a name that reads well beside `interleaved`."""
    return statistics.median(values)


def where() -> dict[str, str]:
    """Device, versions and date, for every row of a result."""
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        # which instructions torch uses decides by what products are made, and who is quicker
        device = f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": device,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass
    return platform.processor() or platform.machine()


def write_csv(name: str, rows: Sequence[Mapping[str, Any]], path: Path | None = None) -> Path:
    """Write results/NAME.csv, or `path`, with `where()` on every row; what was measured on another
    device stays."""
    RESULTS.mkdir(exist_ok=True)
    path = path or RESULTS / f"{name}.csv"
    here = where()
    others = [row for row in read_csv(path) if row.get("device") != here["device"]]
    stamped = [*others, *({**row, **here} for row in rows)]
    columns = list(dict.fromkeys(key for row in stamped for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(stamped)
    return path


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a result file; none where there is none."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows as aligned text."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *[[_show(row.get(c, "")) for c in columns] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))


def _show(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def in_fresh_process(module: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Run `python -m MODULE JSON` and return the JSON it prints last: peak memory needs a
    process that has held nothing else."""
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{module} {arguments}: {done.stderr.strip().splitlines()[-1:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result
