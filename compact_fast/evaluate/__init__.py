"""Evaluation: accuracy by generation and by likelihood, held-out NLL, perplexity of a text.

Names are loaded on first use: reading results (tables, reports) needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compact_fast.evaluate.generate import exact_match
    from compact_fast.evaluate.options import option_likelihood
    from compact_fast.evaluate.perplexity import read_text, text_perplexity
    from compact_fast.evaluate.prompts import PromptBuilder
    from compact_fast.evaluate.rationales import rationale_nll
    from compact_fast.evaluate.results import EvaluationResult, measures, measures_table
    from compact_fast.evaluate.run import EvaluationOptions, evaluate

_HOME = {
    "exact_match": "generate",
    "option_likelihood": "options",
    "read_text": "perplexity",
    "text_perplexity": "perplexity",
    "PromptBuilder": "prompts",
    "rationale_nll": "rationales",
    "EvaluationResult": "results",
    "measures": "results",
    "measures_table": "results",
    "EvaluationOptions": "run",
    "evaluate": "run",
}

__all__ = [
    "EvaluationOptions",
    "EvaluationResult",
    "PromptBuilder",
    "evaluate",
    "exact_match",
    "measures",
    "measures_table",
    "option_likelihood",
    "rationale_nll",
    "read_text",
    "text_perplexity",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
