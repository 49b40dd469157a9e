"""A checkpoint that has been opened, and the ways in which a method may read one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from splice.checkpoint.header import Entry
from splice.checkpoint.tensors import Weights
from splice.config import PeftConfig


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been opened: its config, and its tensors by their names after any mapping."""

    config: PeftConfig
    weights: Weights
    names: Mapping[str, str]
    # Of the config: fields of long ago, and what of it was read in another way than it is written.
    legacy: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def entries(self) -> dict[str, Entry]:
        return {name: self.weights.entries[own] for name, own in self.names.items()}
