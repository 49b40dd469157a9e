"""Small functions that programs import from the reference's `utils`, under the names that they have there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import nn

from splice.base.backends.marks import quantisation
from splice.base.bare import original_class, walk_bare
from splice.base.decoder_input import shift_tokens_right as shift_tokens_right
from splice.base.embeddings import input_embeddings
from splice.base.offload import at_hand
from splice.base.weight_access import check_readable, dense_weight, is_plain
from splice.base.zero3 import gathered
from splice.checkpoint.types import PeftType
from splice.config import PeftConfig
from splice.errors import UnsupportedFeatureError
from splice.kinds.host import host_of
from splice.kinds.matching import TargetMatcher, value_for
from splice.kinds.registry import all_methods
from splice.surgery.adapted_layer import Adapted
from splice.surgery.isinstance_classes import AuxiliaryTrainingWrapper
from splice.surgery.merging import left_to_merge
from splice.surgery.replication import replicate
from splice.surgery.tuner import Tuner, tuner_of


class SetsAdapter(Protocol):
    """A layer that can be told which adapters are active on it."""

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these active."""
        ...


# -- modules and their names


def get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """The parent of the module at the dotted path `key`, the module, and its name in the parent.

    Raises:
        AttributeError: there is no such module.
    """
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """The path of `reference_module` in `model`; empty where it is not there."""
    return next((path for path, module in model.named_modules() if module is reference_module), "")


def get_input_embeddings_name(model: nn.Module, default: str | None = None) -> str | None:
    """The path of the module that embeds tokens; `default` where nobody can tell."""
    path = input_embeddings(model, walk_bare(model)).path
    return path if path else default


def has_valid_embedding_base_layer(layer: nn.Module) -> bool:
    """Whether `layer` is an embedding or a linear layer with an adapter on it."""
    return isinstance(layer, Adapted) and issubclass(original_class(layer), (nn.Linear, nn.Embedding))


def get_embedding_layer_name(model: nn.Module, layer: nn.Module, is_embedding_in_target_modules: bool) -> str | None:
    """The path of `layer` in `model`, below which its weight stands.

    Args:
        model: with adapters.
        layer: one that embeds tokens, or gives their scores.
        is_embedding_in_target_modules: whether it is looked for among adapted layers alone.
    """
    if is_embedding_in_target_modules and not has_valid_embedding_base_layer(layer):
        return None
    return find_parameter_name_by_module(model, layer) or None


def replicate_layers(model: nn.Module, layer_map: Sequence[tuple[int, int]]) -> None:
    """Rebuild the model's list of layers from these ranges [start, end) of it; copies share the parameters.

    Raises:
        ValueError: there is no such list, or a range goes beyond its end.
    """
    replicate(model, layer_map)


# -- which modules a config selects


def check_target_module_exists(config: PeftConfig, key: str) -> bool:
    """Whether `config` selects the module at the path `key`: it is a target, and not left out."""
    return TargetMatcher(config.target_rule())(key)


def inspect_matched_modules(tuner: Tuner, adapter_name: str = "default") -> dict[str, list[str]]:
    """The paths of the network's own modules: those that the adapter's config selects ("matched"), and the others."""
    selects = TargetMatcher(tuner.peft_config[adapter_name].target_rule())
    found: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for path in walk_bare(tuner.model):
        found["matched" if selects(path) else "unmatched"].append(path)
    return found


def is_valid_match(key: str, target_key: str) -> bool:
    """Whether the path `key` is `target_key`, or ends with it from a dot on."""
    return key == target_key or key.endswith(f".{target_key}")


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    """The match of a regular expression with the whole of a path."""
    return re.fullmatch(target_pattern, key)


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    """The first of the patterns that matches the end of a path from a dot on; the path itself where none does."""
    return value_for({key: key for key in pattern_keys}, key_to_match, key_to_match)


# -- tensors


