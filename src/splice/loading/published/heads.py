"""Heads and biases: what the file holds of them, where the config says something else."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import nn

from splice.base.bare import own_tensors
from splice.checkpoint.keys import PREFIX, format_key, parse_key
from splice.config import PeftConfig, copy_config
from splice.loading.config_fields import field_names
from splice.loading.wanted import Wanted


class Restated(NamedTuple):
    """What the file holds of heads and biases."""

    # The config that says so; the given one where it did already.
    config: PeftConfig
    # A line for each thing that was read in another way than it is written.
    notes: list[str]
    # Whether the adapter trains biases and the file holds none of them.
    lacks_biases: bool


def with_heads_and_biases(config: PeftConfig, names: Collection[str], wanted: Wanted) -> Restated:
    """What the file holds of heads and biases, and `config` made to say so of heads.

    Args:
        config: the adapter's config.
        names: of the file's tensors, where they are in this model.
        wanted: the adapter that the file is to become.
    """
    changes: dict[str, object] = {}
    notes = []
    saved = [*(config.target_rule().modules_to_save or ())]
    heads = _heads_among(names, (*saved, *wanted.heads), wanted)
    if heads and "modules_to_save" in field_names(config):
        changes["modules_to_save"] = [*saved, *heads]
        shown = ", ".join(repr(head) for head in heads)
        notes.append(f"{shown} in the file is not in the config's modules_to_save: loaded as a trained module")
        saved += heads
    lacks_biases = config.trained_biases() != "none" and _lacks_biases(names, (*saved, *wanted.heads), wanted)
    if lacks_biases:
        # Not another `bias` in the config: whoever goes on training trains them, as in the reference.
        notes.append(
            f"bias={config.trained_biases()!r} in the config, and the file holds no bias: they are the base's own"
        )
    return Restated(copy_config(config, **changes) if changes else config, notes, lacks_biases)


def _lacks_biases(names: Collection[str], whole: tuple[str, ...], wanted: Wanted) -> bool:
    """Whether the file holds no bias of the base, outside of modules that are saved whole."""
    biases = [n for n in names if n.endswith(".bias") and parse_key(n, wanted.method.tensor_names) is None]
    paths = {name.rpartition(".")[0].removesuffix(".base_layer") for name in biases}
    # A head that is saved whole has its bias in any case; it does not tell that biases of the base were trained.
    return all(_is_inside(path.removeprefix(PREFIX), whole) for path in paths)


def _heads_among(names: Collection[str], known: tuple[str, ...], wanted: Wanted) -> list[str]:
    """Modules outside the numbered layers that the file holds whole, and that no name in `known` ends the path of."""
    heads: list[str] = []
    for name in names:
        if parse_key(name, wanted.method.tensor_names) or not name.startswith(PREFIX):
            continue
        parts = name[len(PREFIX) :].split(".")[:-1]
        # In a numbered layer it is no head of a task but a layer that the config should name.
        if any(part.isdigit() for part in parts):
            continue
        # From the top of the tree down: of modules inside one another the outermost that is whole.
        paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
        head = next((path for path in paths if _is_whole(path, names, wanted.modules)), None)
        if head is not None and head not in heads and not (known and head.endswith(known)):
            heads.append(head)
    return heads


def _is_whole(path: str, names: Collection[str], modules: Mapping[str, nn.Module]) -> bool:
    """Whether there is a module at `path` and the file holds all of its tensors."""
    if path not in modules:
        return False
    tensors = [format_key(path, name) for name, _ in own_tensors(modules[path])]
    return bool(tensors) and all(key in names for key in tensors)


def _is_inside(path: str, names: Collection[str]) -> bool:
    """Whether one of `names` stands in `path` as a component, or as several in a row."""
    dotted = f".{path}."
    return any(f".{name}." in dotted for name in names)
