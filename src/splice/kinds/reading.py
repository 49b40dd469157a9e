"""A checkpoint that has been opened, and what a method makes of one that was written in another way."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

from torch import nn

from splice.checkpoint.header import Entry
from splice.checkpoint.tensors import Weights
from splice.config import PeftConfig
from splice.kinds.layer import Config


class Checkpoint(NamedTuple):
    """A checkpoint that has been opened: its config, and its tensors by their names after any mapping."""

    # What its config file says, or the caller in its place.
    config: PeftConfig
    # Its tensors; none has been read.
    weights: Weights
    # Name of a tensor as the plan sees it -> its name in `weights`.
    names: Mapping[str, str]
    # Fields of long ago that the config's class understands and no longer has.
    legacy: Mapping[str, object] = MappingProxyType({})
    # What of the config was read in another way than it is written, a line each.
    notes: tuple[str, ...] = ()

    @property
    def entries(self) -> dict[str, Entry]:
        """Dtype and shape of every tensor, by the names that the plan sees."""
        return {name: self.weights.entries[own] for name, own in self.names.items()}


class Reading(NamedTuple):
    """A checkpoint as a method reads it where its names and shapes are not those of today."""

    # With the tensors that it stands for.
    checkpoint: Checkpoint
    # With the fields that say so.
    config: PeftConfig
    # A line for each thing that was read in another way than it is written.
    notes: tuple[str, ...] = ()


class Reader(Protocol):
    """One of the ways in which adapters of a method were written before."""

    def __call__(
        self, checkpoint: Checkpoint, config: Config, network: nn.Module, modules: Mapping[str, nn.Module], /
    ) -> Reading | None:
        """What the checkpoint means; None where it is not written in this way.

        Args:
            checkpoint: as it was opened.
            config: what its config says.
            network: the base model it is for.
            modules: all modules of the network, by path.
        """
        ...
