"""Chat formats: what is prompt, what is completion, what ends a turn, for every template."""

from __future__ import annotations

from typing import Any

import pytest

from compact_fast.data.records import Question, Rationale
from compact_fast.data.template import ChatFormat, with_choices
from compact_fast.data.tokenize import TokenizeOptions, prompts, tokenize_questions

QUESTION = Question("q", "Natalia sold 48 clips. How many?", "72", [])
TEXT = "She sold 48 / 2 = 24 clips.\nSo the answer is 72."
KINDS = ("bytes", "marks")
CHAT = ("chatml", "thinking", "headers", "turns", "inst", "marked")


def tokens(tokenizer: Any, text: str = TEXT, **options: Any) -> tuple[list[int], list[int], Any]:
    question = Question("q", QUESTION.question, "72", [Rationale("t", text, "72", True)])
    data = tokenize_questions(
        [question], tokenizer, teachers=["t"], options=TokenizeOptions(**options)
    )
    row = data.rows[0]
    return row["prompt_ids"], row["completion_ids"][0], row


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [*CHAT, "spaced", "double"])
def test_sequence_is_the_templates_own_rendering_up_to_the_end_of_turn(
    tokenizer_of: Any, kind: str, template: str
) -> None:
    tokenizer = tokenizer_of(kind, template)
    prompt, completion, row = tokens(tokenizer)
    conversation = [
        {"role": "user", "content": QUESTION.question},
        {"role": "assistant", "content": TEXT},
    ]
    whole = tokenizer.apply_chat_template(conversation, tokenize=False)
    expected = tokenizer(whole.rstrip("\n"), add_special_tokens=False)["input_ids"]
    assert prompt + completion == expected
    start, end = row["answer_spans"][0]
    # a token may hold the answer and the period behind it
    assert tokenizer.decode((prompt + completion)[start:end]).strip(" .") == "72"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [*CHAT, "none"])
def test_completion_is_the_teachers_text_and_one_end_of_turn(
    tokenizer_of: Any, kind: str, template: str
) -> None:
    tokenizer = tokenizer_of(kind, template)
    prompt, completion, _ = tokens(tokenizer)
    end = ChatFormat(tokenizer).end_ids
    assert len(end) == 1
    assert completion[-1:] == end
    assert end[0] not in completion[:-1]
    assert tokenizer.decode(completion[:-1]).strip() == TEXT
    ids, stop = prompts([QUESTION], tokenizer)
    assert ids == [prompt]
    assert stop == end


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["chatml", "headers", "turns", "inst", "marked"])
def test_prompt_is_the_generation_prompt(tokenizer_of: Any, kind: str, template: str) -> None:
    tokenizer = tokenizer_of(kind, template)
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION.question}], add_generation_prompt=True
    )["input_ids"]
    assert tokens(tokenizer)[0] == expected


def test_labels_are_the_tokens_that_a_templates_own_marks_name(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of("bytes", "marked")
    marked = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": QUESTION.question},
            {"role": "assistant", "content": TEXT},
        ],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    prompt, completion, _ = tokens(tokenizer)
    named = [i for i, m in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if m]
    assert completion == named
    assert prompt == marked["input_ids"][: len(prompt)]


