"""Text to tokens and back: what a tokenizer and its chat template make of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Turn(NamedTuple):
    """One message of a conversation."""

    # "system", "user" or "assistant".
    role: str
    # What was said.
    content: str


class Texts:
    """A tokenizer, and how prompts are put to it.

    Args:
        tokenizer: of transformers.
        raw: leave the chat template out where the tokenizer has one.
        system: what a conversation begins with; None for nothing.

    Raises:
        ValueError: there is a `system` text, and no chat template to say it in.
    """

    def __init__(self, tokenizer: Any, raw: bool = False, system: str | None = None) -> None:
        self._tokenizer = tokenizer
        # Whether prompts are put into the tokenizer's chat template.
        self.in_template = bool(tokenizer.chat_template) and not raw
        if system is not None and not self.in_template:
            why = "is left out by --raw" if raw else "this tokenizer does not have"
            raise ValueError(f"--system needs a chat template, which {why}")
        self._before = [] if system is None else [Turn("system", system)]

    def encode(self, turns: Sequence[Turn]) -> list[int]:
        """The tokens that the base is to go on with: of the whole conversation, or of its last turn without a template.

        Raises:
            ValueError: there is no token, or the template does not take such a conversation.
        """
        if self.in_template:
            ids = self._tokenizer(self._put_into_template(turns), add_special_tokens=False)["input_ids"]
        else:
            ids = self._tokenizer(turns[-1].content)["input_ids"]
        if not ids:
            raise ValueError(f"the prompt {turns[-1].content!r} is no token to this tokenizer")
        return list(ids)

    def _put_into_template(self, turns: Sequence[Turn]) -> str:
        messages = [turn._asdict() for turn in (*self._before, *turns)]
        try:
            text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # A template is a program of its own: what it refuses is an error of the library that runs it.
        except Exception as error:
            raise ValueError(f"the tokenizer's chat template refuses this: {error}; --raw leaves it out") from error
        return text

    def decode(self, ids: Iterable[int]) -> str:
        """The text of tokens, without those that mark its ends."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    @property
    def ends(self) -> tuple[int, ...]:
        """The token that ends a text, where the tokenizer has one."""
        found = self._tokenizer.eos_token_id
        return () if found is None else (found,)
