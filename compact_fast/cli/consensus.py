"""`compact-fast consensus`: graph consensus of a file of any size, without a student."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compact_fast.cli.arguments import Arguments, Option
from compact_fast.cli.train import say
from compact_fast.cli.verb import Verb
from compact_fast.flat_yaml import Setting, check, parse_text
from compact_fast.run_config import schema
from compact_fast.tables import ProgressLine, counted, duration, indent, percent, table

if TYPE_CHECKING:
    from compact_fast.graphs.rows import QuestionTexts
    from compact_fast.graphs.stream import StreamReport


def run(arguments: Arguments) -> int:
    source = Path(arguments.positionals[0])
    backend = _value(arguments, "backend", "consensus_backend")
    threads = _value(arguments, "threads", "consensus_threads")
    if (name := arguments.option("explain")) is not None:
        _explain(source, name, backend, arguments.option("output"))
        return 0
    target = arguments.option("output")
    if target is None or not target.endswith(".parquet") or Path(target).is_dir():
        got = "missing" if target is None else target
        raise ValueError(f"--output: {got}: expected a file name that ends in .parquet")
    from compact_fast.graphs.stream import resumable, score_file

    if resumable(target):
        say(f"going on with an earlier run of {target}")
    started = time.monotonic()
    progress = _ConsensusLine()
    report = score_file(
        source, target, convert=_texts, backend=backend, threads=threads, on_progress=progress
    )
    progress.close()
    say(indent(teachers_text(report)) + "\n")
    say(_flags(report))
    if report.answer_only:
        say(_too_long(report))
    spent = time.monotonic() - started
    new = report.questions - report.resumed_at
    earlier = f", {report.resumed_at:,} of them by an earlier run" if report.resumed_at else ""
    speed = f"{new / max(spent, 1e-9):,.0f} questions/s"
    done = f"{counted(report.questions, 'question')}{earlier}, {duration(spent)}, {speed}"
    say(f"Wrote {target}: {done}")
    return 0


def _texts(row: Mapping[str, Any], place: str) -> QuestionTexts:
    """A row of any shape that `train` reads, if it holds a whole question."""
    from compact_fast.graphs.rows import QuestionTexts, question_texts

    if not {"completion", "completions"} & set(row):
        return question_texts(row, place)
    from compact_fast.data.shapes import parse_row

    parsed = parse_row(row, place, need_rationales=True)
    if parsed.problems:
        name, what = parsed.problems[0]
        raise ValueError(f"{place}:{name}: {what}")
    question = parsed.question
    if question is None or parsed.partial:
        raise ValueError(
            f"{place}:completion: one teacher's alone; a file that is streamed needs a question's "
            "rationales in one row: teachers and completions, or rationales"
        )
    return QuestionTexts(
        question.id or place,
        [r.teacher for r in question.rationales],
        [r.text for r in question.rationales],
        None,
        question.answer or None,
        place,
    )


class _ConsensusLine(ProgressLine):
    """Questions done, speed and time left, by the share of the file."""

    def __init__(self) -> None:
        super().__init__("consensus")
        self._first: tuple[int, float] | None = None  # what an earlier run had done

    def __call__(self, done: int, share: float) -> None:
        if self._first is None:
            self._first = done, share
        questions, read = done - self._first[0], share - self._first[1]
        passed = max(time.monotonic() - self.start, 1e-9)
        left = f", {duration(passed / read * (1 - share))} left" if read > 0 else ""
        speed = f"{questions / passed:,.0f} a second"
        self.show(f"consensus: {done:,} questions ({percent(share)} of the file), {speed}{left}")


def _value(arguments: Arguments, option: str, key: str) -> Any:
    """An option's value, checked as the configuration key that means the same."""
    text = arguments.option(option)
    if text is None:
        return schema()[key].default
    hint = schema()[key].hint
    return check(Setting(parse_text(text, hint), f"--{option}"), key, hint)


def teachers_text(report: StreamReport) -> str:
    """One line a teacher, over the whole file."""
    rows = [
        [
            t.teacher,
            f"{t.rationales:,}",
            f"{t.mean_score:.2f}",
            f"{t.mean_agreement:.2f}",
            percent(t.share_copied),
            percent(t.share_filtered),
            percent(t.share_right),
        ]
        for t in report.teachers
    ]
    headers = ["teacher", "rationales", "score", "agreement", "copied", "filtered", "right"]
    return table(headers, rows)


def _flags(report: StreamReport) -> str:
    n = max(report.questions, 1)
    return (
        f"{percent(report.no_evidence / n)} of questions without evidence, "
        f"{percent(report.undecidable / n)} undecidable"
    )


def _too_long(report: StreamReport) -> str:
    """Rationales that count by their answers alone; an earlier run has named its own."""
    from compact_fast.graphs.limits import limits_sentence

    here = report.answer_only_places
    earlier = report.answer_only - len(here)
    parts = [limits_sentence(here)] if here else []
    if earlier:
        parts.append(f"{earlier:,} in the part done by an earlier run (column answer_only)")
    return "; ".join(parts)


def _explain(source: Path, name: str, backend: Any, output: str | None) -> None:
    from compact_fast.graphs.explain import examine
    from compact_fast.graphs.limits import limits_sentence, stand_ins
    from compact_fast.graphs.picture import save

    picture = Path(output or re.sub(r"[^\w.-]+", "-", f"consensus-{name}") + ".png")
    if picture.suffix != ".png" or picture.is_dir():
        raise ValueError(
            f"--output: {picture}: expected a file name that ends in .png, for --explain"
        )
    question = _question(source, name)
    texts, beyond = stand_ins(
        question.texts, find_answers=question.answers is None, backend=backend
    )
    if beyond:
        say(limits_sentence([question.named(k) for k in beyond]))
    found = examine(texts, question.teachers, final_answers=question.answers, backend=backend)
    say(found.text(max(shutil.get_terminal_size((120, 24)).columns, 60)))
    save(found, picture)
    say(f"Wrote {picture}")


def _question(source: Path, name: str) -> QuestionTexts:
    from compact_fast.flat_yaml import near
    from compact_fast.graphs.rows import RowReader

    names = []
    for place, row in RowReader(source).rows():
        question = _texts(row, place)
        if question.id == name:
            return question
        names.append(question.id)
    raise ValueError(f"--explain: {source} has no question {name!r}{near(name, names)}")


VERB = Verb(
    name="consensus",
    summary="Score how far the teachers of each question agree; needs no student.",
    details=(
        "DATA is a .jsonl or .parquet file of any size, a question a row. A run that was cut off "
        "goes on where it was when the same command is given again. One row a question comes out: "
        "id, teachers, scores, agreement, groups, right, no_evidence, undecidable, answer_only."
    ),
    run=run,
    names=("DATA",),
    required=1,
    options=(
        Option(
            "output",
            "The parquet file to write; with --explain the picture, a .png file.",
            "FILE",
            short="o",
        ),
        Option(
            "explain",
            "Show one question's steps, matches and scores side by side instead, here and as a "
            "picture (consensus-ID.png unless --output names another).",
            "ID",
        ),
        Option("threads", "Threads; all cores unless given.", "N"),
        Option("backend", "auto, native or rustworkx. Default: auto.", "NAME"),
    ),
)
