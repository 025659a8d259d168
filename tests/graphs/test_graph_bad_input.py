"""Bad and odd input to every public function, in both implementations: the right answer, or a
ValueError that names the place; never another exception, a crash or a silent guess."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from graph_support import HAS_NATIVE, needs_native

from compact_fast.graphs import (
    GraphOptions,
    StepGraphs,
    agreement,
    answer_keys,
    assign,
    consensus,
    explain,
    match,
    match_matrices,
    parse_rationales,
    score_graphs,
)
from compact_fast.graphs.explain import examine
from compact_fast.graphs.stream import score_batch, score_file

TEXTS = ["2 + 3 = 5\n5 * 4 = 20", "3 + 2 = 5\nThe answer is 5.", "4 * 4 = 16", ""]
NAN = float("nan")
NANS = np.array([0.0, NAN])
EDGES = [[0, 1, 0]]
STRANGE = "a\ud800"  # a lone surrogate: what json makes of invalid UTF-16


def graphs() -> StepGraphs:
    return parse_rationales(TEXTS, backend="rustworkx")


def rows(width: int = 4) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((graphs().result.size, width))


def corrupt(name: str, value: Any) -> StepGraphs:
    return StepGraphs(**{**graphs().arrays(), name: value})


def batch(*answers: Any) -> dict[str, Any]:
    return {"rationales": [[{"text": t, "answer": a} for t, a in zip(TEXTS, answers, strict=True)]]}


Call = Callable[..., Any]
REFUSED: dict[str, tuple[Call, str]] = {
    # texts
    "one string": (lambda **b: consensus("abc", [0, 3], **b), "expected a list of texts"),
    "one string of bytes": (lambda **b: parse_rationales(b"abc", **b), "expected a list of texts"),
    "no texts": (lambda **b: consensus(None, [0], **b), "expected a list of texts, got NoneType"),
    "a set of texts": (lambda **b: consensus(set(TEXTS), [0, 4], **b), "got set"),
    "a dict of texts": (lambda **b: parse_rationales(dict.fromkeys(TEXTS), **b), "got dict"),
    "a number of texts": (lambda **b: parse_rationales(3, **b), "got int"),
    "bytes among texts": (
        lambda **b: consensus(["a", "b", b"\xff"], [0, 1, 3], **b),
        "question 1, teacher 1: text 2: expected a string, got bytes",
    ),
    "NaN among texts": (
        lambda **b: consensus(["a", NAN], [0, 2], **b),
        "question 0, teacher 1: text 1: expected a string, got float",
    ),
    "None among texts": (lambda **b: parse_rationales([None], **b), "text 0: expected a string"),
    "invalid Unicode": (
        lambda **b: consensus(["a", "b", STRANGE], [0, 1, 3], **b),
        "question 1, teacher 1: text 2: not valid Unicode at character 1",
    ),
    "invalid Unicode, explained": (
        lambda **b: explain(["b", STRANGE], **b),
        "question 0, teacher 1: text 1: not valid Unicode",
    ),
    "10,000 steps": (
        lambda **b: consensus(["fine", "one 1\n" * 10_000], [0, 2], **b),
        "question 0, teacher 1: text 1: too many steps; the limit is 512; shorten it or raise",
    ),
    "10,000 steps, parsed": (
        lambda **b: parse_rationales(["fine", "one 1\n" * 10_000], **b),
        "text 1: too many steps; the limit is 512",
    ),
    "too many bytes": (
        lambda **b: consensus(["a", "é" * 600], [0, 2], options=GraphOptions(max_bytes=999), **b),
        r"question 0, teacher 1: text 1: too many bytes \(1200\); the limit is 999",
    ),
    "texts and teachers": (lambda **b: explain(TEXTS, ["a"], **b), "4 texts, but 1 teachers"),
    "teachers in one string": (lambda **b: explain(TEXTS, "abcd", **b), "list of teachers"),
    # final answers
    "one string of answers": (
        lambda **b: consensus(TEXTS, [0, 4], final_answers="1234", **b),
        "expected a list of final answers, got one string",
    ),
    "NaN among answers": (
        lambda **b: consensus(TEXTS, [0, 2, 4], final_answers=["1", None, NAN, "2"], **b),
        "question 1, teacher 0: final answer 2: expected a string, got float",
    ),
    "answers are short": (
        lambda **b: consensus(TEXTS, [0, 4], final_answers=["1"], **b), "4 texts, but 1 final"
    ),
    "a number as answer": (lambda backend: answer_keys([5], backend), "final answer 0"),
    "bytes as answer": (lambda backend: answer_keys([None, b"5"], backend), "final answer 1"),
    "NaN explained": (
        lambda **b: explain(TEXTS, final_answers=["1", NAN, "2", "3"], **b),
        "question 0, teacher 1: final answer 1: expected a string",
    ),
    # offsets
    "offsets end early": (lambda **b: consensus(TEXTS, [0, 3], **b), "must rise from 0 to 4"),
    "offsets start late": (lambda **b: consensus(TEXTS, [1, 4], **b), "must rise from 0 to 4"),
    "offsets fall": (
        lambda **b: consensus(TEXTS, [0, 3, 2, 4], **b), r"cu_teachers\[2\] = 2: below"
    ),
    "unsigned offsets fall": (
        lambda **b: consensus(TEXTS, np.array([0, 9, 2, 4], np.uint64), **b),
        r"cu_teachers\[2\] = 2: below",
    ),
    "bytes of offsets fall": (
        lambda **b: score_graphs(graphs(), np.array([0, 9, 2, 4], np.uint8), **b),
        r"cu_teachers\[2\] = 2: below",
    ),
    "offsets whose difference wraps": (
        lambda **b: consensus(TEXTS, np.array([0, 2**63 - 1, -2, 4]), **b),
        r"cu_teachers\[2\] = -2: below",
    ),
    "offsets of floats": (lambda **b: consensus(TEXTS, [0.0, 4.0], **b), "expected integers"),
    "offsets of NaN": (lambda **b: agreement(graphs(), [0, NAN], **b), "expected integers"),
    "offsets of text": (lambda **b: consensus(TEXTS, ["0", "4"], **b), "expected integers"),
    "offsets of booleans": (lambda **b: consensus(["a"], [False, True], **b), "expected integers"),
    "offsets too large for 64 bits": (
        lambda **b: consensus(TEXTS, [0, 2**70, 4], **b), "cu_teachers"
    ),
    "ragged offsets": (lambda **b: consensus(TEXTS, [[0], [1, 4]], **b), "cu_teachers: expected"),
    "offsets with two dimensions": (lambda **b: consensus(TEXTS, [[0, 4]], **b), "cu_teachers"),
    "one offset": (lambda **b: consensus(TEXTS, 4, **b), "cu_teachers"),
    "no offsets": (lambda **b: consensus(TEXTS, [], **b), "cu_teachers"),
    "5,000 teachers": (
        lambda **b: consensus(["1"] * 5000, [0, 5000], **b), "question 0: 5000 teachers; at most"
    ),
    # graphs
    "no graphs": (lambda **b: score_graphs(None, [0], **b), "expected StepGraphs, got NoneType"),
    "a list of graphs": (lambda **b: match([1, 2], [(0, 1)], **b), "expected StepGraphs, got list"),
    "graphs whose nodes lie": (
        lambda **b: match(corrupt("cu_nodes", np.array([0, 2, 1, 4, 4])), [(0, 1)], **b),
        r"cu_nodes\[2\] = 1: below|cu_nodes",
    ),
    "graphs whose edges leave": (
        lambda **b: match(corrupt("edge_target", graphs().edge_target + 9), [(0, 1)], **b),
        "nodes",
    ),
    "graphs of another dtype": (
        lambda **b: match(corrupt("numbers", graphs().numbers.astype(float)), [(0, 1)], **b),
        "graphs.numbers: expected int64, got float64",
    ),
    "graphs of another shape": (
        lambda **b: match(corrupt("answer", graphs().answer.reshape(2, 2)), [(0, 1)], **b),
        "graphs.answer: expected one dimension",
    ),
    # pairs
    "a pair of NaN": (lambda **b: match(graphs(), [[0, NAN]], **b), "pairs: expected integers"),
    "a pair outside": (lambda **b: match(graphs(), [[0, 4]], **b), r"pairs\[0, 1\] = 4"),
    "a pair below": (lambda **b: match(graphs(), [[0, 1], [-1, 1]], **b), r"pairs\[1, 0\] = -1"),
    "unsigned pairs outside": (
        lambda **b: match(graphs(), np.array([[0, 2**64 - 1]], np.uint64), **b), r"pairs\[0, 1\]"
    ),
    "ragged pairs": (lambda **b: match(graphs(), [[0], [0, 1]], **b), "pairs: expected"),
    "triples": (lambda **b: match(graphs(), [[0, 1, 2]], **b), r"integers \[P, 2\]"),
    # embeddings
    "embeddings of NaN": (
        lambda **b: score_graphs(graphs(), [0, 4], embeddings=rows() * NAN, **b),
        r"embeddings\[0, 0\] = nan: must be finite",
    ),
    "embeddings of inf": (
        lambda **b: match(graphs(), [(0, 1)], embeddings=rows() - np.inf, **b),
        r"embeddings\[0, 0\] = -inf: must be finite",
    ),
    "embeddings of integers": (
        lambda **b: match(graphs(), [(0, 1)], embeddings=rows().astype(int), **b), "expected floats"
    ),
    "embeddings of text": (
        lambda **b: match(graphs(), [(0, 1)], embeddings=[["a"]], **b), "embeddings: expected"
    ),
    "ragged embeddings": (
        lambda **b: match(graphs(), [(0, 1)], embeddings=[[1.0], [1.0, 2.0]], **b), "embeddings"
    ),
    "too few embeddings": (
        lambda **b: score_graphs(graphs(), [0, 4], embeddings=rows()[1:], **b), "one row a step"
    ),
    # matrices
    "NaN in a matrix": (
        lambda **b: match_matrices([[[1]], [[NAN]]], [[], []], [[], []], **b),
        "pair 1: expected a matrix of integers, got float64",
    ),
    "inf in a matrix": (lambda **b: assign([[[1, np.inf]]], **b), "pair 0: expected a matrix"),
    "negative similarity": (
        lambda **b: match_matrices([[[1, -1]]], [[]], [[]], **b), r"pair 0: entry \[0, 1\] = -1"
    ),
    "similarity above 1": (
        lambda **b: match_matrices([[[1, 32769]]], [[]], [[]], **b), r"entry \[0, 1\] = 32769"
    ),
    "negative weight": (lambda **b: assign([[[3], [-3]]], **b), r"pair 0: entry \[1, 0\] = -3"),
    "weight too large": (lambda **b: assign([[[1 << 30]]], **b), "expected 0 to 1073741823"),
    "weight beyond 64 bits": (lambda **b: assign([[[1 << 70]]], **b), "pair 0: expected a matrix"),
    "ragged matrix": (lambda **b: assign([[[1]], [[1], [1, 2]]], **b), "pair 1: expected an array"),
    "vector for a matrix": (lambda **b: assign([[1, 2]], **b), "pair 0: expected a matrix"),
    "no matrices": (lambda **b: assign(None, **b), "expected a list of matrices"),
    "matrices and edges": (lambda **b: match_matrices([[[1]]], [], [[]], **b), "1 similarities, 0"),
    "edges of floats": (
        lambda **b: match_matrices([[[1]]], [[[0.0, 1.0, 0.0]]], [[]], **b), r"edges_a\[0\]: exp"
    ),
    "ragged edges": (
        lambda **b: match_matrices([[[1]]], [[]], [[[0], [0, 1, 0]]], **b), r"edges_b\[0\]: exp"
    ),
    "an edge that leaves": (
        lambda **b: match_matrices([[[1]]], [EDGES], [[]], **b), "graph 0 has 1 nodes"
    ),
    "an unsigned edge that leaves": (
        lambda **b: match_matrices(
            [np.ones((2, 2), int)], [np.array([[0, 2**64 - 1, 0]], np.uint64)], [[]], **b
        ),
        "edges_a: entries must be",
    ),
    "5,000 steps in a matrix": (
        lambda **b: match_matrices([np.zeros((1, 5000), int)], [[]], [[]], **b),
        "pair 0: 5000 steps; at most 2048",
    ),
    # choices
    "threads": (lambda **b: parse_rationales(TEXTS, threads=0, **b), "threads=0"),
    "threads of consensus": (lambda **b: consensus(TEXTS, [0, 4], threads=1.0, **b), "threads=1.0"),
    "threads of match": (lambda **b: match(graphs(), [(0, 1)], threads=-1, **b), "threads=-1"),
    "threads of matrices": (
        lambda **b: match_matrices([[[1]]], [[]], [[]], threads="2", **b), "threads='2'"
    ),
    "threads of assign": (lambda **b: assign([[[1]]], threads=10**6, **b), "threads=1000000"),
    "threads of graphs": (lambda **b: agreement(graphs(), [0, 4], threads=0, **b), "threads=0"),
    "options as a dict": (lambda **b: consensus(TEXTS, [0, 4], options={}, **b), "options: exp"),
    "mode": (lambda **b: match(graphs(), [(0, 1)], mode=[], **b), r"mode=\[\]"),
    "budget": (lambda **b: match(graphs(), [(0, 1)], node_budget=NAN, **b), "node_budget=nan"),
    "cluster_at": (lambda **b: consensus(TEXTS, [0, 4], cluster_at=NAN, **b), "cluster_at=nan"),
    "cluster_at true": (lambda **b: consensus(TEXTS, [0, 4], cluster_at=True, **b), "cluster_at="),
    # batches
    "a batch without rationales": (
        lambda **b: score_batch({"id": ["a"]}, **b), "row 0: rationales: expected a list"
    ),
    "a list as batch": (lambda **b: score_batch([1], **b), "expected a mapping of columns"),
    "columns that differ": (
        lambda **b: score_batch({"id": ["a", "b"], "rationales": [[]]}, **b), "differ in length"
    ),
    "one text as CoT": (lambda **b: score_batch({"CoT": ["ab"]}, **b), "row 0: CoT: expected"),
    "None as CoT": (lambda **b: score_batch({"CoT": [None]}, **b), "row 0: CoT: expected a list"),
    "NaN as a batch's answer": (
        lambda **b: score_batch(batch("1", NAN, None, "2"), **b),
        r"row 0: rationales\[1\].answer: expected text, a finite number or null, got nan",
    ),
    "inf as a batch's answer": (
        lambda **b: score_batch(batch("1", np.inf, None, "2"), **b), r"rationales\[1\].answer"
    ),
    "a list as a batch's answer": (
        lambda **b: score_batch(batch("1", ["2"], None, "2"), **b), r"rationales\[1\].answer"
    ),
    "invalid Unicode in a batch": (
        lambda **b: score_batch(
            {"id": ["x"], "rationales": [[{"teacher": "anna", "text": STRANGE}]]}, **b
        ),
        "row 0: question x, teacher anna: not valid Unicode",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str, backend: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call(backend=backend)


ODD_TEXTS = {
    "empty": "",
    "white space": " \t\r\n\v\f \n\n",
    "NUL bytes": "\x00\x00 2 + 3 = 5 \x00\n\x00#### 5\x00",
    "1 MB of one letter": "a" * 1_000_000,
    "1 MB of one digit": "9" * 1_000_000,
    "1 MB of one mark": "=" * 1_000_000,
    "1 MB of one word": "word " * 200_000,
    "512 steps": "one 1\n" * 512,
    "open marks": "<<" * 1000 + "\\boxed{" * 1000 + "\\frac{" * 1000 + "((((",
    "control characters": "".join(map(chr, range(1, 160))),
    "other scripts": "二加三等于五 — ٢ + ٣ = ٥ · 𝟚+𝟛=𝟝 🙂\u200b\u202e½⅔",
    "byte order mark": "\ufeff2 + 3 = 5",
    "the last character": "\U0010ffff 1",
    "nan and inf": "nan + inf = -inf\n#### nan",
    "huge numbers": f"{10**400} + 1e999 = {10**400 + 1}",
    "divided by zero": "5 / 0 = 7\n\\frac{0}{0} = 1\n#### 1/0",
}


@pytest.mark.parametrize("case", ODD_TEXTS)
def test_odd_texts_are_read_the_same_by_both(case: str) -> None:
    if not HAS_NATIVE:
        pytest.skip("the native module is not built")
    texts = [ODD_TEXTS[case], "2 + 3 = 5\n#### 5", "3 + 2 = 6\n#### 6"]
    native, twin = (
        consensus(texts, [0, 3], backend=b, options=GraphOptions(max_bytes=1 << 20))
        for b in ("native", "rustworkx")
    )  # type: ignore[arg-type]
    np.testing.assert_array_equal(native.scores, twin.scores)
    np.testing.assert_array_equal(native.agreement[0], twin.agreement[0])
    assert ((native.scores >= 0) & (native.scores <= 1)).all()
    given = [ODD_TEXTS[case], None, ""]
    for x, y in zip(*(answer_keys(given, b) for b in ("native", "rustworkx")), strict=True):
        np.testing.assert_array_equal(x, y)


@needs_native
def test_long_answers_are_read_to_their_end_whatever_the_limit_of_steps() -> None:
    given = ["7" + ". many words follow" * 600 + ". The answer is 8", "8"]
    for backend in ("native", "rustworkx"):
        keys, known = answer_keys(given, backend)  # type: ignore[arg-type]
        assert known.all()
        assert keys[0] == keys[1]
    few = GraphOptions(max_steps=1)
    scores = [
        consensus(["1", "2", "3"], [0, 3], final_answers=[*given, "9"], options=few, backend=b)
        for b in ("native", "rustworkx")
    ]  # type: ignore[arg-type]
    np.testing.assert_array_equal(scores[0].scores, scores[1].scores)


@pytest.mark.parametrize("teachers", [0, 1, 2, 64])
def test_any_number_of_teachers(teachers: int, backend: str) -> None:
    texts = [f"{k} + 2 = {k + 2}\n#### {k % 3}" for k in range(teachers)]
    found = consensus(texts, [0, teachers], backend=backend)  # type: ignore[arg-type]
    assert found.scores.shape == (teachers,)
    assert found.agreement[0].shape == (teachers, teachers)
    assert found.no_evidence.tolist() == [teachers < 2]
    assert found.undecidable.tolist() == [teachers == 2]
    assert ((found.scores >= 0) & (found.scores <= 1)).all()
    again = score_batch({"CoT": [texts]}, backend=backend)
    assert again["consensus"] == [found.scores.tolist()]
    assert len(examine(texts, backend=backend).teachers) == teachers  # type: ignore[arg-type]


def test_anything_that_has_an_order_will_do(backend: str) -> None:
    plain = consensus(TEXTS, [0, 4], backend=backend)  # type: ignore[arg-type]
    for texts in (tuple(TEXTS), iter(TEXTS), np.array(TEXTS), np.array(TEXTS, dtype=object)):
        for cu in ((0, 4), np.array([0, 4], np.uint8), np.array([0, 9, 4, 9])[::2]):
            if isinstance(texts, type(iter([]))):
                texts = iter(TEXTS)
            found = consensus(texts, cu, backend=backend)  # type: ignore[arg-type]
            np.testing.assert_array_equal(found.scores, plain.scores)


def test_strided_and_foreign_arrays_are_read_right(backend: str) -> None:
    plain = graphs()
    wide = {k: np.repeat(a, 2, axis=0)[::2] for k, a in plain.arrays().items()}
    strided = StepGraphs(**wide)
    assert not wide["numbers"].flags.c_contiguous
    e = rows()
    pairs = np.array([[1, 0, 0], [0, 9, 2]], dtype=np.int16)[:, ::2]
    calls: list[Any] = [
        match(plain, [(1, 0), (0, 2)], embeddings=e, backend=backend),  # type: ignore[arg-type]
        match(strided, pairs, embeddings=np.asfortranarray(e), backend=backend),  # type: ignore[arg-type]
        match(strided, pairs, embeddings=np.repeat(e, 2, 1)[:, ::2], backend=backend),  # type: ignore[arg-type]
        match(strided, pairs, embeddings=e.astype(e.dtype.newbyteorder()), backend=backend),  # type: ignore[arg-type]
    ]
    for found in calls[1:]:
        np.testing.assert_array_equal(found.values, calls[0].values)
        np.testing.assert_array_equal(found.scores, calls[0].scores)


def test_graphs_cannot_be_edited_behind_the_checks(backend: str) -> None:
    made = parse_rationales(TEXTS, backend=backend)  # type: ignore[arg-type]
    mine = {k: a.copy() for k, a in made.arrays().items()}
    checked = StepGraphs(**mine)
    mine["cu_nodes"][1] = 1000
    assert checked.cu_nodes[1] == made.cu_nodes[1]
    for held in (made, checked):
        with pytest.raises(ValueError, match="read-only"):
            held.cu_nodes[1] = 1000


def test_edge_weights_are_bounded() -> None:
    GraphOptions(edge_weight=0.25, uses_edge=4.0)
    with pytest.raises(
        ValueError, match=r"edge_weight=1\.0: .*uses_edge=1\.5 it must be at most 1"
    ):
        GraphOptions(edge_weight=1.0, uses_edge=1.5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"rationales": [{"text": "\xff\xfe"}]}', "in.jsonl:1: byte 27 of the line is not UTF-8"),
        (b'{"rationales": [{"text": "a\\ud800"}]}', "question .*, teacher .*: not valid Unicode"),
        (b'{"rationales": [{"text": "a", "answer": NaN}]}', r"rationales\[0\].answer: .*got nan"),
        (b'{"rationales": [{"text": "a", "answer": {"b": 1}}]}', r"rationales\[0\].answer"),
        (b'{"CoT": "a", "Answer": "1"}', "in.jsonl:1: CoT: expected a list, got str"),
        (b"\x00\x00", "in.jsonl:1: is not valid JSON"),
    ],
)
def test_bad_lines_of_a_file(line: bytes, message: str, backend: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(line + b"\n")
    with pytest.raises(ValueError, match=message):
        score_file(tmp_path / "in.jsonl", tmp_path / "out.parquet", backend=backend)  # type: ignore[arg-type]
    assert not (tmp_path / "out.parquet").exists()


def test_tables_with_nulls(backend: str) -> None:
    table = pa.table(
        {"rationales": [[{"text": "1", "answer": None}, {"text": "1", "answer": "1"}]]}
    )
    found = score_batch(table, backend=backend)
    plain = consensus(["1", "1"], [0, 2], final_answers=[None, "1"], backend=backend)  # type: ignore[arg-type]
    assert found["consensus"].to_pylist() == [plain.scores.tolist()]
    with pytest.raises(ValueError, match="row 0: rationale 0: expected text, got NoneType"):
        score_batch(pa.table({"rationales": [[{"text": None}]]}), backend=backend)


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by RLIMIT_AS")
def test_fewer_threads_than_asked_for() -> None:
    """Where the system refuses threads, those that run do the work."""
    script = f"""
import json, resource
from compact_fast.graphs import consensus
texts, cu = {TEXTS!r} * 3000, list(range(0, 12001, 4))
plain = consensus(texts, cu, threads=1).scores.tolist()
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 60 * 2**20  # the stacks of a few threads
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(json.dumps(consensus(texts, cu, threads=180).scores.tolist() == plain))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
