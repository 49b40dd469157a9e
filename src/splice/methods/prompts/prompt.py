"""What all prompt-learning methods share: trained virtual tokens that stand in front of what a network is called with.

An adapter of this kind has one adapter layer, on the network itself: what is adapted is its call. So whatever calls the
network (a forward, each step of `generate`, a pipeline) gets the virtual tokens. Where they stand is a matter of two
kinds: among the embedded inputs (`embedded.py`), or in the cache of keys and values (`cached.py`). A method says how they
come about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.signatures import named_arguments
from splice.checkpoint.types import TaskType
from splice.errors import UnsupportedFeatureError, warn
from splice.kinds.container import Holder
from splice.kinds.effect import Effect, Forward
from splice.kinds.layer import Config
from splice.kinds.names import Names
from splice.kinds.network import NetworkLayer
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held
from splice.methods.prompts.cache import Cache
from splice.methods.prompts.counts import token_count
from splice.methods.prompts.names import PromptHead, PromptNames
from splice.methods.prompts.sizes import sizes_of
from splice.selection import Rows

# What a network is called with, by name.
Call = dict[str, Any]
# The tasks whose models get the caller's `token_type_ids`.
TYPED = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS)


class Encoder(Holder):
    """The tensors behind virtual tokens, in the tree; called as the reference's encoders are."""

    def link(self, layer: object) -> None:
        self.__dict__["layer"] = layer

    @property
    def layer(self) -> PromptLayer:
        """The adapter layer that makes the virtual tokens.

        Raises:
            RuntimeError: the adapter was deleted.
        """
        found: PromptLayer | None = self.__dict__.get("layer")
        if found is None:
            raise RuntimeError(
                f"this {type(self).__name__} is of an adapter that was deleted: its virtual tokens cannot be computed any "
                "more. Ask for them before `delete_adapter`, or load the adapter again."
            )
        return found

    def forward(self, indices: Any = None, task_ids: torch.Tensor | None = None) -> Any:
        """The rows `indices` of the table of virtual tokens; all, if None. With a function, as every holder: its result."""
        if callable(indices) and not isinstance(indices, torch.Tensor):
            return indices()
        return self.layer.table() if indices is None else F.embedding(indices, self.layer.table())

    def train(self, mode: bool = True) -> Encoder:
        super().train(mode)
        for module in self._modules.values():  # which may be layers of a network, with dropout
            if module is not None:
                module.train(mode)
        return self


