"""What programs that serve models take of adapters: limits that follow from config, names and shapes, as data.

An engine serves adapters of some methods. What it takes of a method's is registered by that method, in a file of its own
called `engines.py`, which is read without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from splice.discovery import find_beside


class Limits(NamedTuple):
    """What one engine takes of one method's adapters.

    Attributes:
        suffixes: the tensors of a layer that it reads.
        ranks: the largest rank that it can be set to serve, and those that it can be set to; empty where any will do.
        rank_option: how it is told the rank, for people; with "{rank}" in the place of it.
        default_rank: the largest rank that it takes without being told; None where that is any.
        refused: fields of the config that must not be switched on -> why not.
        noted: fields of the config that it serves if something is done about them -> what.
        modules: the last names of modules that it knows; empty where that depends on the base alone.
        formats: endings of the files of weights that it reads.
        saved_modules: whether it takes modules that are saved whole.
    """

    suffixes: frozenset[str]
    ranks: tuple[int, ...] = ()
    rank_option: str = ""
    default_rank: int | None = None
    refused: Mapping[str, str] = {}
    noted: Mapping[str, str] = {}
    modules: frozenset[str] = frozenset()
    formats: tuple[str, ...] = (".safetensors", ".bin")
    saved_modules: bool = False


def is_on(value: object) -> bool:
    """Whether a field of a config with this value asks for anything."""
    return value not in (None, False, [], {}, "none")


_LIMITS: dict[str, dict[str, Limits]] = {}


def register_limits(engine: str, peft_type: str, limits: Limits) -> None:
    """Make it known what an engine takes of adapters of this `peft_type`."""
    _LIMITS.setdefault(engine, {})[peft_type] = limits


def engines() -> dict[str, Mapping[str, Limits]]:
    """Engine -> `peft_type` -> what it takes of such adapters."""
    find_beside("engines")
    return dict(_LIMITS)
