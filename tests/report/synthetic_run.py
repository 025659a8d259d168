"""Run directories as training writes them, without training."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

SHORT = ["strong", "misleading"]
FOUR = ["gpt-4o", "gemini-1.5-flash", "llama3-70b", "human"]
EIGHT = [
    "meta-llama/Llama-3.3-70B-Instruct-Turbo@L3",
    "meta-llama/Llama-3.3-70B-Instruct-Turbo@L4",
    "Qwen/Qwen2.5-72B-Instruct",
    "mistralai/Mixtral-8x22B-Instruct-v0.1",
    "gpt-4o-2024-11-20",
    "$cheap$ <b>&\"model\"</b><script>alert('x')</script>",
    "教師",
    "human",
]


def make_run(path, teachers, steps, *, status="finished", seed=0, known=True):
    """Writes every file of a run; the log has a row a step and five evaluations."""
    rng = random.Random(seed)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    info = {
        "config": {"student": "arithmetic", "weighting": "compact", "mi": "logit", "lora": False},
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
        "backend": {"name": "torch", "reason": "triton: no CUDA device is visible"},
        "consensus_backend": "native",
        "teachers": teachers,
        "device": "cpu, 2 threads",
        "started": "2026-01-01T10:00:00+00:00",
        "steps": steps,
        "status": status,
    }
    if status != "running":
        info["finished"] = "2026-01-01T10:06:05+00:00"
    (path / "run.json").write_text(json.dumps(info))
    lines = []
    for step in range(1, steps + 1):
        lines.append(training_row(step, steps, teachers, rng, known))
        if step % max(1, steps // 5) == 0:
            held = {f"eval/teacher/{t}/nll": 1.5 + 0.1 * i for i, t in enumerate(teachers)}
            lines.append({"step": step, "time": float(step), "eval_nll": 1.2, **held})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    K = len(teachers)
    matrix = [[1.0 if i == j else 0.9 - 0.07 * abs(i - j) for j in range(K)] for i in range(K)]
    if K > 2:
        matrix[0][K - 1] = matrix[K - 1][0] = None
    shares = {t: (0.95 - 0.1 * i if known and i != 1 else None) for i, t in enumerate(teachers)}
    agreement = {
        "teachers": teachers,
        "matrix": matrix,
        "counts": [[200] * K] * K,
        "share_right": shares,
    }
    (path / "agreement.json").write_text(json.dumps(agreement))
    evaluation = {"before": evaluated(0.55, 2.3, teachers), "after": evaluated(0.83, 0.9, teachers)}
    (path / "evaluation.json").write_text(json.dumps(evaluation))
    return path


def training_row(step, steps, teachers, rng, known=True):
    x = step / steps
    raw = [
        math.exp(min(1, 3 * x) * math.sin(1.7 * i) + rng.gauss(0, 0.2))
        for i in range(len(teachers))
    ]
    row = {
        "step": step,
        "epoch": x,
        "time": 0.3 * step,
        "loss_sft": 2.2 * math.exp(-3 * x) + 0.4 + rng.gauss(0, 0.05),
        "loss_consistency": 0.03 * math.exp(-x) + abs(rng.gauss(0, 0.004)),
        "weight_entropy": 1.2 - 0.3 * x,
        "learning_rate": 1e-3 * (1 - x),
        "grad_norm": abs(rng.gauss(1, 0.2)),
        "tokens_per_second": 5200 + rng.gauss(0, 200),
        "questions_per_second": 14 + rng.gauss(0, 0.6),
        "filtered_share": 0.2 + rng.gauss(0, 0.02),
        "skipped_questions": 0.0,
    }
    row["loss"] = row["loss_sft"] + row["loss_consistency"]
    if known:
        row["weight/right"], row["weight/wrong"] = 0.25 + 0.1 * x, 0.25 - 0.15 * x
    for i, (teacher, value) in enumerate(zip(teachers, raw, strict=True)):
        row[f"teacher/{teacher}/weight"] = value / sum(raw)
        row[f"teacher/{teacher}/nll"] = 2 * math.exp(-2 * x) + 0.3 + 0.05 * i
        row[f"teacher/{teacher}/mi"] = 1.5 + 0.4 * math.cos(i) + x + rng.gauss(0, 0.2)
        row[f"teacher/{teacher}/consensus"] = 0.75 + 0.1 * math.sin(1.7 * i) + rng.gauss(0, 0.02)
        row[f"teacher/{teacher}/nonfinite"] = 0.0
        row[f"teacher/{teacher}/filtered"] = 0.05 * i
        row[f"teacher/{teacher}/grad_norm"] = 0.8 + 0.2 * i - 0.4 * x + abs(rng.gauss(0, 0.1))
        row[f"teacher/{teacher}/grad_cosine"] = 0.4 - 0.1 * i + rng.gauss(0, 0.05)
    return row


def evaluated(accuracy, nll, teachers):
    error = math.sqrt(accuracy * (1 - accuracy) / 300)
    share = {
        "right": accuracy * 300,
        "questions": 300,
        "accuracy": accuracy,
        "standard_error": error,
        "interval_95": [accuracy - 1.96 * error, accuracy + 1.96 * error],
    }
    speed = {"seconds": 12.0, "tokens_per_second": 700.0}
    part = {"nll": nll, "standard_error": 0.02, "rationales": 400, "tokens": 9000}
    return {
        "exact_match": {
            **share,
            **speed,
            "decoding": "greedy",
            "unanswered": 3,
            "unfinished": 1,
            "max_new_tokens": 64,
        },
        "rationale_nll": {
            **part,
            **speed,
            "nonfinite": 0,
            "teachers": {t: {**part, "nll": nll + 0.1 * i} for i, t in enumerate(teachers)},
        },
        "perplexity": {
            **speed,
            "perplexity": math.exp(nll + 1),
            "bits_per_token": (nll + 1) / math.log(2),
            "bits_per_byte": (nll + 1) / math.log(16),
            "tokens": 5000,
            "bytes": 20000,
        },
    }
