"""What can be made again from what is kept anyway, instead of being kept too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class Source:
    """A tensor as a cheap function of tensors that are kept."""

    make: Callable[..., Tensor]
    parts: tuple[Tensor, ...]


_SOURCES = WeakTensorKeyDictionary()  # tensor -> (its version, Source)


def note_source(t: Tensor, source: Source) -> None:
    """Whoever would keep t may keep its source instead."""
    _SOURCES[t] = (t._version, source)


def source_of(t: Tensor) -> Source | None:
    """What t was noted to be made from, unless it was changed in place since."""
    version, source = _SOURCES.get(t, (None, None))  # type: ignore[no-untyped-call]
    return source if source is not None and t._version == version else None
