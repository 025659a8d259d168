"""When a run may write into a folder, and what an earlier run there means."""

from __future__ import annotations

import json

import pytest

from compact_fast.flat_yaml import Setting
from compact_fast.pipeline.run_folder import (
    MAY_DIFFER,
    begin,
    changes,
    clear,
    is_finished,
    resume_point,
)
from compact_fast.run_config import RunConfig, build, schema


def config(folder, **keys) -> RunConfig:
    keys = {"student": "s", "data": "d", "output_dir": str(folder), **keys}
    return build({k: Setting(v, f"--{k}") for k, v in keys.items()})


def leave(folder, status: str = "running", **keys) -> None:
    folder.mkdir(exist_ok=True)
    record = {"config": config(folder, **keys).flat(), "status": status}
    (folder / "run.json").write_text(json.dumps(record))


def test_a_new_folder_is_made_when_the_run_begins(tmp_path):
    new = config(tmp_path / "a" / "b")
    assert resume_point(new) == "auto"
    assert not (tmp_path / "a").exists()
    begin(new)
    assert (tmp_path / "a" / "b").is_dir()
    assert resume_point(config(tmp_path / "c", resume="never")) is None


def test_an_interrupted_run_goes_on(tmp_path):
    leave(tmp_path, weighting=[1, 2])
    assert resume_point(config(tmp_path, weighting=[1, 2])) == "auto"
    assert resume_point(config(tmp_path, weighting=[1, 2], max_steps=5, save_steps=1)) == "auto"


@pytest.mark.parametrize(
    "key", ["learning_rate", "data", "max_length", "lora_r", "seed", "holdout"]
)
def test_other_settings_are_refused(key, tmp_path):
    leave(tmp_path)
    default = schema()[key].default
    other = "else" if key == "data" else default * 2 + 1 if key != "holdout" else 0.5
    with pytest.raises(ValueError, match=f"other settings.*{key}: .* there, .* now"):
        resume_point(config(tmp_path, **{key: other}))


def test_keys_that_may_differ_exist():
    from transformers import TrainingArguments

    known = {*schema(), *TrainingArguments.__dataclass_fields__}
    assert known >= MAY_DIFFER


def test_a_checkpoint_without_run_json_counts_as_a_run(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match="holds a run"):
        resume_point(config(tmp_path, resume="never"))
    assert resume_point(config(tmp_path)) == "auto"
    assert resume_point(config(tmp_path, resume=str(tmp_path / "checkpoint-3"))).endswith("-3")


def test_overwrite_deletes_the_run_and_nothing_else(tmp_path):
    leave(tmp_path)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    other = config(tmp_path, overwrite=True, tau=3)
    assert resume_point(other) == "auto"
    assert (tmp_path / "model").exists()
    begin(other)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    clear(tmp_path / "absent")


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        resume_point(config(tmp_path / "f"))


def test_finished_means_the_same_run_to_its_end(tmp_path):
    leave(tmp_path, status="finished", max_steps=5)
    assert not is_finished(config(tmp_path, max_steps=5))  # no model was kept
    (tmp_path / "model").mkdir()
    assert is_finished(config(tmp_path, max_steps=5))
    assert not is_finished(config(tmp_path, max_steps=6))
    assert not is_finished(config(tmp_path, max_steps=5, overwrite=True))
    leave(tmp_path, status="stopped: x", max_steps=5)
    assert not is_finished(config(tmp_path, max_steps=5))


@pytest.mark.parametrize(
    "keys",
    [
        {"progress": "none"},
        {"logging_steps": 1, "save_steps": 7, "run_name": "mine"},
        {"backend": "torch", "eval_batch_size": 8, "cache_dir": "c", "report_to": "none"},
    ],
)
def test_finished_stays_finished_where_nothing_more_is_asked(keys, tmp_path):
    leave(tmp_path, status="finished")
    (tmp_path / "model").mkdir()
    assert is_finished(config(tmp_path, **keys))


@pytest.mark.parametrize(
    "keys", [{"num_train_epochs": 9}, {"samples": 2}, {"eval_questions": 3}, {"tau": 2}]
)
def test_a_finished_run_is_not_where_more_is_asked(keys, tmp_path):
    leave(tmp_path, status="finished")
    (tmp_path / "model").mkdir()
    assert not is_finished(config(tmp_path, **keys))


def test_a_setting_that_only_the_earlier_run_had_makes_it_another(tmp_path):
    leave(tmp_path, status="finished", warmup_steps=3)
    (tmp_path / "model").mkdir()
    assert not is_finished(config(tmp_path))


def test_changes_of_a_damaged_record_are_none(tmp_path):
    assert changes(None, config(tmp_path)) == []
    assert changes({"config": 3}, config(tmp_path)) == []
