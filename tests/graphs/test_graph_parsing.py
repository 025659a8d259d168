"""Texts to step graphs: hand-made cases, and the native parser against its Python twin."""

from __future__ import annotations

import time

import numpy as np
import pytest
from graph_support import needs_native
from hypothesis import given, settings
from hypothesis import strategies as st

from compact_fast.graphs import GraphOptions, StepGraphs, answer_keys, parse_rationales
from compact_fast.graphs.parsing import pack, unpack

M = 1_000_000


def steps(text: str, backend: str) -> list[tuple[list[float], float | None, int, int]]:
    """(operands, result, kind of result, operators) of each step."""
    (graph,) = unpack(parse_rationales([text], backend=backend))
    return [
        (
            [x / M for x in n.numbers],
            n.result / M if n.result_kind else None,
            n.result_kind,
            n.operators,
        )
        for n in graph.nodes
    ]


ADD, SUB, MUL, DIV = 1, 2, 4, 8

STEP_CASES = [
    ("48 / 2 = 24", [([2, 48], 24, 2, DIV)]),
    ("She has 5 apples.", [([], 5, 1, 0)]),
    ("She has 5 + 3 apples.", [([3, 5], None, 0, ADD)]),
    ("5 + 3 = 8. 8 * 2 = 16.", [([3, 5], 8, 2, ADD), ([2, 8], 16, 2, MUL)]),
    ("5 + 3 = 8, then 8 * 2 = 16.", [([3, 5], 8, 2, ADD), ([2, 8], 16, 2, MUL)]),
    ("x = 594 / 3 = 198", [([3, 594], 198, 2, DIV)]),
    ("x = 594 / 3", [([3, 594], None, 0, DIV)]),
    ("2 hours * 60 minutes = 120 minutes = 2 hours", [([2, 60, 120], 2, 2, MUL)]),
    ("so 48/2 = <<48/2=24>>24 clips", [([2, 48], 24, 2, DIV)]),
    ("She sold <<48/2=24>>24 clips", [([2, 24, 48], 24, 2, DIV)]),
    ("total: $1,234.50 + $0.50 = $1,235", [([0.5, 1234.5], 1235, 2, ADD)]),
    ("20% of 50 = 10", [([20, 50], 10, 2, 0)]),
    ("-5 + 3 = -2", [([-5, 3], -2, 2, ADD)]),
    ("7 - 5 = 2", [([5, 7], 2, 2, SUB)]),
    ("$$\\frac{48}{2} = 24$$", [([2, 48], 24, 2, DIV)]),
    ("$3 \\times 4 = 12$", [([3, 4], 12, 2, MUL)]),
    ("3 × 4 = 12", [([3, 4], 12, 2, MUL)]),
    ("3 x 4 = 12", [([3, 4], 12, 2, MUL)]),
    ("12 ÷ 4 = 3", [([4, 12], 3, 2, DIV)]),
    ("8 − 5 = **3**", [([5, 8], 3, 2, SUB)]),
    ("five plus three equals 8", [([3, 5], 8, 2, ADD)]),
    ("1. He has 4 pens.\n2. She has 6 pens.", [([], 4, 1, 0), ([], 6, 1, 0)]),
    ("Step 1: 2 + 2 = 4\nStep 2: 4 + 4 = 8", [([2], 4, 2, ADD), ([4], 8, 2, ADD)]),
    ("(a) 2 + 2 = 4", [([2], 4, 2, ADD)]),
    ("## Plan\n- take 3\n* take 4", [([], None, 0, 0), ([], 3, 1, 0), ([], 4, 1, 0)]),
    ("Mr. Smith has 3 cats.", [([], 3, 1, 0)]),
    ("0.1 + .2 = 0.3", [([0.1, 0.2], 0.3, 2, ADD)]),
    ("In 3.5.2 nothing", [([3.5], 0.2, 1, 0)]),
    ("debt = -$5", [([], -5, 2, 0)]),
    ("birds can fly; penguins are birds", [([], None, 0, 0), ([], None, 0, 0)]),
    ("   \n\n  ", []),
    ("", []),
    ("12,34 is odd", [([12], 34, 1, 0)]),
    ("½ of 8 = 4", [([1, 2, 8], 4, 2, DIV)]),
]


@pytest.mark.parametrize(("text", "expected"), STEP_CASES, ids=[t for t, _ in STEP_CASES])
def test_steps(text: str, expected: list, backend: str) -> None:
    want = [(sorted(set(a)), r, k, o) for a, r, k, o in expected]
    assert steps(text, backend) == want


