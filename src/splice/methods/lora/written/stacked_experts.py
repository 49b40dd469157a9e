"""The factors of experts that are one parameter, as llama.cpp has them: (experts, rank, in) and (experts, out, rank).

How an adapter holds them (`target_parameters`) is said in `parameters.py`: which parameter a pair of tensors is for follows
from their nesting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from splice.checkpoint.unread import Unread
from splice.errors import UnsupportedFeatureError
from splice.methods.lora.written.factors import DOWN, UP, Factors
from splice.methods.lora.written.scales import scale_in

_EXPERTS, _INNER = ".experts", ".base_layer"
# The parameters of such a module, in the order in which transformers registers them: the last one is outermost.
_BOTH, _LAST = "gate_up_proj", "down_proj"


class Stacked(NamedTuple):
    """One weight of all experts of a block."""

    # Path of the module that has the parameter.
    path: str
    # What it is: "gate", "up" or "down".
    role: str
    # Its factors; they have three dimensions.
    factors: Factors


def is_stacked(path: str) -> bool:
    """Whether the factors at `path` are those of stacked experts."""
    return path.removesuffix(_INNER).endswith(_EXPERTS)


def as_matrix(path: str, factors: Factors, fields: Mapping[str, object]) -> Factors:
    """The factors of a layer; of one whose weight is itself a target, with the scale that the config gives to the weight."""
    weight = f"{path}.weight"
    if not any(f".{weight}".endswith(f".{entry}") for entry in _entries(fields)):
        return factors
    return factors._replace(scale=scale_in(fields, weight, factors.scale.rank))


def _entries(fields: Mapping[str, object]) -> list[str]:
    named = fields.get("target_parameters")
    return [str(entry) for entry in named] if isinstance(named, list) else []


def stacked_in(layers: Mapping[str, Factors], fields: Mapping[str, object], experts: int | None) -> Iterator[Stacked]:
    """The stacked experts among `layers`, one weight after the other.

    Args:
        layers: path -> factors, with `base_layer` at the end of an inner one's path.
        fields: of the adapter's config.
        experts: how many there are in a block, by the base's config; None where that says nothing.

    Raises:
        UnsupportedFeatureError: which parameters these are cannot be told.
    """
    entries = _entries(fields)
    for path in dict.fromkeys(path.removesuffix(_INNER) for path in layers if is_stacked(path)):
        targets = [name for name in (_BOTH, _LAST) if any(f".{path}.{name}".endswith(f".{entry}") for entry in entries)]
        pairs = [layers[path + front] for front in (_INNER, "") if path + front in layers]
        if experts is None or not targets or len(targets) != len(pairs):
            raise UnsupportedFeatureError(
                f"{path!r}: its {len(pairs)} pairs of factors are not those of {_BOTH} and {_LAST} of so many experts as the "
                f"base's config says ({experts})"
            )
        for name, pair in zip(targets, pairs, strict=True):
            yield from _of_one(path, name, pair, fields, experts)


def _of_one(path: str, name: str, pair: Factors, fields: Mapping[str, object], experts: int) -> Iterator[Stacked]:
    (rows, size_in), size_out = pair.down.shape, pair.up.shape[0]
    rank, rest = divmod(rows, experts)
    halves = 2 if name == _BOTH else 1
    if rest or size_out % halves:
        raise UnsupportedFeatureError(f"{path}.{name}: factors of {rows} rows are not those of {experts} experts")
    scale = scale_in(fields, f"{path}.{name}", rank)
    down = Unread(pair.down.dtype, (experts, rank, size_in), lambda: pair.down.read().reshape(experts, rank, size_in))
    height = size_out // halves
    for index, role in enumerate(("gate", "up") if halves == 2 else ("down",)):

        def up(first: int = index * height) -> torch.Tensor:
            each = pair.up.read().reshape(size_out, rank, experts).permute(2, 0, 1)
            return each[:, first : first + height]

        shape = (experts, height, rank)
        yield Stacked(path, role, Factors({DOWN: down, UP: Unread(pair.up.dtype, shape, up)}, scale))
