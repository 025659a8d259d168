"""How a question and a rationale become the student's own kind of conversation, in token ids.

Nothing here knows a marker of any model. The template is rendered once around a stand-in for the
completion; what stands before the stand-in is the prompt, what stands behind it ends the turn.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compact_fast.data.extract import truth_options
from compact_fast.data.records import Question

# Letters only, so that no template trims, escapes or splits it.
_STAND_IN = "CompletionGoesHere"

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Turn:
    """The template's text around one completion."""

    prompt: str
    """All that stands before the completion when the student is asked to write it."""
    lead: str
    """What the template puts between `prompt` and the completion (a blank, or nothing)."""
    generation: str
    """The prompt without a block that the template inserts for models that think, such as an
    empty "<think></think>": for completions that bring their own."""


class ChatFormat:
    """A tokenizer's chat template, or a plain default where it has none.

    `system_prompt` None sends no system message (a template may still insert its own);
    `system_role` says how one is sent: "system", or "merge" for templates without such a role
    (it then opens the user's message). Raises ValueError where the template cannot be used.
    """

    def __init__(
        self, tokenizer: Any, *, system_prompt: str | None = None, system_role: str = "system"
    ) -> None:
        if system_role not in ("system", "merge"):
            raise ValueError(f"system_role={system_role!r}: expected system or merge")
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.system_role = system_role
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.end_ids = self._end_of_turn()

    # ---- text --------------------------------------------------------------------------------

    def messages(self, question: Question) -> Messages:
        """The conversation that ends in the user's turn, system message and options included."""
        if question.messages:
            messages = [dict(m) for m in question.messages]
        else:
            messages = [{"role": "user", "content": question.question}]
        if question.choices:
            last = messages[-1]
            last["content"] = with_choices(str(last["content"]), question.choices)
        # A conversation that brings its own system message keeps it.
        if self.system_prompt and messages[0]["role"] != "system":
            if self.system_role == "system":
                messages.insert(0, {"role": "system", "content": self.system_prompt})
            else:
                messages[0]["content"] = f"{self.system_prompt}\n\n{messages[0]['content']}"
        return messages

    def turn(self, messages: Messages) -> Turn:
        """The text around the completion that answers this conversation."""
        if not self.has_template:
            return Turn(*_plain_prompt(messages))
        generation = self._render(messages, add_generation_prompt=True)
        whole = self._render([*messages, {"role": "assistant", "content": _STAND_IN}])
        before, found, _ = whole.rpartition(_STAND_IN)
        if not found:
            raise ValueError("the tokenizer's chat template drops the assistant's message")
        system = str(messages[0]["content"]).strip() if messages[0]["role"] == "system" else ""
        if system not in generation:
            raise ValueError(
                "the tokenizer's chat template drops the system message; "
                "set system_role=merge to open the user's message with it"
            )
        if not before.startswith(generation):
            # The template renders a finished turn unlike one still to be written: the former is
            # what the student was trained on.
            return Turn(before, "", before)
        inserted = before[len(generation) :]
        block = inserted.rstrip(" ")
        if not block.strip():
            return Turn(generation, inserted, generation)
        return Turn(generation + block, inserted[len(block) :], generation)

    def _render(self, messages: Messages, **options: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:  # jinja2 and templates raise what they like
            roles = ", ".join(m["role"] for m in messages)
            hint = ""
            if messages[0]["role"] == "system" and self.system_role == "system":
                hint = "; if it knows no system role, set system_role=merge or no system_prompt"
            raise ValueError(
                f"the tokenizer's chat template refuses the roles {roles}: {error}{hint}"
            ) from error

    # ---- token ids ---------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Token ids of text in the middle of a sequence: nothing is added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a rendered prompt, with the BOS token where the tokenizer starts with one
        and the template, which usually writes it, does not."""
        return [*self.bos_ids(), *self.encode(prompt)]

    def bos_ids(self) -> list[int]:
        """[BOS] where this tokenizer begins plain texts with it; templates write their own."""
        bos = self.tokenizer.bos_token_id
        if self.has_template or bos is None:
            return []
        return [bos] if list(self.tokenizer("x")["input_ids"])[:1] == [bos] else []

    def _end_of_turn(self) -> list[int]:
        """What ends the assistant's turn: what the template writes behind it up to its first
        special token, and those that follow that one directly, the EOS token at the latest."""
        eos = self.tokenizer.eos_token_id
        if self.has_template:
            whole = self._render(
                [
                    {"role": "user", "content": "Question"},
                    {"role": "assistant", "content": _STAND_IN},
                ]
            )
            # Encoded behind a text, since some tokenizers open every text with a blank.
            text = self.encode(_STAND_IN)
            after = self.encode(_STAND_IN + whole.rpartition(_STAND_IN)[2])
            after = after[len(text) :] if after[: len(text)] == text else after
            special = set(self.tokenizer.all_special_ids) | _added_ids(self.tokenizer)
            first = next((i for i, token in enumerate(after) if token in special), None)
            if first is not None:
                end = first + 1
                while end < len(after) and after[end] in special and after[end - 1] != eos:
                    end += 1
                return after[:end]
        if eos is None:
            raise ValueError(
                "the tokenizer has no token that ends the assistant's turn; "
                "set its eos_token, or a chat template that writes an end-of-turn token"
            )
        return [int(eos)]


def _added_ids(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {int(i) for i, token in added.items() if str(token).strip()}


def _plain_prompt(messages: Messages) -> tuple[str, str, str]:
    names = {"user": "Question", "assistant": "Answer"}
    parts = [
        f"{names[m['role']]}: {m['content']}" if m["role"] in names else str(m["content"])
        for m in messages
    ]
    prompt = "\n\n".join([*parts, "Answer:"])
    return prompt, " ", prompt


def with_choices(question: str, choices: Sequence[str]) -> str:
    """The question with one "A. ..." line an option ("True or False?" where these are the
    options), unless it already names all of them."""
    if all(re.search(rf"(?<!\w){re.escape(c)}(?!\w)", question, re.IGNORECASE) for c in choices):
        return question
    if truth_options(choices):
        return f"{question}\n{choices[0]} or {choices[1]}?"
    lines = [f"{string.ascii_uppercase[i]}. {c}" for i, c in enumerate(choices)]
    return "\n".join([question, *lines])
