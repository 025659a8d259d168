"""Command lines: positionals, a verb's own options, configuration keys as flags."""

from __future__ import annotations

import pytest

from compact_fast.cli.arguments import Option, parse

OWN = (Option("output", "Where.", "FILE", short="o"), Option("force", "Really."))


def overrides(*words: str) -> dict[str, object]:
    return {k: s.value for k, s in parse(["c.yaml", *words], OWN, names=("CONFIG",)).overrides}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--learning-rate", "1e-4"], {"learning_rate": 1e-4}),
        (["--learning_rate=1e-4"], {"learning_rate": 1e-4}),
        (["--no-lora"], {"lora": False}),
        (["--lora", "false"], {"lora": False}),
        (["--lora"], {"lora": True}),
        (["--bf16", "auto"], {"bf16": "auto"}),
        (["--beta-mi", "-1"], {"beta_mi": -1}),
        (["--weighting", "1,2"], {"weighting": [1, 2]}),
        (["--weighting=[1, 2]"], {"weighting": [1, 2]}),
        (["--system-prompt", "3"], {"system_prompt": "3"}),
        (["--system-prompt="], {"system_prompt": ""}),
        (["--warmup-steps", "3"], {"warmup_steps": 3}),
        (["--use-cpu", "--tau", "2"], {"use_cpu": True, "tau": 2}),
        (["--consistency", "off"], {"consistency": "off"}),
        (["--tau", "1", "--tau", "2"], {"tau": 2}),
    ],
)
def test_configuration_flags(words, expected):
    assert overrides(*words) == expected


def test_a_true_or_false_flag_does_not_swallow_the_file():
    out = parse(["--lora", "c.yaml"], names=("CONFIG",))
    assert out.positionals == ["c.yaml"]
    assert [(k, s.value) for k, s in out.overrides] == [("lora", True)]


def test_own_options():
    out = parse(["a", "-o", "x", "--force", "--output=y"], OWN, names=("A",))
    assert out.option("output") == "y"
    assert out.switch("force")
    assert not out.switch("debug")
    assert parse(["--", "--odd"], names=("A",)).positionals == ["--odd"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "CONFIG: missing"),
        (["a", "b"], "'b': one argument too many"),
        (["a", "--tau"], "--tau: needs a value"),
        (["a", "--tau", "--lora"], "--tau: needs a value"),
        (["a", "-x"], "-x: unknown option"),
        (["a", "--forc"], "--forc: unknown option; did you mean force?"),
        (["a", "--force=1"], "--force=1: --force takes no value"),
        (["a", "-o"], "-o: needs a value"),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(ValueError) as caught:
        parse(words, OWN, names=("CONFIG",), required=1)
    assert str(caught.value).startswith(message)


def test_without_configuration_keys_unknown_options_are_errors():
    with pytest.raises(ValueError, match="--outputt: unknown option; did you mean output"):
        parse(["--outputt", "x"], OWN, keys=())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora-r", "3"], "--lora-r: eval does not use this key"),
        (["--no-lora"], "--no-lora: eval does not use this key"),
        (["--sample", "3"], "--sample: unknown option; did you mean samples?"),
        (["--warmup-steps", "3"], "--warmup-steps: unknown option"),
    ],
)
def test_a_verb_refuses_keys_that_it_does_not_use(words, message):
    with pytest.raises(ValueError) as caught:
        parse(words, OWN, keys=("samples", "generate"), verb="eval")
    assert str(caught.value).startswith(message)
    out = parse(["--samples", "2", "--no-generate"], OWN, keys=("samples", "generate"))
    assert [(k, s.value) for k, s in out.overrides] == [("samples", 2), ("generate", False)]
