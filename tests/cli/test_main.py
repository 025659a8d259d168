"""The command's frame: help, exit codes, one clear line for every error."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys

import pytest

from compact_fast.atomic import DiskFullError
from compact_fast.cli import main as cli
from compact_fast.cli.config_page import page
from compact_fast.cli.init import template
from compact_fast.run_config import build, load, schema
from compact_fast.trainer.interrupts import TrainingInterrupted


def failing(error: BaseException, monkeypatch, capsys, *flags: str) -> tuple[int, str]:
    """Exit code and stderr of a verb that raises."""

    def run(arguments):
        raise error

    verb = cli.load_verb("env")
    monkeypatch.setattr(cli, "load_verb", lambda name: verb.__class__("env", "", run))
    code = cli.main(["env", *flags])
    return code, capsys.readouterr().err


def test_help_needs_no_torch_and_no_patience():
    check = (
        "import sys; from compact_fast.cli.main import main; code = main(['--help']); "
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy or code else 0)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    for verb in cli.VERBS:
        assert f"\n  {verb}" in done.stdout
    # time of the processor, so that a busy machine does not count
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_explains_itself(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: compact-fast {verb}")
    assert all(len(line) <= 100 for line in out.splitlines())


def test_help_of_train_names_every_key(capsys):
    cli.main(["train", "--help"])
    out = capsys.readouterr().out
    assert all(f"\n  --{key.replace('_', '-')}\n" in out for key in schema())


@pytest.mark.parametrize(
    ("verb", "used", "unused"),
    [
        ("eval", ("limit", "samples", "world-seed"), ("output-dir", "save-steps", "lora-r", "tau")),
        ("score", ("teachers", "tau", "share-prompts"), ("resume", "holdout", "samples", "bf16")),
    ],
)
def test_help_names_the_keys_that_are_used_and_the_others_are_refused(verb, used, unused, capsys):
    assert set(cli.load_verb(verb).keys) <= set(schema())
    cli.main([verb, "--help"])
    out = capsys.readouterr().out
    assert all(f"\n  --{key}\n" in out for key in used)
    for key in unused:
        assert f"\n  --{key}\n" not in out
        assert cli.main([verb, "data.jsonl", f"--{key}", "1"]) == 2
        assert f"--{key}: {verb} does not use this key" in capsys.readouterr().err


def test_unknown_command_names_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    assert "trian: unknown command; did you mean train?" in capsys.readouterr().err


def test_without_a_command_it_shows_the_overview(capsys):
    assert cli.main([]) == 2
    assert "usage: compact-fast COMMAND" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("compact-fast 0.")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("tau=0: wrong\n  here"), 2, "tau=0: wrong here"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "x.txt"),
            2,
            "x.txt: no such file or directory",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/r"), 2, "/r: permission denied"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a"),
            2,
            "runs/a: no space left on device; free some space and run again",
        ),
        (
            DiskFullError(errno.ENOSPC, "no space left on the disk (0.1 MB free)", "runs/a"),
            2,
            "runs/a: no space left on the disk (0.1 MB free); free some space and run again",
        ),
        (MemoryError(), 2, "out of memory; lower questions_per_step, limit or max_length"),
        (RuntimeError("shape"), 1, "internal error: RuntimeError: shape; run with --debug"),
        (KeyError("k"), 1, "internal error: KeyError: 'k'; run with --debug"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(error, code, line, monkeypatch, capsys):
    got, err = failing(error, monkeypatch, capsys)
    assert (got, err) == (code, f"compact-fast: error: {line}\n")


@pytest.mark.parametrize(
    ("stop", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            TrainingInterrupted(15, 7, "checkpoint-7"),
            143,
            "stopped by SIGTERM after step 7; checkpoint-7 is whole: run the same command again to "
            "resume there",
        ),
    ],
)
def test_a_stop_by_signal_is_no_error(stop, code, line, monkeypatch, capsys):
    assert failing(stop, monkeypatch, capsys) == (code, f"compact-fast: {line}\n")


def test_debug_shows_the_traceback(monkeypatch, capsys):
    code, err = failing(ValueError("what"), monkeypatch, capsys, "--debug")
    assert code == 2
    assert "Traceback (most recent call last)" in err
    assert err.endswith("compact-fast: error: what\n")


# ---- init ------------------------------------------------------------------------------------


def test_init_round_trips(tmp_path, capsys):
    path = tmp_path / "new" / "run.yaml"
    assert cli.main(["init", str(path)]) == 0
    assert load(path) == build({})
    assert cli.main(["init", str(path), "--student", "x", "--tau", "2"]) == 2
    assert f"{path}: exists already; --force overwrites it" in capsys.readouterr().err
    assert cli.main(["init", str(path), "--student", "x", "--tau", "2", "--force"]) == 0
    config = load(path)
    assert config.run.student == "x"
    assert config.method.tau == 2
    assert config.run.data is None


def test_the_template_has_every_key_at_its_default():
    lines = template({}).splitlines()
    for key in schema().values():
        assert sum(line.lstrip("# ").startswith(f"{key.name}: ") for line in lines) >= 1


def test_uncommented_defaults_are_the_defaults(tmp_path):
    names = tuple(f"# {key}: " for key in schema())
    text = "\n".join(
        line[2:] if line.startswith(names) else line for line in template({}).splitlines()
    )
    (tmp_path / "all.yaml").write_text(text)
    assert load(tmp_path / "all.yaml").flat() == build({}).flat()


def test_init_refuses_a_folder_and_bad_values(tmp_path, capsys):
    assert cli.main(["init", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert cli.main(["init", str(tmp_path / "a.yaml"), "--tau", "0"]) == 2
    assert not (tmp_path / "a.yaml").exists()


def test_the_page_of_keys_is_current():
    from pathlib import Path

    path = Path(__file__).parents[2] / "docs" / "config.md"
    assert path.read_text(encoding="utf-8") == page(), (
        "docs/config.md is out of date: python -m compact_fast.cli.config_page docs/config.md"
    )


def test_scenarios_are_those_of_the_world():
    from typing import get_args

    from compact_fast.arithmetic import SCENARIOS

    hint = schema()["world_scenario"].hint
    assert set(get_args(hint)) == set(SCENARIOS)
