"""How transformers reads the weights of its older releases: names that changed, and layers that became one parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from splice.base.asking import asked

# What is done to the weights of all experts to stack them into one parameter; a second step joins the parts of each.
_STACKED = ("MergeModulelist", 0)
_JOINED = ("Concatenate", 1)


@dataclass(frozen=True)
class Stacking:
    """A parameter that holds a layer of every expert, or several layers of each behind one another.

    Attributes:
        container: last component of the path of the module that owns it (`experts`).
        parameter: its name (`gate_up_proj`), stored (experts, out, in).
        parts: what the layers were called (`gate_proj`, `up_proj`), in their order along `out`.
    """

    container: str
    parameter: str
    parts: tuple[str, ...]


def is_pretrained(network: nn.Module) -> bool:
    """Whether `network` is a model of transformers."""
    return any(cls.__name__ == "PreTrainedModel" for cls in type(network).__mro__)


def renaming_of(network: nn.Module) -> Callable[[str], str] | None:
    """Path of a module in older weights of `network` -> its path now; None where nothing is known about it."""
    steps = [step for step in _steps(network) if not _operations(step)]
    if not steps:
        return None

    def rename(path: str) -> str:
        key = path + ".weight"
        for step in steps:
            key, _ = step.rename_source_key(key)
        return str(key).removesuffix(".weight")

    return rename


def stackings_of(network: nn.Module) -> list[Stacking]:
    """The parameters of `network` that were a layer of every expert in its older weights."""
    found = []
    for step in _steps(network):
        operations = _operations(step)
        if operations not in ([_STACKED], [_STACKED, _JOINED]) or len(step.target_patterns) != 1:
            continue
        container, _, parameter = step.target_patterns[0].rpartition(".")
        parts = tuple(source.removesuffix(".weight").rpartition(".")[2] for source in step.source_patterns)
        found.append(Stacking(container.rpartition(".")[2], parameter, parts))
    return found


def _operations(step: Any) -> list[tuple[str, int | None]]:
    """What a step does beside renaming: the operations by name, and the dimension of each."""
    return [(type(operation).__name__, vars(operation).get("dim")) for operation in asked(step, "operations", ())]


def _steps(network: Any) -> list[Any]:
    if not is_pretrained(network):
        return []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # releases before 5 have no such table
        return []
    return list(get_model_conversion_mapping(network))
