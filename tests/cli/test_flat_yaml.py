"""Flat YAML: YAML 1.2 scalars, places, type checks in words."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from compact_fast.cli.verb import yaml_text
from compact_fast.flat_yaml import Setting, check, describe, parse_text, read_flat_yaml

CHOICE = Literal["a", "b"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("-2.5E+3", -2500.0),
        (".5", 0.5),
        ("3", 3),
        ("010", 10),
        ("-7", -7),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("off", "off"),
        ("no", "no"),
        ("1:30", "1:30"),
        ("none", "none"),
        ("[1, 2.5]", [1, 2.5]),
        ("'5'", "5"),
        (".inf", math.inf),
        ("1_000", "1_000"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value, tmp_path):
    (tmp_path / "c.yaml").write_text(f"key: {text}\n")
    (setting,) = read_flat_yaml(tmp_path / "c.yaml").values()
    assert setting.value == value
    assert type(setting.value) is type(value)


def test_places_are_file_and_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("# comment\na: 1\n\nsome-key: |\n  two\n  lines\nb: 2\n")
    settings = read_flat_yaml(path)
    assert [(k, s.place) for k, s in settings.items()] == [
        ("a", f"{path}:2"),
        ("some_key", f"{path}:4"),
        ("b", f"{path}:7"),
    ]


def test_empty_file_is_no_settings(tmp_path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert read_flat_yaml(tmp_path / "c.yaml") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", ":3: a: given twice, first in line 1"),
        ("a: 1\na-b: 2\na_b: 3\n", ":3: a_b: given twice, first in line 2"),
        ("- 1\n", ":1: expected lines of the form `key: value`"),
        ("a: [1\n", ":2: not valid YAML"),
        ("a: 1\n b: 2\n", ":2: not valid YAML"),
        ("3: x\n", ":1: 3: expected the key to be text"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
    ],
)
def test_broken_files_are_named_with_line(text, message, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_flat_yaml(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "recipe.yaml").write_text("a: 1\n")
    with pytest.raises(ValueError, match=r"recipes\.yaml: no such file; did you mean recipe\.yaml"):
        read_flat_yaml(tmp_path / "recipes.yaml")


def test_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_flat_yaml(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("value", "hint", "result"),
    [
        (3, float, 3.0),
        (3, int, 3),
        ("x", str, "x"),
        (None, int | None, None),
        ("a", CHOICE, "a"),
        ([1, 2], CHOICE | tuple[float, ...], (1.0, 2.0)),
        ("one", list[str], ["one"]),
        ("auto", bool | Literal["auto"], "auto"),
        ({"k": 1}, dict[str, Any] | None, {"k": 1}),
    ],
)
def test_values_that_fit(value, hint, result):
    out = check(Setting(value, "f:1"), "key", hint)
    assert out == result
    assert type(out) is type(result)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (1.5, int, "expected a whole number, got 1.5"),
        (True, int, "expected a whole number, got True"),
        ("x", float, "expected a number, got 'x'"),
        (math.nan, float, "expected a number, got nan"),
        (None, float, "expected a number, got null"),
        (1, bool, "expected true or false, got 1"),
        (5, str, "expected text, got 5"),
        ("bb", CHOICE, "expected one of a, b, got 'bb'; did you mean b?"),
        ([1, "x"], tuple[float, ...], "expected a list of numbers, got [1, 'x']"),
        (None, list[str], "expected a list of text, got null"),
    ],
)
def test_values_that_do_not_fit_say_expected_and_got(value, hint, message):
    with pytest.raises(ValueError) as caught:
        check(Setting(value, "f.yaml:4"), "key", hint)
    assert str(caught.value) == f"f.yaml:4: key: {message}"


def test_flags_are_read_as_their_key_needs():
    assert parse_text("007", str) == "007"
    assert parse_text("null", str | None) is None
    assert parse_text("1e-3", float) == 1e-3
    assert parse_text("q_proj, v_proj", list[str]) == ["q_proj", "v_proj"]
    assert parse_text("0.5,0.5", CHOICE | tuple[float, ...]) == [0.5, 0.5]
    assert parse_text("a", CHOICE | tuple[float, ...]) == "a"
    assert parse_text("[broken", int) == "[broken"


def test_hints_in_words():
    assert describe(int | None) == "a whole number or null"
    assert describe(CHOICE | tuple[float, ...]) == "one of a, b or a list of numbers"


JSON_LIKE = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()
)


@given(st.one_of(JSON_LIKE, st.lists(JSON_LIKE)))
def test_yaml_text_reads_back(value):
    text = yaml_text(value)
    assert "\n" not in text
    assert parse_text(text, Any) == value
    # and by a plain YAML reader, but for numbers that YAML 1.1 takes for text
    if isinstance(value, (str, bool, type(None))):
        assert yaml.safe_load(text) == value or text in ("off", "on", "yes", "no", "y", "n")
