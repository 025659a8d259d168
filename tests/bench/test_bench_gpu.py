"""The command for a GPU, taken along its whole path on a CPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(*words):
    # torch.compile is a peer; here it may be a name only
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu", *map(str, words)], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so():
    done = run()
    assert done.returncode == 2
    assert "no CUDA or ROCm device" in done.stderr
    assert "--device cpu --backend torch --tiny" in done.stderr


def test_checks_first_then_one_table(tmp_path):
    target = tmp_path / "gpu.csv"
    small = ("--device", "cpu", "--backend", "torch", "--tiny", "--rounds", "1", "-o", target)
    done = run(*small)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.index("conformance") < done.stdout.index("accuracy")
    assert done.stdout.index("accuracy") < done.stdout.index("timing tiny")
    assert "TOO LARGE" not in done.stdout
    assert "left out: quack (pip install quack-kernels)" in done.stdout
    rows = list(csv.DictReader(target.open()))
    assert {row["head"] for row in rows} == {"frozen", "trained"}
    assert {row["variant"] for row in rows} >= {
        "bare products", "compact_loss", "compact_loss, fixed weights", "eager", "torch.compile",
    }  # fmt: skip
    for row in rows:
        assert row["note"] or float(row["ms"]) > 0
        assert row["date"]
        assert row["torch"] == torch.__version__


def test_a_wrong_backend_is_not_timed(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import gpu
    from compact_fast.backends.torch_backend import TorchBackend

    class Doubling(TorchBackend):
        def score_and_loss(self, *arguments):
            good = super().score_and_loss(*arguments)
            return good._replace(loss=2 * good.loss)

    monkeypatch.setattr(gpu, "check_backend", lambda *_: None)  # accuracy alone has to see it
    assert not gpu.check(Doubling(name="doubling"), torch.device("cpu"), tiny=True)
    said = capsys.readouterr().out
    assert "TOO LARGE" in said
    assert "nothing is timed" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_benches_of_steps_and_tiles_say_so_too(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delenv("COMPACT_FAST_DATA", raising=False)
    from bench import gpu_step, gpu_tiles

    assert gpu_tiles.main() == 2
    assert gpu_step.main(["--data", "somewhere"]) == 2
    assert gpu_step.main([]) == 2
    said = capsys.readouterr().err
    assert said.count("no CUDA or ROCm device") == 2
    assert "--data FOLDER" in said
