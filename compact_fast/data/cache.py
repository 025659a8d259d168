"""Tokenised rows on disk, found by what they were made from, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets

from compact_fast.data import encode, extract, numerals, records, template
from compact_fast.data.records import Question

MANIFEST = "manifest.json"

_ints = datasets.Sequence(datasets.Value("int64"))
FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "index": datasets.Value("int64"),
        "prompt_ids": _ints,
        "completion_ids": datasets.Sequence(_ints),
        "teacher_ids": _ints,
        "rationale_index": _ints,
        "answer_spans": datasets.Sequence(_ints),
        "correct": _ints,
        "gold_ids": _ints,
        "prior_completion_ids": _ints,
        "prior_span": _ints,
    }
)


def key(
    questions: Iterable[Question], tokenizer: Any, teachers: Sequence[str], options: Any
) -> str:
    """A hash of all that tokenised rows depend on: records, tokenizer, options, this code."""
    digest = hashlib.sha256()
    for module in (encode, extract, numerals, records, template):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(Path(__file__).with_name("tokenize.py").read_bytes())
    digest.update(_tokenizer_identity(tokenizer).encode())
    digest.update(json.dumps([list(teachers), asdict(options)]).encode())
    for question in questions:
        record = asdict(question)
        del record["source"]
        digest.update(json.dumps(record, sort_keys=True, ensure_ascii=True).encode())
    return digest.hexdigest()[:32]


def _tokenizer_identity(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        vocabulary = backend.to_str()
    else:
        vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    return json.dumps(
        [type(tokenizer).__name__, vocabulary, special, str(tokenizer.chat_template)],
        sort_keys=True,
    )


def rows(
    build: Callable[[], tuple[list[dict[str, Any]], dict[str, Any]]],
    cache_dir: str | Path | None,
    name: str | None,
    say: Callable[[str], None] | None,
) -> tuple[Any, dict[str, Any]]:
    """(rows, report) from the cache, or built and, with a `cache_dir`, kept there.

    Raises ValueError naming the folder where it cannot be written.
    """
    if cache_dir is None or name is None:
        made, report = build()
        return _dataset(made), {**report, "from_cache": False}
    folder = Path(cache_dir) / name
    if folder.exists():
        problem = _damage(folder)
        if problem is None:
            report = json.loads((folder / MANIFEST).read_text())["report"]
            return datasets.load_from_disk(str(folder / "rows")), {**report, "from_cache": True}
        if say:
            say(f"tokenised data in {folder} is damaged ({problem}); making it anew")
        shutil.rmtree(folder)
    made, report = build()
    dataset = _dataset(made)
    try:
        _write(dataset, report, folder)
    except OSError as error:
        raise type(error)(
            error.errno, f"cannot keep tokenised data: {error.strerror}", str(folder)
        ) from error
    return dataset, {**report, "from_cache": False}


def _dataset(made: list[dict[str, Any]]) -> Any:
    columns = {name: [row[name] for row in made] for name in FEATURES}
    return datasets.Dataset.from_dict(columns, features=FEATURES)


def _write(dataset: Any, report: dict[str, Any], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if len(dataset):
            dataset.save_to_disk(str(work / "rows"))
        files = {
            str(p.relative_to(work)): _sha256(p) for p in sorted(work.rglob("*")) if p.is_file()
        }
        (work / MANIFEST).write_text(json.dumps({"files": files, "report": report}))
        for path in work.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        try:
            os.rename(work, folder)
        except OSError:
            if _damage(folder) is not None:  # another process may have written the same thing
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _damage(folder: Path) -> str | None:
    """What is wrong with a cached folder, or None."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"no readable {MANIFEST}"
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != digest:
            return f"{name} has changed"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
