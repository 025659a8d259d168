"""A student small enough to train in a second, and the command as users start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest


def entry_point() -> list[str]:
    """The installed command, or the module where the package is only importable."""
    script = Path(sysconfig.get_path("scripts")) / "compact-fast"
    return [str(script)] if script.exists() else [sys.executable, "-m", "compact_fast"]


@pytest.fixture(scope="session")
def command(tmp_path_factory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `compact-fast ARGS` in a process of its own."""
    root = str(Path(__file__).parents[2])
    cache = str(tmp_path_factory.mktemp("cache"))

    def run(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "PYTHONPATH": path, "COMPACT_FAST_CACHE": cache, "COLUMNS": "100"}
        return subprocess.run(
            [*entry_point(), *map(str, words)],
            env=env,
            cwd=cwd or cache,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory) -> str:
    """A folder with an untrained student of two small layers and the world's tokenizer."""
    import torch
    from transformers import LlamaForCausalLM

    from compact_fast.arithmetic.student import make_config, make_tokenizer

    folder = tmp_path_factory.mktemp("student") / "tiny"
    config = make_config()
    config.hidden_size, config.intermediate_size = 32, 64
    config.num_attention_heads = config.num_key_value_heads = 2
    config.head_dim = 16
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def rationales(tmp_path) -> Path:
    """Six questions in the record format, two teachers, one of them wrong about half."""
    path = tmp_path / "rationales.jsonl"
    rows = []
    for i in range(6):
        right, wrong = 3 + i, 4 + i
        other = wrong if i % 2 else right
        rows.append(
            {
                "id": f"q{i}",
                "question": f"Ann has 3 apples. On Monday she finds {i}. How many has she?",
                "answer": str(right),
                "rationales": [
                    {"teacher": "ada", "text": f"3 + {i} = {right}. The answer is {right}."},
                    {"teacher": "bob", "text": f"3 + {i} = {other}. The answer is {other}."},
                ],
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
