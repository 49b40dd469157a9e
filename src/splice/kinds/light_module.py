"""Modules that are made in a tenth of the time: a load makes hundreds."""

from __future__ import annotations

from typing import Any

from torch import nn

# Taken from a module of this torch, and not written down: the names change from one version to the next.
_PRISTINE = dict(nn.Module().__dict__)


_COLLECTIONS = {name: type(value) for name, value in _PRISTINE.items() if isinstance(value, (dict, set))}


# What every module has; all others are for hooks, which next to none of ours ever gets.
_NEEDED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


_PLAIN_STATE = {name: value for name, value in _PRISTINE.items() if name not in _COLLECTIONS}


_PLAIN = frozenset({int, float, bool, str, tuple})


class _MadeWhenAsked:
    """A collection of hooks, made when it is first asked for; from then on it is the module's own attribute."""

    def __init__(self, name: str, kind: type) -> None:
        self.name, self.kind = name, kind

    def __get__(self, module: nn.Module | None, owner: type) -> object:
        return self if module is None else module.__dict__.setdefault(self.name, self.kind())


class LightModule(nn.Module):
    """A module that is made in a tenth of the time.

    A load makes hundreds of them, and would spend most of its time in `nn.Module.__init__` and `__setattr__`: the first
    makes a dozen collections for hooks, the second looks for the name in three registries even where a number is set.
    """

    def __init__(self) -> None:
        # Those of `_NEEDED` in one call with all else, and not one by one.
        self.__dict__.update(_PLAIN_STATE, _parameters={}, _buffers={}, _modules={}, _non_persistent_buffers_set=set())

    def __setattr__(self, name: str, value: Any) -> None:
        # By the exact class: one look into a set, where `isinstance` would try five classes in turn.
        if type(value) in _PLAIN:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


for _name in _COLLECTIONS.keys() - set(_NEEDED):
    setattr(LightModule, _name, _MadeWhenAsked(_name, _COLLECTIONS[_name]))
