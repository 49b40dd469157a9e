"""Cartridges: the keys and values of a text, trained to stand for it. Eyuboglu et al., arXiv 2506.06266, sections 3 and 4.

A prefix whose first tokens stay what they are, since every later token looks at them (the attention sink). A checkpoint holds
one table, as that of prefix tuning does, and the config where it is divided.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import ClassVar, cast

import torch
from torch import nn

from splice.checkpoint.types import PeftType
from splice.config import PromptLearningConfig
from splice.errors import counted
from splice.kinds.file_form import FileForm, Stored
from splice.kinds.layer import Config
from splice.kinds.reading import Checkpoint, Reading
from splice.kinds.registry import Method, register
from splice.kinds.slot import Role, Slot
from splice.kinds.tensors import Held
from splice.methods.prompts.attributes import PROMPT_METHODS, PROMPT_VIEWS
from splice.methods.prompts.cached import CachedPrompt, computed_sizes
from splice.methods.prompts.counts import check_prompt
from splice.methods.prompts.names import PROMPT_KEY
from splice.methods.prompts.prompt import Encoder
from splice.methods.prompts.reparameterised import BEHIND

_FROZEN, _TRAINED = "frozen_embedding", "trainable_embedding"


@dataclass
class CartridgeConfig(PromptLearningConfig):
    """Fields and defaults of the reference, in its order.

    Raises:
        ValueError: `num_frozen_tokens` is negative, or more than there are.
    """

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.CARTRIDGE
    # Fields of prefix tuning, whose files hold the same table: what they say is of how it came about.
    legacy_fields: ClassVar[frozenset[str]] = frozenset({"init_weights", "encoder_hidden_size", "prefix_projection"})

    # How many of the virtual tokens, from the first on, are not trained.
    num_frozen_tokens: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        frozen, count = self.num_frozen_tokens, self.num_virtual_tokens
        if not isinstance(frozen, int) or frozen < 0:
            raise ValueError(f"`num_frozen_tokens` must be >= 0, got {frozen!r}.")
        if isinstance(count, int) and frozen > count:
            raise ValueError(
                f"`num_frozen_tokens` must be <= `num_virtual_tokens`, got num_frozen_tokens={frozen} and "
                f"num_virtual_tokens={count}."
            )

    def computed(self) -> dict[str, object]:
        return computed_sizes(self)


class CartridgeEncoder(Encoder):
    """The keys and values of a cartridge, in the tree."""

    @property
    def embedding(self) -> SimpleNamespace:
        """All of them as `embedding.weight`, which is no parameter: it is put together when it is asked for."""
        return SimpleNamespace(weight=self.layer.table())

    def load_prompt_embeddings(self, prompt_embeddings: torch.Tensor) -> None:
        """Have these keys and values, (tokens, layers * 2 * heads * size of a head), in the place of those that are there."""
        cast("Cartridge", self.layer).take(prompt_embeddings)


class OneTable(FileForm):
    """A checkpoint holds one table, whose first rows are the frozen ones."""

    converts = True

    def slots(self, slots: Mapping[str, Slot], config: Config) -> Mapping[str, Slot]:
        rows = sum(slot.shape[0] for slot in slots.values())
        return {PROMPT_KEY: slots[_TRAINED]._replace(shape=(rows, slots[_TRAINED].shape[1]))}

    def to_file(self, layer: Stored, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        parts = [tensors.get(suffix) for suffix, _ in layer.named_slots()]
        found = [part.detach() for part in parts if part is not None]
        if len(found) == len(parts):
            yield PROMPT_KEY, torch.cat(found)

    def from_file(self, tensors: Mapping[str, torch.Tensor], slots: Mapping[str, Slot]) -> dict[str, torch.Tensor]:
        table = tensors.get(PROMPT_KEY)
        return {} if table is None else _parts(table, {suffix: slot.shape[0] for suffix, slot in slots.items()})


def _parts(table: torch.Tensor, rows: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The rows of a table for each suffix, one after the other."""
    parts = dict(zip(rows, torch.split(table, list(rows.values()))))
    if _FROZEN in parts:
        # In memory of its own: whoever writes what a model has may leave out what lies where something else does. The other
        # part, mostly far the larger, stays where it was read.
        parts[_FROZEN] = parts[_FROZEN].clone()
    return parts


class Cartridge(CachedPrompt):
    """Keys and values, of which the first tokens' are frozen."""

    encoder = CartridgeEncoder
    file_form = OneTable()
    trainable_embedding = Held()

    @classmethod
    def slots(cls, base: nn.Module, config: CartridgeConfig, path: str) -> dict[str, Slot]:
        (table,) = super().slots(base, config, path).values()
        frozen, (count, width) = config.num_frozen_tokens, table.shape
        parts = {_FROZEN: table._replace(shape=(frozen, width), role=Role.FIXED)} if frozen else {}
        return {**parts, _TRAINED: table._replace(shape=(count - frozen, width))}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: CartridgeConfig) -> None:
        for tensor in tensors.values():
            nn.init.normal_(tensor)

    def table(self) -> torch.Tensor:
        frozen = self.find(_FROZEN)
        return self.trainable_embedding if frozen is None else torch.cat((frozen, self.trainable_embedding))

    def parts_of(self, table: torch.Tensor) -> Mapping[str, torch.Tensor]:
        return _parts(table, {suffix: len(tensor) for suffix, tensor in self.named_slots()})


def _of_a_prefix(
    checkpoint: Checkpoint, config: CartridgeConfig, network: nn.Module, modules: Mapping[str, nn.Module]
) -> Reading | None:
    """The table of prefix tuning alone, where a checkpoint holds the network too that made it."""
    behind = [name for name in checkpoint.names if name.startswith(BEHIND)]
    if not behind or PROMPT_KEY not in checkpoint.names:
        return None
    names = {name: own for name, own in checkpoint.names.items() if name not in behind}
    note = f"{counted(len(behind), 'tensor')} of the network that made {PROMPT_KEY} ({behind[0]}): left out"
    return Reading(checkpoint._replace(names=names), config, (note,))


METHOD = register(
    Method(
        name=PeftType.CARTRIDGE,
        summary="Trains the keys and values of a long text, from its prefill on, as a short prefix that stands for it.",
        config=CartridgeConfig,
        prefix="cartridge_",
        tensor_names=frozenset({PROMPT_KEY}),
        network_layer=Cartridge,
        readings=(_of_a_prefix,),
        check=check_prompt,
        tuner_methods=PROMPT_METHODS,
        tuner_views=PROMPT_VIEWS,
        names=MappingProxyType({"CartridgeEncoder": CartridgeEncoder}),
        paper="arXiv 2506.06266",
    )
)