def test_value_flow(backend: str) -> None:
    text = "2 + 3 = 5\n4 + 4 = 8\n5 * 8 = 40\nSo he has 40."
    (graph,) = unpack(parse_rationales([text], backend=backend))
    # follows: 0-1, 1-2, 2-3; uses: step 2 the results of 0 and 1
    assert sorted(graph.edges) == [(0, 1, 0), (0, 2, 1), (1, 2, 0), (1, 2, 1), (2, 3, 0)]


ANSWER_CASES = [
    ("5 + 3 = 8\n#### 8", 8),
    ("5 + 3 = 8\nThe answer is 1,200.", 1200),
    ("Answer: $-5", -5),
    ("**Final Answer:** 7 apples", 7),
    ("so \\boxed{42}", 42),
    ("so \\boxed{\\frac{1}{2}}", 0.5),
    ("the answer is 1/4", 0.25),
    ("the answer is 2 + 3 = 5", 5),
    ("The answer is 3. Wait. The answer is 4.", 4),
    ("5 + 3 = 8\nSo he has 8 pens in 2 boxes.", 8),
    ("nothing 3 here 4", 4),
]


@pytest.mark.parametrize(("text", "value"), ANSWER_CASES, ids=[t for t, _ in ANSWER_CASES])
def test_final_answer(text: str, value: float, backend: str) -> None:
    graphs = parse_rationales([text], backend=backend)
    assert graphs.answer_kind[0] > 0
    assert graphs.answer[0] / M == value


SAME_ANSWERS = [
    ("12", "12.0"), ("1,200", "$1200"), ("(B)", "b"), ("Yes", "true"), ("No.", "False"),
    ("0.50", "1/2"), ("the red house", "red house"), ("1e", "1 e"), ("-3", "−3"),
    ("123456789012345", "123,456,789,012,345"), ("5 apples", "5"), ("x = 7", "7"),
]  # fmt: skip


@pytest.mark.parametrize(("a", "b"), SAME_ANSWERS, ids=[a for a, _ in SAME_ANSWERS])
def test_answers_that_mean_the_same(a: str, b: str, backend: str) -> None:
    keys, found = answer_keys([a, b], backend)  # type: ignore[arg-type]
    assert found.all()
    assert keys[0] == keys[1]


@pytest.mark.parametrize(("a", "b"), [("A", "B"), ("yes", "no"), ("12", "-12"), ("red", "blue")])
def test_answers_that_differ(a: str, b: str, backend: str) -> None:
    keys, found = answer_keys([a, b], backend)  # type: ignore[arg-type]
    assert found.all()
    assert keys[0] != keys[1]


def test_no_answer(backend: str) -> None:
    keys, found = answer_keys([None, "", "  ", "?!"], backend)  # type: ignore[arg-type]
    assert not found.any()
    assert not keys.any()


# ---- native = Python, byte for byte -----------------------------------------------------------

PIECES = [
    "=", "=", "+", "-", "*", "/", "x", "**", "12", "3.5", "1,200", ".5", "0", "007", "9" * 14,
    "\n", " ", " ", ". ", "; ", "? ", "answer", "is", ":", "#", "####", "\\boxed{", "}", "{",
    "\\frac{", "}{", "\\times", "\\text", "<<", ">>", "<<1+2=3>>", "Step 3:", "1. ", "(a) ",
    "- ", "> ", "Mr", ".", "apples", "apple's", "the", "seven", "plus", "equals", "yes", "(",
    ")", ",", "%", "$", "×", "−", "½", "é", "日本", "\x00", "\t", "\r\n", "’", "…", "A", "B.",
    "4)", "*x*", "\u2028", "x = 5",
]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES), max_size=60).map("".join)
words = st.lists(st.sampled_from(PIECES), max_size=60).map(" ".join)


def same(a: StepGraphs, b: StepGraphs) -> None:
    for name, array in a.arrays().items():
        other = b.arrays()[name]
        assert array.dtype == other.dtype, name
        np.testing.assert_array_equal(array, other, err_msg=name)


@needs_native
@settings(max_examples=400, deadline=None)
@given(st.lists(texts | words | st.text(max_size=40), min_size=1, max_size=4))
def test_native_equals_python(found: list[str]) -> None:
    same(parse_rationales(found, backend="native"), parse_rationales(found, backend="rustworkx"))
    native, python = answer_keys(found, "native"), answer_keys(found, "rustworkx")
    np.testing.assert_array_equal(native[0], python[0])
    np.testing.assert_array_equal(native[1], python[1])


