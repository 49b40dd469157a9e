"""A checkpoint that is in memory: tensors that came over a network or from a trainer, and a config."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from splice.checkpoint.keys import renamed
from splice.checkpoint.tensors import TensorsInMemory
from splice.config import PeftConfig
from splice.errors import CheckpointError
from splice.kinds.reading import Checkpoint
from splice.loading.opening import open_checkpoint
from splice.loading.options import LoadOptions


def checkpoint_from(
    model_id: str | os.PathLike[str] | None,
    tensors: Mapping[str, torch.Tensor] | None,
    config: PeftConfig | None,
    options: LoadOptions,
    key_mapping: Mapping[str, str] | None,
    present: PeftConfig | None = None,
) -> Checkpoint:
    """The checkpoint at `model_id`, or the one that `tensors` and their config are.

    Args:
        model_id: a folder or a Hub id; None with `tensors`.
        tensors: the adapter's tensors by their names in a checkpoint; None with `model_id`.
        config: the caller's, in place of the checkpoint's own.
        options: of the load.
        key_mapping: regular expression -> replacement for the names, behind the prefix.
        present: the config of the adapter that the weights are for, where it is on the model already.

    Raises:
        ValueError: not exactly one of the two is given, or tensors without a config.
        CheckpointError: (a ValueError) it cannot be found or read, or the tensors have no values to copy.
    """
    if tensors is None:
        if model_id is None:
            raise ValueError("nothing to load: pass `model_id` (a folder or a Hub id), or `tensors` and `config`")
        return open_checkpoint(model_id, config, options, key_mapping, present)
    if model_id is not None:
        raise ValueError(f"pass either `model_id` (given: {os.fspath(model_id)!r}) or `tensors`, not both")
    config = present or config
    if not isinstance(config, PeftConfig):
        raise ValueError(
            f"`tensors` need their config as a PeftConfig, got {type(config).__name__}: they do not tell the method or the "
            "scale. From the fields of an adapter_config.json: `config=get_peft_config(fields)`."
        )
    _check(tensors)
    given = TensorsInMemory(tensors, "`tensors`")
    names = renamed(given.entries, key_mapping) if key_mapping else {name: name for name in given.entries}
    return Checkpoint(config, given, names)


def _check(tensors: object) -> None:
    """Raise unless all are tensors whose values can be copied as they are."""
    if not isinstance(tensors, Mapping):
        raise CheckpointError(f"`tensors` must be a dict from names to tensors, got {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"`tensors` must be a dict from names to tensors; it has {name!r}: {type(tensor).__name__}"
            )
        if tensor.device.type == "meta":
            raise CheckpointError(f"tensor {name!r} of `tensors` is on the meta device: it has no values")
        # A sharded tensor's shape is that of the whole, and its memory holds a part of it.
        if type(tensor).__name__ == "DTensor":
            raise CheckpointError(
                f"tensor {name!r} of `tensors` is a DTensor: gather it first (`tensor.full_tensor()`)"
            )
        if tensor.layout is not torch.strided:
            raise CheckpointError(f"tensor {name!r} of `tensors` is {tensor.layout}: make it dense (`to_dense()`)")
