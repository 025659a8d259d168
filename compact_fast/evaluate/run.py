"""Everything that was asked for, in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from compact_fast.data.records import Question
from compact_fast.evaluate.generate import exact_match
from compact_fast.evaluate.likelihood import Progress
from compact_fast.evaluate.options import option_likelihood
from compact_fast.evaluate.perplexity import text_perplexity
from compact_fast.evaluate.prompts import PromptBuilder
from compact_fast.evaluate.rationales import rationale_nll
from compact_fast.evaluate.results import EvaluationResult


@dataclass(frozen=True)
class EvaluationOptions:
    """What to measure, and how."""

    generate: bool = True
    """Exact match of greedily generated final answers."""

    samples: int = 0
    """Completions a question of a second, sampled exact match; 0: none."""

    temperature: float = 1.0
    """Temperature of the sampled exact match."""

    likelihood: bool | Literal["auto"] = "auto"
    """Option likelihood; "auto": if any question has choices."""

    max_new_tokens: int = 256
    """Longest completion, tokens."""

    batch_size: int = 32
    """Completions generated at a time."""

    batch_tokens: int = 16384
    """Padded tokens a forward pass of the likelihood measures."""

    window: int = 1024
    """Perplexity: tokens a window."""

    stride: int = 512
    """Perplexity: tokens a window scores that the one before did not."""

    seed: int = 0
    """Seed of the sampled exact match."""

    backend: Any = "auto"
    """Backend of the log-likelihoods."""


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    questions: Sequence[Question] | None = None,
    prompts: PromptBuilder | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
    teachers: Sequence[str] = (),
    text: str | None = None,
    options: EvaluationOptions | None = None,
    progress: Callable[[str], Progress] | None = None,
) -> EvaluationResult:
    """Measures a student (plain or PEFT, any dtype) on what is given.

    `questions`: exact match and option likelihood, asked through `prompts` (default: the
    tokenizer's chat template). `rows` and `teachers`: held-out NLL of tokenised rationales.
    `text`: perplexity. `progress(name)` returns a callable that hears (done, total).
    Raises ValueError when nothing is given to measure.
    """
    o = options or EvaluationOptions()
    hear = progress or (lambda name: lambda done, total: None)
    if questions is None and rows is None and text is None:
        raise ValueError("nothing to evaluate: give questions, tokenised rationales or a text")
    found: dict[str, Any] = {}
    if questions is not None:
        asked = prompts or PromptBuilder(tokenizer)
        shared = {"max_new_tokens": o.max_new_tokens, "batch_size": o.batch_size, "seed": o.seed}
        if o.generate:
            found["exact_match"] = exact_match(
                model, questions, asked, progress=hear("exact match, greedy"), **shared
            )
        if o.samples:
            found["exact_match_sampled"] = exact_match(
                model,
                questions,
                asked,
                temperature=o.temperature,
                samples=o.samples,
                progress=hear("exact match, sampled"),
                **shared,
            )
        multiple = any(q.choices for q in questions)
        if o.likelihood is True or (o.likelihood == "auto" and multiple):
            found["options"] = option_likelihood(
                model,
                questions,
                asked,
                batch_tokens=o.batch_tokens,
                backend=o.backend,
                progress=hear("option likelihood"),
            )
    if rows is not None:
        found["rationale_nll"] = rationale_nll(
            model,
            rows,
            teachers,
            batch_tokens=o.batch_tokens,
            backend=o.backend,
            progress=hear("rationale NLL"),
        )
    if text is not None:
        found["perplexity"] = text_perplexity(
            model,
            tokenizer,
            text,
            window=o.window,
            stride=o.stride,
            batch_tokens=o.batch_tokens,
            backend=o.backend,
            progress=hear("perplexity"),
        )
    return EvaluationResult(**found)
