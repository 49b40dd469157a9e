"""What a base and its adapters answer to prompts, in as few batches as can be, and how long that took."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from importlib import import_module
from typing import Any, NamedTuple

import torch

from splice.cli.running.draws import Draws
from splice.cli.running.listener import Listener
from splice.cli.running.stage import Stage
from splice.cli.running.text_base import TextBase
from splice.cli.running.texts import Texts
from splice.cli.settings import Manner
from splice.errors import counted

# What a batch is refused with whose rows cannot have adapters of their own.
_UNMIXED = (ValueError, TypeError, NotImplementedError)


class Answer(NamedTuple):
    """What one adapter answered to one prompt."""

    # The number of the prompt.
    prompt: int
    # The adapter's name; None for the base.
    adapter: str | None
    # The answer, without the prompt.
    text: str
    # How many tokens it has.
    tokens: int
    # Whether it came to its end, and was not cut off.
    ended: bool


class Batch(NamedTuple):
    """One call of `generate`."""

    # The adapter of each row; None for the base.
    adapters: tuple[str | None, ...]
    # Seconds to the first token.
    first: float
    # Seconds of the whole call.
    seconds: float
    # New tokens of all rows.
    tokens: int


class Answers(NamedTuple):
    """What came of it all."""

    # One for each prompt and each of base and adapters.
    answers: list[Answer]
    # The calls, in their order.
    batches: list[Batch]
    # A line for each thing that was done otherwise than in one mixed batch.
    notes: list[str]


class Teller:
    """Puts prompts to a base with adapters.

    Args:
        base: the base.
        texts: its tokenizer.
        stage: its adapters.
        manner: how text is made.
    """

    def __init__(self, base: TextBase, texts: Texts, stage: Stage, manner: Manner) -> None:
        self._base, self._texts, self._stage, self._manner = base, texts, stage, manner
        config: Any = base.network.generation_config
        ends = config.eos_token_id
        said = [] if ends is None else ends if isinstance(ends, list) else [ends]
        # Tokens that end an answer. The tokenizer's too: templates often end a turn by it where the base knows another one.
        self._ends = tuple(dict.fromkeys([*said, *texts.ends]))

    def all_answers(self, prompts: Sequence[Sequence[int]], rows: int, heard: Callable[[Listener], object]) -> Answers:
        """What the base and each adapter answer to each prompt.

        Args:
            prompts: the tokens of each.
            rows: of a batch, at most; a prompt's own are never divided.
            heard: called after each step of a batch.

        Raises:
            ValueError: a prompt is longer than what the base takes.
        """
        found = Answers([], [], [])
        # The group that stands there first: it need not be loaded once more.
        for number, group in enumerate(reversed(self._stage.groups or [[]])):
            names: list[str | None] = [*([None] if number == 0 else []), *group]
            if group:
                self._stage.bring(group[0])
            mixed = len(names) > 1
            for batch in _alike(prompts, max(1, rows // len(names))):
                if mixed:
                    try:
                        self._ask(batch, prompts, names, found, heard)
                        continue
                    except _UNMIXED as error:
                        mixed = False
                        listed = ", ".join(name or "the base" for name in names)
                        found.notes.append(f"{listed} cannot share a batch, and had one each: {error}")
                for name in names:
                    self._ask(batch, prompts, [name], found, heard)
        return found

    def _ask(
        self,
        batch: Sequence[int],
        prompts: Sequence[Sequence[int]],
        names: Sequence[str | None],
        found: Answers,
        heard: Callable[[Listener], object],
    ) -> None:
        """One call of `generate`, for these prompts with each of these adapters."""
        rows = [(prompt, name) for prompt in batch for name in names]
        listener = Listener(heard)
        self.generate([prompts[prompt] for prompt, _ in rows], [name for _, name in rows], batch, listener)
        told = [self.told(listener, row, prompt, name) for row, (prompt, name) in enumerate(rows)]
        found.answers.extend(told)
        found.batches.append(
            Batch(
                tuple(name for _, name in rows),
                listener.first or 0.0,
                listener.last or 0.0,
                sum(answer.tokens for answer in told),
            )
        )

    def generate(
        self,
        ids: Sequence[Sequence[int]],
        names: Sequence[str | None],
        prompts: Iterable[int],
        listener: Listener,
    ) -> None:
        """Call `generate` once.

        Args:
            ids: tokens of each row, all of one length.
            names: the adapter of each row.
            prompts: numbers of the prompts, each of which has equally many rows in turn.
            listener: hears what comes of it.

        Raises:
            ValueError: the prompt is longer than what the base takes, the memory does not do, or rows cannot have adapters of
                their own.
        """
        inputs = torch.tensor(ids, device=self._base.device)
        config: Any = deepcopy(self._base.network.generation_config)
        config.update(do_sample=False, num_beams=1, num_return_sequences=1, max_length=None)
        config.max_new_tokens = self._room(len(ids[0]))
        if config.pad_token_id is None:
            config.pad_token_id = self._ends[0] if self._ends else 0
        config.eos_token_id = list(self._ends) or None
        processors = import_module("transformers").LogitsProcessorList()
        if self._manner.temperature:
            numbers = list(prompts)
            each = len(ids) // len(numbers)
            of_rows = [number for number in numbers for _ in range(each)]
            processors.append(Draws(self._manner.temperature, self._manner.top_p, self._manner.seed, of_rows))
        arguments: dict[str, object] = {
            "input_ids": inputs,
            "attention_mask": torch.ones_like(inputs),
            "generation_config": config,
            "logits_processor": processors,
            "streamer": listener,
        }
        if self._stage.knows_tasks(names):
            arguments["task_ids"] = torch.full((len(ids),), self._manner.task, device=self._base.device)
        try:
            self._stage.generate(names, arguments)
        except torch.OutOfMemoryError as error:
            rows = counted(len(ids), "row")
            raise ValueError(f"the memory of {self._base.device} does not do for {rows} at once") from error

    def _room(self, length: int) -> int:
        """How many tokens may come after so many."""
        positions, wanted = self._base.positions, self._manner.max_new_tokens
        if positions is None:
            return wanted
        if not self._base.gives_input_back:
            return min(wanted, positions - 1)
        left = positions - length - self._stage.in_front()
        if left < 1:
            raise ValueError(f"a prompt of {length:,} tokens is too long: the base takes {positions:,} in all")
        return min(wanted, left)

    def told(self, listener: Listener, row: int, prompt: int, name: str | None) -> Answer:
        """The answer that a listener heard in one row."""
        ids = listener.row(row)
        end = next((place for place, token in enumerate(ids) if token in self._ends), None)
        return Answer(prompt, name, self._texts.decode(ids[:end]), len(ids[:end]), end is not None)


def _alike(prompts: Sequence[Sequence[int]], count: int) -> Iterator[list[int]]:
    """The numbers of prompts that share a batch, `count` at most: those of one length.

    So none is padded. Padding changes what some bases answer (recurrent ones, positions that are counted from the left),
    and an answer should not depend on what else was asked.
    """
    lengths: dict[int, list[int]] = {}
    for number, ids in enumerate(prompts):
        lengths.setdefault(len(ids), []).append(number)
    for numbers in lengths.values():
        for start in range(0, len(numbers), count):
            yield numbers[start : start + count]
