"""Perplexity of a user's text in sliding windows: what the student knew and may forget."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from compact_fast.evaluate.likelihood import Progress, evaluation_mode, logp_at
from compact_fast.evaluate.results import TextPerplexity


def text_perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    window: int = 1024,
    stride: int = 512,
    max_tokens: int | None = None,
    batch_tokens: int = 16384,
    backend: Any = "auto",
    progress: Progress | None = None,
) -> TextPerplexity:
    """Every token of `text` scored once, with at least `window - stride` tokens before it where
    the text has them.

    Windows of `window` tokens move by `stride`; each scores only what the one before did not. The
    text is led by the tokenizer's BOS (else EOS) token so that its first token is scored too;
    without either the first token is not scored, and its bytes do not count. `max_tokens` keeps
    the beginning of a long text. Raises ValueError on an empty text or a window out of range.
    """
    if window < 2 or not 1 <= stride < window:
        raise ValueError(f"window={window}, stride={stride}: expected 1 <= stride < window")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and window > limit:
        raise ValueError(f"window={window}: the student reads at most {limit} tokens")
    started = time.perf_counter()
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if max_tokens is not None and len(ids) > max_tokens:
        ids = ids[:max_tokens]
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    lead = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    unscored = 0
    if lead is not None:
        ids = [lead, *ids]
    elif ids:
        unscored = 1
    if len(ids) < 2:
        raise ValueError("the text has no token to score; give a longer one")
    sequences, positions, targets = [], [], []
    for start, first, end in sliding_windows(len(ids), window, stride):
        sequences.append(ids[start : end - 1])
        positions.append(range(first - 1 - start, end - 1 - start))
        targets.append(ids[first:end])
    with evaluation_mode(model):
        parts = logp_at(
            model,
            sequences,
            positions,
            targets,
            batch_tokens=batch_tokens,
            backend=backend,
            progress=progress,
        )
    size = len(text.encode("utf-8", errors="replace"))
    if unscored:
        size -= len(tokenizer.decode(ids[:1]).encode("utf-8", errors="replace"))
    return TextPerplexity(
        nats=-math.fsum(float(p.double().sum()) for p in parts),
        tokens=sum(map(len, targets)),
        bytes=size,
        unscored_tokens=unscored,
        window=window,
        stride=stride,
        seconds=time.perf_counter() - started,
    )


def sliding_windows(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, first scored, end) of every window; tokens 1..length-1 are scored exactly once."""
    out = []
    scored, start = 1, 0
    while scored < length:
        end = min(start + window, length)
        out.append((start, scored, end))
        scored = end
        start += stride
    return out


def read_text(path: str | Path) -> str:
    """A UTF-8 text file. Raises ValueError naming the file and the byte that is not UTF-8."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot read the text: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8"
        ) from error
