"""What `compact-fast consensus` says on its way."""

from __future__ import annotations

import pytest

from compact_fast.cli.consensus import _ConsensusLine


def test_speed_and_time_left_leave_out_an_earlier_run(capsys: pytest.CaptureFixture[str]) -> None:
    line = _ConsensusLine()
    line(100, 0.25)  # done before
    assert capsys.readouterr().err == ""  # no terminal: a line now and then
    line.start -= 10
    line.told -= 31
    line(300, 0.75)
    said = capsys.readouterr().err
    assert said == "consensus: 300 questions (75.0 % of the file), 20 a second, 5 s left\n"
    line(400, 1.0)
    assert capsys.readouterr().err == ""


def test_nothing_read_yet(capsys: pytest.CaptureFixture[str]) -> None:
    line = _ConsensusLine()
    line.told -= 31
    line(0, 0.0)
    assert capsys.readouterr().err == "consensus: 0 questions (0.0 % of the file), 0 a second\n"
