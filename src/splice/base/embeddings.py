"""Layers of a base model that share the weight of its input embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from splice.base.asking import asked


@dataclass(frozen=True)
class InputEmbeddings:
    """Where the input embeddings of a network are, and which layers compute with the same parameter.

    Attributes:
        path: of the input embeddings; empty where the network has none.
        tied: paths of the layers that share their weight; empty where the network's config says they are not tied.
    """

    path: str = ""
    tied: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        return (self.path, *self.tied) if self.path else ()


def input_embeddings(network: nn.Module, modules: Mapping[str, nn.Module]) -> InputEmbeddings:
    """The input embeddings of `network`, whose modules are `modules`."""
    module = _found(network, "get_input_embeddings")
    path = next((path for path, other in modules.items() if other is module), "") if module is not None else ""
    weight = None if module is None else module._parameters.get("weight")
    if not path or weight is None or not _says_tied(network):
        return InputEmbeddings(path)
    tied = [other for other, m in modules.items() if other != path and m._parameters.get("weight") is weight]
    return InputEmbeddings(path, tuple(tied))


def output_embeddings_path(network: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    """The path of the output embeddings; empty where the network has none."""
    module = _found(network, "get_output_embeddings")
    return next((path for path, other in modules.items() if other is module), "") if module is not None else ""


def _found(network: Any, method: str) -> nn.Module | None:
    find = asked(network, method)  # models outside of transformers have none
    try:
        found = None if find is None else find()
    except NotImplementedError:  # as of models of transformers for audio and images
        return None
    return found if isinstance(found, nn.Module) else None


def _says_tied(network: nn.Module) -> bool:
    config = network.__dict__.get("config")
    fields = config if isinstance(config, dict) else vars(config) if config is not None else {}
    return bool(fields.get("tie_word_embeddings", True))
