import json
import re
from collections import Counter

import pytest

from compact_fast.arithmetic.steps import is_affected
from compact_fast.arithmetic.styles import STYLES, style_of
from compact_fast.arithmetic.teachers import SCENARIOS, make_questions, write_questions
from compact_fast.arithmetic.world import WorldOptions, make_problems


def accuracy(questions):
    right = Counter(r.teacher for q in questions for r in q.rationales if r.correct)
    return {
        t: right[t] / len(questions) for t in {r.teacher for q in questions for r in q.rationales}
    }


@pytest.fixture(scope="module")
def misleading():
    return make_questions(400, 5)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_rationales_state_the_answer_they_are_marked_by(scenario):
    for question in make_questions(60, 2, scenario=scenario):
        assert [r.teacher for r in question.rationales] == [t.name for t in SCENARIOS[scenario]]
        for rationale in question.rationales:
            stated = re.findall(r"answer is (\d+)\.$", rationale.text)
            assert stated == [rationale.answer]
            assert rationale.correct == (rationale.answer == question.answer)
            for left, operator, right, result in re.findall(
                r"(\d+) ([-+*/]) (\d+) = (\d+)", rationale.text
            ):
                assert {operator, left, right, result}  # every equation parses


def test_a_seed_fixes_every_rationale_whatever_the_number():
    assert make_questions(5, 9) == make_questions(20, 9)[:5]
    assert make_questions(5, 9) != make_questions(5, 10)


def test_teachers_differ_in_competence(misleading):
    found = accuracy(misleading)
    assert found["strong"] > 0.93
    assert found["strong"] > found["terse"] > found["verbose"] > found["misleading"]
    assert 0.7 < found["verbose"] < 0.95  # occasional slips


def test_the_misleading_teacher_fails_on_its_class_and_nowhere_else(misleading):
    problems = make_problems(400, 5)
    pairs = [(p, r) for p, q in zip(problems, misleading, strict=True) for r in q.rationales]
    for problem, wrong in pairs:
        if not wrong.teacher.startswith("misl"):
            continue
        if not is_affected(problem.steps, "adds_losses"):
            assert wrong.correct
        for left, operator, right, result in re.findall(
            r"(\d+) ([-+*/]) (\d+) = (\d+)", wrong.text
        ):  # right in form: its arithmetic is faultless
            assert operator != "-"
            assert eval(f"{left}{operator}{right}") == int(result)


def test_clean_teachers_are_always_right():
    assert set(accuracy(make_questions(100, 1, scenario="clean")).values()) == {1.0}


def test_complementary_teachers_are_strong_on_their_own_operations():
    questions = make_questions(800, 1, scenario="complementary")
    problems = make_problems(800, 1)
    for teacher, strong in (("adder", "+-"), ("multiplier", "*+"), ("divider", "/-")):
        inside, outside = [], []
        for problem, question in zip(problems, questions, strict=True):
            rationale = next(r for r in question.rationales if r.teacher == teacher)
            known = {s.operator for s in problem.steps} <= set(strong)
            (inside if known else outside).append(rationale.correct)
        assert all(inside)
        assert sum(outside) / len(outside) < 0.75


def test_colluders_repeat_the_misleading_rationale():
    for question in make_questions(50, 1, scenario="colluding"):
        text = {r.teacher: r.text for r in question.rationales}
        assert text["echo"] == text["misleading"]
        assert text["parrot"] != text["misleading"]
        kept = text["parrot"].partition("Consequently")[0]
        assert kept
        assert text["misleading"].startswith(kept)


def test_styles_are_tied_or_shuffled():
    tied = make_questions(60, 3, shuffle_styles=False)
    own = {t.name: t.style for t in SCENARIOS["misleading"]}
    for question in tied:
        assert {r.teacher: style_of(r.text) for r in question.rationales} == own
    seen = Counter(
        (r.teacher, style_of(r.text)) for q in make_questions(200, 3) for r in q.rationales
    )
    assert len(seen) == 25
    assert min(seen.values()) > 20  # 40 expected


def test_styles_differ_in_length_and_order():
    options = WorldOptions(min_steps=5, max_steps=5, join_share=1)
    questions = make_questions(40, 3, options, scenario="clean", shuffle_styles=False)
    length = Counter()
    for question in questions:
        for rationale in question.rationales:
            length[rationale.teacher] += len(rationale.text.split())
    assert length["terse"] < length["numbered"] < length["verbose"]
    equations = [
        [re.findall(r"\d+ [-+*/] \d+ = \d+", r.text) for r in q.rationales] for q in questions
    ]
    assert any(one[0] != one[1] for one in equations)
    assert all(sorted(one[0]) == sorted(one[1]) for one in equations)


def test_a_text_of_another_hand_has_no_style():
    assert style_of("I think it is 5.") is None
    assert style_of("") is None
    assert {style_of(r.text) for q in make_questions(50, 0) for r in q.rationales} == set(STYLES)


def test_an_unknown_scenario_is_named():
    with pytest.raises(ValueError, match=r"scenario='mislead': expected one of clean, misleading"):
        make_questions(1, 0, scenario="mislead")


def test_written_records_are_read_back(tmp_path):
    from compact_fast.data import read_questions

    questions = make_questions(5, 4)
    path = tmp_path / "world.jsonl"
    write_questions(questions, path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert set(rows[0]) == {"id", "question", "answer", "rationales"}
    for ours, theirs in zip(questions, read_questions(str(path)), strict=True):
        assert (ours.id, ours.question, ours.answer) == (theirs.id, theirs.question, theirs.answer)
        assert ours.rationales == theirs.rationales
