"""Opening a checkpoint in a folder or on the Hub: its config and the header of its weights. No model is involved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from splice.checkpoint.format import CONFIG_NAME
from splice.checkpoint.keys import renamed
from splice.checkpoint.source import Source
from splice.checkpoint.tensors import open_weights
from splice.config import PeftConfig, ReadConfig, read_config
from splice.errors import CheckpointError, PeftWarning, warn
from splice.kinds.reading import Checkpoint
from splice.loading.options import LoadOptions


def open_checkpoint(
    model_id: str | os.PathLike[str],
    config: PeftConfig | None,
    options: LoadOptions,
    key_mapping: Mapping[str, str] | None,
    present: PeftConfig | None = None,
) -> Checkpoint:
    """Find a checkpoint and read its config and the header of its weights.

    Args:
        model_id: the folder or the Hub id.
        config: used in place of the checkpoint's own.
        options: of the load.
        key_mapping: regular expression -> replacement for the names, behind the prefix.
        present: the config of the adapter that the weights are for, where it is on the model already.

    Raises:
        CheckpointError: it cannot be found or read.
        ValueError: `config` is no PeftConfig.
    """
    if config is not None and not isinstance(config, PeftConfig):
        raise ValueError(f"The input config must be a PeftConfig, got {type(config).__name__}")
    model_id = _own_folder(model_id, options, present)
    source = Source.from_options(model_id, options.extra.get("subfolder"), options.extra)
    # The config before the weights: on the Hub the first file settles the commit that the other one is taken from.
    read = ReadConfig(config) if config is not None else _config_in(source, present)
    weights = open_weights(Path(source.weights()))
    names = renamed(weights.entries, key_mapping) if key_mapping else {name: name for name in weights.entries}
    return Checkpoint(read.config, weights, names, read.legacy, read.notes)


def _own_folder(
    model_id: str | os.PathLike[str], options: LoadOptions, present: PeftConfig | None
) -> str | os.PathLike[str]:
    """Where the adapter of this name is in a folder that a model with several adapters was saved to."""
    # transformers' Trainer asks for the best checkpoint of the active adapter so, whatever its name. What lies in the folder
    # itself is the adapter called "default", and on the same layers it would be taken for the other.
    name = options.adapter_name
    if present is None or options.extra.get("subfolder") or name == "default" or Path(name).name != name:
        return model_id
    own = Path(model_id) / name
    if not (own / CONFIG_NAME).is_file():
        return model_id
    warn(
        f"{model_id} holds several adapters, and the one called {name!r} is in {name!r} below it: that one is loaded, and "
        "not the one in the folder itself.",
        PeftWarning,
    )
    return own


def _config_in(source: Source, present: PeftConfig | None) -> ReadConfig:
    """The config of the checkpoint; that of the adapter that is `present`, where the checkpoint has none of its kind.

    An adapter that is there keeps its own config. What the file says is read all the same: it tells what the names and
    shapes of the weights mean where they are of an earlier form.
    """
    if present is None:
        return read_config(source.config_text(), source.config_place)
    try:
        text = source.config_text()
    except CheckpointError:  # trainers write folders with the weights alone
        return ReadConfig(present)
    read = read_config(text, source.config_place)
    return read if read.config.peft_type == present.peft_type else ReadConfig(present)
