"""Files and folders that appear on disk whole or not at all, and whose damage is noticed.

A folder is written beside its final place, every file is flushed to the disk, a manifest with the
size and sha256 of every file comes last, and one rename makes it visible. Needs no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_FORMAT = 1
_CHUNK = 1 << 20
# Libraries below us (torch's zip writer) report a full disk without its errno. Less free space
# than this beside a failed write is then taken as the cause.
_FULL_BELOW = 1 << 20


class DiskFullError(OSError):
    """The disk, or the user's quota, has no room. `errno` is ENOSPC; `str()` is for users."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class DamagedError(ValueError):
    """A folder is not what its manifest says; the message names the folder and each fault."""


@contextlib.contextmanager
def atomic_directory(
    path: str | os.PathLike[str], *, record: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """Yield an empty folder to fill; on leaving the block it becomes `path`, whole and durable.

    The yielded folder has the name of `path` and lies in `.NAME.tmp-PID` beside it. A folder that
    is at `path` already is replaced in one step. If the block raises, or the process dies at any
    moment, `path` is what it was before. `manifest.json` (see `verify_directory`) is added, with
    the JSON values of `record` in it. One process at a time may write a given `path`.

    Raises DiskFullError in place of whatever error a full disk caused in the block.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = final.parent / f".{final.name}.tmp-{os.getpid()}"
    try:
        _remove(staging)
        folder = staging / final.name
        folder.mkdir(parents=True)
        yield folder
        _write_manifest(folder, record or {})
        _fsync_tree(folder)
        _move_into_place(folder, final)
        _fsync(final.parent)
    except Exception as error:
        _raise_if_disk_full(error, final)
        raise
    finally:
        # Cleaning up must not hide the error that is on its way.
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write; on leaving the block that file becomes `path`, durably.

    If the block raises, `path` is what it was before. Raises DiskFullError like atomic_directory.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f".{final.name}.tmp-{os.getpid()}"
    try:
        yield temporary
        _fsync(temporary)
        os.replace(temporary, final)
        _fsync(final.parent)
    except Exception as error:
        _raise_if_disk_full(error, final)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 so that readers see the old content or the new one, nothing between."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a folder that atomic_directory wrote: {"files": {...}, **record}.

    Raises DamagedError if it is missing or if any bit of it has changed.
    """
    path = Path(folder) / MANIFEST
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if not Path(folder).is_dir():
            raise DamagedError(f"{folder}: no such folder") from None
        raise DamagedError(f"{folder}: no {MANIFEST}, so it was never written whole") from None
    try:
        body = json.loads(raw)
        body.pop("sha256")
        intact = _render(body) == raw
    except (ValueError, KeyError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise DamagedError(f"{folder}: {MANIFEST} is damaged (its own sha256 differs)")
    return dict(body)


def verify_directory(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read every byte of `folder` and return its manifest if nothing is missing, extra or changed.

    Raises DamagedError naming every file that is missing, of the wrong size, different in content,
    or not in the manifest.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    expected: dict[str, dict[str, Any]] = manifest["files"]
    present = _list_files(folder)
    faults = [f"{name}: missing" for name in sorted(expected.keys() - present.keys())]
    faults += [f"{name}: not in the manifest" for name in sorted(present.keys() - expected.keys())]
    for name in sorted(expected.keys() & present.keys()):
        size = present[name]
        if size != expected[name]["size"]:
            faults.append(f"{name}: {size:,} bytes instead of {expected[name]['size']:,}")
        elif _sha256(folder / name) != expected[name]["sha256"]:
            faults.append(f"{name}: sha256 differs, its content has changed")
    if faults:
        raise DamagedError(f"{folder}: {'; '.join(faults)}")
    return manifest


def remove_leftovers(folder: str | os.PathLike[str]) -> list[str]:
    """Clear what killed processes left half done in `folder`; returns the names removed.

    Call it only when no other process writes there. A folder that was set aside for its
    replacement and lost it (only where the file system cannot swap two folders) is put back.
    """
    removed = []
    for path in sorted(Path(folder).glob(".*")):
        stem, _, pid = path.name[1:].rpartition("-")
        if not pid.isdigit():
            continue
        if stem.endswith(".tmp"):
            _remove(path)
            removed.append(path.name)
        elif stem.endswith(".old"):
            original = path.parent / stem.removesuffix(".old")
            if original.exists():
                _remove(path)
                removed.append(path.name)
            else:
                os.rename(path, original)
    return removed


def remove_directory(path: str | os.PathLike[str]) -> None:
    """Delete a folder so that a kill half-way leaves no half of it under its name."""
    path = Path(path)
    doomed = path.parent / f".{path.name}.tmp-{os.getpid()}"
    _remove(doomed)
    os.rename(path, doomed)
    _remove(doomed)


def free_bytes(folder: str | os.PathLike[str]) -> int:
    """Bytes an unprivileged user may still write where `folder` lies."""
    return shutil.disk_usage(folder).free


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _list_files(folder: Path) -> dict[str, int]:
    """Size of every file below `folder` but the manifest; what is no plain file has size -1."""
    files = {}
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in [*names, *links]:
            path = Path(root) / name
            status = path.lstat()
            size = status.st_size if stat.S_ISREG(status.st_mode) else -1
            files[path.relative_to(folder).as_posix()] = size
    files.pop(MANIFEST, None)
    return files


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _write_manifest(folder: Path, record: Mapping[str, Any]) -> None:
    files = _list_files(folder)
    for name, size in files.items():
        if size < 0:
            raise ValueError(f"{folder / name}: only plain files can be written whole, not links")
    entries = {n: {"size": size, "sha256": _sha256(folder / n)} for n, size in files.items()}
    body = json.loads(json.dumps({**record, "format": _FORMAT, "files": entries}))
    (folder / MANIFEST).write_bytes(_render(body))


def _render(body: Mapping[str, Any]) -> bytes:
    """The one way to write a manifest down, its own digest included: any other byte is damage."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fsync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _fsync(Path(root) / name)
        _fsync(Path(root))


def _move_into_place(folder: Path, final: Path) -> None:
    if not final.exists():
        os.rename(folder, final)
    elif not _swap(folder, final):
        aside = final.parent / f".{final.name}.old-{os.getpid()}"
        _remove(aside)
        os.rename(final, aside)
        os.rename(folder, final)
        _remove(aside)


def _swap(first: Path, second: Path) -> bool:
    """Exchange two folders in one step (Linux renameat2); False where the system cannot."""
    at_fdcwd, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    done = renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange)
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _raise_if_disk_full(error: Exception, final: Path) -> None:
    """Raise DiskFullError if `error`, or one that led to it, comes from a full disk or quota."""
    free = free_bytes(final.parent)
    full = isinstance(error, RuntimeError) and free < _FULL_BELOW
    cause: BaseException | None = error
    while cause is not None and not full:
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        full = full or "No space left on device" in str(cause)  # safetensors gives only the text
        cause = cause.__cause__ or cause.__context__
    if full:
        message = f"no space left on the disk ({free / 1e6:,.1f} MB free)"
        raise DiskFullError(errno.ENOSPC, message, str(final)) from error