def transpose(weight: torch.Tensor, fan_in_fan_out: bool) -> torch.Tensor:
    """The transposed weight if `fan_in_fan_out`; a parameter stays one."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def infer_device() -> str:
    """The kind of accelerator that torch finds on this machine ("cuda", "mps", "xpu"...); "cpu" without one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def id_tensor_storage(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    """What is the same for tensors of one memory alone: device, address and number of bytes."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def get_batch_size(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> int:
    """The number of rows of a call's input.

    Raises:
        ValueError: there is neither.
    """
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        raise ValueError("You have to provide either input_ids or inputs_embeds")
    return given.shape[0]


def dequantize_module_weight(module: nn.Module) -> nn.Parameter:
    """The weight of `module`, as it stores it but in floats.

    Raises:
        UnsupportedFeatureError: it is stored in a form that is not known here.
    """
    check_readable(module, original_class(module).__name__, "reading it")
    own = module._parameters.get("weight")
    return own if own is not None and is_plain(module) else nn.Parameter(dense_weight(module), requires_grad=False)


# -- models


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters that are trained to float32 and all others to `dtype`, for training in mixed precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    """Let the tensors of this adapter be trained no more."""
    tuner_of(model)[0].set_requires_grad(adapter_name, False)


def set_auxiliary_adapter(model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False) -> None:
    """Make these adapters active on modules that are kept whole or of which rows are trained, and on no other layers."""
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            cast(SetsAdapter, module).set_adapter(adapter_name, inference_mode)


def get_quantization_config(model: nn.Module, method: str) -> object | None:
    """The quantisation settings in the model's config, where its weights are quantised by this method."""
    by, settings = quantisation(model)
    return settings if by == method else None


@contextmanager
def gather_params_ctx(
    param: nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None = 0, fwd_module: nn.Module | None = None
) -> Iterator[None]:
    """Inside, parameters that DeepSpeed's ZeRO-3 has divided are whole.

    Args:
        param: one of them, or several.
        modifier_rank: the process whose changes reach the others; None for reading alone.
        fwd_module: accepted for compatibility.
    """
    with gathered([param] if isinstance(param, nn.Parameter) else param, modifier_rank):
        yield


@contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """Inside, the weights of a layer that accelerate offloads are where it computes, to be read; changes are lost."""
    with at_hand(layer.modules()):
        yield


def check_adapters_to_merge(module: nn.Module, adapter_names: list[str] | None = None) -> list[str]:
    """Those of the adapters (the active ones, if none are named) that are not in the layer's weights yet.

    Raises:
        TypeError: `adapter_names` is a string, or the layer carries no adapters.
    """
    host = host_of(module)
    if host is None:
        raise TypeError(f"a {type(module).__name__} without adapters has none to merge")
    return left_to_merge(host, adapter_names)


# -- the rest


def str_to_bool(value: str) -> int:
    """1 for a word that says yes, 0 for one that says no.

    Raises:
        ValueError: it says neither.
    """
    word = value.lower()
    if word in ("y", "yes", "t", "true", "on", "1"):
        return 1
    if word in ("n", "no", "f", "false", "off", "0"):
        return 0
    raise ValueError(f"invalid truth value {value!r}")


def register_peft_method(
    *, name: str, config_cls: type, model_cls: type, prefix: str | None = None, is_mixed_compatible: bool = False
) -> None:
    """Refuse a method that is written for the reference: its layers wrap others, where here layers keep their class.

    Raises:
        ValueError: no method can have the name.
        KeyError: there is a method of this name.
        UnsupportedFeatureError: in any other case; the message says how a method is added.
    """
    if name.endswith("_"):
        raise ValueError(f"Please pass the name of the PEFT method without '_' suffix, got {name}.")
    if name != name.lower():
        raise ValueError(f"The name of the PEFT method should be in lower case letters, got {name}.")
    if name.upper() not in list(PeftType):
        raise ValueError(
            f"Unknown PEFT type {name.upper()}; known are {', '.join(member.value for member in PeftType)}."
        )
    if name.upper() in all_methods():
        raise KeyError(f"There is already PEFT method called {name!r}, please choose a unique name.")
    raise UnsupportedFeatureError(
        f"{model_cls.__name__} cannot be registered as {name!r}: it replaces layers by wrappers, and splice leaves layers in "
        "place. A method is one file with a config, an adapter layer and a record; see CONTRIBUTING.md."
    )
