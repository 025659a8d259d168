"""Raw rows, each with its place, out of local files, saved datasets and the hub."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from compact_fast.data.records import nearest

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
# Columns whose cells hold JSON in a file that has text cells only.
_JSON_COLUMNS = ("rationales", "choices", "completions", "teachers", "messages", "CoT")


class RawRow(NamedTuple):
    """One row as it stands; `problem` says why it could not even be parsed."""

    place: str
    """"data.jsonl:12", "data.json[11]" (from 0), or "data.parquet:row 12" (from 1)."""
    value: Any
    problem: str | None = None


def raw_rows(source: str | Path, split: str) -> Iterator[RawRow]:
    """Rows of a .jsonl, .json, .csv, .tsv or .parquet file, of a saved dataset's folder, or of a
    dataset on the hub ("owner/name", or "owner/name:config").

    Raises ValueError naming what cannot be read at all; a single bad row is yielded as such.
    """
    require_file(source)
    path = Path(source)
    if path.is_dir():
        return _dataset_rows(str(source), split, local=True)
    if path.exists():
        suffix = path.suffix.lower()
        if suffix not in SUFFIXES:
            raise ValueError(f"{source}: unknown kind of file; known are {', '.join(SUFFIXES)}")
        if suffix == ".parquet":
            return _parquet_rows(path)
        data = path.read_bytes()
        if not data.strip():
            raise ValueError(f"{source}: the file is empty")
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError(f"{source}: is UTF-16; save it as UTF-8")
        data = data.removeprefix(b"\xef\xbb\xbf")
        if suffix in (".csv", ".tsv"):
            return _csv_rows(path, data, "\t" if suffix == ".tsv" else ",")
        if suffix == ".json":
            return _json_rows(path, data)
        return _json_lines(path, data)
    return _dataset_rows(str(source), split, local=False)


def require_file(source: str | Path) -> None:
    """Raise ValueError where `source` is named like a file, rather than a dataset on the hub, and
    there is none."""
    path = Path(source)
    if path.exists():
        return
    named_as_file = path.suffix.lower() in SUFFIXES or str(source).startswith((".", "/", "~"))
    if named_as_file or (path.parent != Path(".") and path.parent.is_dir()):
        raise ValueError(f"{source}: no such file{_near_files(path)}")


def _near_files(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"; there is no folder {folder}"
    return nearest(path.name, sorted(p.name for p in folder.iterdir()))


# ---- JSON -------------------------------------------------------------------------------------


def _json_lines(path: Path, data: bytes) -> Iterator[RawRow]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield parse_line(line, f"{path}:{number}")


def parse_line(line: bytes, place: str) -> RawRow:
    """One line of JSON Lines as a row, or with what is wrong with it."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        shown = line.decode("utf-8", "backslashreplace")
        return RawRow(place, shown, f"byte {error.start + 1} of the line is not UTF-8")
    try:
        return RawRow(place, json.loads(text))
    except RecursionError:
        return RawRow(place, text[:1000], "is nested too deeply")
    except ValueError as error:
        return RawRow(place, text, _json_problem(error))


def _json_problem(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"is not valid JSON: {error.msg} at column {error.pos + 1}"
    return f"is not valid JSON: {error}"


def _json_rows(path: Path, data: bytes) -> Iterator[RawRow]:
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start + 1} is not UTF-8") from error
    except RecursionError as error:
        raise ValueError(f"{path}: is nested too deeply") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and data.lstrip().startswith(b"{"):
            yield from _json_lines(path, data)  # JSON Lines under the other name
            return
        raise ValueError(f"{path}:{error.lineno}: is not valid JSON: {error.msg}") from error
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        if set(value) & {"question", "Question", "prompt", "messages"} or len(lists) != 1:
            value = [value]
        else:
            value = lists[0]  # {"data": [...]}
    if not isinstance(value, list):
        raise ValueError(f"{path}: expected a list of records, got {type(value).__name__}")
    for i, row in enumerate(value):
        yield RawRow(f"{path}[{i}]", row)


# ---- tables -----------------------------------------------------------------------------------


def _csv_rows(path: Path, data: bytes, delimiter: str) -> Iterator[RawRow]:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: byte {error.start + 1} is not UTF-8") from error
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader)
        for number, cells in enumerate((c for c in reader if c), start=1):
            place = f"{path}:row {number}"
            if len(cells) != len(header):
                problem = f"has {len(cells)} cells where the header has {len(header)}"
                yield RawRow(place, cells, problem)
            else:
                yield _from_cells(place, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}") from error


def _from_cells(place: str, row: dict[str, Any]) -> RawRow:
    parsed = {name: cell for name, cell in row.items() if cell != ""}
    for name in _JSON_COLUMNS:
        cell = parsed.get(name)
        if isinstance(cell, str):
            try:
                parsed[name] = json.loads(cell)
            except (ValueError, RecursionError) as error:
                return RawRow(f"{place}:{name}", row, f"expected JSON in this cell: {error}")
    return RawRow(place, parsed)


def _parquet_rows(path: Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{path}:row {number}", row)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet: {_one_line(error)}") from error


def _dataset_rows(name: str, split: str, *, local: bool) -> Iterator[RawRow]:
    import datasets

    try:
        if local and (
            (Path(name) / "dataset_info.json").exists()
            or (Path(name) / "dataset_dict.json").exists()
        ):
            data = datasets.load_from_disk(name)
        else:
            repository, _, config = name.partition(":") if not local else (name, "", "")
            data = datasets.load_dataset(repository, config or None, split=split)
    except Exception as error:  # what datasets and the hub's client raise has no common base
        raise ValueError(_not_loaded(name, error, local=local)) from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise ValueError(f"{name}: no split {split!r}{nearest(split, data)}")
        data = data[split]
    for i, row in enumerate(data):
        yield RawRow(f"{name}[{split}]:row {i + 1}", row)


def _not_loaded(name: str, error: Exception, *, local: bool) -> str:
    if local:
        return f"{name}: the folder cannot be read as a dataset: {_one_line(error)}"
    near = nearest(name, sorted(p.name for p in Path().iterdir()))
    return f"{name}: no such file{near}, and no dataset on the hub ({_one_line(error)})"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
