import copy

import pytest
import torch

from compact_fast.data.records import Question
from compact_fast.evaluate.generate import exact_match, generate
from compact_fast.evaluate.prompts import PromptBuilder


def greedy(model, ids, stop, count):
    """One token at a time, without cache, from the model's own logits."""
    ids, new = list(ids), []
    for _ in range(count):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in stop:
            return new, True
        new.append(token)
        ids.append(token)
    return new, False


PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8], [200, 100], [41, 42, 43, 44, 45]]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batched_generation_equals_one_by_one(model, batch_size):
    # Stop tokens that turn up early in some completions and late in others.
    free = [greedy(model, p, (), 12)[0] for p in PROMPTS]
    stop = {free[0][4], free[1][9]}
    want = [greedy(model, p, stop, 12) for p in PROMPTS]
    assert len({finished for _, finished in want}) == 2
    got = generate(
        model, PROMPTS, stop_ids=sorted(stop), pad_id=0, max_new_tokens=12, batch_size=batch_size
    )
    assert got == want


def test_the_students_own_generation_settings_do_not_leak(llama):
    model = copy.deepcopy(llama)
    want = generate(model, PROMPTS, stop_ids=[263], pad_id=0, max_new_tokens=8)
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.no_repeat_ngram_size = 1
    model.generation_config.do_sample = True
    model.generation_config.top_k = 3
    model.generation_config.max_length = 5
    before = model.generation_config
    assert generate(model, PROMPTS, stop_ids=[263], pad_id=0, max_new_tokens=8) == want
    assert model.generation_config is before


def test_sampling_repeats_by_seed_and_leaves_the_random_state_alone(llama):
    settings = {"stop_ids": [263], "pad_id": 0, "max_new_tokens": 6, "temperature": 1.0}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = generate(llama, PROMPTS, seed=1, **settings)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert generate(llama, PROMPTS, seed=1, **settings) == first
    assert generate(llama, PROMPTS, seed=2, **settings) != first


def test_sampling_draws_from_the_whole_distribution(llama):
    with torch.no_grad():
        p = llama(input_ids=torch.tensor([[7]])).logits[0, -1].double().softmax(-1)
    n = 3000
    drawn = generate(
        llama, [[7]] * n, stop_ids=[], pad_id=0, max_new_tokens=1, batch_size=n, temperature=1.0
    )
    counts = torch.bincount(torch.tensor([ids[0] for ids, _ in drawn]), minlength=p.numel())
    big = p * n > 5
    z = (counts[big] - n * p[big]) / (n * p[big] * (1 - p[big])).sqrt()
    assert float((z**2).mean()) < 2.5
    # More than the 50 tokens that the library's own default would keep.
    assert int((counts > 0).sum()) > 50


def test_a_prompt_too_long_for_the_student_is_refused(llama):
    with pytest.raises(ValueError, match="a prompt of 510 tokens and max_new_tokens=8 exceed"):
        generate(llama, [[1] * 510], stop_ids=[], pad_id=0, max_new_tokens=8)


# ---- judged answers ------------------------------------------------------------------------------


@pytest.fixture
def say(monkeypatch, tokenizer):
    """exact_match over given completions instead of a student's."""
    from compact_fast.evaluate import generate as module

    def run(questions, texts, finished=True, **settings):
        replies = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
        monkeypatch.setattr(
            module, "generate", lambda *a, **k: [(list(ids), finished) for ids in replies]
        )
        monkeypatch.setattr(module, "own_stop_ids", lambda model: [])
        return module.exact_match(None, questions, PromptBuilder(tokenizer), **settings)

    return run


def test_exact_match_counts_right_wrong_and_missing(say):
    questions = [
        Question("1", "?", "1,200"),
        Question("2", "?", "B", choices=["x", "y"]),
        Question("3", "?", "True", choices=["True", "False"]),
        Question("4", "?", "7"),
    ]
    texts = ["So the answer is 1200.", "The answer is B.", "The answer is False.", "No idea"]
    found = say(questions, texts)
    assert [a.right for a in found.answers] == [True, True, False, False]
    assert found.answers[3].answer is None
    assert (found.share.right, found.share.total, found.unanswered, found.unfinished) == (
        2,
        4,
        1,
        0,
    )
    assert found.share.accuracy == 0.5
    assert found.share.standard_error == pytest.approx(0.25)


def test_samples_of_one_question_are_one_unit(say):
    questions = [Question("1", "?", "4"), Question("2", "?", "5")]
    texts = ["The answer is 4", "The answer is 9", "The answer is 5", "The answer is 5"]
    found = say(questions, texts, temperature=1.0, samples=2)
    assert found.share.right == 1.5
    assert found.share.accuracy == 0.75
    assert found.share.standard_error == pytest.approx((0.0625 / 2) ** 0.5)
    assert found.samples == 2


def test_cut_completions_are_counted(say):
    found = say([Question("1", "?", "4")], ["The answer is 4"], finished=False, max_new_tokens=9)
    assert found.unfinished == 1
    assert found.to_dict()["unfinished"] == 1


def test_exact_match_end_to_end_with_left_and_right_padding_tokenizers(llama, tokenizer):
    questions = [Question(str(i), "How many? " * i, "3") for i in range(1, 5)]
    texts = []
    for side in ("left", "right"):
        other = copy.deepcopy(tokenizer)
        other.padding_side = side
        found = exact_match(llama, questions, PromptBuilder(other), max_new_tokens=6, batch_size=3)
        texts.append([a.text for a in found.answers])
        assert found.tokens > 0
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"samples": 2}, "samples=2: greedy completions are all equal"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_settings_are_named(llama, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        exact_match(llama, [Question("1", "?", "4")], PromptBuilder(tokenizer), **settings)


def test_no_questions(llama, tokenizer):
    with pytest.raises(ValueError, match="no questions"):
        exact_match(llama, [], PromptBuilder(tokenizer))


def test_stop_ids_hold_end_of_turn_and_eos(tokenizer, plain_tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert PromptBuilder(tokenizer).stop_ids == [end]
    assert PromptBuilder(plain_tokenizer).stop_ids == [end]
    assert PromptBuilder(tokenizer).pad_id == end
