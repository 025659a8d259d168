"""Fixtures for the graph tests: both implementations, and the real rationales where present."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graph_support import HAS_NATIVE


@pytest.fixture(params=["native", "rustworkx"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and not HAS_NATIVE:
        pytest.skip("the native module is not built")
    return request.param


@pytest.fixture(scope="session")
def real() -> Any:
    """real(name) -> (rows, texts, cu_teachers, final answers) of a file of real rationales."""
    root = Path(__file__).parents[2]
    folder = Path(os.environ.get("COMPACT_FAST_DATA", root.parent / "shared" / "data"))

    def load(name: str) -> tuple[list[dict[str, Any]], list[str], Any, list[str | None]]:
        path = folder / f"{name}.jsonl"
        if not path.exists():
            pytest.skip(f"{path} is absent (COMPACT_FAST_DATA names the folder)")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        flat = [r for row in rows for r in row["rationales"]]
        cu = np.cumsum([0] + [len(row["rationales"]) for row in rows])
        return rows, [r["text"] for r in flat], cu, [r["answer"] for r in flat]

    return load
