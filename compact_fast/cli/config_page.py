"""docs/config.md from the schema: `python -m compact_fast.cli.config_page docs/config.md`."""

from __future__ import annotations

import sys
from pathlib import Path

from compact_fast.cli.verb import default_text
from compact_fast.config import MODES
from compact_fast.run_config import GROUPS, INSTEAD, schema

HEADER = """\
# Configuration

Every key below can stand in the YAML file given to `compact-fast train` or `check`, and is a flag
of the same name: `learning_rate: 2e-5` is `--learning-rate 2e-5` or `--learning-rate=2e-5`. Flags
override the file. True-or-false keys also have the forms `--lora` and `--no-lora`; lists may be
written `a,b`. Numbers and words follow YAML 1.2: `1e-5` is a number, and `off` is text.

An unknown key, a key given twice, a wrong type and a value out of range stop the command with the
file, the line and the remedy. `compact-fast init` writes a file of all keys with these
explanations. Any other field of `transformers.TrainingArguments` is accepted by its name, but for
those at the end of this page.

This page is written by `python -m compact_fast.cli.config_page docs/config.md`.
"""


def page() -> str:
    """The text of the page."""
    lines = [HEADER]
    for group, owner in GROUPS.items():
        summary = (owner.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        lines += [f"## {group.capitalize()}", "", summary, ""]
        lines += ["| key | default | meaning | value |", "| --- | --- | --- | --- |"]
        for key in schema().values():
            if key.group == group:
                cells = [f"`{key.name}`", _default(key.name), key.doc, key.expected]
                lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
        lines.append("")
    lines += ["## What a mode sets", ""]
    names = list(MODES)
    lines += [f"| key | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for name in MODES[names[0]]:
        lines.append(f"| `{name}` | " + " | ".join(str(MODES[m][name]) for m in names) + " |")
    lines += [
        "",
        "Baselines (`weighting` other than compact and consensus) are filtered only where",
        "`filter_below` is set.",
        "",
    ]
    lines += ["## Fields of TrainingArguments not used here", ""]
    lines += [f"- `{name}`: {why}" for name, why in INSTEAD.items()]
    return "\n".join(lines) + "\n"


def _default(name: str) -> str:
    key = schema()[name]
    if name in MODES["compact"]:
        return "by mode"
    if name in ("student", "data"):
        return "required"
    return f"`{default_text(key)}`"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
