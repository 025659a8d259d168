"""Questions as the student is asked them: the same prompts as in training."""

from __future__ import annotations

from typing import Any

from compact_fast.data.records import Question
from compact_fast.data.template import ChatFormat, Turn
from compact_fast.data.tokenize import TokenizeOptions


class PromptBuilder:
    """Prompts, stop tokens and decoding of one tokenizer. `options` as in training."""

    def __init__(self, tokenizer: Any, options: TokenizeOptions | None = None) -> None:
        options = options or TokenizeOptions()
        self.tokenizer = tokenizer
        self.chat = ChatFormat(
            tokenizer, system_prompt=options.system_prompt, system_role=options.system_role
        )

    def turn(self, question: Question) -> Turn:
        """The text around the completion."""
        return self.chat.turn(self.chat.messages(question))

    def ids(self, question: Question) -> list[int]:
        """Token ids up to where the student begins to write."""
        return self.chat.prompt_ids(self.turn(question).prompt)

    def encode(self, text: str) -> list[int]:
        """Token ids of text that goes on after a prompt."""
        return self.chat.encode(text)

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    @property
    def stop_ids(self) -> list[int]:
        """Any of these ends a completion: the template's end of turn, the tokenizer's EOS."""
        eos = self.tokenizer.eos_token_id
        return sorted({self.chat.end_ids[-1]} | ({eos} if eos is not None else set()))

    @property
    def pad_id(self) -> int:
        """What fills a batch; masked, so any id would do."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if pad is not None else self.stop_ids[0]
