"""What can be made again from what is kept anyway, instead of being kept too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Source:
    """A tensor as a cheap function of tensors that are kept."""

    make: Callable[..., Tensor]
    parts: tuple[Tensor, ...]


def note_source(t: Tensor, source: Source) -> None:
    """Whoever would keep t may keep its source instead."""
    t.compact_source = source  # type: ignore[attr-defined]


def source_of(t: Tensor) -> Source | None:
    """What t was noted to be made from."""
    found: Source | None = getattr(t, "compact_source", None)
    return found
