"""Entry point of `compact-fast`: finds the verb, and turns errors into one clear line."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from compact_fast._version import __version__
from compact_fast.cli import messages
from compact_fast.cli.verb import Verb
from compact_fast.flat_yaml import near

VERBS = ("init", "check", "train", "eval", "score", "consensus", "export", "report", "bench", "env")

USER_ERROR, BUG = 2, 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code.

    0 done; 2 an error the user can mend (one line on stderr); 1 a bug; 130 interrupted, 143 ended
    by SIGTERM.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        return _dispatch(words, debug)
    except KeyboardInterrupt:
        messages.say("interrupted")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # the reader of our output has gone (`| head`); keep Python from complaining at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if debug:
            traceback.print_exc()
        line, code = describe_error(error)
        if code > 128:  # stopped by a signal, as asked
            messages.say(line)
        else:
            messages.say_error(line if code == USER_ERROR or debug else f"{line}; run with --debug")
        return code


def _dispatch(words: list[str], debug: bool) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if words else USER_ERROR
    if words[0] in ("-V", "--version"):
        print(f"compact-fast {__version__}")
        return 0
    name = words.pop(0)
    if name not in VERBS:
        raise ValueError(f"{name}: unknown command{near(name, VERBS)} (one of {', '.join(VERBS)})")
    verb = load_verb(name)
    arguments = verb.parse(words)
    if arguments.switch("help"):
        print(verb.help())
        return 0
    messages.quieten(debug)
    code = verb.run(arguments)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    return code


def load_verb(name: str) -> Verb:
    """The verb of that name; importing it imports nothing heavy."""
    verb: Verb = importlib.import_module(f"compact_fast.cli.{name}").VERB
    return verb


def overview() -> str:
    """The text of `compact-fast --help`."""
    lines = [
        f"compact-fast {__version__}: distil chain-of-thought from several teachers into one "
        "student,",
        "each teacher weighted by how well its rationale suits the student.",
        "",
        "usage: compact-fast COMMAND ...",
        "",
    ]
    lines += [f"  {name:<11}{load_verb(name).summary}" for name in VERBS]
    lines += ["", "compact-fast COMMAND --help shows a command's options."]
    return "\n".join(lines)


def describe_error(error: BaseException) -> tuple[str, int]:
    """One line for an exception, and the exit code it deserves."""
    code = getattr(error, "exit_code", None)
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(code, int):
        return text, code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f"{error.filename}: " if error.filename else ""
        reason = _lower(error.strerror or "no space left on the disk")
        return f"{where}{reason}; free some space and run again", USER_ERROR
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {_lower(error.strerror or text)}", USER_ERROR
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "the device is out of memory; lower questions_per_step or max_length, or set "
            f"gradient_checkpointing ({text.split('. ')[0]})",
            USER_ERROR,
        )
    if isinstance(error, MemoryError):
        return "out of memory; lower questions_per_step, limit or max_length", USER_ERROR
    if isinstance(error, (ValueError, OSError)):
        return text, USER_ERROR
    return f"internal error: {type(error).__name__}: {text}", BUG


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def console() -> NoReturn:
    """`python -m compact_fast.cli.main`."""
    sys.exit(main())


if __name__ == "__main__":
    console()
