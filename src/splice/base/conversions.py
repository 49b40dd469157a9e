"""How transformers reads the weights of its older releases: names that changed, and layers that became one parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, cast

from torch import nn

from splice.base.foreign_models import backbone_path, is_pretrained

# What is done to the weights of all experts to stack them into one parameter; a second step joins the parts of each.
# By class name and dimension, so that releases of transformers without these classes need no case of their own.
_STACKED = ("MergeModulelist", 0)
_JOINED = ("Concatenate", 1)


class _Operation(Protocol):
    """Something that transformers does to the values of weights, beside giving them another name."""

    dim: int


class _Step(Protocol):
    """One line of the table of transformers 5: weights under the names on the left come under those on the right."""

    source_patterns: list[str]
    target_patterns: list[str]

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]: ...


class _Converter(Protocol):
    """A step that does more than to rename."""

    operations: list[_Operation]


class Stacking(NamedTuple):
    """A parameter that holds a layer of every expert, or several layers of each behind one another.

    Attributes:
        container: last component of the path of the module that owns it (`experts`).
        parameter: its name (`gate_up_proj`), stored (experts, out, in).
        parts: what the layers were called (`gate_proj`, `up_proj`), in their order along `out`.
    """

    container: str
    parameter: str
    parts: tuple[str, ...]


def renaming_of(network: nn.Module) -> Callable[[str], str] | None:
    """Path of a module in older weights of `network` -> its path now; None where nothing is known about it."""
    return renaming_by(_steps(network))


def renaming_by(steps: Iterable[_Step]) -> Callable[[str], str] | None:
    """Path of a module in older weights -> its path now, by these steps; None where none of them renames."""
    steps = [step for step in steps if not _operations(step)]
    if not steps:
        return None

    def rename(path: str) -> str:
        key = path + ".weight"
        for step in steps:
            key, _ = step.rename_source_key(key)
        return key.removesuffix(".weight")

    return rename


def key_renaming_of(network: nn.Module) -> Callable[[str], str | None]:
    """Name of a tensor in the files of `network` -> its name in the network; None of one that is joined with others."""
    steps = _steps(network)
    names = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    names.update(name for name, _ in network.named_buffers(remove_duplicate=False))
    front = f"{backbone_path(network)}." if backbone_path(network) else ""

    def rename(key: str) -> str | None:
        for step in steps:
            key, matched = step.rename_source_key(key)
            if matched is not None and _operations(step):
                return None
        # The files of a network with a head, read into one without, and the other way round.
        if front and key not in names:
            key = key.removeprefix(front) if key.startswith(front) else front + key
        return key

    return rename


def stackings_of(network: nn.Module) -> list[Stacking]:
    """The parameters of `network` that were a layer of every expert in its older weights."""
    return stackings_in(_steps(network))


def stackings_in(steps: Iterable[_Step]) -> list[Stacking]:
    """The parameters that these steps make of a layer of every expert."""
    found = []
    for step in steps:
        operations = _operations(step)
        if operations not in ([_STACKED], [_STACKED, _JOINED]) or len(step.target_patterns) != 1:
            continue
        container, _, parameter = step.target_patterns[0].rpartition(".")
        parts = tuple(source.removesuffix(".weight").rpartition(".")[2] for source in step.source_patterns)
        found.append(Stacking(container.rpartition(".")[2], parameter, parts))
    return found


def _operations(step: _Step) -> list[tuple[str, int | None]]:
    """What a step does beside renaming: the operations by name, and the dimension of those that stack or join."""
    if all(cls.__name__ != "WeightConverter" for cls in type(step).__mro__):
        return []
    named = [(type(operation).__name__, operation) for operation in cast(_Converter, step).operations]
    return [(name, operation.dim if name in (_STACKED[0], _JOINED[0]) else None) for name, operation in named]


def _steps(network: nn.Module) -> list[_Step]:
    if not is_pretrained(network):
        return []
    # Its import costs nothing more: whoever has a model of transformers has imported transformers.
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # releases before 5 have no such table
        return []
    mapping = cast("Callable[[nn.Module], list[_Step]]", get_model_conversion_mapping)
    return list(mapping(network))
