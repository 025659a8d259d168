"""Questions to token ids: one prompt, K completions, and where the gold answer is stated."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import datasets

from compact_fast.data import cache
from compact_fast.data.encode import Completion, Encoder, thinking_token_ids
from compact_fast.data.records import Question, nearest
from compact_fast.data.template import ChatFormat
from compact_fast.tables import counted

THINKING_WORDS = (
    "Therefore", "Thus", "Hence", "So", "Consequently", "Wait", "But", "However", "Although",
    "First", "Second", "Finally", "Specifically", "In summary", "Basically", "Let", "Assuming",
    "Suppose", "Hmm", "Okay", "Note",
)  # fmt: skip

Row = dict[str, Any]
# Questions encoded in one call of the tokenizer, and by one worker at a time.
CHUNK = 512


@dataclass(frozen=True)
class TokenizeOptions:
    """Choices of tokenisation. Raises ValueError naming the field and what is allowed."""

    max_length: int = 2560
    """Tokens of a sequence, prompt included; longer ones are truncated."""
    truncation: Literal["drop_rationale", "middle", "error"] = "drop_rationale"
    """What happens to a longer one: the rationale is left out, or loses tokens from its middle
    while its beginning and the stated answer stay, or the run stops. Always counted."""
    system_prompt: str | None = None
    """System message; None: whatever the template does by itself."""
    system_role: Literal["system", "merge"] = "system"
    """"merge" opens the user's message with the system prompt, for templates without that role."""
    thinking_words: tuple[str, ...] = THINKING_WORDS
    """Words that count as thinking tokens where the tokenizer has them as one token."""
    prior_prefix: str = "The answer is"
    """What precedes the gold answer in the completion that states nothing else (mi="pvi")."""

    def __post_init__(self) -> None:
        if not isinstance(self.max_length, int) or self.max_length < 2:
            raise ValueError(f"max_length={self.max_length!r}: expected an integer of at least 2")
        for name, allowed in (
            ("truncation", ("drop_rationale", "middle", "error")),
            ("system_role", ("system", "merge")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}"
                )


@dataclass
class TokenizedData:
    """Tokenised questions. `rows[i]` is a dict of plain lists:

    id, index (place in the input), prompt_ids [P], completion_ids [K][C], teacher_ids [K] (into
    `teachers`), rationale_index [K] (place among the question's rationales), answer_spans [K][2]
    (tokens of prompt + completion that state the gold answer; [0, 0]: none), correct [K] (1, 0,
    -1 unknown), gold_ids [G], prior_completion_ids, prior_span [2], and, once added, consensus [K].
    """

    rows: Any
    """A datasets.Dataset."""
    teachers: list[str]
    thinking_ids: list[int]
    report: dict[str, Any] = field(default_factory=dict)
    """Counts: questions_read, questions, rationales, tokens (a prompt with each of its rationales),
    prompt_tokens (a prompt once), completion_tokens, longest, answer_spans (rationales that state
    the gold answer), truncated, ends_early (texts that hold the end-of-turn token themselves),
    dropped_rationales and dropped_questions by reason, teachers (rationales, right, wrong,
    unknown, tokens by name); and from_cache."""

    def __len__(self) -> int:
        return len(self.rows)

    def with_consensus(self, scores: Mapping[str, Sequence[float]]) -> TokenizedData:
        """The same data with a consensus score a rationale.

        `scores` maps a question's id to one score for each of its rationales AS READ; those of
        rationales that truncation left out are skipped. Raises ValueError naming the question
        where they are missing or too few.
        """
        column = []
        for row in self.rows.select_columns(["id", "rationale_index"]):
            values = scores.get(row["id"])
            if values is None or len(values) <= max(row["rationale_index"]):
                have = "none" if values is None else str(len(values))
                raise ValueError(
                    f"question {row['id']}: needs a consensus score for each rationale, has {have}"
                )
            column.append([float(values[k]) for k in row["rationale_index"]])
        rows = self.rows
        if "consensus" in rows.column_names:
            rows = rows.remove_columns("consensus")
        return replace(self, rows=rows.add_column("consensus", column))


