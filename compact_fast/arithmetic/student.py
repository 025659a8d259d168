"""The world's own student: a small Llama with a word-level tokenizer, warmed up on easy steps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compact_fast.arithmetic.steps import MAX_NUMBER
from compact_fast.arithmetic.topics import COMMON_EVENTS, DAYS, ENDINGS, TOPICS

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Folder of the shipped student; any loader of pretrained models reads it."""

PAD, UNKNOWN, SYSTEM, USER, ASSISTANT, END = SPECIAL = (
    "<pad>",
    "<unk>",
    "<system>",
    "<user>",
    "<assistant>",
    "<end>",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<end>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

# Words of the rationale styles, and words that mark a turn of thought.
_STYLE_WORDS = """
    First Then Next Let us see On there are begins with has groups of more fewer times as many
    equal parts Finally we compare add and Step at the start in end on Start End We have then After
    that The So Therefore Thus Hence Consequently answer is
"""
_THINKING_WORDS = """
    Therefore Thus Hence So Consequently Wait But However Although First Second Finally
    Specifically In summary Basically Let Assuming Suppose Hmm Okay Note
"""
_PUNCTUATION = (".", ",", ":", "?", "+", "-", "*", "/", "=")
_PIECES = r"\d+|[^\W\d]+|[^\w\s]"


def _phrases() -> Iterator[str]:
    yield from (_STYLE_WORDS, _THINKING_WORDS, *DAYS, *COMMON_EVENTS.values())
    for topic in TOPICS:
        owners = topic.owners
        yield from (*owners, *(o[0].upper() + o[1:] for o in owners), *topic.things)
        yield from (*topic.start, topic.packed, *topic.distractors)
        for phrases in topic.events.values():
            yield from phrases
    for endings in ENDINGS.values():
        yield from endings


def vocabulary() -> list[str]:
    """Every token, in the order of its id: special tokens, numbers, punctuation, words."""
    text = " ".join(re.sub(r"\{\w\}", " ", phrase) for phrase in _phrases())
    words = sorted(set(re.findall(r"[^\W\d]+", text)))
    numbers = [str(n) for n in range(MAX_NUMBER + 1)]
    return [*SPECIAL, *numbers, *_PUNCTUATION, *words]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer with a chat template; each number is one token."""
    ids = {token: i for i, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), "removed", invert=True)
    tokenizer.decoder = decoders.Sequence(
        [
            # Ids become words with a space before each; none before punctuation or at the start.
            decoders.Replace(Regex(r"^(?=[^.,:?])"), " "),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def make_config() -> LlamaConfig:
    """The student's architecture: about 0.3 million parameters."""
    size = len(vocabulary())
    return LlamaConfig(
        vocab_size=size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,  # else words never written drift away before they are read
        bos_token_id=None,
        eos_token_id=SPECIAL.index(END),
        pad_token_id=SPECIAL.index(PAD),
        use_cache=True,
    )


def load_student(
    dtype: torch.dtype = torch.float32,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The warmed-up student and its tokenizer, from the shipped checkpoint."""
    if not (CHECKPOINT / "model.safetensors").is_file():
        raise ValueError(
            f"no checkpoint in {CHECKPOINT}; "
            "make it with `python -m compact_fast.arithmetic.warm_up`"
        )
    model = LlamaForCausalLM.from_pretrained(CHECKPOINT, dtype=dtype)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(CHECKPOINT)
    return model, tokenizer
