import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compact_fast.evaluate.perplexity import read_text, sliding_windows, text_perplexity

TEXT = "Two ducks lay three eggs a day. Ünïcode costs bytes, too. " * 4


@given(st.integers(2, 300), st.integers(2, 60), st.data())
def test_windows_score_every_token_once_with_enough_before_it(length, window, data):
    stride = data.draw(st.integers(1, window - 1))
    windows = sliding_windows(length, window, stride)
    scored = [t for _, first, end in windows for t in range(first, end)]
    assert scored == list(range(1, length))
    for start, first, end in windows:
        assert end - start <= window
        assert first - start >= min(first, window - stride)


@pytest.mark.parametrize(("window", "stride"), [(64, 16), (512, 256), (30, 29)])
def test_perplexity_equals_full_logits(model, tokenizer, judge, window, stride):
    found = text_perplexity(model, tokenizer, TEXT, window=window, stride=stride, batch_tokens=300)
    ids = [tokenizer.eos_token_id, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
    want = 0.0
    for start, first, end in sliding_windows(len(ids), window, stride):
        want -= judge(model, ids[start:first], ids[first:end])
    assert found.nats == pytest.approx(want, rel=1e-5)
    assert found.tokens == len(ids) - 1
    assert found.bytes == len(TEXT.encode())
    figures = found.to_dict()
    assert figures["perplexity"] == pytest.approx(math.exp(want / found.tokens), rel=1e-4)
    assert figures["bits_per_token"] == pytest.approx(want / found.tokens / math.log(2), rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(want / found.bytes / math.log(2), rel=1e-5)
    assert figures["unscored_tokens"] == 0


def test_without_a_leading_token_the_first_token_and_its_bytes_do_not_count(llama, tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    found = text_perplexity(llama, bare, "abcdef", window=8, stride=4)
    assert (found.tokens, found.bytes, found.unscored_tokens) == (5, 5, 1)


def test_max_tokens_keeps_the_beginning(llama, tokenizer):
    found = text_perplexity(llama, tokenizer, "abcdef", window=8, stride=4, max_tokens=3)
    whole = text_perplexity(llama, tokenizer, "abc", window=8, stride=4)
    assert (found.nats, found.tokens, found.bytes) == (whole.nats, 3, 3)


def test_bad_windows_and_texts_are_named(llama, tokenizer):
    with pytest.raises(ValueError, match="window=8, stride=8"):
        text_perplexity(llama, tokenizer, "x", window=8, stride=8)
    with pytest.raises(ValueError, match="window=1024: the student reads at most 512 tokens"):
        text_perplexity(llama, tokenizer, "x")
    with pytest.raises(ValueError, match="no token to score"):
        text_perplexity(llama, tokenizer, "", window=8, stride=4)


def test_read_text_names_file_and_byte(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbfgood")
    assert read_text(path) == "good"
    path.write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"t\.txt: byte 3 is not UTF-8"):
        read_text(path)
    with pytest.raises(ValueError, match=r"none\.txt: cannot read the text: No such file"):
        read_text(tmp_path / "none.txt")
