"""A trained student as files for others: an adapter merged into its base, or the adapter alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compact_fast.atomic import atomic_directory
from compact_fast.students import (
    body_and_head,
    causal_model,
    inference,
    load_student,
    merged,
    resolve_dtype,
)

ADAPTER = "adapter_config.json"
_ADAPTER_FILES = (ADAPTER, "adapter_model.safetensors")
_PROBES = (4, 48)  # sequences and tokens whose logits are compared
# Relative difference of logits that rounding explains, by the dtype that is written.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Exported:
    """What was written, for people."""

    folder: Path
    what: str
    bytes: int
    difference: float | None
    """Largest difference of the reloaded model's logits, over the largest logit; None where no
    model was loaded."""


def find_model(run: str) -> Path:
    """The model folder that RUN means: a run's trained model, its newest good checkpoint where it
    was not finished, or the folder itself. ValueError where there is none."""
    from compact_fast.trainer.checkpoints import find_checkpoint

    folder = Path(run)
    if not folder.is_dir():
        raise ValueError(f"{run}: no such folder; name a run's output_dir, or a model's folder")
    for candidate in (folder / "model", folder):
        if any((candidate / name).is_file() for name in (ADAPTER, "config.json")):
            return candidate
    checkpoint = find_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(f"{run}: holds neither a trained model nor a good checkpoint")
    return checkpoint


def export_merged(source: Path, target: str, *, dtype: str | None = None) -> Exported:
    """Write a whole model: the adapter merged into its base, or the fully trained student.

    `dtype` is "fp32" or "bf16"; None: that of a fully trained student's files, fp32 for a sum.
    The written model is loaded again, and its logits compared with those of the student as
    trained, before `target` appears. Raises ValueError when `target` exists, when the source
    cannot be loaded, and when the logits differ by more than rounding.
    """
    _refuse_existing(target)
    adapter = (source / ADAPTER).is_file()
    kind = resolve_dtype(dtype or ("fp32" if adapter else _stored_dtype(source)))
    student = load_student(str(source), dtype=torch.float32)
    ids = _probes(body_and_head(student.model).weight.shape[0])
    expected = _logits(student.model, ids)
    base = _base_of(source) if adapter else None
    model = merged(student.model).to(kind)
    with atomic_directory(target, record={"exported_from": str(source.resolve())}) as folder:
        model.save_pretrained(folder)
        student.tokenizer.save_pretrained(folder)
        again = load_student(str(folder), dtype=kind)
        difference = _difference(expected, _logits(again.model, ids))
        if not difference <= _TOLERANCE[kind]:
            raise ValueError(
                f"{target}: not written: loaded again, the model's logits differ from the trained "
                f"student's by {difference:.2g} of the largest one; please report it with "
                f"{source / ADAPTER if adapter else source / 'config.json'}"
            )
        if len(again.tokenizer) != len(student.tokenizer):
            raise ValueError(f"{target}: not written: its tokenizer does not load as it was")
    what = f"adapter merged into {base}" if adapter else "fully trained student"
    return Exported(Path(target), f"{what}, {str(kind)[6:]}", _size(target), difference)


def export_adapter(source: Path, target: str) -> Exported:
    """Write the adapter and the tokenizer alone; peft finds the base by its name.

    Raises ValueError when the source has no adapter, or `target` exists.
    """
    _refuse_existing(target)
    if not (source / ADAPTER).is_file():
        raise ValueError(f"{source}: every weight was trained, there is no adapter; use --merge")
    with atomic_directory(target, record={"exported_from": str(source.resolve())}) as folder:
        for path in sorted(source.iterdir()):
            if path.name in _ADAPTER_FILES or _of_tokenizer(path):
                shutil.copy2(path, folder / path.name)
    return Exported(Path(target), f"adapter of {_base_of(source)}", _size(target), None)


def _refuse_existing(target: str) -> None:
    if Path(target).exists():
        raise ValueError(f"--output: {target} exists; name a folder that does not")


def _of_tokenizer(path: Path) -> bool:
    named = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab", "merges")
    return path.is_file() and path.name.startswith(named)


def _base_of(source: Path) -> str:
    config: dict[str, Any] = json.loads((source / ADAPTER).read_text(encoding="utf-8"))
    return str(config["base_model_name_or_path"])


def _stored_dtype(source: Path) -> str:
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    stored = config.get("dtype") or config.get("torch_dtype")
    return "bf16" if stored in ("bfloat16", "float16") else "fp32"


def _probes(vocabulary: int) -> Tensor:
    """Token ids that do not depend on the run, [sequences, tokens]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, _PROBES, generator=generator)


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    causal = causal_model(model)
    with inference(causal):
        logits: Tensor = causal(input_ids=ids).logits.float()
    return logits


def _difference(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        return float("inf")
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-6))


def _size(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
