"""EETQ: 8-bit weights in the order of one GPU kernel, in a layer that is no `nn.Linear`."""

from __future__ import annotations

from splice.base.backends.backend import Backend, Foreign, is_of
from splice.base.backends.identity import weight_by_identity


def _owns(layer: type, weight: type) -> bool:
    own = any(base.__module__ == "transformers.integrations.eetq" for base in layer.__mro__)
    return (own and is_of(layer, "transformers", "EetqLinear")) or is_of(layer, "eetq", "EetqLinear", "W8A16Linear")


def _describe(layer: Foreign) -> str:
    return "8 bit"


def _why_unwritable(layer: Foreign) -> str:
    return "its weight is packed for one kernel"


BACKEND = Backend(
    name="eetq",
    owns=_owns,
    is_linear=True,
    dense=weight_by_identity,
    describe=_describe,
    why_unwritable=_why_unwritable,
)
