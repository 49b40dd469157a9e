"""What the endpoint and the replicas say to each other."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Asked:
    """A request, as a replica needs it. Which adapter is to answer goes with the call: Ray routes by it."""

    # The text to go on with; None in a conversation.
    prompt: str | None
    # The messages of a conversation, as (role, content).
    turns: tuple[tuple[str, str], ...] = ()
    # Tokens of the answer, at most; None for what the base has room for.
    max_tokens: int | None = None
    # 0 always takes the most probable token.
    temperature: float = 1.0
    # Draw among the most probable tokens alone whose probabilities add up to this much.
    top_p: float = 1.0
    # Of the draws; None for another one each time.
    seed: int | None = None
    # Texts before which the answer ends.
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A piece of an answer. The last one says how it ended."""

    # New text; empty in the last piece, mostly.
    text: str
    # Tokens of the prompt.
    prompt_tokens: int
    # Tokens that were made for the answer so far, one that ends it included.
    answer_tokens: int
    # "" before the end, then "stop" (it came to its end) or "length" (it was cut off).
    finish: str
    # Which replica made it.
    replica: str


class RefusedError(Exception):
    """A request that is not answered: what the asker is told, and the status of HTTP."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        # All of them, so that the error can be pickled: it goes from a replica to the endpoint.
        super().__init__(status, message, code, param)
        self.status, self.message, self.code, self.param = status, message, code, param
