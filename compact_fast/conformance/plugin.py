"""pytest plugin: the options of `pytest --pyargs compact_fast.conformance`, and of it alone.

A conftest.py is not read for --pyargs. Installed as a plugin, this one touches no other run.
"""

from __future__ import annotations

from typing import Any


def pytest_load_initial_conftests(parser: Any, args: list[str]) -> None:
    """Add --backend and --device when the conformance suite is what is asked for."""
    if any(arg.startswith("compact_fast.conformance") for arg in args):
        group = parser.getgroup("compact_fast")
        group.addoption("--backend", default="torch", help="name of the backend to judge")
        group.addoption("--device", default="cpu", help="device to judge it on")
