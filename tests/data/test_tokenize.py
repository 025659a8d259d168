"""Tokenisation: prefixes, spans, gold tokens, truncation, reports, and the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compact_fast.data import (
    Question,
    Rationale,
    TokenizeOptions,
    teachers_of,
    tokenize_questions,
)
from compact_fast.data.encode import thinking_token_ids

LONG = "So 48 / 2 = 24 clips. " * 40


def question(*texts: str, answer: str = "72", **rest: Any) -> Question:
    rationales = [Rationale(f"t{i}", t, answer, i != 1) for i, t in enumerate(texts)]
    return Question("q1", "How many clips?", answer, rationales, source="data.jsonl:3", **rest)


def run(tokenizer: Any, *questions: Question, **rest: Any) -> Any:
    return tokenize_questions(questions, tokenizer, teachers=teachers_of(questions), **rest)


def spelled(tokenizer: Any, row: dict[str, Any], k: int = 0) -> str:
    start, end = row["answer_spans"][k]
    return str(tokenizer.decode((row["prompt_ids"] + row["completion_ids"][k])[start:end])).strip()


def test_row_of_a_question(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of()
    data = run(tokenizer, question("48 + 24 = 72. The answer is 72", "The answer is 24", "Hm, 72"))
    (row,) = data.rows
    assert data.teachers == ["t0", "t1", "t2"]
    assert row["teacher_ids"] == row["rationale_index"] == [0, 1, 2]
    assert row["correct"] == [1, 0, 1]
    assert [spelled(tokenizer, row, k) for k in (0, 2)] == ["72", "72"]
    assert row["answer_spans"][1] == [0, 0]
    assert tokenizer.decode(row["gold_ids"]).strip() == "72"
    prior = row["prompt_ids"] + row["prior_completion_ids"]
    start, end = row["prior_span"]
    assert tokenizer.decode(row["prior_completion_ids"]) == "The answer is 72<|im_end|>"
    assert tokenizer.decode(prior[start:end]).strip() == "72"
    report = data.report
    assert report["rationales"] == 3
    assert report["answer_spans"] == 2
    assert report["teachers"]["t1"]["wrong"] == 1
    assert report["tokens"] == sum(len(row["prompt_ids"]) + len(c) for c in row["completion_ids"])


def test_texts_that_end_early_are_counted(tokenizer_of: Any) -> None:
    data = run(tokenizer_of(), question("It is 72.<|im_end|> Next!", "The answer is 72"))
    assert data.report["ends_early"] == 1


def test_unknown_correctness_is_minus_one(tokenizer_of: Any) -> None:
    q = Question("q", "How many?", "72", [Rationale("t", "Many.")])
    data = run(tokenizer_of(), q)
    assert data.rows[0]["correct"] == [-1]
    assert data.report["teachers"]["t"]["unknown"] == 1


def test_prompt_is_a_true_prefix_where_joint_encoding_merges_across_it() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set("Question: hw?\nAnswer TheaisabcQ72<>/"))
    vocabulary = {c: i for i, c in enumerate(dict.fromkeys([*letters, " ", ": ", "</s>"]))}
    core = Tokenizer(models.BPE(vocabulary, [(":", " ")]))
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    q = Question("q", "how?", "72", [Rationale("t", "The answer is 72")])
    row = run(tokenizer, q).rows[0]
    joint = tokenizer("Question: how?\n\nAnswer: The")["input_ids"]
    assert joint[: len(row["prompt_ids"])] != row["prompt_ids"]  # the blank is merged with ":"
    assert tokenizer.decode(row["prompt_ids"]) == "Question: how?\n\nAnswer:"
    assert tokenizer.decode(row["completion_ids"][0]) == " The answer is 72</s>"
    assert spelled(tokenizer, row) == "72"


def test_slow_tokenizer_without_offsets() -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    q = Question("q", "Wie viele?", "72", [Rationale("t", "Über 数: 720 / 10 = 72 Stück é.")])
    row = run(tokenizer, q).rows[0]
    assert spelled(tokenizer, row) == "72"
    assert tokenizer.decode(row["gold_ids"]) == "72"


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    before=st.text(st.sampled_from("ab 数é\n.7😀"), max_size=20),
    value=st.integers(0, 10**7),
    after=st.sampled_from(["", ".", " apples", "é"]),
    kind=st.sampled_from(["bytes", "marks"]),
)
def test_span_covers_the_answer_and_nothing_of_other_figures(
    tokenizer_of: Any, before: str, value: int, after: str, kind: str
) -> None:
    tokenizer = tokenizer_of(kind, "chatml")
    text = f"{before}. The answer is {value}{after}"
    row = run(tokenizer, Question("q", "?", str(value), [Rationale("t", text)])).rows[0]
    assert "".join(c for c in spelled(tokenizer, row) if c.isdigit()) == str(value)


def test_gold_tokens_are_spelled_as_in_running_text(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of()
    for answer in ("72", "B", "True", "-5", "the sun"):
        row = run(tokenizer, question(f"The answer is {answer}", answer=answer)).rows[0]
        assert tokenizer.decode(row["gold_ids"]).strip() == answer
        text = tokenizer(f"is {answer}")["input_ids"]
        assert text[-len(row["gold_ids"]) :] == row["gold_ids"]


def test_thinking_tokens_are_words_of_one_token(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of()
    ids = thinking_token_ids(tokenizer, ["However", "Therefore", "Unheardof"])
    words = {tokenizer.decode([i]) for i in ids}
    assert words <= {"However", " However", "Therefore", " Therefore"}
    assert any(w.strip() == "However" for w in words)
    options = TokenizeOptions(thinking_words=("However",))
    data = run(tokenizer, question("72"), options=options)
    assert data.thinking_ids == thinking_token_ids(tokenizer, ["However"])


# ---- truncation --------------------------------------------------------------------------------


def test_long_rationales_are_left_out_and_counted(tokenizer_of: Any) -> None:
    options = TokenizeOptions(max_length=120)
    data = run(tokenizer_of(), question(LONG, "The answer is 72"), options=options)
    assert data.rows[0]["rationale_index"] == [1]
    assert data.rows[0]["teacher_ids"] == [1]
    assert data.report["dropped_rationales"] == {"longer than max_length": 1}
    assert data.report["longest"] <= 120


def test_middle_truncation_keeps_beginning_and_answer(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of()
    options = TokenizeOptions(max_length=120, truncation="middle")
    text = f"First, 48. {LONG} The answer is 72. {'That is all there is. ' * 5}"
    data = run(tokenizer, question(text), options=options)
    (row,) = data.rows
    assert len(row["prompt_ids"]) + len(row["completion_ids"][0]) == 120
    assert spelled(tokenizer, row) == "72"
    shown = tokenizer.decode(row["completion_ids"][0])
    assert shown.startswith("First, 48.")
    assert shown.endswith("That is all there is.<|im_end|>")
    assert data.report["truncated"] == 1


def test_middle_truncation_never_drops_the_answer_silently(tokenizer_of: Any) -> None:
    options = TokenizeOptions(max_length=120, truncation="middle")
    text = f"The answer is 72. {'That is so. ' * 100}"
    data = run(tokenizer_of(), question(text, "The answer is 72"), options=options)
    assert data.rows[0]["rationale_index"] == [1]
    assert data.report["dropped_rationales"] == {"max_length leaves no room for its answer": 1}


def test_error_truncation_names_the_place(tokenizer_of: Any) -> None:
    options = TokenizeOptions(max_length=120, truncation="error")
    with pytest.raises(
        ValueError, match=r"data.jsonl:3: question q1: teacher t0: .*max_length=120"
    ):
        run(tokenizer_of(), question(LONG), options=options)


def test_nothing_left_is_an_error(tokenizer_of: Any) -> None:
    two = question("The answer is 72", "It is 71")
    with pytest.raises(ValueError) as error:
        run(tokenizer_of(), two, options=TokenizeOptions(max_length=5))
    assert str(error.value) == (
        "no rationale of 1 question is left: 2 rationales left out (longer than max_length); "
        "raise max_length (5)"
    )
    with pytest.raises(ValueError) as error:
        run(tokenizer_of(), question())
    assert str(error.value) == (
        "no rationale of 1 question is left: 1 question without any; give rationales"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length=1"),
        (
            {"truncation": "left"},
            "truncation='left': expected one of drop_rationale, middle, error",
        ),
        ({"system_role": "user"}, "system_role='user'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizeOptions(**options)


def test_teachers_that_do_not_belong_are_named(tokenizer_of: Any) -> None:
    with pytest.raises(ValueError, match=r"data.jsonl:3.*teacher 't0'.*did you mean t00"):
        tokenize_questions([question("72")], tokenizer_of(), teachers=["t00"])
    with pytest.raises(ValueError, match="a name occurs twice"):
        tokenize_questions([question("72")], tokenizer_of(), teachers=["t0", "t0"])
    with pytest.raises(ValueError, match="no questions"):
        tokenize_questions([], tokenizer_of(), teachers=["t0"])


# ---- consensus, processes, cache ----------------------------------------------------------------


def test_consensus_scores_follow_the_rationales_that_stayed(tokenizer_of: Any) -> None:
    options = TokenizeOptions(max_length=120)
    data = run(tokenizer_of(), question(LONG, "The answer is 72", "It is 72"), options=options)
    scored = data.with_consensus({"q1": [0.1, 0.2, 0.3]})
    assert scored.rows[0]["consensus"] == [0.2, 0.3]
    assert scored.with_consensus({"q1": [1.0, 0.5, 0.25]}).rows[0]["consensus"] == [0.5, 0.25]
    for bad in ({}, {"q1": [0.1, 0.2]}):
        with pytest.raises(ValueError, match="q1: needs a consensus score for each rationale"):
            data.with_consensus(bad)


def many(n: int) -> list[Question]:
    return [
        Question(f"q{i}", f"What is {i} + {i}?", str(2 * i), [Rationale("t", f"It is {2 * i}.")])
        for i in range(n)
    ]


def test_several_processes_give_the_same_rows(tokenizer_of: Any) -> None:
    questions = many(1030)
    one = run(tokenizer_of(), *questions)
    two = run(tokenizer_of(), *questions, num_proc=2)
    assert list(one.rows) == list(two.rows)
    assert one.report == two.report


def test_cache_is_used_only_for_the_same_content(tokenizer_of: Any, tmp_path: Path) -> None:
    questions = many(3)
    fresh = run(tokenizer_of(), *questions, cache_dir=tmp_path)
    again = run(tokenizer_of(), *questions, cache_dir=tmp_path)
    assert not fresh.report["from_cache"]
    assert again.report == {**fresh.report, "from_cache": True}
    assert list(again.rows) == list(fresh.rows)
    assert again.thinking_ids == fresh.thinking_ids
    moved = [replace(q, source="elsewhere:1") for q in questions]
    assert run(tokenizer_of(), *moved, cache_dir=tmp_path).report["from_cache"]

    changed = many(3)
    changed[2].rationales[0].text += " "
    for other in (
        run(tokenizer_of(), *changed, cache_dir=tmp_path),
        run(tokenizer_of("marks"), *questions, cache_dir=tmp_path),
        run(tokenizer_of("bytes", "headers"), *questions, cache_dir=tmp_path),
        run(tokenizer_of(), *questions, cache_dir=tmp_path, options=TokenizeOptions(max_length=99)),
    ):
        assert not other.report["from_cache"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_damaged_cache_is_made_anew_and_said(
    tokenizer_of: Any, tmp_path: Path, damage: str
) -> None:
    questions = many(3)
    fresh = run(tokenizer_of(), *questions, cache_dir=tmp_path)
    (file,) = tmp_path.rglob("*.arrow")
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-10])
    elif damage == "remove":
        file.unlink()
    else:
        next(tmp_path.rglob("manifest.json")).write_text("{")
    said: list[str] = []
    again = run(tokenizer_of(), *questions, cache_dir=tmp_path, say=said.append)
    assert not again.report["from_cache"]
    assert list(again.rows) == list(fresh.rows)
    assert len(said) == 1
    assert "damaged and made anew" in said[0]
    assert "\n" not in said[0]
    assert run(tokenizer_of(), *questions, cache_dir=tmp_path).report["from_cache"]
