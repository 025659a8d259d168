"""`compact-fast bench` through its real entry point."""

import csv

import pytest

from compact_fast.cli.main import main

SMALL = ("--rows", "64", "--vocab", "503", "--width", "16", "--rounds", "1")


def test_bench_prints_and_writes(command, tmp_path):
    target = tmp_path / "figures.csv"
    done = command("bench", *SMALL, "--device", "cpu", "-o", target)
    assert done.returncode == 0, done.stderr
    assert "backend torch (auto: first that can run on cpu" in done.stdout
    for words in ("T=64 V=503 D=16, trained head (3 products)", "frozen head (2 products)"):
        assert words in done.stdout
    rows = list(csv.DictReader(target.open()))
    ours = [row for row in rows if row["task"] == "compact_loss"]
    assert [row["head"] for row in ours] == ["trained", "frozen"]
    assert all(float(row["value"]) > 0 and float(row["times_bare"]) > 0 for row in ours)
    rates = {row["task"]: float(row["value"]) for row in rows if row["unit"] == "pairs/s"}
    assert set(rates) == {"matching, relaxed", "matching, fast", "matching, exact"}
    assert all(rate > 0 for rate in rates.values())
    assert all(row["date"] and row["device"] and row["torch"] for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rows", "many"), "--rows: many: expected a whole number above 0"),
        (("--rounds", "0"), "--rounds: 0: expected a whole number above 0"),
        (("--output", "figures.txt"), "--output: figures.txt: expected a file name that ends in"),
        (("--device", "gpu"), "--device: gpu: expected cpu, cuda or cuda:N"),
        (("--backend", "tritn"), "backend='tritn': expected 'auto' or one of"),
        (("--row", "8"), "--row: unknown option; did you mean"),
    ],
)
def test_bench_mistakes(words, message, capsys):
    assert main(["bench", *words]) == 2
    assert message in capsys.readouterr().err
