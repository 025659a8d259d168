import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compact_fast.evaluate.results import (
    EvaluationResult,
    ExactMatch,
    OptionLikelihood,
    RationaleNll,
    Share,
    TeacherNll,
    TextPerplexity,
    measures,
)


def test_share_by_hand():
    share = Share.of([1, 0, 0, 1, 1])
    assert share.accuracy == pytest.approx(0.6)
    assert share.standard_error == pytest.approx(math.sqrt(0.24 / 5))
    # Wilson's interval for 3 of 5, from its closed form.
    assert share.interval == pytest.approx((0.2307, 0.8824), abs=1e-4)


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=50))
def test_interval_holds_the_accuracy_and_stays_in_range(scores):
    share = Share.of(scores)
    low, high = share.interval
    assert 0 <= low <= share.accuracy + 1e-12
    assert share.accuracy - 1e-12 <= high <= 1


def test_a_perfect_score_still_has_an_interval():
    low, high = Share.of([1.0] * 20).interval
    assert high == pytest.approx(1)
    assert low == pytest.approx(0.8389, abs=1e-4)


def result():
    match = ExactMatch(Share.of([1, 0, 1]), "greedy", 1, 1, 2, 64, 300, 1.5)
    options = OptionLikelihood(
        {"text": {"sum": Share.of([1, 0]), "per_byte": Share.of([1, 1])}},
        "The answer is",
        0,
        90,
        0.5,
    )
    nll = RationaleNll(
        TeacherNll(1.25, 0.1, 4, 40),
        {"a": TeacherNll(1.0, 0.2, 3, 30), "b": TeacherNll(2.0, math.nan, 1, 10)},
        1,
        50,
        2.0,
    )
    text = TextPerplexity(
        nats=20.0, tokens=10, bytes=40, unscored_tokens=0, window=8, stride=4, seconds=0.1
    )
    return EvaluationResult(exact_match=match, options=options, rationale_nll=nll, perplexity=text)


def test_json_is_standard_and_holds_what_was_asked_for():
    data = json.loads(result().to_json(), parse_constant=lambda c: pytest.fail(c))
    assert set(data) == {"exact_match", "options", "rationale_nll", "perplexity"}
    assert data["rationale_nll"]["teachers"]["b"]["standard_error"] is None
    assert data["exact_match"]["tokens_per_second"] == 200
    assert data["perplexity"]["bits_per_byte"] == pytest.approx(0.5 / math.log(2))
    assert data["options"]["text"]["per_byte"]["accuracy"] == 1


def test_measures_from_json_equal_those_in_memory():
    assert measures(json.loads(result().to_json())) == measures(result().to_dict())


def test_table_shows_every_figure_with_its_unit():
    lines = result().table().splitlines()
    table = "\n".join(lines)
    for text in (
        "exact match, greedy",
        "66.7 %",
        "27.2 %",
        "20.8 to 93.9 %",
        "3 questions",
        "1 without an answer, 2 cut at 64 tokens",
        "option text by likelihood, per byte",
        "rationale NLL, b",
        "2.0000 nats",
        "1 non-finite, left out",
        "text, bits a byte",
        "0.7213 bits",
        "40 bytes",
        "7.3891",
    ):
        assert text in table, text


def test_no_questions_have_no_accuracy():
    share = Share.of([])
    assert math.isnan(share.accuracy)
    assert json.dumps(
        EvaluationResult(exact_match=ExactMatch(share, "greedy", 1, 0, 0, 1, 0, 0.0)).to_dict()
    )
