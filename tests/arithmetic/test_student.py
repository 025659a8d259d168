import pytest
import torch

from compact_fast.arithmetic.student import (
    CHECKPOINT,
    load_student,
    make_config,
    make_tokenizer,
    vocabulary,
)
from compact_fast.arithmetic.teachers import SCENARIOS, make_questions
from compact_fast.arithmetic.warm_up import KNOWN_WORDS, save, warm_up
from compact_fast.evaluate import PromptBuilder
from compact_fast.evaluate.generate import exact_match


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_every_text_of_the_world_is_in_the_vocabulary(tokenizer):
    for scenario in SCENARIOS:
        for question in make_questions(150, 8, scenario=scenario):
            for text in [question.question, *(r.text for r in question.rationales)]:
                assert tokenizer.unk_token_id not in tokenizer.encode(text), text


def test_numbers_and_thinking_words_are_single_tokens(tokenizer):
    for word in ["0", "7", "42", "99", "Therefore", " Therefore", "So", " First", "Wait"]:
        ids = tokenizer.encode(word)
        assert len(ids) == 1
        assert ids[0] != tokenizer.unk_token_id
    assert len(set(vocabulary())) == len(vocabulary())


def test_decoding_restores_the_text(tokenizer):
    for question in make_questions(20, 8, shuffle_styles=True):
        for text in [question.question, *(r.text for r in question.rationales)]:
            assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\n", " ")


def test_the_chat_template_marks_the_assistant(tokenizer):
    turns = [{"role": "user", "content": "Ann has 3 coins."}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert prompt == "<user>Ann has 3 coins.<assistant>"
    turns.append({"role": "assistant", "content": "The answer is 3."})
    both = tokenizer.apply_chat_template(
        turns, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    marked = [i for i, m in zip(both["input_ids"], both["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "The answer is 3. <end>"


def test_the_shipped_student_is_what_the_code_makes(tokenizer):
    model, shipped = load_student()
    assert shipped.get_vocab() == tokenizer.get_vocab()
    assert shipped.chat_template == tokenizer.chat_template
    assert shipped.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    expected = make_config()
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "eos_token_id", "pad_token_id"):
        assert getattr(model.config, name) == getattr(expected, name)
    assert model.dtype == torch.float32
    assert load_student(torch.bfloat16)[0].dtype == torch.bfloat16


def test_the_shipped_checkpoint_is_small():
    assert sum(f.stat().st_size for f in CHECKPOINT.iterdir()) <= 1_500_000


def test_the_shipped_student_knows_problems_in_known_words():
    model, tokenizer = load_student()
    known, whole = (
        exact_match(
            model,
            make_questions(100, 77, options, scenario="clean"),
            PromptBuilder(tokenizer),
            max_new_tokens=110,
            batch_size=100,
        ).share.accuracy
        for options in (KNOWN_WORDS, None)
    )
    assert known > 0.75
    assert 0.25 < whole < 0.55  # the rest is for the teachers to teach


def test_warming_up_again_gives_the_same_bits(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first, second = (warm_up(3).state_dict() for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_saved_student_is_loaded_by_any_loader(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = warm_up(1)
    torch.set_num_threads(threads)
    save(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].float(), tensor.half().float()), name
    assert AutoTokenizer.from_pretrained(tmp_path).encode("<user>3") == [3, 6 + 3]


def test_a_missing_checkpoint_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr("compact_fast.arithmetic.student.CHECKPOINT", tmp_path / "none")
    with pytest.raises(ValueError, match=r"python -m compact_fast\.arithmetic\.warm_up"):
        load_student()
