"""`compact-fast init`: write a configuration file that explains itself."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compact_fast.cli.arguments import Arguments, Option
from compact_fast.cli.verb import Verb, default_text, yaml_text
from compact_fast.run_config import GROUPS, build, schema

DEFAULT_PATH = "compact.yaml"


def run(arguments: Arguments) -> int:
    path = Path(arguments.positionals[0] if arguments.positionals else DEFAULT_PATH)
    settings = dict(arguments.overrides)
    build(settings)
    text = template({key: setting.value for key, setting in settings.items()})
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give a file name, such as {path / DEFAULT_PATH}")
    if path.exists() and not arguments.switch("force"):
        raise ValueError(f"{path}: exists already; --force overwrites it")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"Wrote {path}.")
    missing = [key for key in ("student", "data") if key not in settings]
    if missing:
        print(f"Set {' and '.join(missing)} in it, then:", file=sys.stdout)
    print(f"  compact-fast check {path}    shows what would run\n  compact-fast train {path}")
    return 0


def template(values: Mapping[str, Any]) -> str:
    """A YAML file of every key with its meaning; keys in `values` are set, the others commented."""
    lines = [
        "# Configuration of compact-fast. Every key is also a flag: --learning-rate 2e-5.",
        "# A key that is commented out has the value shown. Any other field of",
        "# transformers.TrainingArguments may be set by its name as well.",
        "",
    ]
    for group, owner in GROUPS.items():
        summary = (owner.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        lines += [f"# ---- {group}: {summary}", ""]
        for key in schema().values():
            if key.group != group:
                continue
            about = f"{key.doc} ({key.expected})"
            lines += [f"# {line}" for line in textwrap.wrap(about, 98)]
            if key.name in values:
                lines.append(f"{key.name}: {yaml_text(values[key.name])}")
            elif key.name in ("student", "data"):
                lines.append(f"{key.name}: null")
            else:
                lines.append(f"# {key.name}: {default_text(key)}")
            lines.append("")
    foreign = [key for key in values if key not in schema()]
    if foreign:
        lines += ["# ---- fields of transformers.TrainingArguments", ""]
        lines += [f"{key}: {yaml_text(values[key])}" for key in foreign]
    return "\n".join(lines).rstrip() + "\n"


VERB = Verb(
    name="init",
    summary="Write a commented configuration file to start from.",
    details=f"FILE is {DEFAULT_PATH} unless given. Keys given as flags are set in the file.",
    run=run,
    names=("FILE",),
    options=(Option("force", "Overwrite an existing file."),),
    groups=tuple(GROUPS),
)