def tokenize_questions(
    questions: Sequence[Question],
    tokenizer: Any,
    *,
    teachers: Sequence[str],
    options: TokenizeOptions | None = None,
    cache_dir: str | Path | None = None,
    num_proc: int = 1,
    say: Callable[[str], None] | None = None,
) -> TokenizedData:
    """Tokenise whole questions with the student's chat template.

    `teachers` names the run's teachers in order; a rationale of another one is an error. With
    `cache_dir` the result is kept under a hash of questions, tokenizer, options and code, and
    read from there next time; a damaged cache is rebuilt, which `say` is told in one line.
    Raises ValueError naming question and teacher where nothing can be made of them.
    """
    questions = list(questions)
    options = options or TokenizeOptions()
    teachers = list(teachers)
    if not questions:
        raise ValueError("no questions to tokenise")
    if len(set(teachers)) != len(teachers):
        raise ValueError(f"teachers: a name occurs twice in {', '.join(teachers)}")
    for q in questions:
        for r in q.rationales:
            if r.teacher not in teachers:
                raise ValueError(
                    f"{_place(q)}: teacher {r.teacher!r} is not one of the run's"
                    + nearest(r.teacher, teachers)
                )

    def build() -> tuple[Any, dict[str, Any]]:
        rows, counts = _tokenize(questions, tokenizer, teachers, options, num_proc)
        return rows, _report(len(questions), teachers, counts)

    key = cache.key(questions, tokenizer, teachers, options) if cache_dir else ""
    rows, report = cache.kept(build, cache_dir, key, say)
    if not len(rows):
        raise ValueError(_nothing_left(report, options))
    return TokenizedData(
        rows, teachers, thinking_token_ids(tokenizer, options.thinking_words), report
    )


def _nothing_left(report: Mapping[str, Any], options: TokenizeOptions) -> str:
    """Why no rationale is left, and what helps."""
    dropped = [
        f"{counted(n, 'rationale')} left out ({why})"
        for why, n in report["dropped_rationales"].items()
    ]
    if bare := report["dropped_questions"].get("no rationales", 0):
        dropped.append(f"{counted(bare, 'question')} without any")
    remedy = "give rationales"
    if report["dropped_rationales"]:
        remedy = f"raise max_length ({options.max_length})"
    questions = counted(report["questions_read"], "question")
    return f"no rationale of {questions} is left: {', '.join(dropped)}; {remedy}"


def prompts(
    questions: Iterable[Question], tokenizer: Any, options: TokenizeOptions | None = None
) -> tuple[list[list[int]], list[int]]:
    """Prompt ids of each question, as training shows them, and the ids that end an answer.

    For generation: stop at the last of the returned ids.
    """
    options = options or TokenizeOptions()
    chat = ChatFormat(
        tokenizer, system_prompt=options.system_prompt, system_role=options.system_role
    )
    ids = [chat.prompt_ids(chat.turn(chat.messages(q)).prompt) for q in questions]
    return ids, list(chat.end_ids)


# ---- the work -------------------------------------------------------------------------------


