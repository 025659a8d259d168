"""Numbers in words."""

from __future__ import annotations

import pytest

from compact_fast.tables import counted, size


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 questions"), (1, "1 question"), (3000, "3,000 questions")]
)
def test_one_is_singular(n: int, text: str) -> None:
    assert counted(n, "question") == text


@pytest.mark.parametrize(
    ("bytes_", "text"),
    [(41_300, "41 kB"), (312_000, "312 kB"), (312e6, "312 MB"), (4.23e9, "4.2 GB")],
)
def test_small_files_have_a_size(bytes_: float, text: str) -> None:
    assert size(bytes_) == text