@needs_native
@pytest.mark.parametrize("name", ["gsm8k_test_openai", "math_train_eit", "obqa_train_eit_tinyllm"])
def test_native_equals_python_on_real_texts(name: str, real) -> None:
    _, found, _, _ = real(name)
    same(
        parse_rationales(found[:400], backend="native", threads=3),
        parse_rationales(found[:400], backend="rustworkx"),
    )


def test_pack_and_unpack_are_inverse(backend: str) -> None:
    graphs = parse_rationales([t for t, _ in STEP_CASES], backend=backend)
    same(pack(unpack(graphs)), graphs)


# ---- limits and bad input ---------------------------------------------------------------------


def test_bad_texts(backend: str) -> None:
    with pytest.raises(ValueError, match="got one string"):
        parse_rationales("abc", backend=backend)
    with pytest.raises(ValueError, match="text 1: expected a string, got int"):
        parse_rationales(["a", 3], backend=backend)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"text 0: not valid Unicode at character 1"):
        parse_rationales(["a\ud800"], backend=backend)


def test_limits_name_the_first_text(backend: str) -> None:
    long = "a b\n" * 600
    with pytest.raises(ValueError, match="text 1: too many steps; the limit is 512"):
        parse_rationales(["fine", long, long], backend=backend)
    with pytest.raises(ValueError, match=r"text 2: too many bytes \(2400\); the limit is 2000"):
        parse_rationales(["", "", long], options=GraphOptions(max_bytes=2000), backend=backend)
    assert parse_rationales(
        [long], options=GraphOptions(max_steps=600), backend=backend
    ).result.size


def test_one_megabyte_of_one_token(backend: str) -> None:
    graphs = parse_rationales(["a" * 1_000_000, "9" * 1_000_000], backend=backend)
    assert np.diff(graphs.cu_nodes).tolist() == [1, 1]


@needs_native
def test_time_is_linear_in_the_text() -> None:
    options = GraphOptions(max_steps=2048)

    def seconds(size: int) -> float:
        # everything that could look back: unclosed notes, markers, fractions, chains of "="
        text = "<<" * size + "answer : " * size + "\\frac{1}{" * size + "1 = " * size
        start = time.thread_time()  # other processes must not count
        parse_rationales([text], options=options, backend="native", threads=1)
        return time.thread_time() - start

    seconds(100)
    small, large = (min(seconds(size) for _ in range(3)) for size in (4_000, 40_000))
    assert large < 60 * max(small, 1e-3)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("result", -1.0, "expected a number from 0"),
        ("text", float("nan"), "expected a number from 0"),
        ("numbers", "1", "expected a number from 0"),
        ("answer_share", 1.5, "expected a number from 0 to 1"),
        ("ramp", (0.5, 0.5), "must be below"),
        ("ramp", 0.5, "expected 2 numbers"),
        ("step_weights", (1, 2), "expected 3 numbers"),
        ("max_steps", 0, "expected an integer from 1 to 2048"),
        ("max_steps", 10.0, "expected an integer"),
        ("dedupe", 2.0, "expected a number from 0 to 1"),
    ],
)
def test_bad_options(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=.*{message}"):
        GraphOptions(**{name: value})  # type: ignore[arg-type]


CORRUPTIONS = [
    ("cu_nodes", lambda a: a + 1, "must rise from 0"),
    ("cu_nodes", lambda a: a[:-1], "expected shape"),
    ("cu_nodes", lambda a: a[[0, 2, 1, 3]], "below the entry before it"),
    ("cu_edges", lambda a: a.astype(np.int32), "expected int64, got int32"),
    ("edge_target", lambda a: a + 100, "nodes"),
    ("edge_source", lambda a: a * 0, "to itself|repeats"),
    ("edge_type", lambda a: a + 7, "expected 0 or 1"),
    ("signature", lambda a: a[:, :4], "expected shape"),
    ("numbers", lambda a: a[::-1].copy(), "must rise inside an item"),
    ("result_kind", lambda a: a + 9, "at most 2"),
    ("operators", lambda a: a.tolist(), "expected an array, got list"),
    ("cu_shingles", lambda a: a * 2, "must rise from 0"),
]


@pytest.mark.parametrize(("name", "change", "message"), CORRUPTIONS)
def test_arrays_that_lie_are_refused(name: str, change, message: str) -> None:
    good = parse_rationales(
        ["1 + 2 = 3\n3 + 5 = 8\n8 * 3 = 24", "4 * 5 = 20\n20 - 6 = 14", "7 - 2 = 5\n5 + 9 = 14"],
        backend="rustworkx",
    ).arrays()
    with pytest.raises(ValueError, match=message):
        StepGraphs(**{**good, name: change(good[name])})
