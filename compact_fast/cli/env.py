"""`compact-fast env`: what is installed and what would be used, for bug reports."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata, util

from compact_fast._version import __version__
from compact_fast.cli.arguments import Arguments
from compact_fast.cli.verb import Verb

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "safetensors",
    "tokenizers",
    "numpy",
    "pyarrow",
    "rustworkx",
    "matplotlib",
    "gguf",
)


def run(arguments: Arguments) -> int:
    for name, value in facts():
        print(f"{name:<22}{value}")
    return 0


def facts() -> list[tuple[str, str]]:
    """Names and values, in the order in which they are shown."""
    import torch

    from compact_fast.backends import available_backends, choose

    rows = [
        ("compact_fast", f"{__version__} ({os.path.dirname(os.path.dirname(__file__))})"),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("system", platform.platform()),
        ("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}"),
    ]
    rows += [(name, _version(name)) for name in PACKAGES]
    rows += [("device", device) for device in _devices()]
    rows.append(("native module", _native()))
    for name, state in available_backends().items():
        rows.append((f"backend {name}", "can run" if state is True else f"cannot run: {state}"))
    choice = choose("auto")
    rows.append(("backend taken", f"{choice.backend.name} ({choice.reason})"))
    return rows


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    import torch

    found = [
        f"cuda:{i} {torch.cuda.get_device_name(i)}, "
        f"{torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB"
        for i in range(torch.cuda.device_count())
    ]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found or ["cpu only"]


def _native() -> str:
    if util.find_spec("compact_fast._native") is None:
        return "missing: graph consensus falls back to rustworkx"
    return "present"


VERB = Verb(
    name="env",
    summary="Show versions, devices and backends, for bug reports.",
    run=run,
)
