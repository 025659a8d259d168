"""What happened, in plain words: the sentences on top of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime

from compact_fast.evaluate.results import Measure, format_value, measures
from compact_fast.report.read import Run, number
from compact_fast.tables import counted

STRETCHES = 10  # pieces of a run in which the leading teacher is looked up
LEAST_ROWS = 3  # log rows a piece, so that one noisy row makes no leader


def summary(run: Run) -> list[str]:
    """One sentence or two a topic; every number is one of the files'."""
    topics = (
        _state(run),
        _loss(run),
        _trust(run),
        _right_wrong(run),
        _left_out(run),
        _agreement(run),
        *_evaluation(run),
        _speed(run),
        _backend(run),
    )
    return [words for words in topics if words]


def edges(values: Sequence[float]) -> tuple[float, float]:
    """Means over the first and the last tenth of the logged rows, at least one row each."""
    n = max(1, len(values) // 10)
    return math.fsum(values[:n]) / n, math.fsum(values[-n:]) / n


def leaders(run: Run) -> list[tuple[str, float, float]]:
    """Who had the largest mean weight from which step to which, neighbours merged."""
    rows = [r for r in run.train if any(f"teacher/{t}/weight" in r for t in run.teachers)]
    size = max(LEAST_ROWS, math.ceil(len(rows) / STRETCHES))
    out: list[tuple[str, float, float]] = []
    for start in range(0, len(rows), size):
        piece = rows[start : start + size]
        means = {}
        for teacher in run.teachers:
            values = run.series(f"teacher/{teacher}/weight", piece)[1]
            if values:
                means[teacher] = math.fsum(values) / len(values)
        if not means:
            continue
        best = max(means, key=lambda t: means[t])
        if out and out[-1][0] == best:
            out[-1] = (best, out[-1][1], piece[-1]["step"])
        else:
            out.append((best, piece[0]["step"], piece[-1]["step"]))
    return out


def _state(run: Run) -> str:
    status = str(run.info.get("status", "unknown"))
    logged = max((row["step"] for row in run.train), default=0)
    last = number(run.info.get("last_step"))  # absent while a run is on, or of an older version
    steps = logged if last is None else int(last)
    planned = number(run.info.get("steps")) or number(run.config.get("max_steps"))
    of = f" of {planned:,.0f}" if planned and planned >= max(steps, 1) else ""
    seconds = run.series("time")[1]
    took = f", {_duration(seconds[-1])} after its start" if seconds else ""
    if status == "finished":
        words = f"The run finished: {steps:,}{of} optimizer steps{took}."
    elif status == "running":
        words = "The run has not ended, or died without a word: run.json still says “running”. " + (
            f"Its last logged step is {logged:,}{of}{took}." if logged else "It logged no step."
        )
    else:
        words = f"The run did not finish (“{status}”): {steps:,}{of} optimizer steps{took}."
    resumed = run.info.get("resumed")
    if isinstance(resumed, list) and resumed:
        at = ", ".join(f"{r.get('step', 0):,}" for r in resumed[:5] if isinstance(r, dict))
        words += f" It was resumed {_times(len(resumed))}, from step {at}."
    return words


def _loss(run: Run) -> str:
    values = run.series("loss")[1]
    if not values:
        return ""
    first, last = edges(values)
    if len(values) == 1:
        return f"The only logged loss is {first:.3f} nats a token."
    verb = "fell" if last < first else "rose"
    tenth = max(1, len(values) // 10)
    rows = "row" if tenth == 1 else f"{tenth:,} rows"
    return (
        f"The loss {verb} from {first:.3f} to {last:.3f} nats a token (first and last {rows} of "
        "the log; “at the start” and “at the end” mean these below)."
    )


def _trust(run: Run) -> str:
    found = {}
    for teacher in run.teachers:
        values = run.series(f"teacher/{teacher}/weight")[1]
        if values:
            found[teacher] = edges(values)
    if len(found) < 2:
        return "Only one teacher: its weight is always 1." if found else ""
    start = max(found, key=lambda t: found[t][0])
    end = max(found, key=lambda t: found[t][1])
    least = min(found, key=lambda t: found[t][1])
    words = (
        f"Most trusted at the start: {start} (mean weight {found[start][0]:.3f}); at the end: "
        f"{end} ({found[end][1]:.3f}). Least trusted at the end: {least} ({found[least][1]:.3f})."
    )
    led = leaders(run)
    if len(led) == 1:
        return f"{words} {led[0][0]} led all the way."
    if len(led) <= 4:
        spans = "; ".join(f"{t} in steps {a:,} to {b:,}" for t, a, b in led)
        return f"{words} In the lead: {spans}."
    return f"{words} The lead changed {_times(len(led) - 1)}."


def _right_wrong(run: Run) -> str:
    right, wrong = run.series("weight/right")[1], run.series("weight/wrong")[1]
    if not right or not wrong:
        return ""
    (r0, r1), (w0, w1) = edges(right), edges(wrong)
    return (
        f"Rationales with the right answer got a mean weight of {r0:.3f} at the start and "
        f"{r1:.3f} at the end, those with a wrong one {w0:.3f} and {w1:.3f}."
    )


def _left_out(run: Run) -> str:
    words = []
    share = run.series("filtered_share")[1]
    if share:
        mean = math.fsum(share) / len(share)
        by_teacher = {}
        for teacher in run.teachers:
            values = run.series(f"teacher/{teacher}/filtered")[1]
            if values:
                by_teacher[teacher] = math.fsum(values) / len(values)
        if mean > 0 and by_teacher:
            most = max(by_teacher, key=lambda t: by_teacher[t])
            words.append(
                f"The consensus filter gave {100 * mean:.1f} % of the rationales no weight, most "
                f"often those of {most} ({100 * by_teacher[most]:.1f} %)."
            )
        else:
            words.append(f"The consensus filter took out {100 * mean:.1f} % of the rationales.")
    multiplied, bound = (run.series(n)[1] for n in ("kept_share", "gradient_error/hidden"))
    if multiplied and bound:
        words.append(
            f"skip_below multiplied {100 * math.fsum(multiplied) / len(multiplied):.1f} % of the "
            "logit gradients; what it left out of the hidden states' gradient has a norm of "
            f"{max(bound):.2g} at most."
        )
    skipped = run.total("skipped_questions")
    bad = [(t, run.total(f"teacher/{t}/nonfinite")) for t in run.teachers]
    counts = [(t, n) for t, n in bad if n]
    if skipped is not None:
        words.append(
            "No question was skipped."
            if not skipped
            else f"{counted(round(skipped), 'question')} "
            f"{'was' if skipped == 1 else 'were'} skipped: no teacher's scores were finite."
        )
    if counts:
        parts = ", ".join(f"{t} {n:,.0f}" for t, n in counts)
        words.append(f"Rationales with scores that were not finite, given no weight: {parts}.")
    elif any(n is not None for _, n in bad):
        words.append("All scores were finite.")
    return " ".join(words)


def _agreement(run: Run) -> str:
    found = run.agreement or {}
    names, matrix = found.get("teachers") or [], found.get("matrix") or []
    K = len(names)
    if K < 2 or len(matrix) != K or any(len(row) != K for row in matrix):
        return ""
    pairs = [
        (value, i, j)
        for i in range(K)
        for j in range(i)
        if (value := number(matrix[i][j])) is not None
    ]
    if not pairs:
        return ""
    high, low = max(pairs), min(pairs)
    words = f"{names[high[2]]} and {names[high[1]]} agree most ({high[0]:.2f})"
    if len(pairs) > 1:
        words += f", {names[low[2]]} and {names[low[1]]} least ({low[0]:.2f})"
    return words + "."


def _evaluation(run: Run) -> list[str]:
    found = run.evaluation or {}
    before = {m.key: m for m in measures(found.get("before") or {})}
    after = {m.key: m for m in measures(found.get("after") or {})}
    out = []
    for key in (
        "exact_match",
        "exact_match_sampled",
        "options/letter/sum",
        "options/text/sum",
        "rationale_nll",
        "perplexity",
    ):
        b, a = before.get(key), after.get(key)
        if a is None and b is None:
            continue
        if a is None or b is None:
            m, when = (a, "after") if a is not None else (b, "before")
            assert m is not None
            out.append(f"{_sentence(m)}: {_value(m)} {when} training{_on(m)}.")
        else:
            change = f"{_value(b)} before training, {_value(a)} after"
            out.append(f"{_sentence(a)}: {change}{_on(a)}{_apart(b, a)}.")
    return out


def _apart(before: Measure, after: Measure) -> str:
    if before.interval is None or after.interval is None:
        return ""
    apart = before.interval[0] > after.interval[1] or after.interval[0] > before.interval[1]
    return f"; their 95 % intervals {'do not overlap' if apart else 'overlap'}"


def _speed(run: Run) -> str:
    values = sorted(run.series("tokens_per_second")[1])
    if not values:
        return ""
    return f"Half of the time it trained at {_median(values):,.0f} tokens a second or more."


def _backend(run: Run) -> str:
    backend = run.info.get("backend")
    if not isinstance(backend, dict):
        return ""
    words = f"The loss ran on the backend “{backend.get('name', 'unknown')}”"
    if backend.get("reason"):
        words += f" ({backend['reason']})"
    if run.info.get("device"):
        words += f", on {run.info['device']}"
    if run.info.get("consensus_backend"):
        words += f"; the consensus on “{run.info['consensus_backend']}”"
    return words + "."


def duration_of(run: Run) -> str:
    """Wall-clock time between the run's start and end, in words; empty if unknown."""
    try:
        start = datetime.fromisoformat(str(run.info["started"]).replace("Z", "+00:00"))
        end = datetime.fromisoformat(str(run.info["finished"]).replace("Z", "+00:00"))
        return _duration((end - start).total_seconds())
    except (KeyError, ValueError, TypeError):
        return ""


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _median(ordered: Sequence[float]) -> float:
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def _times(n: int) -> str:
    return {1: "once", 2: "twice"}.get(n, f"{n} times")


def _sentence(m: Measure) -> str:
    return m.label[0].upper() + m.label[1:]


def _value(m: Measure) -> str:
    return format_value(m.kind, m.value)


def _on(m: Measure) -> str:
    return f" ({m.count:,} {m.counted})" if m.count is not None else ""
