"""The shape of adapter layers: a class of them is abstract or final, and what they are made of stays small."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

import pytest
from torch import nn

from splice.kinds.effect import Effect
from splice.kinds.file_form import FileForm
from splice.kinds.layer import AdapterLayer
from splice.kinds.module_copy import SavedModule
from splice.kinds.names import Names
from splice.kinds.network import NetworkLayer
from splice.kinds.registry import Method, all_methods
from splice.kinds.tensors import OwnTensors
from splice.kinds.token_rows import TokenRowsBeside
from splice.kinds.trained_bias import BiasOnly
from splice.kinds.weight_effect import WeightEffect

# What adapters of every method may have on a layer, beside what their record says.
OF_ALL = {SavedModule, TokenRowsBeside, BiasOnly}


def layer_classes(value: object) -> Iterator[type[AdapterLayer]]:
    """The classes of adapter layers in `value`, and in the tables inside it."""
    if isinstance(value, type) and issubclass(value, AdapterLayer):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from layer_classes(entry)


def used_by(method: Method) -> set[type[AdapterLayer]]:
    """The classes that an adapter of `method` may put on a layer, on parameters or on the network."""
    found = set(layer_classes(method._asdict()))
    if method.variant is not None:  # which chooses from the tables of its module
        for name, value in vars(sys.modules[method.variant.__module__]).items():
            found.update(layer_classes(value) if name.isupper() else ())
    for cls in list(found):
        found.update(cls.companions(nn.Module(), "layer").values())
        if issubclass(cls, NetworkLayer):
            found.add(cls.head)
    return found


def below(cls: type[AdapterLayer]) -> set[type[AdapterLayer]]:
    """The classes of the library that derive from `cls`."""
    found = {child for child in cls.__subclasses__() if child.__module__.startswith("splice.")}
    return found.union(*(below(child) for child in found))


@pytest.mark.parametrize("method", all_methods().values(), ids=lambda method: method.name.value)
def test_a_class_of_adapter_layers_is_abstract_or_final(method: Method) -> None:
    used = used_by(method)
    assert used
    assert {cls.__name__: sorted(c.__name__ for c in below(cls)) for cls in used | OF_ALL if below(cls)} == {}


def test_what_is_not_used_is_built_upon() -> None:
    used = OF_ALL.union(*(used_by(method) for method in all_methods().values()))
    unused = {cls for cls in below(AdapterLayer) if not below(cls)} - used
    # A new adapter may train more than its checkpoint holds, and then it has a class of its own.
    trained = {cls for cls in unused if issubclass(cls, NetworkLayer)}
    assert unused - trained == set()


@pytest.mark.parametrize("part", [AdapterLayer, OwnTensors, Effect, WeightEffect, Names, FileForm])
def test_a_part_says_few_things(part: type) -> None:
    names = {name for name in vars(part).keys() | part.__annotations__.keys() if not name.startswith("_")}
    assert len(names) <= 18, sorted(names)
