"""What a backend is: one way in which layers store their weight in a form of their own, and how to read and write it.

A backend is one frozen record in a file of its own. It is found by the types of a layer and of its weight, so that no library
has to be there; what it needs of one is looked up among the modules that are loaded, since a layer of a library is only there
where the library is.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

# A layer, weight or function of another library: what it has is known to its backend alone.
Foreign: TypeAlias = Any

# Of a place: the registries of a module, and the object's own dict.
PARAMETERS, BUFFERS, OWN = "_parameters", "_buffers", ""


class Place(NamedTuple):
    """Where a layer keeps a part of what its weight is stored as."""

    # `PARAMETERS`, `BUFFERS` or `OWN`.
    registry: str
    # Its name there.
    name: str

    def of(self, layer: nn.Module) -> dict[str, Any]:
        """The dict that holds it."""
        found: dict[str, Any] = vars(layer)[self.registry] if self.registry else vars(layer)
        return found


# A weight as a layer stores it: by place, whatever stands there.
Stored: TypeAlias = dict[Place, Any]

WEIGHT = Place(PARAMETERS, "weight")


def standing(layer: nn.Module, places: Iterable[Place]) -> Stored:
    """What stands in these places of `layer`: the objects themselves."""
    return {place: place.of(layer).get(place.name) for place in places}


def place_all(layer: nn.Module, stored: Stored) -> None:
    """Put each in its place on `layer`."""
    for place, value in stored.items():
        place.of(layer)[place.name] = value


def moved(stored: Stored, device: torch.device) -> Stored:
    """The same on `device`: itself, where it is there already."""
    found: Stored = _moved(stored, device)
    return found


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value if value.device == device else value.to(device)
    if isinstance(value, dict):
        return {key: _moved(each, device) for key, each in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # the states of layers and of codes
        state = copy.copy(value)
        vars(state).update(_moved(vars(value), device))
        return state
    return value


def is_of(cls: type, library: str, *names: str) -> bool:
    """Whether `cls` or an ancestor is a class of `library`; of one of these names, if any are given."""
    return any(
        base.__module__.partition(".")[0] == library and (not names or base.__name__ in names) for base in cls.__mro__
    )


def values_in(weight: Foreign) -> torch.Tensor:
    """The tensor that a parameter of another class is, as one of torch's own."""
    found: torch.Tensor = weight.detach().as_subclass(torch.Tensor)
    return found


def library_of(something: object, name: str) -> Foreign:
    """The module `name`, which is loaded because `something`, an object of its library, is there."""
    assert name in sys.modules, f"{type(something).__name__} without {name}"
    return sys.modules[name]


def bias_attribute(layer: Foreign) -> torch.Tensor | None:
    """The bias of a layer that has it under its usual name, though not as a parameter."""
    found: torch.Tensor | None = layer.bias
    return found


def _always(layer: Foreign) -> str:
    return ""


def _sizes(layer: Foreign) -> tuple[int, int]:
    return layer.in_features, layer.out_features


def _no_dtype(layer: Foreign) -> torch.dtype | None:
    return None


def _no_bias(layer: Foreign) -> torch.Tensor | None:
    return None


def _never(layer: Foreign, weight: torch.Tensor) -> Stored:
    raise NotImplementedError("a layer that cannot be written is not written")


@dataclass(frozen=True)
class Backend:
    """One way to store a weight.

    Attributes:
        name: what reports of a model call it, as the reference does.
        owns: whether a layer of the first class with a weight of the second one is stored so; the second is that of no
            weight, `type(None)`, where the layer has no parameter of this name.
        is_linear: whether all its layers are linear ones, also those that are no `nn.Linear`.
        dense: the weight in floats, (out, in) of a linear layer; a new tensor, in the dtype that it was stored from if that
            is known.
        describe: how it is stored, in a few words that hold its settings: "4 bit, nf4".
        why_unreadable: why `dense` cannot be asked of a layer; empty where it can.
        why_unwritable: why `encode` cannot be asked of a layer that can be read; empty where it can.
        encode: a dense weight as the layer would store it, with the settings that its own has. The layer stays as it is.
        places: where a layer keeps what its weight is stored as.
        features: (in, out) of a linear layer that is no `nn.Linear`.
        dtype: the floating dtype that the layer computes in; None where it does not say.
        bias: the bias of a layer that does not keep it as a parameter, where `bias_place` says; None for none.
        bias_place: where it keeps that.
        grouped_inputs: whether groups of inputs share a zero point, so that an update which is the same for each input of a
            group could go into the zero points.
    """

    name: str
    owns: Callable[[type, type], bool]
    is_linear: bool
    dense: Callable[[Foreign], torch.Tensor]
    describe: Callable[[Foreign], str]
    why_unreadable: Callable[[Foreign], str] = _always
    why_unwritable: Callable[[Foreign], str] = _always
    encode: Callable[[Foreign, torch.Tensor], Stored] = _never
    places: tuple[Place, ...] = (WEIGHT,)
    features: Callable[[Foreign], tuple[int, int]] = _sizes
    dtype: Callable[[Foreign], torch.dtype | None] = _no_dtype
    bias: Callable[[Foreign], torch.Tensor | None] = _no_bias
    bias_place: Place | None = None
    grouped_inputs: bool = False
