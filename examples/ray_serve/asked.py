"""Requests as OpenAI's clients write them. What is not understood is refused, and not left out in silence."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .messages import Asked

Stop = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _leave_nulls_out(cls, found: Any) -> Any:
        return {name: value for name, value in found.items() if value is not None} if isinstance(found, dict) else found


class StreamOptions(_Strict):
    """What a stream has besides text."""

    # Whether its last chunk says how many tokens there were.
    include_usage: bool = False


class _Request(_Strict):
    # The name of an adapter, or the base's own.
    model: str
    max_tokens: int | None = Field(None, gt=0)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None
    stop: Stop | list[Stop] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    # Only what these are if nobody gives them.
    n: int = Field(1, ge=1, le=1)
    presence_penalty: float = Field(0, ge=0, le=0)
    frequency_penalty: float = Field(0, ge=0, le=0)
    # Who asks. It changes nothing.
    user: str = ""

    def _manner(self) -> dict[str, Any]:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed, "stop": stop}


class CompletionRequest(_Request):
    """The body of /v1/completions."""

    prompt: str
    # As OpenAI has it.
    max_tokens: int = Field(16, gt=0)
    echo: Literal[False] = False

    def asked(self) -> Asked:
        """What a replica needs of it."""
        return Asked(self.prompt, max_tokens=self.max_tokens, **self._manner())


class Message(_Strict):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(_Request):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    # The name that newer clients have for `max_tokens`.
    max_completion_tokens: int | None = Field(None, gt=0)

    def asked(self) -> Asked:
        """What a replica needs of it."""
        turns = tuple((message.role, message.content) for message in self.messages)
        return Asked(None, turns, self.max_completion_tokens or self.max_tokens, **self._manner())
