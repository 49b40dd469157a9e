"""Several cartridges as one, by their files: their tokens one behind the other (arXiv 2506.06266, section 5.3)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from splice.checkpoint.format import METADATA_KEY
from splice.checkpoint.source import Source
from splice.checkpoint.tensors import open_weights
from splice.checkpoint.writing import write_checkpoint
from splice.config import copy_config, parse_config
from splice.discovery import public
from splice.errors import CheckpointError
from splice.methods.prompts.cartridge.cartridge import CartridgeConfig
from splice.methods.prompts.names import PROMPT_KEY

# What has to be the same, or the tables have other columns.
_ALIKE = ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


class _Part(NamedTuple):
    """One of the cartridges."""

    # Where it is, for messages.
    place: str
    # Its config.
    config: CartridgeConfig
    # Its table, (tokens, layers * 2 * heads * size of a head).
    table: torch.Tensor
    # What its checkpoint holds beside that: modules that were saved whole.
    others: dict[str, torch.Tensor]
    # The fingerprint of the base that it was saved with; empty for none.
    base: str


@public
def compose_cartridge_adapters(
    adapter_paths: Sequence[str | os.PathLike[str]],
    *,
    output_path: str | os.PathLike[str],
    safe_serialization: bool = True,
) -> None:
    """Write a cartridge whose tokens are those of several, in their order. No model is needed.

    Each keeps the positions it was trained at, so that all of them start at 0; the text that follows starts behind the sum.

    Args:
        adapter_paths: at least two folders, or ids on the Hub.
        output_path: the folder to write, which may be one of them.
        safe_serialization: whether to write safetensors, and not a pickle.

    Raises:
        ValueError: there are fewer than two, one is of another method, or they do not go together; nothing is written.
    """
    parts = [_opened(path) for path in adapter_paths]
    if len(parts) < 2:
        raise ValueError(f"Need at least 2 adapters to compose, got {len(parts)}.")
    first = parts[0]
    for part in parts[1:]:
        _check_alike(first, part)
    table = torch.cat([part.table for part in parts])
    # The frozen tokens are the first ones of all.
    config = copy_config(first.config, num_virtual_tokens=len(table))
    base = first.base if all(part.base == first.base for part in parts) else ""
    tensors = {PROMPT_KEY: table, **first.others}
    write_checkpoint(Path(output_path), tensors, config.to_json(config.auto_mapping), safe_serialization, base)


def _opened(path: str | os.PathLike[str]) -> _Part:
    """The cartridge at `path`, with its tensors.

    Raises:
        ValueError: it cannot be read, or is of another method.
    """
    source = Source.from_options(path, None, {})
    config = parse_config(source.config_text(), source.config_place)
    if not isinstance(config, CartridgeConfig):
        raise ValueError(f"Adapter at '{path}' is not a CARTRIDGE adapter (got {config.peft_type}).")
    weights = open_weights(Path(source.weights()))
    names = list(weights.entries)
    if PROMPT_KEY not in names:
        raise CheckpointError(
            f"{weights.place} has no {PROMPT_KEY!r}, which is what is put together; it has {names[:5]}"
        )
    tensors = dict(zip(names, weights.read(names)))
    table = tensors.pop(PROMPT_KEY)
    if len(table) != config.num_virtual_tokens:
        raise ValueError(
            f"{weights.place}: {PROMPT_KEY} has {len(table)} rows, and the config says num_virtual_tokens="
            f"{config.num_virtual_tokens}: one of the two is another adapter's"
        )
    return _Part(os.fspath(path), config, table, tensors, weights.metadata.get(METADATA_KEY, ""))


def _check_alike(first: _Part, part: _Part) -> None:
    """Raise ValueError where the two cannot be one cartridge."""
    one, other = first.config.to_dict(), part.config.to_dict()
    for name in _ALIKE:
        if one[name] != other[name]:
            raise ValueError(
                f"Incompatible CARTRIDGE configs for attribute '{name}': {first.place} has {one[name]!r}, {part.place} has "
                f"{other[name]!r}."
            )
    if part.table.shape[1:] != first.table.shape[1:]:
        raise ValueError(
            f"Incompatible cartridges: a token of {first.place} has {tuple(first.table.shape[1:])} numbers, one of "
            f"{part.place} {tuple(part.table.shape[1:])}."
        )
    mine, theirs = first.others, part.others
    differing = [
        n for n in sorted({*mine, *theirs}) if n not in mine or n not in theirs or not torch.equal(mine[n], theirs[n])
    ]
    if differing:
        raise ValueError(
            f"{first.place} and {part.place} differ in {differing[0]}: a module that is saved whole cannot be put together "
            "from several. Leave it out of `modules_to_save`, or compose cartridges that have the same."
        )
