"""What `compact-fast bench` and `bench.gpu` measure with."""

import time

import pytest
import torch

from compact_fast import compact_loss
from compact_fast.benchmark.loss import PLAIN, Shape, make_problem, weighted_nll
from compact_fast.benchmark.timing import measure

CPU = torch.device("cpu")


def test_all_variants_compute_one_loss():
    problem = make_problem(Shape(2048, 101, 8), frozen=False, dtype=torch.float32, device=CPU)
    assert problem.shape.rows == 2048
    assert problem.layout.num_questions == 2
    out = compact_loss(problem.hidden, problem.weight, problem.layout, config=PLAIN)
    torch.testing.assert_close(out.loss, weighted_nll(problem), rtol=1e-5, atol=0)
    assert float(problem.scale.sum()) == pytest.approx(1)


def test_measure_tells_time_memory_and_errors():
    held = []

    def broken():
        raise RuntimeError("no such\nkernel")

    found = measure(
        {
            "slow": lambda: time.sleep(0.02),
            "large": lambda: held.append(torch.ones(32_000_000)),  # left behind, as gradients are
            "broken": broken,
        },
        CPU,
        clear=held.clear,
        rounds=2,
    )
    assert found["broken"].error == "RuntimeError: no such kernel"
    assert found["broken"].milliseconds is None
    assert found["slow"].milliseconds > 19
    if found["large"].peak_mb is not None:  # Linux
        assert 110 < found["large"].peak_mb < 160
        assert found["slow"].peak_mb < 20
