"""One test a check, on the backend that --backend names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from compact_fast.backends import get_backend
from compact_fast.conformance.checks import CHECKS
from compact_fast.conformance.judge import Subject


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
def test_backend(check: Callable[[Subject], None], request: pytest.FixtureRequest) -> None:
    """The check passes, or says what is wrong."""
    option = request.config.getoption
    subject = Subject(get_backend(option("--backend")), torch.device(option("--device")))
    verdict = subject.can_run(torch.float32)
    if verdict is not True:
        pytest.fail(f"backend {subject.backend.name!r} cannot run here: {verdict}")
    check(subject)
