"""Autotuning of the logits GEMM: off unless COMPACT_FAST_AUTOTUNE=1.

The table in `launch.py` is what runs. Switched on, the first call with a new (device, vocabulary,
width, epilogue, dtype) times the table's choice and its candidates on the arguments at hand, and
keeps the quickest in a file of Triton's cache folder; later runs read it there. Sums over the
vocabulary are cut at tile borders, so another choice may change the last bits of a result: that is
why it is off.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from torch import Tensor

from .launch import LOGITS_GEMM_CANDIDATES, GemmConfig, architecture, gemm_config
from .logits_gemm import logits_exp, new_partials, padded_width

logger = logging.getLogger(__name__)

SWITCH = "COMPACT_FAST_AUTOTUNE"
ROWS = 2048  # rows that a candidate is timed on, at most: some milliseconds each

_chosen: dict[str, GemmConfig] = {}


def is_on() -> bool:
    """Whether the environment asks for autotuning. Raises ValueError for anything but 0 and 1."""
    value = os.environ.get(SWITCH, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{SWITCH}={value!r}: expected 0 (the table) or 1 (measure)")
    return value == "1"


def tuned_config(
    x: Tensor,  # [n, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    *,
    statistics: bool,
    softcap: float = 0.0,
) -> GemmConfig:
    """The table's configuration, or the measured one where autotuning is on."""
    usual = gemm_config(x, statistics=statistics, bias=bias is not None, softcap=softcap)
    if not is_on():
        return usual
    form = (*weight.shape, statistics, bias is not None, x.dtype, *([softcap] if softcap else []))
    key = "|".join(map(str, (_device_name(x), triton.__version__, *form)))
    if key not in _chosen:
        _chosen[key] = _read(key) or _measure(
            key, usual, x, weight, bias, statistics=statistics, softcap=softcap
        )
    return _chosen[key]


def cache_file() -> Path:
    """Where choices are kept."""
    return Path(triton.knobs.cache.dir) / "compact_fast_autotune.json"


def _device_name(x: Tensor) -> str:
    return torch.cuda.get_device_name(x.device) if x.is_cuda else architecture(x)


def _read(key: str) -> GemmConfig | None:
    found = _contents().get(key)
    try:
        return None if found is None else GemmConfig(**found)
    except TypeError:  # written by another version
        return None


def _contents() -> dict[str, dict[str, object]]:
    try:
        found = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _measure(
    key: str,
    usual: GemmConfig,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    statistics: bool,
    softcap: float,
) -> GemmConfig:
    x = x[:ROWS]
    n, V = x.shape[0], weight.shape[0]
    targets = torch.zeros(n, dtype=torch.long, device=x.device)
    offset = torch.zeros(n, dtype=torch.float32, device=x.device)
    exps = weight.new_empty(n, padded_width(V))[:, :V]
    times: dict[GemmConfig, float] = {}
    for config in (usual, *LOGITS_GEMM_CANDIDATES[architecture(x)]):

        def run(config: GemmConfig = config) -> None:
            partials = new_partials(n, weight, config, statistics=statistics)
            logits_exp(
                x, weight, bias, targets, offset, exps, partials, config, statistics=statistics,
                softcap=softcap,
            )  # fmt: skip

        try:
            times[config] = milliseconds(run)
        except triton.runtime.errors.OutOfResources:
            continue  # a smaller chip of the same architecture
    best = min(times, key=lambda config: times[config])
    logger.info(
        "autotuning %s: %s at %.3f ms, the table's choice takes %.3f",
        key, best, times[best], times.get(usual, float("nan")),
    )  # fmt: skip
    _keep(key, best)
    return best


def milliseconds(run: Callable[[], None]) -> float:
    """Median time on the device."""
    return float(triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median"))


def _keep(key: str, config: GemmConfig) -> None:
    """Add to the file, whole or not at all; a folder that cannot be written costs a measurement."""
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(_contents() | {key: asdict(config)}, indent=1))
        part.replace(path)
    except OSError as error:
        logger.warning("autotuning: %s cannot be kept: %s", path, error)