def test_empty_block_of_thought_belongs_to_the_prompt(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of("bytes", "thinking")
    prompt, completion, _ = tokens(tokenizer)
    assert tokenizer.decode(prompt).endswith("assistant\n<think>\n\n</think>\n\n")
    assert "think>" not in tokenizer.decode(completion)


@pytest.mark.parametrize(
    ("template", "block"),
    [("thinking", "<think>\n\n</think>\n\n"), ("thoughtless", "<think></think>")],
)
def test_a_teachers_own_thought_replaces_the_empty_block(
    tokenizer_of: Any, template: str, block: str
) -> None:
    tokenizer = tokenizer_of("bytes", template)
    own = "<think>\nHalf of 48 is 24.\n</think>\n\nThe answer is 72."
    question = Question("q", "How many?", "72", [Rationale("a", own), Rationale("b", TEXT)])
    row = tokenize_questions([question], tokenizer, teachers=["a", "b"]).rows[0]
    assert tokenizer.decode(row["prompt_ids"]).endswith("<|im_start|>assistant\n")
    first, second = (tokenizer.decode(ids) for ids in row["completion_ids"])
    assert first == own + "<|im_end|>"
    assert second == block + TEXT + "<|im_end|>"
    for k, (start, end) in enumerate(row["answer_spans"]):
        sequence = row["prompt_ids"] + row["completion_ids"][k]
        assert tokenizer.decode(sequence[start:end]).strip() == "72"


def test_finished_turn_wins_where_the_generation_prompt_opens_a_block(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of("bytes", "opened")
    prompt, completion, _ = tokens(tokenizer)
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(completion) == TEXT + "<|im_end|>"


def test_default_format_without_a_template(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of("bytes", "none")
    prompt, completion, _ = tokens(tokenizer, system_prompt="Think.")
    assert tokenizer.decode(prompt) == f"Think.\n\nQuestion: {QUESTION.question}\n\nAnswer:"
    assert tokenizer.decode(completion) == f" {TEXT}</s>"


def test_default_format_begins_with_bos_where_the_tokenizer_does(tokenizer_of: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of("bytes", "none")
    bos = tokenizer.bos_token_id
    assert tokens(tokenizer)[0][0] != bos
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    prompt, completion, row = tokens(tokenizer)
    assert prompt[0] == bos
    assert prompt.count(bos) == 1
    assert bos not in completion
    start, end = row["answer_spans"][0]
    assert tokenizer.decode((prompt + completion)[start:end]).strip() == "72"


def test_tokenizer_that_cannot_end_a_turn_is_refused(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of("bytes", "none")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="set its eos_token"):
        tokens(tokenizer)


@pytest.mark.parametrize("template", ["chatml", "headers"])
def test_system_prompt_is_sent_as_such(tokenizer_of: Any, template: str) -> None:
    tokenizer = tokenizer_of("bytes", template)
    text = tokenizer.decode(tokens(tokenizer, system_prompt="Be brief.")[0])
    assert "system" in text
    assert "Be brief." in text
    assert "You help." not in text


@pytest.mark.parametrize(
    ("template", "message"),
    [("turns", "refuses the roles system, user"), ("inst", "drops the system message")],
)
def test_template_without_a_system_role_says_so_and_can_merge(
    tokenizer_of: Any, template: str, message: str
) -> None:
    tokenizer = tokenizer_of("bytes", template)
    with pytest.raises(ValueError, match=f"{message}.*system_role=merge"):
        tokens(tokenizer, system_prompt="Be brief.")
    prompt, _, _ = tokens(tokenizer, system_prompt="Be brief.", system_role="merge")
    assert f"Be brief.\n\n{QUESTION.question}" in tokenizer.decode(prompt)


def test_broken_template_is_named(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of("bytes", "chatml")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}"
    with pytest.raises(ValueError, match="chat template refuses"):
        tokens(tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="drops the assistant's message"):
        tokens(tokenizer)


def test_conversations_are_rendered_whole(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of("bytes", "chatml")
    question = Question(
        "q",
        "Half?",
        "24",
        [Rationale("t", "24")],
        messages=[
            {"role": "system", "content": "Own."},
            {"role": "user", "content": "48 clips."},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Half?"},
        ],
    )
    options = TokenizeOptions(system_prompt="Unused where a conversation brings its own.")
    row = tokenize_questions([question], tokenizer, teachers=["t"], options=options).rows[0]
    text = tokenizer.decode(row["prompt_ids"])
    assert [p.split("\n", 1)[1] for p in text.split("<|im_start|>")[1:]] == [
        "Own.<|im_end|>\n",
        "48 clips.<|im_end|>\n",
        "Yes.<|im_end|>\n",
        "Half?<|im_end|>\n",
        "",
    ]
    assert tokenizer.decode(row["completion_ids"][0]) == "24<|im_end|>"


def test_options_are_shown_in_letter_order_unless_the_question_has_them() -> None:
    choices = ["rocks", "the sun"]
    assert with_choices("What is hot?", choices) == "What is hot?\nA. rocks\nB. the sun"
    asked = "Are rocks or is the sun hot?"
    assert with_choices(asked, choices) == asked
    assert with_choices("Is it 35?", ["3", "5"]) == "Is it 35?\nA. 3\nB. 5"
    assert with_choices("Is it hot?", ["True", "False"]) == "Is it hot?\nTrue or False?"


def test_smollm2(smollm2: Any) -> None:
    prompt, completion, row = tokens(smollm2)
    assert smollm2.decode(prompt).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert smollm2.decode(completion) == TEXT + "<|im_end|>"
    start, end = row["answer_spans"][0]
    assert smollm2.decode((prompt + completion)[start:end]) == "72"
    assert [smollm2.decode([t]) for t in row["gold_ids"]] == ["7", "2"]
