"""What can be said of an adapter's layers from its config and its file alone: rank, scale, and the update that they make.

Neither torch nor the method is imported: a method that can be asked so says how in a file of its own called `outline.py`,
which registers it here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from splice.discovery import find_beside

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# The fields of a config, as they stand in its file.
Fields: TypeAlias = Mapping[str, object]
# Suffix -> shape, of the tensors that a file has for one layer.
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
Array: TypeAlias = "npt.NDArray[np.float32]"


class Factors(NamedTuple):
    """An update of a weight as a product, before it is scaled: the matrix itself is never needed."""

    # (out, r).
    left: Array
    # (r, in).
    right: Array


class Outline(NamedTuple):
    """How a method's adapters are read without torch.

    Attributes:
        suffixes: what every layer has, where it has one of them: groups of suffixes that only make sense together.
        planned: the rank that the config gives to the layer at a path; None where that may be another one than it has.
        rank: the rank of a layer, by the config, its path and its shapes; None where they do not tell.
        scale: what its update is multiplied with, by the config, its path and its rank; None where more is needed.
        factors: its update, by the config and its tensors; None where more than these is needed.
        remark: what the update is more than its factors, for people; "" for nothing.
    """

    suffixes: tuple[tuple[str, ...], ...]
    planned: Callable[[Fields, str], int | None]
    rank: Callable[[Fields, str, Shapes], int | None]
    scale: Callable[[Fields, str, int], float | None]
    factors: Callable[[Fields, Mapping[str, Array]], Factors | None]
    remark: Callable[[Fields], str]


_OUTLINES: dict[str, Outline] = {}


def register_outline(peft_type: str, outline: Outline) -> None:
    """Make it known how adapters of this `peft_type` are read."""
    _OUTLINES[peft_type] = outline


def outline_of(peft_type: object) -> Outline | None:
    """How adapters of this `peft_type` are read; None where nobody said."""
    find_beside("outline")
    return _OUTLINES.get(peft_type) if isinstance(peft_type, str) else None
