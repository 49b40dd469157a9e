"""Adapter weights as dicts: reading a checkpoint into one, and putting one into an adapter that is there."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from splice.base.foreign_models import uncompiled
from splice.checkpoint.keys import PREFIX, renamed
from splice.checkpoint.source import Source
from splice.checkpoint.tensors import TensorsInMemory, open_weights
from splice.kinds.reading import Checkpoint
from splice.loading.load import LoadResult, load_into
from splice.loading.options import LoadOptions
from splice.surgery.tuner import tuner_of
from splice.surgery.undo import Undo


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub_kwargs: Any,
) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, each in memory of its own.

    Args:
        model_id: folder of a checkpoint, or its id on the Hub.
        device: where to put them; the CPU by default.
        key_mapping: regular expression -> replacement for their names, behind the prefix.
        **hub_kwargs: `subfolder`, and options of `huggingface_hub.hf_hub_download`.

    Raises:
        CheckpointError: (a ValueError) the weights cannot be found or read.
    """
    source = Source.from_options(model_id, hub_kwargs.get("subfolder"), hub_kwargs)
    weights = open_weights(Path(source.weights()))
    names = renamed(weights.entries, key_mapping) if key_mapping else {name: name for name in weights.entries}
    tensors = weights.read(list(names.values()))
    return {name: tensor.to(device or "cpu") for name, tensor in zip(names, tensors)}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, torch.Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Put tensors, under the names of a checkpoint, into an adapter that is there. The dict is not changed.

    Args:
        model: a PeftModel, or a network that carries adapters; for the latter names may lack the prefix.
        peft_model_state_dict: the tensors.
        adapter_name: which adapter.
        ignore_mismatched_sizes: leave out tensors of another shape, with a warning.
        low_cpu_mem_usage: accepted for compatibility.

    Returns:
        `missing_keys` and `unexpected_keys`, as `load_state_dict` of torch does.

    Raises:
        KeyError: there is no such adapter.
        AdapterMismatchError: (a RuntimeError) a tensor has another shape.
    """
    tuner, prefix = tuner_of(uncompiled(model))
    if adapter_name not in tuner.placed:
        raise KeyError(f"no adapter {adapter_name!r}; there are {list(tuner.placed)}")
    given = TensorsInMemory(peft_model_state_dict, "the given state dict")
    # Below a network alone names begin with its own modules; the grammar has them behind its prefix.
    names = {name if prefix or name.startswith(PREFIX) else PREFIX + name: name for name in peft_model_state_dict}
    # Never strict, as in the reference: trainers put parts of a state dict back.
    asked = {"ignore_mismatched_sizes": ignore_mismatched_sizes}
    options = LoadOptions(adapter_name, False, True, False, None, False, asked, time.perf_counter())
    checkpoint = Checkpoint(tuner.peft_config[adapter_name], given, names)
    undo = Undo(tuner)
    try:
        return load_into(tuner, checkpoint, options, undo).result
    except BaseException:
        undo.run()
        raise
