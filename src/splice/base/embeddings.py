"""Layers of a base model that share the weight of its input embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from splice.base.foreign_models import config_field, input_embedding_layer, output_embedding_layer


class InputEmbeddings(NamedTuple):
    """Where the input embeddings of a network are, and which layers compute with the same parameter."""

    # Path of the input embeddings; empty where the network has none.
    path: str = ""
    # Paths of the layers that share their weight; empty where the network's config says that they are not tied.
    tied: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        return (self.path, *self.tied) if self.path else ()


def input_embeddings(network: nn.Module, modules: Mapping[str, nn.Module]) -> InputEmbeddings:
    """The input embeddings of `network`, whose modules are `modules`."""
    module = input_embedding_layer(network)
    path = _path_of(module, modules)
    weight = None if module is None else module._parameters.get("weight")
    if not path or weight is None or not _says_tied(network):
        return InputEmbeddings(path)
    # By the parameter itself. What the config says is what was meant; a merge may have untied them since.
    tied = [other for other, m in modules.items() if other != path and m._parameters.get("weight") is weight]
    return InputEmbeddings(path, tuple(tied))


def output_embeddings_path(network: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    """The path of the output embeddings; empty where the network has none."""
    return _path_of(output_embedding_layer(network), modules)


def _path_of(module: nn.Module | None, modules: Mapping[str, nn.Module]) -> str:
    return next((path for path, other in modules.items() if other is module), "")


def _says_tied(network: nn.Module) -> bool:
    # A model whose config does not say it has tied embeddings: that is the default of transformers.
    said = config_field(network, "tie_word_embeddings")
    return said is None or bool(said)
