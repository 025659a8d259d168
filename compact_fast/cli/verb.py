"""A verb of the command: its usage, its options, its help text."""

from __future__ import annotations

import json
import math
import re
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import yaml

from compact_fast.cli.arguments import DEBUG, HELP, Arguments, Option, parse
from compact_fast.flat_yaml import parse_text
from compact_fast.run_config import GROUPS, Key, flag_name, schema

CONFIG = Option("config", "A YAML file of keys, such as a training run's.", "FILE")


@dataclass(frozen=True)
class Verb:
    """One command. `names` are its positional arguments; the first `required` must be given."""

    name: str
    summary: str
    run: Callable[[Arguments], int]
    names: tuple[str, ...] = ()
    required: int = 0
    options: tuple[Option, ...] = ()
    groups: tuple[str, ...] = ()
    """Groups of configuration keys that it reads whole. With all of them it also takes fields of
    TrainingArguments; without these and `keys`, no configuration key."""

    keys: tuple[str, ...] = ()
    """Keys of other groups that it reads."""

    details: str = ""

    def parse(self, argv: Sequence[str]) -> Arguments:
        return parse(
            argv,
            self.options,
            names=self.names,
            required=self.required,
            keys=None if self._takes_all else [key.name for key in self._keys],
            verb=self.name,
        )

    @property
    def _takes_all(self) -> bool:
        return set(self.groups) == set(GROUPS)

    @property
    def _keys(self) -> list[Key]:
        """The configuration keys that it reads, in the order of the schema."""
        return [k for k in schema().values() if k.group in self.groups or k.name in self.keys]

    def help(self) -> str:
        """The text of `compact-fast VERB --help`."""
        width = min(shutil.get_terminal_size().columns, 100)
        shown = [n if i < self.required else f"[{n}]" for i, n in enumerate(self.names)]
        keys = ["[--KEY VALUE ...]"] if self._keys else []
        usage = " ".join(["usage: compact-fast", self.name, *shown, "[options]", *keys])
        out = [usage, "", *textwrap.wrap(self.summary, width)]
        if self.details:
            out += ["", *textwrap.wrap(self.details, width)]
        out += ["", "options:"]
        for option in (*self.options, DEBUG, HELP):
            value = f" {option.metavar}" if option.metavar else ""
            dash = f"-{option.short}, " if option.short else ""
            out += _entry(f"{dash}--{option.name}{value}", option.doc, width)
        for group, found in groupby(self._keys, key=lambda key: key.group):
            out += ["", f"{group}:"]
            for key in found:
                out += _entry(flag_name(key.name), _key_help(key), width)
        if self._keys:
            more = (
                "Any other field of transformers.TrainingArguments is accepted by its name."
                if self._takes_all
                else "The file may hold other commands' keys as well."
            )
            flags = "A flag overrides the key of the same name in the configuration file."
            out += ["", *textwrap.wrap(f"{flags} {more}", width)]
        return "\n".join(out)


def _key_help(key: Key) -> str:
    default = "" if key.default is None else f" Default: {default_text(key)}."
    return f"{key.doc} ({key.expected}.{default})"


def default_text(key: Key) -> str:
    """A key's default as YAML."""
    return yaml_text(key.default)


def yaml_text(value: Any) -> str:
    """A value on one line of YAML, in the dialect of `flat_yaml`."""
    if isinstance(value, float) and math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(yaml_text(v) for v in value)}]"
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_./][\w./:-]*", value) and not value.endswith(":")
        if plain and parse_text(value, Any) == value:
            return value
        return yaml.safe_dump(value, default_style='"', width=float("inf")).strip()
    return json.dumps(value)


def _entry(head: str, doc: str, width: int) -> list[str]:
    lines = textwrap.wrap(doc, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return [f"  {head}", *lines]
