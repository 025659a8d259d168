"""The flat schema: every key reaches its place, every mistake is named where it was made."""

from __future__ import annotations

from dataclasses import fields

import pytest

from compact_fast.config import CompactConfig
from compact_fast.flat_yaml import Setting
from compact_fast.run_config import GROUPS, INSTEAD, RunConfig, build, load, schema


def config(text: str, tmp_path, **flags) -> RunConfig:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load(path, [(k, Setting(v, f"--{k}")) for k, v in flags.items()])


def error(text: str, tmp_path, **flags) -> str:
    with pytest.raises(ValueError) as caught:
        config(text, tmp_path, **flags)
    return str(caught.value).replace(str(tmp_path) + "/", "")


def test_every_key_is_documented_and_has_a_default_that_fits():
    assert len(schema()) > 60
    for key in schema().values():
        assert key.doc, key.name
        assert key.doc.endswith((".", ")")), key.name
    build({})
    settings = {k: Setting(v.default, "default") for k, v in schema().items()}
    assert build(settings).flat() == build({}).flat()


def test_every_method_field_is_a_key():
    assert {f.name for f in fields(CompactConfig)} <= set(schema())


def test_defaults_are_the_authors_set_up():
    c = build({})
    assert (c.lora.lora_r, c.lora.lora_alpha, c.lora.lora_dropout) == (16, 32, 0.1)
    assert c.training.learning_rate == 1e-5
    assert c.training.lr_scheduler_type == "constant"
    assert (c.training.questions_per_step, c.training.gradient_accumulation_steps) == (1, 4)
    assert c.training.num_train_epochs == 5
    assert c.training.max_grad_norm == 1.0
    assert c.data.max_length == 2560
    assert c.method == CompactConfig()


def test_file_and_flags(tmp_path):
    c = config("tau: 2\nlearning-rate: 1e-4\nweighting: [1, 3]\n", tmp_path, tau=0.5, lora=False)
    assert c.method.tau == 0.5
    assert c.method.weighting == (1.0, 3.0)
    assert c.training.learning_rate == 1e-4
    assert c.lora.lora is False
    assert c.flat()["weighting"] == [1.0, 3.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "student: a\nlearning_rte: 1\n",
            "c.yaml:2: learning_rte: unknown key; did you mean learning_rate?",
        ),
        ("warmup_stps: 3\n", "c.yaml:1: warmup_stps: unknown key; did you mean warmup_steps?"),
        ("zzzzqq: 3\n", "c.yaml:1: zzzzqq: unknown key"),
        ("epochs: 3\n", "c.yaml:1: epochs: unknown key; did you mean num_train_epochs?"),
        ("max_steps: 1.5\n", "c.yaml:1: max_steps: expected a whole number, got 1.5"),
        ("lora: yes\n", "c.yaml:1: lora: expected true or false, got 'yes'"),
        (
            "mode: papr\n",
            "c.yaml:1: mode: expected one of compact, paper, reference, got "
            "'papr'; did you mean paper?",
        ),
        ("\ntau: 0\n", "c.yaml:2: tau=0.0: expected a finite number > 0"),
        ("holdout: 1\n", "c.yaml:1: holdout=1.0: expected a share, at least 0 and below 1"),
        (
            "weighting: [0, 0]\n",
            "c.yaml:1: weighting=(0.0, 0.0): fixed weights must be finite, >= 0 "
            "and not all 0, one for each teacher",
        ),
        (
            "compare: [uniform, singel]\n",
            "c.yaml:1: compare=['uniform', 'singel']: expected some of compact, ",
        ),
        (
            "training: {tau: 1}\n",
            "c.yaml:1: training: keys are flat; write the keys under it at the top level",
        ),
        ("warmup_steps: soon\n", "c.yaml:1: warmup_steps: expected a number, got 'soon'"),
        (
            "label_smoothing_factor: 0.1\n",
            "c.yaml:1: label_smoothing_factor: not used here; this loss has no label smoothing",
        ),
    ],
)
def test_mistakes_are_named_where_they_were_made(text, message, tmp_path):
    assert error(text, tmp_path).startswith(message)


def test_a_flag_is_named_as_a_flag(tmp_path):
    assert error("", tmp_path, tau="hot") == "--tau: expected a number, got 'hot'"
    assert error("", tmp_path, tau=-1).startswith("--tau: tau=-1.0: expected")


def test_other_fields_of_training_arguments_are_taken_by_name(tmp_path):
    c = config("warmup_steps: 7\nweight_decay: 0.1\n", tmp_path)
    assert c.extra == {"warmup_steps": 7.0, "weight_decay": 0.1}
    assert c.flat()["weight_decay"] == 0.1


def test_fields_with_another_name_here_exist_in_transformers():
    from transformers import TrainingArguments

    assert set(INSTEAD) <= {f.name for f in fields(TrainingArguments)}
    assert not set(INSTEAD) & set(schema())


def test_replace_keeps_what_follows_from_other_keys(tmp_path):
    c = config("tau: 2\n", tmp_path)
    assert c.method.filter_below == 0.8
    uniform = c.replace(weighting="uniform")
    assert uniform.method.filter_below == 0.0  # a baseline is not filtered
    assert uniform.method.tau == 2
    with pytest.raises(ValueError, match="--tau"):
        c.replace(tau=0)


def test_require_names_the_key_and_both_remedies(tmp_path):
    with pytest.raises(
        ValueError, match=r"student: not set; write `student: ...`.* or give --student"
    ):
        config("data: x\n", tmp_path).require("data", "student")


def test_groups_have_summaries():
    assert all(owner.__doc__ for owner in GROUPS.values())
