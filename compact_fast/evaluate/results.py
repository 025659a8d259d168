"""What an evaluation found: plain numbers with their uncertainty, as JSON and as a text table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Share:
    """A share of right answers. `right` may be fractional: mean over the samples of a question."""

    right: float
    total: int
    standard_error: float

    @classmethod
    def of(cls, scores: Iterable[float]) -> Share:
        """From one score in [0, 1] a question; the standard error is between questions."""
        values = list(scores)
        n = len(values)
        if not n:
            return cls(0.0, 0, math.nan)
        mean = sum(values) / n
        variance = sum((v - mean) ** 2 for v in values) / n
        return cls(sum(values), n, math.sqrt(variance / n))

    @property
    def accuracy(self) -> float:
        return self.right / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval; fractional scores count as the sample size of equal variance."""
        if not self.total:
            return (math.nan, math.nan)
        p = self.accuracy
        spread = p * (1 - p)
        n = spread / self.standard_error**2 if self.standard_error > 0 else float(self.total)
        centre = (p + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
        half = Z_95 / (1 + Z_95**2 / n) * math.sqrt(spread / n + Z_95**2 / (4 * n * n))
        return (max(0.0, centre - half), min(1.0, centre + half))

    def to_dict(self) -> dict[str, Any]:
        low, high = self.interval
        return {
            "right": self.right,
            "questions": self.total,
            "accuracy": self.accuracy,
            "standard_error": self.standard_error,
            "interval_95": [low, high],
        }


@dataclass(frozen=True)
class Answer:
    """One generated completion and how it was judged."""

    id: str
    gold: str
    answer: str | None
    right: bool
    finished: bool
    text: str


@dataclass(frozen=True)
class ExactMatch:
    """Generated final answers compared with the gold ones."""

    share: Share
    decoding: str
    samples: int
    unanswered: int
    unfinished: int
    max_new_tokens: int
    tokens: int
    seconds: float
    answers: list[Answer] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.share.to_dict(),
            "decoding": self.decoding,
            "samples_per_question": self.samples,
            "unanswered": self.unanswered,
            "unfinished": self.unfinished,
            "max_new_tokens": self.max_new_tokens,
            "generated_tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": _rate(self.tokens, self.seconds),
        }


@dataclass(frozen=True)
class OptionLikelihood:
    """Multiple choice: the option with the largest log-likelihood, by form and by normalisation.

    Keys of `shares`: "letter" or "text" (what was scored), then "sum" or "per_byte".
    """

    shares: dict[str, dict[str, Share]]
    lead: str
    without_choices: int
    tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            **{
                form: {norm: share.to_dict() for norm, share in by_norm.items()}
                for form, by_norm in self.shares.items()
            },
            "lead": self.lead,
            "without_choices": self.without_choices,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": _rate(self.tokens, self.seconds),
        }


@dataclass(frozen=True)
class TeacherNll:
    """Mean over rationales of S_NLL (mean over the rationale's tokens), nats a token."""

    nll: float
    standard_error: float
    rationales: int
    tokens: int


@dataclass(frozen=True)
class RationaleNll:
    """How well the student predicts held-out rationales. `overall` weighs rationales equally."""

    overall: TeacherNll
    teachers: dict[str, TeacherNll]
    nonfinite: int
    tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self.overall),
            "teachers": {name: asdict(value) for name, value in self.teachers.items()},
            "nonfinite": self.nonfinite,
            "read_tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": _rate(self.tokens, self.seconds),
        }


@dataclass(frozen=True)
class TextPerplexity:
    """Likelihood of a text in sliding windows; nats summed over `tokens` scored tokens."""

    nats: float
    tokens: int
    bytes: int
    unscored_tokens: int
    window: int
    stride: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        per_token = self.nats / self.tokens if self.tokens else math.nan
        return {
            "perplexity": math.exp(per_token) if per_token < 700 else math.inf,
            "nll": per_token,
            "bits_per_token": per_token / math.log(2),
            "bits_per_byte": self.nats / math.log(2) / self.bytes if self.bytes else math.nan,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "unscored_tokens": self.unscored_tokens,
            "window": self.window,
            "stride": self.stride,
            "seconds": self.seconds,
            "tokens_per_second": _rate(self.tokens, self.seconds),
        }


@dataclass(frozen=True)
class EvaluationResult:
    """Every measure that was asked for; None where it was not."""

    exact_match: ExactMatch | None = None
    exact_match_sampled: ExactMatch | None = None
    options: OptionLikelihood | None = None
    rationale_nll: RationaleNll | None = None
    perplexity: TextPerplexity | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: measures by name, those not asked for left out; numbers that are not finite
        become None (JSON has none)."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return {n: _json_safe(p.to_dict()) for n, p in parts.items() if p is not None}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def table(self) -> str:
        """Plain text, one line a measure."""
        return measures_table(measures(self.to_dict()))


