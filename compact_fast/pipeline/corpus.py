"""The questions of a run: read, restricted to teachers, and split into training and held-out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compact_fast.data.records import Question, select_teachers, teachers_of
from compact_fast.run_config import ARITHMETIC, RunConfig

# Offset between the built-in world's training seed and the seed of its evaluation problems.
EVALUATION_SEED = 1_000_003
WORLD_PROBLEMS = 300  # to evaluate on, unless told


@dataclass(frozen=True)
class Corpus:
    """Questions with rationales, and the teachers in the order of their ids."""

    train: list[Question]
    held_out: list[Question]
    teachers: list[str]
    source: str
    """What was read, for people."""

    quarantined: int = 0
    """Broken records set aside."""

    @property
    def questions(self) -> list[Question]:
        """All of them; a question's place here is its index."""
        return [*self.train, *self.held_out]


def read_corpus(
    config: RunConfig, *, quarantine: Path | None = None, cache_dir: Path | None = None
) -> Corpus:
    """Read `data`, or draw it from the built-in world, and hold a share of the questions out.

    Broken records go to the file `quarantine` when on_error is "skip" (None: they are only
    counted). With a `cache_dir` the questions of a faultless file are kept there. Raises ValueError
    as the readers do, and when nothing is left to train on.
    """
    source, teachers = str(config.run.data), config.data.teachers
    skipped = 0
    if quarantine is not None:
        quarantine.unlink(missing_ok=True)  # an earlier run's
    if source == ARITHMETIC:
        questions = world_questions(config)
        source = (
            f"the built-in world ({config.world.world_scenario}, seed {config.world.world_seed})"
        )
    else:
        questions, skipped = _read(config, source, quarantine, cache_dir)
    if teachers is not None:
        questions = select_teachers(questions, teachers)
    else:
        teachers = teachers_of(questions)
    _check_fixed_weights(config, teachers)
    train, held_out = split(questions, config.data.holdout, config.method.seed)
    if not train:
        raise ValueError(f"{config.run.data}: no question left to train on")
    return Corpus(train, held_out, list(teachers), source, skipped)


def _read(
    config: RunConfig, source: str, quarantine: Path | None, cache_dir: Path | None
) -> tuple[list[Question], int]:
    from compact_fast.data import read_questions
    from compact_fast.data.kept import kept_questions

    options: dict[str, Any] = {
        "split": config.data.split,
        "on_error": config.data.on_error,
        "limit": config.data.limit,
    }

    def read() -> tuple[list[Question], int]:
        found = read_questions(source, quarantine=quarantine, **options)
        return list(found), found.skipped

    return kept_questions(source, cache_dir, options, read)


def cache_folder(config: RunConfig) -> Path:
    """Where questions, tokenised data and consensus scores are kept.

    `cache_dir`, else $COMPACT_FAST_CACHE, else compact_fast in the user's cache folder.
    """
    if config.data.cache_dir is not None:
        return Path(config.data.cache_dir)
    if named := os.environ.get("COMPACT_FAST_CACHE"):
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "compact_fast"


def world_questions(config: RunConfig) -> list[Question]:
    """The built-in world's training questions."""
    from compact_fast.arithmetic import make_questions

    w = config.world
    number = min(w.world_questions, config.data.limit or w.world_questions)
    return make_questions(
        number, w.world_seed, scenario=w.world_scenario, shuffle_styles=w.world_shuffle_styles
    )


def evaluation_questions(config: RunConfig) -> tuple[list[Question], str] | None:
    """Questions to evaluate on and what they are, or None when the run asks for none."""
    path, number = config.evaluation.eval_data, config.evaluation.eval_questions
    if number == 0 or (path is None and config.run.data != ARITHMETIC):
        return None
    if path is not None and path != ARITHMETIC:
        from compact_fast.data import read_questions

        questions = read_questions(
            path,
            split=config.data.split,
            on_error=config.data.on_error,
            limit=number,
            need_rationales=False,
        )
        return list(questions), path
    from compact_fast.arithmetic import make_questions

    w = config.world
    problems = make_questions(
        WORLD_PROBLEMS if number is None else number,
        w.world_seed + EVALUATION_SEED,
        scenario=w.world_scenario,
        shuffle_styles=w.world_shuffle_styles,
    )
    return problems, "the built-in world"


def refuse_absent(config: RunConfig) -> None:
    """Raise now what else would be raised only behind the student: evaluation files that are not
    there, and a backend of an unknown name."""
    e = config.evaluation
    if e.eval_data not in (None, ARITHMETIC) and e.eval_questions != 0:
        from compact_fast.data.files import require_file

        require_file(str(e.eval_data))
    if e.forget_text is not None:
        from compact_fast.evaluate import read_text

        read_text(e.forget_text)
    if config.training.backend != "auto":
        from compact_fast.backends import choose

        choose(config.training.backend)


def split(
    questions: Sequence[Question], share: float, seed: int
) -> tuple[list[Question], list[Question]]:
    """Training and held-out questions, each in the given order.

    A question's side depends on its id and the seed alone, but for the last place: the held-out are
    the round(share * n) with the smallest hashes, at least one where share > 0 and n > 1.
    """
    n = len(questions)
    number = min(max(round(share * n), 1), n - 1) if share > 0 else 0

    def key(i: int) -> bytes:
        return hashlib.sha256(f"{seed}:{questions[i].id}".encode()).digest()

    chosen = set(sorted(range(n), key=key)[:number])
    train = [q for i, q in enumerate(questions) if i not in chosen]
    return train, [questions[i] for i in sorted(chosen)]


def share_right(questions: Sequence[Question], teachers: Sequence[str]) -> dict[str, float | None]:
    """Each teacher's share of right rationales among those that are known, None where none is."""
    known: dict[str, list[bool]] = {name: [] for name in teachers}
    for question in questions:
        for rationale in question.rationales:
            if rationale.correct is not None:
                known[rationale.teacher].append(rationale.correct)
    return {name: sum(v) / len(v) if v else None for name, v in known.items()}


def _check_fixed_weights(config: RunConfig, teachers: Sequence[str]) -> None:
    weighting = config.method.weighting
    if not isinstance(weighting, str) and len(weighting) != len(teachers):
        raise ValueError(
            f"weighting={list(weighting)}: {len(weighting)} weights for {len(teachers)} teachers "
            f"({', '.join(teachers)})"
        )
