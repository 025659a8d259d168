"""Text to token ids with the places that matter: true prefixes, answer spans, gold tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from compact_fast.data.extract import find_span
from compact_fast.data.records import Question
from compact_fast.data.template import ChatFormat

# The tag that opens a block which a template inserts, such as "<think>".
_OPENING = re.compile(r"\s*(<[^<>\s]+>|\S+)")


class Completion(NamedTuple):
    """Token ids of one completion, end of turn included; `span` [start, end) states the answer,
    (0, 0) where nothing does."""

    ids: list[int]
    span: tuple[int, int]


class Encoded(NamedTuple):
    """One question in token ids."""

    prompt_ids: list[int]
    completions: list[Completion]
    prior: Completion
    gold_ids: list[int]


class _Job(NamedTuple):
    """One completion still to be encoded, and the characters of its text to be found again."""

    prompt: str
    text: str  # lead, if any, and completion
    span: tuple[int, int] | None


class Encoder:
    """Encodes questions with one tokenizer and chat format, many texts a call."""

    def __init__(self, tokenizer: Any, chat: ChatFormat) -> None:
        self.tokenizer = tokenizer
        self.chat = chat
        self.has_offsets = bool(getattr(tokenizer, "is_fast", False))

    def __call__(self, questions: Sequence[Question], prior_prefix: str) -> list[Encoded]:
        """Every question's prompt, completions (one a rationale), prior completion, gold tokens."""
        prompts: list[str] = []
        jobs: list[list[_Job]] = []
        for question in questions:
            turn = self.chat.turn(self.chat.messages(question))
            texts = [r.text.strip() for r in question.rationales]
            spans = [find_span(t, question.answer, question.choices) for t in texts]
            prior = f"{prior_prefix} {question.answer}".strip()
            texts.append(prior)
            spans.append((len(prior) - len(question.answer), len(prior)))
            prompt, lead = turn.prompt, turn.lead
            block = turn.prompt[len(turn.generation) :]
            tag = _OPENING.match(block)
            opening = tag[1] if tag else None
            if opening and any(t.startswith(opening) for t in texts):
                # A teacher's own thinking stands where the template would put an empty block.
                prompt = turn.generation
                leads = ["" if t.startswith(opening) else block + lead for t in texts]
            else:
                leads = [lead] * len(texts)
            prompts.append(prompt)
            jobs.append(
                [
                    _Job(
                        prompt,
                        before + text,
                        (span[0] + len(before), span[1] + len(before)) if span else None,
                    )
                    for before, text, span in zip(leads, texts, spans, strict=True)
                ]
            )
        prompt_ids = [self.chat.bos_ids() + ids for ids in self._batch(prompts)]
        for question, ids in zip(questions, prompt_ids, strict=True):
            if not ids:
                raise ValueError(f"{question.source or question.id}: the prompt has no tokens")
        flat = [job for of_question in jobs for job in of_question]
        owner = [i for i, of_question in enumerate(jobs) for _ in of_question]
        done = self._completions(flat, [prompt_ids[i] for i in owner])
        gold = self._gold([q.answer for q in questions])
        encoded, at = [], 0
        for i, of_question in enumerate(jobs):
            *completions, prior_completion = done[at : at + len(of_question)]
            at += len(of_question)
            encoded.append(Encoded(prompt_ids[i], completions, prior_completion, gold[i]))
        return encoded

    def _batch(self, texts: Sequence[str]) -> Any:
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def _completions(
        self, jobs: Sequence[_Job], prompt_ids: Sequence[list[int]]
    ) -> list[Completion]:
        """Joint encoding where the prompt's ids are a prefix of it, separate encoding elsewhere.

        A tokenizer may merge across the boundary. At generation time the student reads the
        prompt's own ids and writes on from there, so those ids have to come first in training
        too, and all of a question's completions have to share them.
        """
        bos = len(self.chat.bos_ids())
        joint = self._encode_with_offsets([job.prompt + job.text for job in jobs])
        apart = [
            i
            for i, job in enumerate(jobs)
            if joint[i][0][: len(prompt_ids[i]) - bos] != prompt_ids[i][bos:]
        ]
        separate = dict(
            zip(apart, self._encode_with_offsets([jobs[i].text for i in apart]), strict=True)
        )
        completions = []
        for i, job in enumerate(jobs):
            if i in separate:
                (ids, offsets), shift = separate[i], 0
                text = job.text
            else:
                n = len(prompt_ids[i]) - bos
                ids, offsets = joint[i][0][n:], joint[i][1]
                offsets = offsets[n:] if offsets is not None else None
                shift, text = len(job.prompt), job.text
            span = (0, 0)
            if job.span:
                if offsets is None:
                    span = self._span_by_decoding(ids, text, job.span)
                else:
                    span = _token_span(offsets, job.span[0] + shift, job.span[1] + shift)
            completions.append(Completion([*ids, *self.chat.end_ids], span))
        return completions

    def _encode_with_offsets(
        self, texts: Sequence[str]
    ) -> list[tuple[list[int], list[tuple[int, int]] | None]]:
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_offsets_mapping=self.has_offsets,
            verbose=False,  # no warning about texts longer than the tokenizer's own limit
        )
        offsets = encoded["offset_mapping"] if self.has_offsets else [None] * len(texts)
        return list(zip(encoded["input_ids"], offsets, strict=True))

    def _span_by_decoding(
        self, ids: Sequence[int], text: str, span: tuple[int, int]
    ) -> tuple[int, int]:
        """The tokens of characters [start, end) by decoding ever longer beginnings.

        For tokenizers that report no offsets. (0, 0) where decoding does not give the text back.
        """

        def decoded(n: int) -> str:
            return str(self.tokenizer.decode(list(ids[:n]), clean_up_tokenization_spaces=False))

        whole = decoded(len(ids))
        start = whole.rfind(text[span[0] : span[1]], 0, span[1] + max(0, len(whole) - len(text)))
        if start < 0:
            return (0, 0)
        end = start + span[1] - span[0]
        # Token n lies in the span if the beginning that includes it passes `start` while the one
        # before it has not reached `end`.
        first, last = 0, len(ids)
        lengths = [len(decoded(n)) for n in range(len(ids) + 1)]
        first = next(n for n in range(len(ids)) if lengths[n + 1] > start)
        last = next(n for n in range(len(ids), 0, -1) if lengths[n - 1] < end)
        return first, last

    def _gold(self, answers: Sequence[str]) -> list[list[int]]:
        """Token ids of each answer as it stands behind a word and a space, without that space.

        "18" behind "is ": the tokens that spell it in running text, which may differ from those
        of "18" alone. A token that is only the space is left out: it says nothing of the answer.
        """
        distinct = list(dict.fromkeys(answers))
        before = "is "
        ids_of = {}
        encoded = self._encode_with_offsets([before + a.strip() for a in distinct])
        plain = len(self._batch(["is"])[0])
        for answer, (ids, offsets) in zip(distinct, encoded, strict=True):
            if offsets is None:
                rest = ids[plain:]
                kept = [t for t in rest if str(self.tokenizer.decode([t])).strip()] or rest
            else:
                start, end = _token_span(offsets, len(before), len(before) + len(answer.strip()))
                kept = ids[start:end]
            ids_of[answer] = list(kept)
        return [ids_of[a] for a in answers]


def _token_span(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """Tokens whose characters overlap [start, end); (0, 0) where none do."""
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def thinking_token_ids(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """Ids of the words, bare or behind one space, that the tokenizer has as ONE token; sorted."""
    found = set()
    for word in words:
        for form in (word, f" {word}"):
            ids = tokenizer(form, add_special_tokens=False)["input_ids"]
            if len(ids) == 1:
                found.add(int(ids[0]))
    return sorted(found - {tokenizer.unk_token_id})
