"""One answer while it is made: tokens come in, text goes out, and it can be ended from outside."""

from collections.abc import Callable, Collection, Sequence

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

# What stands at the end of text whose last character has not come whole.
_BROKEN = "\ufffd"


class Answer(BaseStreamer):
    """Hears the tokens of one row as `generate` makes them, and tells their text.

    Args:
        decode: makes text of tokens.
        ends: tokens that end the answer, and are no part of its text.
        stop: texts before which it ends.
        tell: called with new text. What may be the beginning of a stop, or of a character, is held back until it is clear.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        ends: Collection[int],
        stop: Sequence[str],
        tell: Callable[[str], object],
    ) -> None:
        self._decode, self._ends, self._stop, self._tell = decode, ends, stop, tell
        # `generate` gives the prompt first.
        self._begun = False
        # Text that is held back.
        self._held = ""
        # Tokens of the answer, and up to where their text has come, as in `_new_text`.
        self._ids: list[int] = []
        self._start = self._read = 0
        # Tokens so far, one that ends it included.
        self.tokens = 0
        # How it ended; "" before.
        self.finish = ""
        # Whether nobody waits for it any more.
        self.left = False

    def leave(self) -> None:
        """Let it end at its next token: nobody waits for it. May be called from any thread."""
        self.left = True

    @property
    def is_over(self) -> bool:
        """Whether no more tokens are wanted."""
        return self.left or bool(self.finish)

    def put(self, value: torch.Tensor) -> None:
        """The prompt (1, tokens), and then each new token (1,)."""
        if not self._begun:
            self._begun = True
        elif not self.is_over:
            self._take(int(value.reshape(-1)[0]))

    def end(self) -> None:
        """No more tokens come."""
        self._held += self._decode(self._ids[self._start :])[len(self._decode(self._ids[self._start : self._read])) :]
        if not self.finish:
            self._cut_at_a_stop()
        self._say(len(self._held))
        self.finish = self.finish or "length"

    def _take(self, token: int) -> None:
        self.tokens += 1
        if token in self._ends:
            self.finish = "stop"
            return
        self._ids.append(token)
        self._held += self._new_text()
        self._cut_at_a_stop()
        self._say(len(self._held) if self.finish else len(self._held) - self._may_begin_a_stop())

    def _new_text(self) -> str:
        """The text that the last tokens add. Decoded with some before them: tokens of many tokenizers depend on these."""
        before, now = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        if now.endswith(_BROKEN):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _cut_at_a_stop(self) -> None:
        places = [self._held.find(stop) for stop in self._stop if stop in self._held]
        if places:
            self._held, self.finish = self._held[: min(places)], "stop"
            self._start = self._read = len(self._ids)

    def _may_begin_a_stop(self) -> int:
        """How many of the last characters may be the beginning of a stop."""
        longest = min(max((len(stop) for stop in self._stop), default=1) - 1, len(self._held))
        tails = (self._held[-count:] for count in range(longest, 0, -1))
        return next((len(tail) for tail in tails if any(stop.startswith(tail) for stop in self._stop)), 0)

    def _say(self, count: int) -> None:
        text, self._held = self._held[:count], self._held[count:]
        if text:
            self._tell(text)


class Until(StoppingCriteria):
    """Ends `generate` where an answer wants no more tokens."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: object) -> torch.BoolTensor:
        """Of rows (1, tokens), whether each is done: (1,)."""
        return torch.full((len(input_ids),), self._answer.is_over, dtype=torch.bool, device=input_ids.device)
