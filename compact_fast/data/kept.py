"""Questions read from a file, kept by the file's content: extracting answers takes most of reading.

Only files that were read without a fault are kept, so that faults are told of every time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from compact_fast.atomic import DamagedError, atomic_directory, verify_directory
from compact_fast.data.records import Question, Rationale

_FILE = "questions.jsonl"
_QUESTION = [f.name for f in fields(Question) if f.name != "rationales"]
_RATIONALE = [f.name for f in fields(Rationale)]


def kept_questions(
    source: str | Path,
    cache_dir: Path | None,
    options: dict[str, Any],
    read: Callable[[], tuple[list[Question], int]],
) -> tuple[list[Question], int]:
    """What `read()` returns (questions, broken records), from `cache_dir` where it was read before.

    Found by the file's bytes, its name, `options` and this package's reading code. A source that is
    no file is always read, and a damaged entry is read and written anew.
    """
    path = Path(source)
    if cache_dir is None or not path.is_file():
        return read()
    folder = cache_dir / _key(path, options)
    if folder.is_dir():
        try:
            verify_directory(folder)
            with (folder / _FILE).open(encoding="utf-8") as file:
                return [_question(json.loads(line)) for line in file], 0
        except (DamagedError, ValueError, TypeError):
            pass
    questions, broken = read()
    if not broken:
        with (
            atomic_directory(folder) as work,
            (work / _FILE).open("w", encoding="utf-8", errors="surrogatepass") as file,
        ):
            for question in questions:
                file.write(json.dumps(_record(question)) + "\n")
    return questions, broken


def _record(question: Question) -> list[Any]:
    own = [getattr(question, name) for name in _QUESTION]
    return [own, [[getattr(r, name) for name in _RATIONALE] for r in question.rationales]]


def _question(record: list[Any]) -> Question:
    own, rationales = record
    made = [Rationale(*values) for values in rationales]
    return Question(**dict(zip(_QUESTION, own, strict=True)), rationales=made)


def _key(path: Path, options: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([str(path), options], sort_keys=True).encode())
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.read_bytes())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:32]