class PromptLayer(NetworkLayer):
    """The virtual tokens of one adapter. The target is the network, or the part of it that takes a cache."""

    names: Names = PromptNames()
    head = PromptHead
    table_tensor = Held("embedding.weight")
    # The class of what it has in the tree.
    encoder: ClassVar[type[Encoder]]
    # How many virtual tokens stand in front of a row.
    count: int
    # The parameters of the target's own forward.
    arguments: tuple[str, ...]
    # The `task_type` of the adapter.
    task: TaskType | str | None

    @classmethod
    def place(cls, network: nn.Module, config: Config) -> str:
        return ""

    @classmethod
    def resolved(cls, base: nn.Module, config: Config) -> dict[str, object]:
        return {**sizes_of(base, config)}

    @classmethod
    def slots(cls, base: nn.Module, config: Config, path: str) -> dict[str, Slot]:
        sizes = sizes_of(base, config)
        rows = token_count(config) * sizes["num_transformer_submodules"]
        # In float32 whatever the base is in: so the reference trains and writes them.
        return {"embedding.weight": Slot((rows, sizes["token_dim"]), dtype=torch.float32)}

    def prepare(self, base: nn.Module, config: Config, path: str) -> None:
        self.count = token_count(config)
        self.task = config.task_type
        self.arguments = named_arguments(base)

    def new_entry(self, container: str) -> nn.Module:
        return self.encoder()

    def table(self) -> torch.Tensor:
        """Every virtual token, one a row, in float32: what a checkpoint holds."""
        return self.table_tensor

    @torch.no_grad()
    def table_to_save(self) -> torch.Tensor:
        """The table for a checkpoint: without dropout, which would leave a part of it out."""
        return self.table()

    def every_token(self, task_ids: torch.Tensor | None) -> torch.Tensor:
        """(rows, all tokens, ...), those of every submodule, in float32; one row where all rows have the same.

        `task_ids` (rows) are what methods with tasks ask for.
        """
        return self.table()[None]

    def virtual_tokens(self, call: Call) -> torch.Tensor:
        """(rows, count, ...) for this call, in float32; one row where all are the same."""
        raise NotImplementedError

    def prompted(self, call: Call, prompt: Prompt, inner: Forward) -> object:
        """What `inner` gives with the virtual tokens of `prompt` in front of the input.

        Args:
            call: the arguments of the network, by name: `input_ids` (batch, T), `attention_mask` (batch, T)...
            prompt: virtual tokens for each of the batch's rows.
            inner: the network's own forward.
        """
        raise NotImplementedError

    def wrapped(self, inner: Forward) -> Forward:
        def run(*args: object, **kwargs: object) -> object:
            return self.prompted(self.bound(args, kwargs), Prompt(((self, None),), self.count), inner)

        return run

    @classmethod
    def wrapped_rows(cls, layers: Mapping[str, Effect], rows: Rows, inner: Forward) -> Forward:
        """As `wrapped`, with an adapter for each row."""

        def run(*args: object, **kwargs: object) -> object:
            first = next(layer for layer in layers.values() if isinstance(layer, PromptLayer))
            call = first.bound(args, kwargs)
            prompt = prompt_of_rows(layers, rows, main_input(call))
            return inner(**call) if prompt is None else prompt.parts[0][0].prompted(call, prompt, inner)

        return run

    def bound(self, args: Sequence[object], kwargs: Mapping[str, object]) -> Call:
        """All arguments by name."""
        return {**dict(zip(self.arguments, args)), **kwargs}

    @property
    def cache_name(self) -> str:
        """What the target calls its cache: transformers is about to rename it."""
        return "past_key_values" if "past_key_values" in self.arguments else "cache"

    def cache_in(self, call: Call) -> Cache | None:
        """The cache of this call under either of its names, or None."""
        given: Cache | None = call.pop("past_key_values", None)
        given = call.get("cache") if given is None else given
        call.pop("cache", None)
        if given is not None:
            call[self.cache_name] = given
        return given

    def drop_types(self, call: Call, unless: Sequence[TaskType]) -> None:
        """Take the types of tokens away, except for these tasks: adapters are trained without."""
        if self.task not in unless and call.pop("token_type_ids", None) is not None:
            text = f"Token type ids are not supported for {self.task} with virtual tokens. They are ignored."
            warn(text)

    def set_mask(self, call: Call, name: str, prompt: Prompt, length: int, past: int) -> None:
        """Let the mask cover the virtual tokens too. Rows with fewer of them are padded in front."""
        mask = call.get(name)
        if mask is None:
            if prompt.short is None:
                return
            batch, seen = len(prompt.short), max(past - prompt.count, 0)
            mask = torch.ones(batch, seen + length, dtype=torch.long, device=prompt.short.device)
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            raise ValueError(
                f"virtual tokens need `{name}` of shape (batch, tokens), got "
                f"{tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__}; masks that are worked out "
                "beforehand do not know of them. While generating, use a cache that grows (not a static one)."
            )
        if past == 0 or mask.shape[1] != past + length:
            call[name] = torch.cat([prompt.mask(mask), mask], dim=1)

    def set_positions(self, call: Call, name: str, prompt: Prompt, length: int, past: int) -> None:
        """Positions for rows that are padded in front, counted from their own first token."""
        if prompt.short is not None:
            positions = torch.arange(past, past + length, device=prompt.short.device) - prompt.short
            call[name] = positions.clamp(min=0)


