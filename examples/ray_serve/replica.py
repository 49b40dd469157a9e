"""A replica: the base, with a store of adapters, and the answers that they give."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from threading import Thread
from typing import Any

import torch
from ray import serve
from transformers import LogitsProcessorList, StoppingCriteriaList

from splice import LoraConfig, NoRoomError, StoreLimits, get_peft_model
from splice.cli.running.draws import Draws
from splice.cli.running.text_base import TextBase, load_base, open_tokenizer
from splice.cli.running.texts import Texts, Turn
from splice.cli.settings import Wanted

from .answering import Answer, Until
from .messages import Asked, Piece, RefusedError
from .meters import Meters
from .options import Options

# What `adapter_names` calls the base.
_BASE = "__base__"
# Seconds between two times that what the store does is told.
_TELL_EVERY = 1.0
# The lowest temperature that is drawn at: what is divided by still lower ones leaves the range of numbers.
_COLDEST = 0.01
# Tokens of an answer where neither the request nor the base says how many there may be.
_UNLIMITED = 4096


class Replica:
    """Answers requests, each with the adapter that it was routed by."""

    def __init__(self, options: Options) -> None:
        wanted = Wanted(options.base, dtype=options.dtype, device=options.device)
        tokenizer = open_tokenizer(wanted)
        self._texts, self._raw_texts = Texts(tokenizer), Texts(tokenizer, raw=True)
        self._base: TextBase = load_base(wanted)
        if not self._base.gives_input_back:
            raise ValueError(f"{options.base} is an encoder-decoder, and only decoders are served here")
        self._network: Any = self._base.network
        self._ends = _ends(self._network, tokenizer)
        self._model = _with_store(self._network, options)
        self._store = self._model.adapter_store
        self._threads = ThreadPoolExecutor(options.requests_per_replica, "answer")
        # Those that are being made now.
        self._answers: set[Answer] = set()
        self._id = serve.get_replica_context().replica_id.unique_id
        self._meters = Meters()
        Thread(target=self._tell, name="meters", daemon=True).start()

    def _tell(self) -> None:
        while True:
            self._meters.tell_now(self._store.stats(), len(self._answers))
            time.sleep(_TELL_EVERY)

    async def names(self) -> list[str]:
        """The adapters that can be asked for."""
        return list(self._store.names)

    async def bring(self, name: str) -> str:
        """Have an adapter on the model. Ray calls this where it does not know the replica for the adapter yet.

        The store is touched and nothing is held: how long an adapter stays is the store's affair. If it has gone by the time
        that an answer begins, `generate` brings it back.

        Raises:
            RefusedError: the adapter cannot be loaded, or there is no room for it.
        """
        try:
            await asyncio.to_thread(self._touch, name)
        except NoRoomError as error:
            raise RefusedError(503, str(error)) from error
        except Exception as error:  # whatever is wrong with one adapter, the others go on
            raise RefusedError(500, f"adapter {name!r} cannot be loaded: {error}") from error
        return name

    def _touch(self, name: str) -> None:
        self._store.pin(name)
        self._store.unpin(name)

    async def answer(self, asked: Asked) -> AsyncIterator[Piece]:
        """Answer a request, piece by piece, with the adapter that it was routed by; with the base where that is none.

        Raises:
            RefusedError: it cannot be answered; before the first piece.
        """
        started, end, heard = time.perf_counter(), "failed", False
        ids: list[int] = []
        loop, texts = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def tell(text: str | None) -> None:
            loop.call_soon_threadsafe(texts.put_nowait, text)

        answer = Answer(self._raw_texts.decode, self._ends, asked.stop, tell)
        try:
            ids = self._encode(asked)
            room = self._room(len(ids), asked.max_tokens)
            adapter = serve.get_multiplexed_model_id()
            if adapter:
                await self.bring(adapter)
            work = loop.run_in_executor(self._threads, self._work, ids, room, asked, adapter, answer, tell)
            while (text := await texts.get()) is not None:
                if not heard:
                    self._meters.tell_first(time.perf_counter() - started)
                    heard = True
                yield Piece(text, len(ids), answer.tokens, "", self._id)
            await work
            end = answer.finish
            yield Piece("", len(ids), answer.tokens, end, self._id)
        except RefusedError:
            end = "refused"
            raise
        except (asyncio.CancelledError, GeneratorExit):
            end = "left"
            raise
        finally:
            answer.leave()
            self._meters.tell_end(end, len(ids), answer.tokens)

    def _encode(self, asked: Asked) -> list[int]:
        """The tokens of the prompt.

        Raises:
            RefusedError: the tokenizer does not take it.
        """
        try:
            if asked.prompt is not None:
                return self._raw_texts.encode([Turn("user", asked.prompt)])
            if not self._texts.in_template:
                raise RefusedError(
                    400, "this base's tokenizer has no chat template: ask /v1/completions with a prompt instead"
                )
            return self._texts.encode([Turn(role, content) for role, content in asked.turns])
        except ValueError as error:
            raise RefusedError(400, str(error)) from error

    def _room(self, length: int, wanted: int | None) -> int:
        """How many tokens the answer may have.

        Raises:
            RefusedError: the base does not take so many.
        """
        positions = self._base.positions
        if positions is None:
            return wanted or _UNLIMITED
        if length + (wanted or 1) > positions:
            answer = "an answer" if wanted is None else f"an answer of {wanted:,}"
            raise RefusedError(
                400,
                f"the prompt has {length:,} tokens, which leaves no room for {answer}: the base takes {positions:,} in all",
                "context_length_exceeded",
            )
        return wanted or positions - length

    def _work(
        self,
        ids: list[int],
        room: int,
        asked: Asked,
        adapter: str,
        answer: Answer,
        tell: Callable[[str | None], object],
    ) -> None:
        """Make an answer, in a thread of its own: which adapter is used belongs to the call, so others may run meanwhile."""
        self._answers.add(answer)
        try:
            if not answer.left:
                self._generate(ids, room, asked, adapter or _BASE, answer)
        finally:
            self._answers.discard(answer)
            tell(None)

    @torch.inference_mode()
    def _generate(self, ids: list[int], room: int, asked: Asked, adapter: str, answer: Answer) -> None:
        inputs = torch.tensor([ids], device=self._base.device)
        config = deepcopy(self._network.generation_config)
        config.update(do_sample=False, num_beams=1, num_return_sequences=1, max_length=None, max_new_tokens=room)
        config.eos_token_id = list(self._ends) or None
        if config.pad_token_id is None:
            config.pad_token_id = next(iter(self._ends), 0)
        processors = LogitsProcessorList()
        if asked.temperature:
            # Not torch's own sampling: there all threads draw from one generator, and a seed would mean nothing.
            seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
            processors.append(Draws(max(asked.temperature, _COLDEST), asked.top_p, seed, [0]))
        self._model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            adapter_names=[adapter],
            generation_config=config,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([Until(answer)]),
            streamer=answer,
        )


def _with_store(network: Any, options: Options) -> Any:
    """The base with all adapters registered and none on it.

    Raises:
        ValueError: none of them can be registered.
    """
    # A model begins with an adapter, and this one makes room at once. `mixed`: the others may be of any methods of layers.
    model = get_peft_model(network, LoraConfig(r=1, target_modules="all-linear"), mixed=True)
    model.eval()
    if options.slot_rank is not None:
        model.slots(count=options.adapters_per_replica, rank=options.slot_rank)
    registered = model.register_adapters(options.adapters)
    model.delete_adapter("default")
    model.adapter_store.limits = StoreLimits(device_count=options.adapters_per_replica)
    print(registered, flush=True)
    if not registered.names:
        raise ValueError(f"none of the adapters can be served: {registered}")
    return model


def _ends(network: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer: the base's, and the tokenizer's, by which templates often end a turn."""
    said = network.generation_config.eos_token_id
    found = [*(said if isinstance(said, list) else [said]), tokenizer.eos_token_id]
    return tuple(dict.fromkeys(token for token in found if token is not None))
