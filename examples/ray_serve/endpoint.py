"""What clients talk to: OpenAI's protocol over HTTP, each request sent on to a replica that has its adapter."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.exceptions import HTTPException

from .asked import ChatRequest, CompletionRequest
from .messages import Asked, Piece, RefusedError
from .told import Told, error_body, event, unknown_model

app = FastAPI(title="splice on Ray Serve")
# Of what nobody expected. What it is stands in the log, and is no affair of the asker's.
_FAILED = RefusedError(500, "the replica failed; its log says why")


@app.exception_handler(RefusedError)
async def _refused(request: Request, error: RefusedError) -> JSONResponse:
    return JSONResponse(error_body(error), error.status)


@app.exception_handler(RequestValidationError)
async def _not_understood(request: Request, error: RequestValidationError) -> JSONResponse:
    return await _refused(request, RefusedError(400, "; ".join(map(_problem, error.errors()))))


@app.exception_handler(HTTPException)
async def _not_there(request: Request, error: HTTPException) -> JSONResponse:
    return await _refused(
        request, RefusedError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    )


@app.exception_handler(Exception)
async def _failed(request: Request, error: Exception) -> JSONResponse:
    return await _refused(request, _FAILED)


def _problem(found: dict[str, Any]) -> str:
    """One thing that is wrong with a body, by the name of its field."""
    if found["type"] == "json_invalid":
        return f"the body is no JSON: {found['ctx']['error']}"
    field = ".".join(map(str, found["loc"][1:])) or "the body"
    if found["type"] == "extra_forbidden":
        return f"{field}: not understood here"
    return f"{field}: {found['msg']}"


async def _events(
    told: Told, first: Piece, pieces: DeploymentResponseGenerator[Piece], with_usage: bool
) -> AsyncIterator[str]:
    """The events of a stream. If nobody reads them any more, the replica stops."""
    last = first
    try:
        for text in told.opening(first):
            yield text
        yield told.chunk(first)
        async for last in pieces:
            yield told.chunk(last)
        if with_usage:
            yield told.usage(last)
        yield "data: [DONE]\n\n"
    except Exception as error:  # the status has been sent
        yield event(error_body(error if isinstance(error, RefusedError) else _FAILED))
    finally:
        pieces.cancel()


# Below what it uses: the application is copied for the processes that run it where it is decorated.
@serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=1000)
@serve.ingress(app)
class Endpoint:
    """OpenAI's protocol. `model` is the name of an adapter, or the base's own.

    Args:
        replicas: what answers.
        base_name: what the base is called.
    """

    def __init__(self, replicas: DeploymentHandle, base_name: str) -> None:
        self._replicas, self._base_name = replicas, base_name
        self._adapters: Sequence[str] = ()
        self._started = int(time.time())

    @app.get("/health")
    async def health(self) -> JSONResponse:
        """Whether a replica is there: 200 or 503, with how many are in which state."""
        status = await asyncio.to_thread(serve.status)
        here = serve.get_replica_context().app_name
        states = dict(status.applications[here].deployments[self._replicas.deployment_name].replica_states)
        return JSONResponse({"replicas": states}, 200 if states.get("RUNNING") else 503)

    @app.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """The base, and the adapters, whose `parent` is the base."""
        await self._look_again()
        names = [(self._base_name, None), *((name, self._base_name) for name in self._adapters)]
        return {"object": "list", "data": [self._model(name, parent) for name, parent in names]}

    @app.get("/v1/models/{name:path}")
    async def model(self, name: str) -> dict[str, Any]:
        """One of them."""
        await self._check_known(name)
        return self._model(name, None if name == self._base_name else self._base_name)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(self, request: ChatRequest) -> JSONResponse | StreamingResponse:
        """Answer a conversation."""
        return await self._answer(request, request.asked(), Told(request.model, is_chat=True))

    @app.post("/v1/completions", response_model=None)
    async def completion(self, request: CompletionRequest) -> JSONResponse | StreamingResponse:
        """Go on with a text."""
        return await self._answer(request, request.asked(), Told(request.model, is_chat=False))

    async def _answer(
        self, request: ChatRequest | CompletionRequest, asked: Asked, told: Told
    ) -> JSONResponse | StreamingResponse:
        await self._check_known(request.model)
        # Ray prefers a replica that has this adapter. The base is on all of them.
        adapter = "" if request.model == self._base_name else request.model
        handle = self._replicas.options(stream=True, multiplexed_model_id=adapter)
        pieces: DeploymentResponseGenerator[Piece] = handle.answer.remote(asked)
        # Waited for before anything is sent: what is wrong with a request is an error, and not a stream.
        first = await anext(pieces)
        if request.stream:
            events = _events(told, first, pieces, request.stream_options.include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return JSONResponse(told.whole([first, *[piece async for piece in pieces]]))

    def _model(self, name: str, parent: str | None) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "splice", "parent": parent}

    async def _check_known(self, name: str) -> None:
        if name != self._base_name and name not in self._adapters:
            await self._look_again()
            if name not in self._adapters:
                raise unknown_model(name, self._base_name, self._adapters)

    async def _look_again(self) -> None:
        self._adapters = await self._replicas.names.remote()