_MAIN = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "labels")


def main_input(call: Call, names: Sequence[str] = _MAIN) -> torch.Tensor:
    """The argument that tells how many rows there are.

    Raises:
        ValueError: none of `names` is given.
    """
    found = next((call[name] for name in names if call.get(name) is not None), None)
    if found is None:
        raise ValueError("You have to provide either input_ids or inputs_embeds")
    return found  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Prompt:
    """The virtual tokens of one call: one adapter's for all rows, or each row's own.

    Attributes:
        parts: adapter layers with the indices of their rows; None stands for all rows.
        count: the number of virtual tokens in front of every row, padding included.
        short: (batch, 1), how many fewer each row has; None where all have `count`.
    """

    parts: tuple[tuple[PromptLayer, torch.Tensor | None], ...]
    count: int
    short: torch.Tensor | None = None

    def values(
        self, call: Call, batch: int, tokens_of: Callable[[PromptLayer, Call], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """(batch, count, ...) in float32; zeros where a row is padded. `tokens_of` takes the place of `virtual_tokens`."""
        layer, rows = self.parts[0]
        tokens = _for_rows(layer.virtual_tokens(call) if tokens_of is None else tokens_of(layer, call), batch)
        if rows is None:
            return tokens
        result = tokens.new_zeros(batch, self.count, *tokens.shape[2:])
        for layer, rows in self.parts:
            tokens = _for_rows(layer.virtual_tokens(call) if tokens_of is None else tokens_of(layer, call), batch)
            assert rows is not None
            result[rows, self.count - layer.count :] = tokens[rows]
        return result

    def mask(self, like: torch.Tensor) -> torch.Tensor:
        """(batch, count): what the mask `like` has in front."""
        ones = like.new_ones(like.shape[0], self.count)
        if self.short is None:
            return ones
        return (torch.arange(self.count, device=like.device) >= self.short).to(like.dtype)


def _for_rows(tokens: torch.Tensor, batch: int) -> torch.Tensor:
    """Virtual tokens for each row of a batch, which has several for each of those that the caller gave while it generates."""
    if len(tokens) == 1:  # a view, where all rows have the same: no copy for each of them
        return tokens.expand(batch, *tokens.shape[1:])
    if batch % len(tokens):
        raise ValueError(f"there are virtual tokens for {len(tokens)} rows, and the batch has {batch}")
    return tokens if len(tokens) == batch else tokens.repeat_interleave(batch // len(tokens), 0)


def prompt_of_rows(layers: Mapping[str, Effect], rows: Rows, main: torch.Tensor) -> Prompt | None:
    """The virtual tokens of a batch with an adapter for each row; None where no row has any.

    Raises:
        UnsupportedFeatureError: rows get different numbers of them, and this network cannot pad rows.
    """
    parts = []
    for group in rows.groups(main.shape[0], main.device):
        layer = layers[group.name]
        assert isinstance(layer, PromptLayer)
        parts.append((layer, group.indices))
    if not parts:
        return None
    count = max(layer.count for layer, _ in parts)
    short = torch.full((main.shape[0], 1), count, device=main.device)
    for layer, index in parts:
        short[index] -= layer.count
    if all(layer.count == count for layer, _ in parts) and sum(len(index) for _, index in parts) == len(short):
        return Prompt(tuple(parts), count)
    first = parts[0][0]
    if first.task != TaskType.CAUSAL_LM or "position_ids" not in first.arguments:
        raise UnsupportedFeatureError(
            f"`adapter_names`: rows get different numbers of virtual tokens ({sorted({*(count - short[:, 0]).tolist()})}), "
            f"and {type(first).__name__} can pad rows only for CAUSAL_LM models that take `position_ids`; this is "
            f"{first.task}. Choose adapters with the same `num_virtual_tokens` and no '__base__', or call them one by one."
        )
    return Prompt(tuple(parts), count, short)
