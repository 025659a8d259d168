"""Reports: one self-contained HTML page and PNGs a run, and a comparison of several runs.

Names are loaded on first use: matplotlib takes a while.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compact_fast.report.compare import write_comparison
    from compact_fast.report.single import write_report

__all__ = ["write_comparison", "write_report"]


def __getattr__(name: str) -> Any:
    if name == "write_report":
        from compact_fast.report.single import write_report

        return write_report
    if name == "write_comparison":
        from compact_fast.report.compare import write_comparison

        return write_comparison
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
