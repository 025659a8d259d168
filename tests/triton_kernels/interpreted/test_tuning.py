"""The choice of a configuration by measurement: off by default, measured once, kept on disk."""

import json

import pytest
import torch
import triton
from compact_fast.triton_kernels import launch, tuning
from compact_fast.triton_kernels.token_logp import measure_rows

USUAL = launch.LOGITS_GEMM["interpreter"]
OTHER = launch.LOGITS_GEMM_CANDIDATES["interpreter"][0]


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A clock that finds the candidate twice as quick, and counts how often it is asked."""
    asked = []

    def milliseconds(run):
        run()  # what is timed must run
        asked.append(run.__defaults__[0])
        return 2.0 if asked[-1] == USUAL else 1.0

    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    monkeypatch.setenv(tuning.SWITCH, "1")
    return asked


def problem():
    g = torch.Generator().manual_seed(0)
    return torch.randn(40, 16, generator=g), torch.randn(70, 16, generator=g)


def test_off_by_default(clock, monkeypatch):
    monkeypatch.delenv(tuning.SWITCH)
    assert tuning.tuned_config(*problem(), None, statistics=False) == USUAL
    assert not clock
    monkeypatch.setenv(tuning.SWITCH, "yes")
    with pytest.raises(ValueError, match="COMPACT_FAST_AUTOTUNE='yes': expected 0"):
        tuning.tuned_config(*problem(), None, statistics=False)


def test_the_quickest_is_kept(clock, monkeypatch):
    x, weight = problem()
    assert tuning.tuned_config(x, weight, None, statistics=False) == OTHER
    assert clock == [USUAL, OTHER]
    tuning.tuned_config(x, weight, None, statistics=False)
    assert len(clock) == 2  # in this process
    monkeypatch.setattr(tuning, "_chosen", {})
    assert tuning.tuned_config(x, weight, None, statistics=False) == OTHER
    assert len(clock) == 2  # in another one
    tuning.tuned_config(x, weight, None, statistics=True)
    assert len(clock) == 4  # another epilogue
    kept = json.loads(tuning.cache_file().read_text())
    assert len(kept) == 2
    assert all(key.startswith(f"interpreter|{triton.__version__}|70|16|") for key in kept)


@pytest.mark.parametrize("text", ["not json", "[]", '{"KEY": {"block_q": 3}}'])
def test_a_file_that_cannot_be_used_is_measured_anew(clock, text, monkeypatch):
    x, weight = problem()
    tuning.tuned_config(x, weight, None, statistics=False)
    key = next(iter(json.loads(tuning.cache_file().read_text())))
    tuning.cache_file().write_text(text.replace("KEY", key))
    monkeypatch.setattr(tuning, "_chosen", {})
    assert tuning.tuned_config(x, weight, None, statistics=False) == OTHER
    assert len(clock) == 4


def test_results_are_those_of_the_table(clock):
    x, weight = problem()
    targets = torch.arange(40)
    tuned = measure_rows(x, weight, None, targets)
    assert clock
    exact = (x.double() @ weight.double().T).log_softmax(1)[targets, targets]
    torch.testing.assert_close(tuned.logp.double(), exact, rtol=1e-5, atol=1e-5)
