"""Agreement and consensus scores: truths by hand, invariances, real data, collusion, bad input."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
from graph_support import needs_native

from compact_fast.graphs import (
    GraphOptions,
    agreement,
    consensus,
    parse_rationales,
    score_graphs,
)

RIGHT = "She has 4 boxes of 6 pens, 4 * 6 = 24 pens.\nShe gives 5 away, 24 - 5 = 19 pens.\n#### 19"
AGREES = "First 6 * 4 = 24.\nThen 24 - 5 = 19 pens are left for her.\nThe answer is 19."
WRONG = "She has 4 boxes of 6 pens, 4 + 6 = 10 pens.\nShe gives 5 away, 10 - 5 = 5 pens.\n#### 5"
ODD = "There are 6 pens and she gets 5, 6 + 5 = 11 pens, so we say 11 pens.\n#### 11"
OFF_TOPIC = "Paris is the capital of France.\nIt lies on the river Seine and is large."


def scores(texts: list[str], backend: str = "auto", **choices: Any) -> np.ndarray:
    return consensus(texts, [0, len(texts)], backend=backend, **choices).scores  # type: ignore[arg-type]


def test_the_misleading_rationale_scores_lowest(backend: str) -> None:
    got = scores([RIGHT, AGREES, WRONG, ODD], backend)
    assert min(got[:2]) > 2 * max(got[2:])
    assert ((got >= 0) & (got <= 1)).all()


def test_agreement_matrix(backend: str) -> None:
    half = RIGHT.splitlines()[0] + "\nSo 24 + 5 = 29.\n#### 19"
    graphs = parse_rationales([RIGHT, RIGHT, OFF_TOPIC, half], backend=backend)  # type: ignore[arg-type]
    (r,) = agreement(graphs, [0, 4], backend=backend)
    np.testing.assert_array_equal(r, r.T)
    assert r[0, 1] == 1
    assert r[0, 2] == 0
    assert 0 < r[0, 3] < 1
    assert np.diag(r).tolist() == [1, 1, 1, 1]


def test_flags(backend: str) -> None:
    texts = [RIGHT, *[RIGHT] * 3, *[RIGHT, WRONG], *[RIGHT, WRONG, ODD]]
    found = consensus(texts, [0, 1, 1, 4, 6, 9], backend=backend)  # type: ignore[arg-type]
    assert found.no_evidence.tolist() == [True, True, True, False, False]
    assert found.undecidable.tolist() == [False, False, False, True, False]
    assert found.scores[:4].tolist() == [1, 1, 1, 1]
    assert found.scores[4] == found.scores[5] < 1
    assert found.groups.tolist() == [0, 0, 0, 0, 0, 1, 0, 1, 2]
    assert found.backend == backend
    assert [m.shape[0] for m in found.agreement] == [1, 0, 3, 2, 3]


def test_one_copy_more_changes_nothing(backend: str) -> None:
    once = scores([RIGHT, AGREES, WRONG, ODD], backend)
    for copies in (2, 3):
        more = scores([RIGHT, AGREES, WRONG, *[ODD] * copies], backend)
        np.testing.assert_array_equal(more[:3], once[:3])
        assert (more[3:] == once[3]).all()
    raw = scores([RIGHT, AGREES, WRONG, ODD, ODD], backend, options=GraphOptions(dedupe=None))
    assert raw[3] > once[3]


def test_given_answers_replace_those_in_the_texts(backend: str) -> None:
    texts = [RIGHT, AGREES, WRONG, ODD]
    vote = GraphOptions(answer_share=1.0, soundness=0.0)
    got = scores(texts, backend, options=vote, final_answers=["7", "8", "7.0", None])
    assert got.tolist() == [1 / 3, 0, 1 / 3, 0]
    assert scores(texts, backend, options=vote).tolist() == [1 / 3, 1 / 3, 0, 0]


def test_centralities(backend: str) -> None:
    texts = [RIGHT, AGREES, WRONG, ODD]
    options = GraphOptions(soundness=0.0)
    cover, agree = (
        scores(texts, backend, options=options, centrality=c) for c in ("coverage", "agreement")
    )
    (r,) = consensus(texts, [0, 4], options=options, backend=backend).agreement  # type: ignore[arg-type]
    np.testing.assert_allclose(agree, (r.sum(1) - 1) / 3, atol=1e-7)
    assert not np.array_equal(cover, agree)
    cluster = scores(texts, backend, options=options, centrality="cluster", cluster_at=0.5)
    assert cluster[0] > 0
    assert cluster[2:].tolist() == [0, 0]


def test_a_derived_answer_counts_for_more_than_a_bare_one(backend: str) -> None:
    got = scores([RIGHT, "19", "21", "12 + 9 = 21"], backend)
    assert got[0] > got[1]
    assert got[3] > got[2]


def test_texts_without_numbers(backend: str) -> None:
    texts = [
        "Penguins are birds.\nBirds have feathers and lay eggs.\nThe answer is yes.",
        "Penguins are birds and birds lay eggs.\nSo they have feathers.\nThe answer is yes.",
        "Penguins swim like fish.\nFish have scales and no feathers.\nThe answer is no.",
    ]
    got = scores(texts, backend)
    assert got[2] < min(got[:2])


def test_likeness_of_words_breaks_no_tie_of_answers(backend: str) -> None:
    texts = [
        "Penguins are birds and birds have feathers.",
        "Penguins are birds, birds have warm feathers.",
        "A body of that kind keeps its coat.",
        "Mammals alone grow fur, so no.",
    ]
    for answers in (["yes", "yes", "no", "no"], ["yes", "no", "no", "yes"]):
        got = scores(texts, backend, final_answers=answers)
        assert len(set(got.tolist())) == 1
    alone = scores(texts, backend, options=GraphOptions(soundness=0.0))
    assert min(alone[:2]) > max(alone[2:])


def test_near_copies_with_other_answers_have_votes_of_their_own(backend: str) -> None:
    start = "She has 4 boxes of 6 pens each, so she has 4 * 6 = 24 pens in all of her boxes.\n"
    texts = [start + f"She gives 5 away, 24 - 5 = {end}" for end in (19, 19, 18, 17)]
    found = consensus(texts, [0, 4], backend=backend)  # type: ignore[arg-type]
    assert found.groups.tolist() == [0, 0, 2, 3]
    assert not found.no_evidence[0]
    given = consensus(texts, [0, 4], final_answers=["1"] * 4, backend=backend)  # type: ignore[arg-type]
    assert given.no_evidence[0]


def shuffled(texts: list[str], cu: np.ndarray, answers: list[Any], rng: random.Random) -> Any:
    """Teachers in another order inside each question, questions in another order."""
    order, bounds = [], [0]
    questions = list(range(len(cu) - 1))
    rng.shuffle(questions)
    for q in questions:
        mine = list(range(cu[q], cu[q + 1]))
        rng.shuffle(mine)
        order += mine
        bounds.append(len(order))
    return order, [texts[s] for s in order], bounds, [answers[s] for s in order]


@needs_native
def test_order_threads_batches_and_instructions_do_not_matter(real) -> None:
    from compact_fast import _native

    _, texts, cu, answers = real("obqa_train_eit_tinyllm")
    texts, cu, answers = texts[: cu[150]], cu[:151], answers[: cu[150]]
    plain = consensus(texts, cu, final_answers=answers, threads=1)
    _native.force_simd_level(0)
    try:
        scalar = consensus(texts, cu, final_answers=answers, threads=2)
    finally:
        _native.force_simd_level(-1)
    np.testing.assert_array_equal(scalar.scores, plain.scores)
    order, mixed, bounds, finals = shuffled(texts, cu, answers, random.Random(0))
    other = consensus(mixed, bounds, final_answers=finals, threads=5)
    np.testing.assert_array_equal(other.scores, plain.scores[order])
    single = [
        consensus(texts[a:b], [0, b - a], final_answers=answers[a:b]).scores
        for a, b in itertools.pairwise(cu[:21])
    ]
    np.testing.assert_array_equal(np.concatenate(single), plain.scores[: cu[20]])


@needs_native
@pytest.mark.parametrize("name", ["svamp_train_fair", "math_train_eit", "strategyqa_train_eit"])
def test_native_equals_rustworkx(name: str, real) -> None:
    _, texts, cu, answers = real(name)
    texts, cu, answers = texts[: cu[40]], cu[:41], answers[: cu[40]]
    for finals in (answers, None):
        for centrality in ("coverage", "agreement", "cluster"):
            native, twin = (
                consensus(texts, cu, final_answers=finals, centrality=centrality, backend=b)  # type: ignore[arg-type]
                for b in ("native", "rustworkx")
            )
            for field in ("scores", "groups", "no_evidence", "undecidable"):
                np.testing.assert_array_equal(getattr(native, field), getattr(twin, field))
            for a, b in zip(native.agreement, twin.agreement, strict=True):
                np.testing.assert_array_equal(a, b)


@needs_native
def test_scores_from_graphs_equal_scores_from_texts(real) -> None:
    _, texts, cu, _ = real("gsm8k_train_eit")
    texts, cu = texts[: cu[100]], cu[:101]
    graphs = parse_rationales(texts)
    np.testing.assert_array_equal(score_graphs(graphs, cu).scores, consensus(texts, cu).scores)
    rows = np.random.default_rng(0).standard_normal((graphs.result.size, 8))
    native = score_graphs(graphs, cu, embeddings=rows)
    small = parse_rationales(texts[: cu[10]])
    part = rows[: small.result.size]
    twin = score_graphs(small, cu[:11], embeddings=part, backend="rustworkx")
    np.testing.assert_array_equal(native.scores[: cu[10]], twin.scores)


def auc(rows: list[dict[str, Any]], cu: np.ndarray, got: np.ndarray) -> float:
    """Mean over questions with right and wrong rationales of P(right above wrong)."""
    values = []
    for q, row in enumerate(rows):
        right = np.array([bool(r["correct"]) for r in row["rationales"]])
        if right.any() and not right.all():
            mine = got[cu[q] : cu[q + 1]]
            gap = mine[right][:, None] - mine[~right][None]
            values.append(((gap > 0) + 0.5 * (gap == 0)).mean())
    return float(np.mean(values))


@needs_native
@pytest.mark.parametrize("name", ["gsm8k_test_openai", "svamp_train_fair"])
def test_right_rationales_rank_above_wrong_ones(name: str, real) -> None:
    rows, texts, cu, answers = real(name)
    found = auc(rows, cu, consensus(texts, cu, final_answers=answers).scores)
    vote = GraphOptions(answer_share=1.0, soundness=0.0)
    votes = auc(rows, cu, consensus(texts, cu, final_answers=answers, options=vote).scores)
    assert found >= 0.79
    assert found > votes + 0.04


def reworded(text: str, rng: random.Random) -> str:
    """Near-verbatim: a tenth of the words dropped or doubled at the seams of the copy."""
    words = text.split(" ")
    at = rng.randrange(len(words))
    return " ".join([*words[:at], "indeed", *words[at:]])


@needs_native
@pytest.mark.parametrize("change", [lambda t, _: t, reworded], ids=["verbatim", "near-verbatim"])
@pytest.mark.parametrize("colluders", [1, 2, 3])
def test_collusion_of_copies(colluders: int, change, real) -> None:
    """Honest teachers are a majority; wrong copies must not win by being many."""
    rows, _, _, _ = real("gsm8k_train_eit")
    blind, *_ = real("gsm8k_test_openai")
    rng = random.Random(colluders)
    texts, right, bounds = [], [], [0]
    wrong = [r["text"] for row in blind for r in row["rationales"] if len(r["text"].split()) > 25]
    for row in rows[:200]:
        honest = [r["text"] for r in row["rationales"]]
        honest += [honest[0].replace("\n", ". So "), honest[1].replace(". ", ".\nNow ")][:1]
        lie = rng.choice(wrong)
        texts += honest + [lie] + [change(lie, rng) for _ in range(colluders - 1)]
        right += [True] * len(honest) + [False] * colluders
        bounds.append(len(texts))
    got = consensus(texts, bounds)
    values = []
    for a, b in itertools.pairwise(bounds):
        mine, good = got.scores[a:b], np.array(right[a:b])
        gap = mine[good][:, None] - mine[~good][None]
        values.append(((gap > 0) + 0.5 * (gap == 0)).mean())
    assert np.mean(values) >= 0.8


# ---- bad input ---------------------------------------------------------------------------------

TWO = [RIGHT, WRONG]


@pytest.mark.parametrize(
    ("texts", "cu", "choices", "message"),
    [
        (TWO, [0, 1], {}, "cu_teachers: must rise from 0 to 2, goes from 0 to 1"),
        (TWO, [1, 2], {}, "cu_teachers: must rise from 0"),
        (TWO, [0, 2, 1, 2], {}, r"cu_teachers\[2\] = 1: below the entry before it"),
        (TWO, [0.0, 2.0], {}, "expected integers"),
        (TWO, [[0, 2]], {}, r"expected integers \[Q \+ 1\]"),
        (TWO, [], {}, "cu_teachers"),
        ("text", [0, 4], {}, "got one string"),
        ([RIGHT, None], [0, 2], {}, "question 0, teacher 1: text 1: expected a string"),
        ([RIGHT, "a", "b\udfff"], [0, 1, 3], {}, "question 1, teacher 1: .*lone surrogate"),
        ([RIGHT, "b\n" * 600], [0, 1, 2], {}, "question 1, teacher 0: .*too many steps"),
        (TWO, [0, 2], {"final_answers": ["1"]}, "2 texts, but 1 final answers"),
        (TWO, [0, 2], {"final_answers": ["1", 2]}, "teacher 1: final answer 1: expected a string"),
        (TWO, [0, 2], {"mode": "x"}, "mode='x'"),
        (TWO, [0, 2], {"centrality": "x"}, "centrality='x'"),
        (TWO, [0, 2], {"cluster_at": 2}, "cluster_at=2"),
        (TWO, [0, 2], {"threads": True}, "threads=True"),
    ],
)
def test_bad_input(texts: Any, cu: Any, choices: Any, message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        consensus(texts, cu, backend=backend, **choices)  # type: ignore[arg-type]


def test_odd_but_legal_texts(backend: str) -> None:
    texts = [
        "",
        "\x00",
        "9" * 5000,
        "\n" * 5000,
        "= = =",
        "日本語のテキスト。",
        "\ufeff5",
        "<<<<>>>>",
    ]
    got = consensus(texts, [0, len(texts)], backend=backend)  # type: ignore[arg-type]
    assert np.isfinite(got.scores).all()
    assert ((got.scores >= 0) & (got.scores <= 1)).all()


def test_sixty_four_teachers_and_none(backend: str) -> None:
    texts = [f"{i % 9} + {i} = {i % 9 + i}\nThe answer is {i % 5}" for i in range(64)]
    got = consensus(texts, [0, 0, 64, 64], backend=backend)  # type: ignore[arg-type]
    assert got.scores.shape == (64,)
    assert got.agreement[1].shape == (64, 64)
    assert got.no_evidence.tolist() == [True, False, True]
    assert consensus([], [0], backend=backend).scores.size == 0  # type: ignore[arg-type]