def _tokenize(
    questions: Sequence[Question],
    tokenizer: Any,
    teachers: Sequence[str],
    options: TokenizeOptions,
    num_proc: int,
) -> tuple[Any, Counter[str]]:
    numbered = list(enumerate(questions))
    chunks = [numbered[i : i + CHUNK] for i in range(0, len(numbered), CHUNK)]
    arguments = (tokenizer, list(teachers), options)
    if num_proc <= 1 or len(chunks) == 1:
        work = _Work(*arguments)
        results = [work(chunk) for chunk in chunks]
    else:
        # spawn, not fork: a forked process must not inherit the threads of torch and tokenizers.
        with ProcessPoolExecutor(
            min(num_proc, len(chunks)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=arguments,
        ) as pool:
            results = list(pool.map(_work_in_worker, chunks))
    counts: Counter[str] = Counter()
    for _, part in results:
        counts["longest"], longest = 0, max(counts["longest"], part["longest"])
        counts.update(part)
        counts["longest"] = longest
    return datasets.concatenate_datasets([rows for rows, _ in results]), counts


_worker: _Work | None = None


def _start_worker(*arguments: Any) -> None:
    global _worker
    _worker = _Work(*arguments)


def _work_in_worker(chunk: list[tuple[int, Question]]) -> tuple[Any, Counter[str]]:
    assert _worker is not None
    return _worker(chunk)


class _Work:
    """Tokenises chunks of numbered questions; counts what it had to change or leave out."""

    def __init__(self, tokenizer: Any, teachers: list[str], options: TokenizeOptions) -> None:
        self.encoder = Encoder(
            tokenizer,
            ChatFormat(
                tokenizer, system_prompt=options.system_prompt, system_role=options.system_role
            ),
        )
        self.teacher_id = {name: i for i, name in enumerate(teachers)}
        self.options = options

    def __call__(self, chunk: list[tuple[int, Question]]) -> tuple[Any, Counter[str]]:
        counts: Counter[str] = Counter()
        rows = []
        encoded = self.encoder([q for _, q in chunk], self.options.prior_prefix)
        for (index, question), (prompt, completions, prior, gold_ids) in zip(
            chunk, encoded, strict=True
        ):
            row: Row = {
                "id": question.id,
                "index": index,
                "prompt_ids": prompt,
                "completion_ids": [],
                "teacher_ids": [],
                "rationale_index": [],
                "answer_spans": [],
                "correct": [],
                "gold_ids": gold_ids,
                "prior_completion_ids": prior.ids,
                "prior_span": [len(prompt) + i for i in prior.span],
            }
            for k, (rationale, completion) in enumerate(
                zip(question.rationales, completions, strict=True)
            ):
                fitted = self._fit(question, rationale.teacher, len(prompt), completion, counts)
                if fitted is None:
                    continue
                start, end = fitted.span
                end_of_turn = self.encoder.chat.end_ids
                if end_of_turn[-1] in fitted.ids[: -len(end_of_turn)]:
                    counts["ends_early"] += 1
                row["completion_ids"].append(fitted.ids)
                row["teacher_ids"].append(self.teacher_id[rationale.teacher])
                row["rationale_index"].append(k)
                row["answer_spans"].append(
                    [len(prompt) + start, len(prompt) + end] if end > start else [0, 0]
                )
                row["correct"].append(-1 if rationale.correct is None else int(rationale.correct))
            if row["completion_ids"]:
                rows.append(row)
                _count(row, question, counts)
            else:
                reason = "no rationale left" if question.rationales else "no rationales"
                counts[f"question: {reason}"] += 1
        return cache.as_dataset(rows), counts

    def _fit(
        self,
        question: Question,
        teacher: str,
        prompt_length: int,
        completion: Completion,
        counts: Counter[str],
    ) -> Completion | None:
        """The completion within max_length, or None where it has to be left out."""
        room = self.options.max_length - prompt_length
        length = len(completion.ids)
        if length <= room:
            return completion
        if self.options.truncation == "error":
            raise ValueError(
                f"{_place(question)}: teacher {teacher}: {prompt_length} prompt and {length} "
                f"completion tokens exceed max_length={self.options.max_length}; "
                "raise it, or set truncation"
            )
        if self.options.truncation == "drop_rationale":
            counts["rationale: longer than max_length"] += 1
            return None
        start, end = completion.span
        # The end of the rationale, from the stated answer on, is kept whole.
        needed = length - start if end > start else 1
        tail = max(room // 2, needed)
        head = room - tail
        if head < 1:
            counts["rationale: max_length leaves no room for its answer"] += 1
            return None
        counts["truncated"] += 1
        cut = length - tail - head
        ids = completion.ids[:head] + completion.ids[length - tail :]
        span = (start - cut, end - cut) if end > start else (0, 0)
        return Completion(ids, span)


def _place(question: Question) -> str:
    return (
        f"{question.source}: question {question.id}"
        if question.source
        else (f"question {question.id}")
    )


def _count(row: Row, question: Question, counts: Counter[str]) -> None:
    prompt = len(row["prompt_ids"])
    counts["questions"] += 1
    counts["prompt_tokens"] += prompt
    for k, ids in enumerate(row["completion_ids"]):
        counts["rationales"] += 1
        counts["completion_tokens"] += len(ids)
        counts["tokens"] += prompt + len(ids)
        counts["longest"] = max(counts["longest"], prompt + len(ids))
        counts["answer_spans"] += row["answer_spans"][k][1] > 0
        teacher = question.rationales[row["rationale_index"][k]].teacher
        judged = ("wrong", "right", "unknown")[row["correct"][k]]
        counts[f"teacher rationales {teacher}"] += 1
        counts[f"teacher {judged} {teacher}"] += 1
        counts[f"teacher tokens {teacher}"] += len(ids)


_TOTALS = (
    *("questions", "rationales", "tokens", "prompt_tokens", "completion_tokens", "longest"),
    *("answer_spans", "truncated", "ends_early"),
)


def _report(read: int, teachers: Sequence[str], counts: Counter[str]) -> dict[str, Any]:
    def by_reason(kind: str) -> dict[str, int]:
        start = f"{kind}: "
        return {k.removeprefix(start): n for k, n in counts.items() if k.startswith(start)}

    columns = ("rationales", "right", "wrong", "unknown", "tokens")
    return {
        "questions_read": read,
        **{name: counts[name] for name in _TOTALS},
        "dropped_rationales": by_reason("rationale"),
        "dropped_questions": by_reason("question"),
        "teachers": {t: {c: counts[f"teacher {c} {t}"] for c in columns} for t in teachers},
    }
