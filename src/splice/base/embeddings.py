"""Layers of a base model that share the weight of its input embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from splice.base.foreign_models import config_field, input_embedding_layer, output_embedding_layer, set_config_field

# Where T5 and its kin have their hidden size.
_WIDTH = "model_dim"


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


def scales_while_tied(network: nn.Module) -> bool:
    """Whether its own code multiplies what goes into the head only as long as its config says that embeddings are tied.

    T5 and its kin do, before transformers 5, which has a field for it.
    """
    # By the names in the code: it depends on the release, and many architectures are copies of T5's.
    forwards = (vars(each).get("forward") for each in type(network).__mro__)
    codes = [getattr(inspect.unwrap(forward), "__code__", None) for forward in forwards if callable(forward)]
    return any(code is not None and {"tie_word_embeddings", _WIDTH} <= {*code.co_names} for code in codes)


def untie_head(network: nn.Module) -> None:
    """Have the config say that embeddings are not tied, and give the head what was multiplied with because it did.

    For a network whose head has a weight of its own.
    """
    head = output_embedding_layer(network)
    if head is not None and scales_while_tied(network):
        weight, width = head._parameters["weight"], getattr(network, _WIDTH)
        if weight is not None:
            # A new one: others may hold what was the head's, as the embeddings of an encoder do.
            head.weight = nn.Parameter(weight.detach() * width**-0.5, requires_grad=weight.requires_grad)
    set_config_field(network, "tie_word_embeddings", False)


def _path_of(module: nn.Module | None, modules: Mapping[str, nn.Module]) -> str:
    return next((path for path, other in modules.items() if other is module), "")


def _says_tied(network: nn.Module) -> bool:
    # A model whose config does not say it has tied embeddings: that is the default of transformers.
    said = config_field(network, "tie_word_embeddings")
    return said is None or bool(said)
