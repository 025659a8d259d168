"""What every run starts from: questions, student, tokens, agreement of the teachers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from compact_fast.data import TokenizedData, TokenizeOptions, tokenize_questions
from compact_fast.data.records import Question
from compact_fast.graphs.limits import limits_sentence
from compact_fast.pipeline.agreement import (
    Agreement,
    filtered_share,
    graph_agreement,
    mean_with_others,
    teacher_table,
)
from compact_fast.pipeline.corpus import Corpus, cache_folder, share_right
from compact_fast.run_config import RunConfig
from compact_fast.students import LoraSettings, Student, load_student
from compact_fast.tables import counted, percent, table

Say = Callable[[str], None]


@dataclass(frozen=True)
class Inputs:
    """Everything that is read before the first step."""

    config: RunConfig
    corpus: Corpus
    student: Student
    train: TokenizedData
    held_out: TokenizedData | None
    scored: list[Question]
    """The corpus without the rationales that truncation left out: those `agreement` is about."""
    agreement: Agreement
    agreement_seconds: float
    teachers: dict[str, Any]
    """agreement.json: teachers, matrix, counts, share_right."""


def prepare(
    config: RunConfig, corpus: Corpus, say: Say, *, write: bool, training: bool = True
) -> Inputs:
    """Load a run's student, tokenise its data, and score the teachers' agreement.

    Says what it found, a line each. With `write` false nothing is written, not even a cache.
    Without `training` no adapter is added. Raises ValueError naming what cannot be used.
    """
    student = student_of(config, training=training)
    say(f"Student    {student.description}")
    cache = cache_folder(config) if write else None
    tokens = tokenize_questions(
        corpus.questions,
        student.tokenizer,
        teachers=corpus.teachers,
        options=tokenize_options(config),
        cache_dir=cache / "tokens" if cache else None,
        say=say,
    )
    say(f"Tokens     {_tokens_line(tokens.report)}")
    started = time.perf_counter()
    scored = kept_rationales(corpus.questions, tokens)
    agreement = graph_agreement(
        scored,
        backend=config.training.consensus_backend,
        threads=config.training.consensus_threads,
        cache_dir=cache,
    )
    spent = time.perf_counter() - started
    say(f"Consensus  {_consensus_line(agreement, spent)}")
    if agreement.answer_only:
        say(f"           {limits_sentence(agreement.answer_only)}")
    train, held_out = _split(_with_consensus(tokens, agreement), len(corpus.train))
    known = share_right(corpus.questions, corpus.teachers)
    teachers = teacher_table(scored, corpus.teachers, agreement)
    return Inputs(
        config=config,
        corpus=corpus,
        student=student,
        train=train,
        held_out=held_out,
        scored=scored,
        agreement=agreement,
        agreement_seconds=spent,
        teachers={**teachers, "share_right": known},
    )


def kept_rationales(questions: Sequence[Question], tokens: TokenizedData) -> list[Question]:
    """The questions, in their order, with the rationales that tokenisation kept alone."""
    out = []
    rows = tokens.rows.select_columns(["index", "rationale_index"])
    for row in rows:
        question, places = questions[row["index"]], row["rationale_index"]
        if len(places) < len(question.rationales):
            question = replace(question, rationales=[question.rationales[k] for k in places])
        out.append(question)
    return out


def _with_consensus(tokens: TokenizedData, agreement: Agreement) -> TokenizedData:
    """The rows with their scores; `agreement` is about the rationales that they hold."""
    places = tokens.rows["rationale_index"]
    scores = {}
    for name, kept, found in zip(tokens.rows["id"], places, agreement.scores, strict=True):
        of_read = np.full(max(kept) + 1, np.nan)  # a score for each rationale as read
        of_read[kept] = found
        scores[name] = of_read.tolist()
    return tokens.with_consensus(scores)


def student_of(config: RunConfig, *, training: bool = True) -> Student:
    """The run's student, with a fresh adapter where one is to be trained."""
    lora = None
    if training and config.lora.lora:
        settings = config.lora
        lora = LoraSettings(
            r=settings.lora_r,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
            targets=tuple(settings.lora_targets),
        )
    dtype = config.run.student_dtype
    if dtype == "auto" and training and not config.lora.lora:
        # updates of weights that are themselves bf16 are mostly rounded away
        dtype = "fp32"
    return load_student(
        str(config.run.student),
        dtype=dtype,
        lora=lora,
        gradient_checkpointing=training and config.training.gradient_checkpointing,
        seed=config.method.seed,
        training=training,
    )


