"""A trained network of transformers as shadow network, from a folder or the Hub.

Its architecture is asked for at every load, and its weights by a new adapter alone: a checkpoint holds them again.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from splice.checkpoint.download import download
from splice.checkpoint.tensors import open_weights
from splice.errors import CheckpointError

# The `model_type` of networks that were trained as shadows of others, with what brings their states to those's width.
_PROJECTED = "causal_lm_with_hidden_projection"
_FRONT, _PROJECTION = "shadow_model.", "shadow_hidden_projection.weight"


class TrainedNetwork(NamedTuple):
    """A network that was found."""

    # Its folder or Hub id.
    location: str
    # The network, with values if it was asked for these.
    module: nn.Module
    # Whether there is something that brings its states to another width.
    is_projected: bool
    # That, (out, in); None where no values were asked for.
    projection: nn.Parameter | None = None

    @classmethod
    def at(cls, location: str, with_values: bool) -> TrainedNetwork:
        """The network in a folder or on the Hub.

        Raises:
            OSError: it is not there.
            ValueError: its weights are not those of its config.
        """
        transformers = import_module("transformers")
        fields: dict[str, Any] = json.loads(_file(location, "config.json").read_text(encoding="utf-8"))
        if fields.get("model_type") != _PROJECTED:
            if with_values:
                return cls(location, transformers.AutoModel.from_pretrained(location), False)
            config = transformers.AutoConfig.from_pretrained(location)
            return cls(location, transformers.AutoModel.from_config(config), False)
        own = dict(fields["shadow_model_config"])
        config = transformers.AutoConfig.for_model(own.pop("model_type"), **own)
        module: nn.Module = transformers.AutoModel.from_config(config)
        return cls(location, module, True, _read(location, module) if with_values else None)

    def check_projection(self, width: int, own: int) -> None:
        """Raise where what the network brings does not lead from its width, `own`, to that of the base.

        Raises:
            ValueError: so it is.
        """
        if self.projection is not None and tuple(self.projection.shape) != (width, own):
            raise ValueError(
                f"`shadow_model` {self.location!r}: its {_PROJECTION!r} has the shape {tuple(self.projection.shape)}, and "
                f"({width}, {own}) leads from its states to those of the base. It was trained for another base."
            )


def _read(location: str, module: nn.Module) -> nn.Parameter:
    """Fill `module` with the weights that lie there; the result is what stands beside it."""
    weights = open_weights(_file(location, "model.safetensors"))
    if _PROJECTION not in weights.entries:
        raise ValueError(
            f"`shadow_model` {location!r}: its weights lack {_PROJECTION!r}, which its `model_type` promises."
        )
    names = [name for name in weights.entries if name.startswith(_FRONT)]
    found = dict(zip(names, weights.read(names)))
    try:
        module.load_state_dict({name.removeprefix(_FRONT): tensor for name, tensor in found.items()})
    except RuntimeError as error:
        raise ValueError(f"`shadow_model` {location!r}: its weights are not those of its config: {error}") from error
    projection: torch.Tensor = weights.read([_PROJECTION])[0]
    return nn.Parameter(projection)


def _file(location: str, name: str) -> Path:
    """A file of the network.

    Raises:
        OSError: it is not there.
    """
    why = ""
    try:
        path = Path(location) / name if Path(location).is_dir() else download(location, name, {}, None).path
    except CheckpointError as error:
        path, why = None, f" {error}"
    if path is None or not path.is_file():
        raise OSError(
            f"`shadow_model` {location!r}: there is no {name} in a folder of this name, nor on the Hub. Its architecture is "
            f"needed to load the adapter: put the network there, or name the place where it is.{why}"
        )
    return path
