"""The built-in world: word problems, programmatic teachers and a small student of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compact_fast.arithmetic.teachers import SCENARIOS, Teacher, make_questions, write_questions
from compact_fast.arithmetic.world import Problem, WorldOptions, make_problems

if TYPE_CHECKING:
    from compact_fast.arithmetic.student import CHECKPOINT, load_student

__all__ = [
    "CHECKPOINT",
    "SCENARIOS",
    "Problem",
    "Teacher",
    "WorldOptions",
    "load_student",
    "make_problems",
    "make_questions",
    "write_questions",
]


def __getattr__(name: str) -> Any:
    # The student needs torch and transformers; questions do not.
    if name in ("CHECKPOINT", "load_student"):
        from compact_fast.arithmetic import student

        return getattr(student, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
