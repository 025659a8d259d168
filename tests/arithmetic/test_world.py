import hashlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compact_fast.arithmetic.steps import FAULTS, Of, compute, edges
from compact_fast.arithmetic.topics import TOPICS
from compact_fast.arithmetic.world import WorldOptions, make_problems


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def test_a_seed_fixes_every_question_whatever_the_number():
    many = make_problems(30, seed=3)
    assert make_problems(10, seed=3) == many[:10]
    assert make_problems(10, seed=4) != many[:10]
    # Pinned, so that a change of the world, or of Python's generator, cannot go unnoticed.
    digest = hashlib.sha256("\n".join(p.question for p in many).encode()).hexdigest()
    assert digest[:16] == "3b78b3f5d317bccd"


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), low=st.integers(1, 5), extra=st.integers(0, 4))
def test_problems_are_consistent(seed, low, extra):
    high = min(low + extra, 5)
    options = WorldOptions(min_steps=low, max_steps=high)
    for problem in make_problems(3, seed, options):
        assert low <= len(problem.steps) <= high
        assert tuple(compute(problem.steps)) == problem.solution
        assert all(0 <= c.result <= options.max_value for c in problem.solution)
        for fault in FAULTS.values():  # every teacher can write its solution down
            assert compute(fault(problem.steps)) is not None
        # Each step but the last is used exactly once: the graph is a tree that ends in the answer.
        assert sorted(i for i, _ in edges(problem.steps)) == list(range(len(problem.steps) - 1))
        given_numbers = [
            v for s in problem.steps for v in (s.left, s.right) if not isinstance(v, Of)
        ]
        if problem.distractor is not None:
            given_numbers.append(problem.distractor)
        assert sorted(numbers(problem.question)) == sorted(given_numbers)


def test_the_mix_has_all_that_was_asked_for():
    problems = make_problems(600, seed=1)
    assert {p.topic for p in problems} == {t.name for t in TOPICS}
    assert {s.operator for p in problems for s in p.steps} == set("+-*/")
    assert {len(p.steps) for p in problems} == {2, 3, 4, 5}
    assert sum(len(p.steps) == 2 for p in problems) > sum(len(p.steps) == 5 for p in problems)
    distracted = sum(p.distractor is not None for p in problems) / len(problems)
    assert 0.22 < distracted < 0.38
    joins = [p for p in problems if p.is_join]
    assert 0.04 < len(joins) / len(problems) < 0.15
    assert all(len(p.steps) >= 3 for p in joins)


def test_options_switch_things_off():
    options = WorldOptions(
        operators=("+",), distractor_share=0, join_share=0, max_steps=3, new_word_share=0
    )
    for problem in make_problems(50, 0, options):
        assert problem.question.count("gets") == len(problem.steps)
        assert {s.operator for s in problem.steps} == {"+"}
        assert problem.distractor is None
        assert not problem.is_join


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_steps": 0}, "min_steps=0"),
        ({"min_steps": 4, "max_steps": 3}, "min_steps=4, max_steps=3"),
        ({"max_steps": 6}, "max_steps=6"),
        ({"max_value": 100}, "max_value=100: expected 20 to 60"),
        ({"max_factor": 1}, "max_factor=1"),
        ({"distractor_share": 1.5}, "distractor_share=1.5"),
        ({"operators": ()}, "operators="),
        ({"operators": ("%",)}, "operators="),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        WorldOptions(**options)


def test_a_negative_number_of_problems_is_refused():
    with pytest.raises(ValueError, match="n=-1"):
        make_problems(-1, 0)
