"""The folder of a run: may this run write there, and does it continue what lies there?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from compact_fast.run_config import EvaluationSettings, RunConfig

FILES = ("run.json", "metrics.jsonl", "agreement.json", "evaluation.json")
FOLDERS = ("model", "report")

# Keys that may differ between a run and its continuation: they change what is written and
# measured, or how long it goes on, never what a step computes.
MAY_DIFFER = frozenset(
    [
        *("output_dir", "resume", "overwrite", "compare", "cache_dir", "on_error"),
        *("max_steps", "num_train_epochs", "backend", "consensus_backend", "consensus_threads"),
        *("logging_steps", "eval_steps", "save_steps", "save_total_limit", "report_to"),
        *("progress", "sharding"),
        *("eval_questions", "run_name", "disable_tqdm", "dataloader_num_workers"),
        *(f.name for f in fields(EvaluationSettings)),
    ]
)

# Of these, the keys that ask a finished run for more: further steps, or another measurement.
ASK_FOR_MORE = frozenset(
    [
        *("max_steps", "num_train_epochs", "eval_questions"),
        *(f.name for f in fields(EvaluationSettings) if f.name != "eval_batch_size"),
    ]
)


def resume_point(config: RunConfig) -> str | None:
    """What to resume from: "auto", a checkpoint's path, or None. Writes nothing.

    Raises ValueError, with the remedy, when the folder holds a run that this configuration does
    not continue.
    """
    folder = Path(config.run.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir={folder}: is a file; name a folder")
    if config.run.overwrite:
        return None if config.run.resume == "never" else "auto"
    earlier = read_json(folder / "run.json")
    begun = earlier is not None or any(folder.glob("checkpoint-*"))
    if begun and config.run.resume == "never":
        raise ValueError(
            f"output_dir={folder}: holds a run; resume=auto continues it, overwrite deletes it, "
            "or name another folder"
        )
    if begun and config.run.resume == "auto":
        changed = changes(earlier, config)
        if changed:
            raise ValueError(
                f"output_dir={folder}: holds a run with other settings ({'; '.join(changed)}); "
                "name another folder, or delete that run with --overwrite"
            )
    return None if config.run.resume == "never" else config.run.resume


def begin(config: RunConfig) -> None:
    """Make the run's folder, and delete the run it holds where the user said so."""
    folder = Path(config.run.output_dir)
    if config.run.overwrite:
        clear(folder)
    folder.mkdir(parents=True, exist_ok=True)


def is_finished(config: RunConfig) -> bool:
    """Whether the folder holds this run, trained to its end, and nothing more is asked of it."""
    folder = Path(config.run.output_dir)
    earlier = read_json(folder / "run.json")
    if earlier is None or earlier.get("status") != "finished" or config.run.overwrite:
        return False
    if config.run.resume != "auto" or not (folder / "model").is_dir():
        return False
    return not _different(earlier, config, MAY_DIFFER - ASK_FOR_MORE)


def changes(earlier: Mapping[str, Any] | None, config: RunConfig) -> list[str]:
    """The first settings that differ from an earlier run's and change what a step computes."""
    if earlier is None or not isinstance(earlier.get("config"), dict):
        return []
    return _different(earlier, config, MAY_DIFFER)[:3]


def _different(
    earlier: Mapping[str, Any], config: RunConfig, may_differ: Collection[str]
) -> list[str]:
    """The settings that differ from an earlier run's, but for those that may."""
    theirs = earlier["config"] if isinstance(earlier.get("config"), dict) else {}
    ours = json.loads(json.dumps(config.flat()))
    return [
        f"{key}: {theirs.get(key)} there, {ours.get(key)} now"
        for key in {**theirs, **ours}
        if key not in may_differ and theirs.get(key) != ours.get(key)
    ]


def clear(folder: Path) -> None:
    """Delete the run in a folder, and nothing else there."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    for path in [*(folder / name for name in FOLDERS), *folder.glob("checkpoint-*")]:
        if path.is_dir():
            shutil.rmtree(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is none to read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
