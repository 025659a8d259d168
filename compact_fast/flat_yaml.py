"""Flat `key: value` YAML with the place of every key, and values checked against type hints.

Scalars follow YAML 1.2: `1e-5` is a number, and `off`, `no` and `yes` are text.
"""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml


@dataclass(frozen=True)
class Setting:
    """A value and where the user wrote it: "file.yaml:12" or "--learning-rate"."""

    value: Any
    place: str

    def error(self, key: str, message: str) -> ValueError:
        """ValueError that names the place, and the key where the place does not."""
        named = self.place if self.place.startswith("--") else f"{self.place}: {key}"
        return ValueError(f"{named}: {message}")


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars instead of YAML 1.1's."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


_FLOAT = (
    r"[-+]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
)
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first
    )


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


# The inherited constructor reads 010 as octal.
_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


def read_flat_yaml(path: str | Path) -> dict[str, Setting]:
    """Settings of a YAML file in file order.

    Raises ValueError naming file and line: unreadable file, broken YAML, a top level that is not
    `key: value`, a key that is not text, the same key twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file{near(path.name, _siblings(path))}") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder; expected a YAML file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        return {} if root is None else dict(_settings(loader, root, path))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{path}{line}: not valid YAML: {problem}") from None
    finally:
        loader.dispose()


def _siblings(path: Path) -> list[str]:
    folder = path.parent
    return (
        [p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml")]
        if (folder.is_dir())
        else []
    )


def _settings(loader: _Loader, root: yaml.Node, path: Path) -> Iterable[tuple[str, Setting]]:
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(
            f"{path}:{root.start_mark.line + 1}: expected lines of the form `key: value`"
        )
    seen: dict[str, int] = {}
    for key_node, value_node in root.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise ValueError(f"{path}:{line}: {key!r}: expected the key to be text")
        key = key.replace("-", "_")
        if key in seen:
            raise ValueError(f"{path}:{line}: {key}: given twice, first in line {seen[key]}")
        seen[key] = line
        yield key, Setting(loader.construct_object(value_node, deep=True), f"{path}:{line}")


def parse_text(text: str, hint: Any) -> Any:
    """The value that a flag's text stands for, read as the hint suggests."""
    if accepts_only_text(hint):
        return None if text in ("null", "~") and _allows_none(hint) else text
    value = _parse_yaml(text)
    if isinstance(value, str) and any(get_origin(h) in (list, tuple) for h in _branches(hint)):
        literals = [v for h in _branches(hint) if get_origin(h) is Literal for v in get_args(h)]
        if value not in literals and (not literals or "," in value):
            return [_parse_yaml(part.strip()) for part in value.split(",")]
    return value


def accepts_only_text(hint: Any) -> bool:
    """Whether nothing but text (or null) fits, so that text must not be read as a number."""
    return all(h is str for h in _branches(hint) if h is not type(None))


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def check(setting: Setting, key: str, hint: Any) -> Any:
    """The setting's value as the hint has it; ValueError naming place, expected and got."""
    fits, value = _fit(setting.value, hint)
    if fits:
        return value
    got = "null" if setting.value is None else repr(setting.value)
    wanted = describe(hint)
    close = ""
    if isinstance(setting.value, str):
        close = near(setting.value, [v for v in _literals(hint) if isinstance(v, str)])
    raise setting.error(key, f"expected {wanted}, got {got}{close}")


def _fit(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether the value fits, and the value in the hint's own type."""
    if hint is Any:
        return True, value
    branches = _branches(hint)
    if len(branches) > 1:
        for branch in branches:
            fits, out = _fit(value, branch)
            if fits:
                return True, out
        return False, value
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is type(None):
        return value is None, value
    if origin is Literal:
        return any(value is v or (value == v and type(value) is type(v)) for v in arguments), value
    if origin in (list, tuple):
        parts = value if isinstance(value, (list, tuple)) else [value]
        done = [_fit(part, arguments[0]) for part in parts]
        if value is None or not all(fits for fits, _ in done):
            return False, value
        return True, origin(out for _, out in done)
    if hint is dict or origin is dict:
        return isinstance(value, dict), value
    if hint is bool:
        return isinstance(value, bool), value
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if hint is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        return good and not math.isnan(value), float(value) if good else value
    # Any other class (an enum of transformers, say) is judged by its owner.
    return isinstance(value, str), value


def _branches(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(b for h in get_args(hint) for b in _branches(h))
    return (hint,)


def _allows_none(hint: Any) -> bool:
    return type(None) in _branches(hint)


def _literals(hint: Any) -> list[Any]:
    return [v for h in _branches(hint) if get_origin(h) is Literal for v in get_args(h)]


_NAMES: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    type(None): "null",
}


def describe(hint: Any) -> str:
    """A type hint in words, for messages and for the table of keys."""
    words = []
    for branch in _branches(hint):
        origin, arguments = get_origin(branch), get_args(branch)
        if origin is Literal:
            values = [str(v) for v in arguments]
            words.append(values[0] if len(values) == 1 else f"one of {', '.join(values)}")
        elif origin in (list, tuple):
            item = {float: "numbers", int: "whole numbers"}.get(arguments[0], "text")
            words.append(f"a list of {item}")
        else:
            words.append(_NAMES.get(origin or branch, "text"))
    unique = list(dict.fromkeys(words))
    return " or ".join(unique)


def near(name: str, names: Iterable[str]) -> str:
    """ "; did you mean NAME?" for the closest of the names, or nothing.

    Close is what differs by a few letters, else the shortest that contains the name.
    """
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not close and len(name) > 2:
        close = sorted((n for n in names if name in n), key=len)
    return f"; did you mean {close[0]}?" if close else ""
