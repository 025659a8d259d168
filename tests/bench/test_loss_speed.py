"""The command line of bench/loss_speed.py, which `make bench` begins with."""

from __future__ import annotations

import pytest

from bench.loss_speed import arguments


def test_both_are_measured_unless_one_is_named():
    assert arguments([]).what == ["time", "memory"]
    assert arguments(["memory", "--rounds", "3"]).what == ["memory"]


def test_what_cannot_be_measured_is_named(capsys):
    with pytest.raises(SystemExit):
        arguments(["time", "money"])
    assert "neither time nor memory: money" in capsys.readouterr().err
