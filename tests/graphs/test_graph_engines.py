"""The consensus stage inside engines that exist: datasets.map, and Ray Data on a local cluster."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from compact_fast.graphs import consensus
from compact_fast.graphs.stream import score_batch

TEXTS = ["{a} + {b} = {c}\n{c} * 2 = {d}", "First {b} + {a} = {c}. Then 2 * {c} = {d}.", "{a} * 2"]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    out = []
    for q in range(60):
        a, b = q + 2, 3 * q + 1
        numbers = {"a": a, "b": b, "c": a + b, "d": 2 * (a + b)}
        rationales = [
            {
                "teacher": f"t{k}",
                "text": text.format(**numbers),
                "answer": str(numbers["d"] + k // 2),
            }
            for k, text in enumerate(TEXTS[: q % 3 + 1])
        ]
        out.append({"id": f"q{q}", "answer": str(numbers["d"]), "rationales": rationales})
    return out


@pytest.fixture(scope="module")
def expected(rows: list[dict[str, Any]]) -> list[list[float]]:
    flat = [r for row in rows for r in row["rationales"]]
    cu = np.cumsum([0] + [len(row["rationales"]) for row in rows])
    found = consensus([r["text"] for r in flat], cu, final_answers=[r["answer"] for r in flat])
    return [part.tolist() for part in np.split(found.scores, cu[1:-1])]


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_columns(rows: list[dict[str, Any]], expected: list[list[float]]) -> None:
    batch = columns(rows)
    out = score_batch(batch)
    assert out["consensus"] == expected
    assert out["id"] == batch["id"]
    assert [len(flat) for flat in out["agreement"]] == [len(r) ** 2 for r in batch["rationales"]]
    arrays = {name: np.array(column, dtype=object) for name, column in batch.items()}
    assert score_batch(arrays)["consensus"] == expected


def test_arrow(rows: list[dict[str, Any]], expected: list[list[float]]) -> None:
    out = score_batch(pa.Table.from_pylist(rows))
    assert out["consensus"].to_pylist() == expected
    assert out.column_names == ["id", "answer", "rationales", "consensus", "agreement"]
    empty = score_batch(pa.Table.from_pylist(rows).slice(0, 0))
    assert empty.num_rows == 0
    assert empty.schema == out.schema


def test_authors_columns(rows: list[dict[str, Any]]) -> None:
    texts = [[r["text"] for r in row["rationales"]] for row in rows]
    out = score_batch({"CoT": texts, "Answer": [row["answer"] for row in rows]})
    plain = consensus([t for q in texts for t in q], np.cumsum([0, *map(len, texts)]))
    assert [x for scores in out["consensus"] for x in scores] == plain.scores.tolist()


def test_bad_batch(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="row 1: rationales: expected a list, got NoneType"):
        score_batch({"rationales": [rows[0]["rationales"], None]})


def test_datasets_map(rows: list[dict[str, Any]], expected: list[list[float]]) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list(rows)
    out = data.map(score_batch, batched=True, batch_size=7, num_proc=2)
    assert out["consensus"][:] == expected
    assert out["id"][:] == [row["id"] for row in rows]


@pytest.fixture
def cluster() -> Any:
    """Two raylets on this machine, with one processor each."""
    pytest.importorskip("ray.data", reason="ray is not installed (the extra `ray`)")
    import ray
    from ray.cluster_utils import Cluster

    quiet = {"include_dashboard": False, "object_store_memory": 100 * 2**20}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **quiet})
    made.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.parametrize("form", ["pyarrow", "numpy"])
@pytest.mark.nightly
def test_ray_data(
    form: str, rows: list[dict[str, Any]], expected: list[list[float]], cluster: Any, tmp_path: Path
) -> None:
    import ray

    def score_and_tell(batch: Any) -> Any:  # inside, so that it travels by value
        time.sleep(0.5)  # longer than one node alone needs to take everything
        node = ray.get_runtime_context().get_node_id()
        out = score_batch(batch)
        return out.append_column("node", pa.array([node] * out.num_rows, pa.string()))

    for part in range(6):
        lines = [json.dumps(row) for row in rows[part::6]]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
    assert len(ray.nodes()) == 2
    data = ray.data.read_json(str(tmp_path), override_num_blocks=6, file_extensions=["jsonl"])
    if form == "pyarrow":
        out = data.map_batches(score_and_tell, batch_format="pyarrow", num_cpus=1)
    else:
        out = data.map_batches(score_batch, num_cpus=1)
    got = {row["id"]: row for row in out.take_all()}
    assert [list(got[row["id"]]["consensus"]) for row in rows] == expected
    if form == "pyarrow":
        assert len({row["node"] for row in got.values()}) == 2
