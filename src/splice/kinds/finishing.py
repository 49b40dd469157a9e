"""Adapter layers that add a plain product and then change the output as a whole.

In a mixed batch the product is worked out with those of all others, and what comes after it once for all adapters of a class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from splice.selection import Group


class Finishing:
    """The part of an adapter layer that can be worked out in these two steps."""

    # Suffixes of the factors, a and b. `product_scale` is the scale, and None where the two steps are not what it does now.
    product_names: ClassVar[tuple[str, str]]

    # Not typed as what they are: a method says so of its own class alone.
    @classmethod
    def finish(cls, layers: Sequence[Any], y: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """What these layers, all of this class, give for some rows, of the shape and dtype of `y`.

        Args:
            layers: one for each adapter.
            y: the rows, with their products added, (rows, ..., out). It is not changed.
            numbers: which of the layers each row has, (rows,).
        """
        raise NotImplementedError


class Finish:
    """What comes after the products for the rows of some layers of one class."""

    def __init__(self, layers: Sequence[Finishing], groups: Sequence[Group]) -> None:
        """For these layers, each with its rows."""
        self.layers = layers
        rows = [row for group in groups for row in group.rows]
        # One adapter's rows behind another's, (rows,); and which adapter each of them has.
        self._rows = torch.cat([group.indices for group in groups])
        numbers = [number for number, group in enumerate(groups) for _ in group.rows]
        self._numbers = torch.tensor(numbers, device=self._rows.device)
        self._in_order = rows == list(range(len(rows)))

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        """`y` (rows of the batch, ..., out) with their rows finished; it is not changed."""
        finish = type(self.layers[0]).finish
        if self._in_order and len(self._rows) == len(y):
            return finish(self.layers, y, self._numbers)
        done = finish(self.layers, y.index_select(0, self._rows), self._numbers)
        return y.index_copy(0, self._rows, done)


@torch.inference_mode(False)
def find_finishes(layers: Sequence[object], groups: Sequence[Group]) -> list[Finish]:
    """What comes after the products of those of these layers that are to be finished; one for each class."""
    by_class: dict[type, list[tuple[Finishing, Group]]] = {}
    for layer, group in zip(layers, groups):
        if isinstance(layer, Finishing):
            by_class.setdefault(type(layer), []).append((layer, group))
    return [Finish([layer for layer, _ in same], [group for _, group in same]) for same in by_class.values()]