@dataclass(frozen=True)
class Measure:
    """One line of a table. `kind` says how to print the value: "share", "nats" or "bits"."""

    key: str
    label: str
    kind: str
    value: float | None
    standard_error: float | None = None
    interval: tuple[float, float] | None = None
    count: int | None = None
    counted: str = "questions"
    seconds: float | None = None
    tokens_per_second: float | None = None
    note: str = ""

    @property
    def better(self) -> str:
        return "higher" if self.kind == "share" else "lower"


def measures(result: Mapping[str, Any]) -> list[Measure]:
    """The lines of an evaluation as `EvaluationResult.to_dict` gives it (or its JSON)."""
    lines: list[Measure] = []
    for key, label in (
        ("exact_match", "exact match"),
        ("exact_match_sampled", "exact match"),
    ):
        if part := result.get(key):
            remarks = []
            if part.get("unanswered"):
                remarks.append(f"{part['unanswered']} without an answer")
            if part.get("unfinished"):
                remarks.append(f"{part['unfinished']} cut at {part['max_new_tokens']} tokens")
            lines.append(
                _share_line(key, f"{label}, {part['decoding']}", part, part, ", ".join(remarks))
            )
    if part := result.get("options"):
        for form in ("letter", "text"):
            for norm, words in (("sum", "sum"), ("per_byte", "per byte")):
                if share := part.get(form, {}).get(norm):
                    label = f"option {form} by likelihood, {words}"
                    lines.append(_share_line(f"options/{form}/{norm}", label, share, part, ""))
    if part := result.get("rationale_nll"):
        note = f"{part['nonfinite']} non-finite, left out" if part.get("nonfinite") else ""
        lines.append(_nll_line("rationale_nll", "rationale NLL", part, note, part))
        for name, teacher in part.get("teachers", {}).items():
            lines.append(_nll_line(f"rationale_nll/{name}", f"rationale NLL, {name}", teacher, ""))
    if part := result.get("perplexity"):
        speed = (part.get("seconds"), part.get("tokens_per_second"))
        for key, label, kind in (
            ("perplexity", "text perplexity", "number"),
            ("bits_per_token", "text, bits a token", "bits"),
            ("bits_per_byte", "text, bits a byte", "bits"),
        ):
            count, counted = (
                (part["bytes"], "bytes") if key == "bits_per_byte" else (part["tokens"], "tokens")
            )
            lines.append(
                Measure(
                    f"perplexity/{key}" if key != "perplexity" else key,
                    label,
                    kind,
                    part.get(key),
                    count=count,
                    counted=counted,
                    seconds=speed[0] if key == "perplexity" else None,
                    tokens_per_second=speed[1] if key == "perplexity" else None,
                )
            )
    return lines


def format_value(kind: str, value: float | None) -> str:
    """A value with its unit."""
    if value is None or not math.isfinite(value):
        return "none"
    if kind == "share":
        return f"{100 * value:.1f} %"
    unit = {"nats": " nats", "bits": " bits"}.get(kind, "")
    return f"{value:.4f}{unit}" if abs(value) < 1000 else f"{value:,.0f}{unit}"


def measures_table(lines: Iterable[Measure]) -> str:
    """Aligned columns; a dash stands where a column does not apply."""
    head = ("measure", "value", "s.e.", "95 % interval", "n", "seconds", "tokens/s", "")
    rows = [head]
    for m in lines:
        interval = "-"
        if m.interval is not None:
            interval = f"{100 * m.interval[0]:.1f} to {100 * m.interval[1]:.1f} %"
        error = "-" if m.standard_error is None else format_value(m.kind, m.standard_error)
        rows.append(
            (
                m.label,
                format_value(m.kind, m.value),
                error,
                interval,
                "-" if m.count is None else f"{m.count:,} {m.counted}",
                "-" if m.seconds is None else f"{m.seconds:.1f}",
                "-" if m.tokens_per_second is None else f"{m.tokens_per_second:,.0f}",
                m.note,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in (0, 7) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _share_line(
    key: str, label: str, share: Mapping[str, Any], part: Mapping[str, Any], note: str
) -> Measure:
    low, high = share["interval_95"]
    return Measure(
        key,
        label,
        "share",
        share["accuracy"],
        share["standard_error"],
        None if low is None or high is None else (low, high),
        share["questions"],
        seconds=part.get("seconds"),
        tokens_per_second=part.get("tokens_per_second"),
        note=note,
    )


def _nll_line(
    key: str,
    label: str,
    part: Mapping[str, Any],
    note: str,
    speed: Mapping[str, Any] | None = None,
) -> Measure:
    return Measure(
        key,
        label,
        "nats",
        part["nll"],
        part["standard_error"],
        count=part["rationales"],
        counted="rationales",
        seconds=speed.get("seconds") if speed else None,
        tokens_per_second=speed.get("tokens_per_second") if speed else None,
        note=note,
    )


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else math.nan


def _json_safe(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(v) for v in value]
    return value
