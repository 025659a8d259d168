"""Command-line arguments: a verb's own options, and configuration keys as flags."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compact_fast.flat_yaml import Setting, near, parse_text
from compact_fast.run_config import flag_name, schema


@dataclass(frozen=True)
class Option:
    """An option of a verb's own, not a configuration key."""

    name: str
    """Without dashes: "output"."""

    doc: str
    metavar: str | None = None
    """What its value is called; None: a switch."""

    short: str | None = None
    """One-letter form without the dash."""


DEBUG = Option("debug", "Show the traceback of an error, and the libraries' own messages.")
HELP = Option("help", "Show this help.", short="h")


@dataclass
class Arguments:
    """A parsed command line."""

    positionals: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    overrides: list[tuple[str, Setting]] = field(default_factory=list)

    def option(self, name: str) -> str | None:
        """The text of an option of the verb's own, None when not given."""
        value: str | None = self.options.get(name)
        return value

    def switch(self, name: str) -> bool:
        return bool(self.options.get(name, False))


def parse(
    argv: Sequence[str],
    options: Iterable[Option] = (),
    *,
    names: Sequence[str] = (),
    required: int = 0,
    keys: Collection[str] | None = None,
    verb: str = "this command",
) -> Arguments:
    """Split a command line.

    `names` are the positional arguments in order, the first `required` of which must be there; a
    last one that ends in "..." stands for any number.
    Every other flag is a configuration key, one of `keys` where those are given (None: any key, and
    any field of TrainingArguments): `--key value`, `--key=value`, dashes or underscores, `--no-key`
    and a bare `--key` for true-or-false keys. Raises ValueError naming the argument, with the
    nearest name for an unknown one, and `verb` for a key that it does not use.
    """
    own = {o.name: o for o in (*options, DEBUG, HELP)}
    short = {o.short: o for o in own.values() if o.short}
    out = Arguments()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            out.positionals += rest
            break
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            given = text if equals else None
            if name in own:
                _own_option(out, own[name], word, given, rest)
            else:
                key = name.replace("-", "_")
                if keys is not None:
                    _refuse_unused(key, keys, own, verb)
                _override(out, key, given, rest, own)
        elif word.startswith("-") and word[1:] in short:
            _own_option(out, short[word[1:]], word, None, rest)
        elif word.startswith("-") and len(word) > 1:
            raise ValueError(f"{word}: unknown option; --help shows what there is")
        else:
            out.positionals.append(word)
    if not out.switch("help"):
        if len(out.positionals) < required:
            raise ValueError(f"{names[len(out.positionals)]}: missing; --help shows the usage")
        if len(out.positionals) > len(names) and not "".join(names[-1:]).endswith("..."):
            raise ValueError(f"{out.positionals[len(names)]!r}: one argument too many")
    return out


def _own_option(
    out: Arguments, option: Option, word: str, given: str | None, rest: list[str]
) -> None:
    if option.metavar is None:
        if given is not None:
            raise ValueError(f"{word}: --{option.name} takes no value")
        out.options[option.name] = True
    else:
        out.options[option.name] = given if given is not None else _value(word, rest)


def _refuse_unused(key: str, keys: Collection[str], own: Collection[str], verb: str) -> None:
    named, known = flag_name(key), schema()
    if key not in known and key.startswith("no_"):
        key = key[3:]
    if key in keys:
        return
    if keys and key in known:
        raise ValueError(f"{named}: {verb} does not use this key; --help shows those it does")
    names = [*own, *(flag_name(k).removeprefix("--") for k in keys)]
    raise ValueError(f"{named}: unknown option{near(named.removeprefix('--'), names)}")


def _override(
    out: Arguments, key: str, given: str | None, rest: list[str], own: Mapping[str, Option]
) -> None:
    flag = flag_name(key)
    known = schema()
    if key.startswith("no_") and key not in known and given is None:
        positive = key[3:]
        if positive in known and bool in _branches(known[positive].hint):
            out.overrides.append((positive, Setting(False, flag)))
            return
    hint = known[key].hint if key in known else Any
    if given is None and bool in _branches(hint) and not (rest and _is_bool_like(rest[0])):
        out.overrides.append((key, Setting(True, flag)))
        return
    if given is None and key not in known and (not rest or rest[0].startswith("--")):
        if close := near(key, own):
            raise ValueError(f"{flag}: unknown option{close}")
        # a switch of the trainer's; who knows its fields will judge it
        out.overrides.append((key, Setting(True, flag)))
        return
    text = given if given is not None else _value(flag, rest)
    out.overrides.append((key, Setting(parse_text(text, hint), flag)))


def _branches(hint: Any) -> tuple[Any, ...]:
    return (hint, *getattr(hint, "__args__", ()))


def _is_bool_like(word: str) -> bool:
    return word.lower() in ("true", "false", "auto", "yes", "no", "on", "off", "0", "1", "null")


def _value(flag: str, rest: list[str]) -> str:
    if not rest or rest[0].startswith("--"):
        raise ValueError(f"{flag}: needs a value")
    return rest.pop(0)
