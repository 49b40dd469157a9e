"""Answers and errors as OpenAI's clients read them."""

import json
import time
import uuid
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from .messages import Piece, RefusedError

# Names that a message lists.
_LISTED = 10


class Told:
    """One answer, in the form of the endpoint that it was asked at.

    Args:
        model: as it was asked for.
        is_chat: whether that was /v1/chat/completions.
    """

    def __init__(self, model: str, is_chat: bool) -> None:
        self._is_chat, self._kind = is_chat, "chat.completion" if is_chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The answer that these pieces are."""
        text, last = "".join(piece.text for piece in pieces), pieces[-1]
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        return {**self._begin(self._kind, last), "choices": [_choice(said, last.finish)], "usage": _usage(last)}

    def opening(self, first: Piece) -> list[str]:
        """What stands before the first text of a stream."""
        if not self._is_chat:
            return []
        return [self._event(first, [_choice({"delta": {"role": "assistant", "content": ""}}, "")])]

    def chunk(self, piece: Piece) -> str:
        """A piece of a stream."""
        said: dict[str, Any] = {"text": piece.text}
        if self._is_chat:
            said = {"delta": {"content": piece.text} if piece.text else {}}
        return self._event(piece, [_choice(said, piece.finish)])

    def usage(self, last: Piece) -> str:
        """What a stream with `include_usage` ends with."""
        return self._event(last, [], usage=_usage(last))

    def _begin(self, kind: str, piece: Piece) -> dict[str, Any]:
        return {**self._head, "object": kind, "system_fingerprint": piece.replica}

    def _event(self, piece: Piece, choices: list[dict[str, Any]], **more: Any) -> str:
        kind = "chat.completion.chunk" if self._is_chat else self._kind
        return event({**self._begin(kind, piece), "choices": choices, **more})


def _choice(said: dict[str, Any], finish: str) -> dict[str, Any]:
    return {"index": 0, **said, "logprobs": None, "finish_reason": finish or None}


def _usage(last: Piece) -> dict[str, int]:
    prompt, answer = last.prompt_tokens, last.answer_tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def event(body: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body)}\n\n"


def error_body(error: RefusedError) -> dict[str, Any]:
    """An error, in the form that clients make an exception of."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def unknown_model(name: str, base_name: str, adapters: Sequence[str]) -> RefusedError:
    """Of a model that is not served: a sentence with those that are, the nearest name first."""
    near = get_close_matches(name, adapters, _LISTED)
    listed = [repr(adapter) for adapter in dict.fromkeys([*near, *adapters])]
    more = f" and {len(listed) - _LISTED:,} more" if len(listed) > _LISTED else ""
    return RefusedError(
        404,
        f"there is no model {name!r}: the base is {base_name!r}, and its adapters are {', '.join(listed[:_LISTED])}{more}",
        "model_not_found",
        "model",
    )
