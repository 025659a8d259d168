"""Tokenised rows on disk, found by what they were made from, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.ipc

from compact_fast.atomic import DamagedError, atomic_directory, verify_directory
from compact_fast.data import encode, extract, numerals, records, template
from compact_fast.data.records import Question

ROWS = "rows.arrow"

_ints = datasets.Sequence(datasets.Value("int32"))
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
    for q in questions:
        rationales = [(r.teacher, r.text, r.answer, r.correct) for r in q.rationales]
        record = (q.id, q.question, q.answer, q.choices, q.messages, rationales)
        digest.update(json.dumps(record, ensure_ascii=True).encode())
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


def as_dataset(made: Sequence[dict[str, Any]]) -> Any:
    """Rows as a datasets.Dataset: Arrow holds token ids in a tenth of the room of Python's."""
    columns = {name: [row[name] for row in made] for name in FEATURES}
    return datasets.Dataset.from_dict(columns, features=FEATURES)


def kept(
    build: Callable[[], tuple[Any, dict[str, Any]]],
    cache_dir: str | Path | None,
    name: str,
    say: Callable[[str], None] | None,
) -> tuple[Any, dict[str, Any]]:
    """(dataset, report) from the cache, or built and, with a `cache_dir`, kept there.

    Raises OSError naming the folder where it cannot be written.
    """
    if cache_dir is None:
        dataset, report = build()
        return dataset, {**report, "from_cache": False}
    folder = Path(cache_dir) / name
    if folder.exists():
        try:
            report = verify_directory(folder)["report"]
            return datasets.Dataset.from_file(str(folder / ROWS)), {**report, "from_cache": True}
        except (DamagedError, KeyError) as error:
            if say:
                say(f"tokenised data in the cache is damaged and made anew ({error})")
    dataset, report = build()
    with atomic_directory(folder, record={"report": report}) as work:
        table = dataset.with_format("arrow")[:]
        with (
            pyarrow.OSFile(str(work / ROWS), "wb") as file,
            pyarrow.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(table)
    return dataset, {**report, "from_cache": False}
