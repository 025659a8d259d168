import pytest

from compact_fast.arithmetic.steps import (
    FAULTS,
    MAX_NUMBER,
    Of,
    Step,
    apply,
    compute,
    edges,
    is_affected,
    reorder,
)

CHAIN = [Step("+", 12, 5, "Ann", "Monday"), Step("-", Of(0), 3, "Ann", "Tuesday")]
JOIN = [
    Step("*", 3, 4, "Ann", "start"),
    Step("/", 20, 2, "Ben", "Monday"),
    Step("-", Of(0), Of(1), "Ann", "more"),
]


def results(steps):
    return [c.result for c in compute(steps)]


@pytest.mark.parametrize(
    ("operator", "left", "right", "result"),
    [
        ("+", 90, 9, 99),
        ("+", 90, 10, None),
        ("-", 3, 3, 0),
        ("-", 3, 4, None),
        ("*", 33, 3, 99),
        ("*", 50, 2, None),
        ("/", 21, 3, 7),
        ("/", 22, 3, None),
        ("/", 22, 0, None),
    ],
)
def test_an_operation_stays_in_the_worlds_numbers(operator, left, right, result):
    assert apply(operator, left, right) == result
    assert MAX_NUMBER == 99


def test_results_flow_into_later_steps():
    assert results(CHAIN) == [17, 14]
    assert [c.equation for c in compute(JOIN)] == ["3 * 4 = 12", "20 / 2 = 10", "12 - 10 = 2"]
    assert edges(CHAIN) == [(0, 1)]
    assert edges(JOIN) == [(0, 2), (1, 2)]


def test_a_slip_is_carried_on():
    assert [c.result for c in compute(CHAIN, lambda i, r: r + 1 if i == 0 else r)] == [18, 15]
    assert compute(CHAIN, lambda i, r: r - 60) is None


def test_reordering_swaps_the_branches_and_keeps_the_result():
    other = reorder(JOIN)
    assert [c.equation for c in compute(other)] == ["20 / 2 = 10", "3 * 4 = 12", "12 - 10 = 2"]
    assert edges(other) == [(1, 2), (0, 2)]
    assert reorder(CHAIN) == CHAIN


@pytest.mark.parametrize(
    ("fault", "chain", "join"),
    [
        ("adds_losses", [17, 20], [12, 10, 22]),
        ("adds_multiples", [17, 14], None),
        ("subtracts_shares", [17, 14], None),
        ("stops_early", [17, 14], [12, 10]),
    ],
)
def test_a_fault_changes_its_class_of_problems_only(fault, chain, join):
    assert results(FAULTS[fault](CHAIN)) == chain
    assert is_affected(CHAIN, fault) == (chain != [17, 14])
    done = compute(FAULTS[fault](JOIN))
    assert join == (None if done is None else [c.result for c in done])
    assert is_affected(JOIN, fault)