def tokenize_options(config: RunConfig) -> TokenizeOptions:
    d = config.data
    return TokenizeOptions(
        max_length=d.max_length,
        truncation=d.truncation,
        system_prompt=d.system_prompt,
        system_role=d.system_role,
    )


def _split(
    tokens: TokenizedData, train_questions: int
) -> tuple[TokenizedData, TokenizedData | None]:
    # the training questions come first, and `index` is a question's place
    indices = tokens.rows["index"]
    first = [i for i, index in enumerate(indices) if index < train_questions]
    rest = [i for i, index in enumerate(indices) if index >= train_questions]
    if not first:
        raise ValueError("no training question is left after truncation; raise max_length")
    held_out = replace(tokens, rows=tokens.rows.select(rest)) if rest else None
    return replace(tokens, rows=tokens.rows.select(first)), held_out


def _tokens_line(report: dict[str, Any]) -> str:
    total = report["tokens"]
    # of rationales each behind its own prompt, as `total` counts them
    share = 1 - report["completion_tokens"] / total if total else 0.0
    parts = [
        f"{total:,} in {counted(report['rationales'], 'rationale')} ({percent(share)} prompt), "
        f"longest {report['longest']:,}"
    ]
    if report["truncated"]:
        parts.append(f"{report['truncated']:,} truncated")
    for what, reasons in (
        ("rationale", report["dropped_rationales"]),
        ("question", report["dropped_questions"]),
    ):
        parts += [f"{counted(n, what)} dropped ({why})" for why, n in reasons.items() if n]
    if report.get("from_cache"):
        parts.append("from the cache")
    return ", ".join(parts)


def _consensus_line(agreement: Agreement, seconds: float) -> str:
    where = "from the cache" if agreement.cached else f"{seconds:.1f} s"
    line = f"{agreement.backend} step graphs, {where}"
    n = len(agreement.scores)
    for what, flags in (
        ("without evidence", agreement.no_evidence),
        ("undecidable", agreement.undecidable),
    ):
        if flags.any():
            line += f", {percent(float(flags.sum()) / n)} of questions {what}"
    return line


def teachers_text(inputs: Inputs) -> str:
    """One line a teacher: rationales, share right, agreement with the others, share filtered."""
    corpus = inputs.corpus
    known = inputs.teachers["share_right"]
    counts = inputs.teachers["counts"]
    filtered = filtered_share(
        inputs.scored, corpus.teachers, inputs.agreement, inputs.config.method.filter_below
    )
    rows = []
    for i, (name, agrees) in enumerate(
        zip(corpus.teachers, mean_with_others(inputs.teachers), strict=True)
    ):
        agreed = "-" if agrees is None else f"{agrees:.2f}"
        rows.append([name, f"{counts[i][i]:,}", percent(known[name]), agreed, percent(filtered[i])])
    return table(["teacher", "rationales", "right", "agreement", "filtered"], rows)


def method_line(config: RunConfig) -> str:
    """The method's choices in one line, defaults of the mode left out."""
    m = config.method
    weighting = m.weighting if isinstance(m.weighting, str) else f"fixed {list(m.weighting)}"
    parts = [f"mode {m.mode}", f"weighting {weighting}"]
    if isinstance(m.weighting, str) and m.weighting in ("compact", "best"):
        parts.append("β {:g}, {:g}, {:g}".format(*m.betas))
    parts.append(f"consensus {m.consensus}")
    if m.filter_below > 0:
        parts.append(f"filter below {m.filter_below:g} x the largest")
    consistency = f"{m.consistency}"
    if m.consistency != "off":
        consistency += f" x {m.consistency_weight:g}"
    parts.append(f"consistency {consistency}")
    return ", ".join(parts)


def on_device(student: Student) -> Student:
    """The student on the GPU, where there is one; for work without a trainer."""
    if torch.cuda.is_available():
        student.model.to("cuda")
    return student
