"""The kind of prompt whose table is the output of a small network while it is trained.

A checkpoint of the reference holds the table alone, so that training cannot go on from it. Ours holds the tensors behind it
too, under names that the reference leaves aside: a load for inference takes the table, one for training all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from splice.kinds.container import Holder
from splice.kinds.file_form import FileForm, Stored
from splice.kinds.layer import Config
from splice.kinds.slot import Slot
from splice.methods.prompts.names import PROMPT_KEY, PromptNames
from splice.methods.prompts.prompt import Encoder, PromptLayer

# What the names of these tensors begin with.
BEHIND = "prompt_encoder."


class TableAndTensors(FileForm):
    """A checkpoint holds the table, which is what the reference reads, and what it is made of."""

    def to_file(self, layer: Stored, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        assert isinstance(layer, PromptLayer)
        table = table_of(layer, tensors)
        if table is not None:
            yield PROMPT_KEY, table
        yield from tensors.items()


def table_of(layer: PromptLayer, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The table that `layer` would have with these tensors, by suffix; None where they are not all that it is made of."""
    own = {suffix: layer.tensor(suffix) for suffix in layer.registered}
    if any(suffix not in tensors for suffix, _ in layer.named_slots()):
        return None
    if all(tensors.get(suffix, tensor) is tensor for suffix, tensor in own.items()):
        return layer.table_to_save()
    # A layer of its own, since others may compute with the tensors that are on the model now.
    slots = {suffix: registered.slot for suffix, registered in layer.registered.items()}
    given = {suffix: tensors.get(suffix, tensor).detach() for suffix, tensor in own.items()}
    return type(layer)(layer.base, layer.config, "", slots, given).table_to_save()


class TrainedBehind(PromptLayer):
    """A prompt that is trained by other tensors than its table. A checkpoint holds these behind `BEHIND`."""

    names = PromptNames(keys=MappingProxyType({PROMPT_KEY: PROMPT_KEY}), front=BEHIND)
    file_form = TableAndTensors()


class _Undrawn(TorchFunctionMode):
    """Inside, a module that is made gets no values: torch takes longer to draw nothing on the meta device than to draw."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        drawn = func in (nn.init.kaiming_uniform_, nn.init.uniform_)
        return None if drawn else func(*args, **(kwargs or {}))


class Reparameterised(TrainedBehind):
    """The table is what modules make of an embedding; they stand in the tree, beside it."""

    @classmethod
    def behind(cls, base: nn.Module, config: Config) -> Mapping[str, nn.Module]:
        """These modules, by name, with the values that torch draws for them.

        Raises:
            ValueError: the config asks for none that is known.
        """
        raise NotImplementedError

    @classmethod
    def width(cls, base: nn.Module, config: Config) -> tuple[int, int]:
        """The shape of the embedding."""
        raise NotImplementedError

    @classmethod
    def slots(cls, base: nn.Module, config: Config, path: str) -> dict[str, Slot]:
        with torch.device("meta"), _Undrawn():
            tensors = _tensors_of(cls.behind(base, config))
        shapes = {"embedding.weight": cls.width(base, config), **{s: tuple(t.shape) for s, t in tensors.items()}}
        return {suffix: Slot(shape, dtype=torch.float32) for suffix, shape in shapes.items()}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: Config) -> None:
        nn.init.normal_(tensors["embedding.weight"])
        # Drawn by the modules themselves, so that the same seed gives what it gives in the reference.
        for suffix, tensor in _tensors_of(cls.behind(base, config)).items():
            tensors[suffix].copy_(tensor)

    def new_entry(self, container: str) -> Encoder:
        # Modules without values: each gets the tensors of its slots next.
        with torch.device("meta"), _Undrawn():
            modules = self.behind(self.base, self.config)
        entry = self.encoder()
        entry._modules.update({"embedding": Holder(), **modules})
        return entry

    def module(self, name: str) -> nn.Module:
        """One of the modules, as it is in the tree."""
        found = self.entries["prompt_encoder"]._modules[name]
        assert found is not None
        return found


def _tensors_of(modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {f"{front}.{name}": p for front, module in modules.items() for name, p in module.named_parameters()}
