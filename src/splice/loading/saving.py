"""Saving: the tensors of an adapter under the names of the grammar, on disk without a moment in which nothing is there."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import nn

from splice.base.bare import original_class, own_tensors, walk_bare
from splice.base.embeddings import input_embeddings, output_embeddings_path
from splice.base.foreign_models import COMPILED, config_field, is_pretrained, model_tags, name_or_path, uncompiled
from splice.base.sharding import divide_again, is_divided, is_sharded, whole
from splice.checkpoint.card import CardFacts, write_card
from splice.checkpoint.keys import PREFIX, format_key
from splice.checkpoint.source import Source
from splice.checkpoint.tensors import open_weights
from splice.checkpoint.types import TaskType
from splice.checkpoint.writing import write_checkpoint
from splice.config import PeftConfig, copy_config
from splice.errors import PeftWarning, counted, warn
from splice.kinds.layer import AdapterLayer
from splice.kinds.registry import method_of
from splice.kinds.shared import SHARED_PATH, SharedTensors
from splice.kinds.token_rows import TokenRows
from splice.loading.fingerprint import fingerprint_of
from splice.loading.tying import EMBEDDING_NAMES
from splice.surgery.tuner import Tuner, tuner_of


def save(
    tuner: Tuner,
    save_directory: str | os.PathLike[str],
    safe_serialization: bool,
    selected_adapters: list[str] | None,
    save_embedding_layers: str | bool,
    is_main_process: bool,
    state_dict: Mapping[str, torch.Tensor] | None,
    initial: str | os.PathLike[str] | None = None,
) -> None:
    """Write the selected adapters; arguments as `PeftModel.save_pretrained`."""
    folder = Path(save_directory)
    if folder.is_file():
        raise ValueError(f"Provided path ({folder}) should be a directory, not a file")
    names = list(tuner.peft_config) if selected_adapters is None else list(selected_adapters)
    unknown = sorted(set(names) - set(tuner.peft_config))
    if unknown:
        raise ValueError(
            f"Adapters {unknown} cannot be saved: the model has {list(tuner.peft_config)}, given were {names}"
        )
    for name in names:
        _check_place(name)
    if state_dict is not None and not state_dict and not is_main_process:
        return  # all was gathered on the main process, which alone has it
    divide_again(tuner)
    for name in names:
        # Gathered by all processes, in one order: those that do not write take part.
        found = tensors_to_save(tuner, name, state_dict, save_embedding_layers)
        tensors = {key: whole(tensor) for key, tensor in found.items()}
        if state_dict is None:
            _warn_of_shards(tensors, _without_elements(tuner, name))
        config = tuner.peft_config[name]
        if initial is not None:
            config, tensors = _for_unchanged_base(config, tensors, initial)
        if is_main_process:
            place = folder if name == "default" else folder / name
            base = fingerprint_of(tuner, name).text() if safe_serialization else ""
            write_checkpoint(place, tensors, config_text(config, tuner.model), safe_serialization, base)
    if is_main_process and names:
        folder.mkdir(parents=True, exist_ok=True)
        write_card(folder, facts_of(tuner))


def _for_unchanged_base(
    config: PeftConfig, tensors: Mapping[str, torch.Tensor], initial: str | os.PathLike[str]
) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """The adapter as one for the base before its initialisation took something out of it.

    Raises:
        ValueError: no initialisation of its method changes the base, or `initial` is another adapter.
    """
    method = method_of(config)
    if method.for_unchanged_base is None:
        raise ValueError(
            "`path_initial_model_for_weight_conversion` is for methods with initialisations that change the base; this is "
            f"{method.name.value}, which has none."
        )
    source = Source.from_options(initial, None, {})
    weights = open_weights(source.weights())
    before = dict(zip(weights.entries, weights.read(list(weights.entries))))
    return method.for_unchanged_base(config, tensors, before, str(initial))


def facts_of(tuner: Tuner) -> CardFacts:
    """What the model card says of a model."""
    network, configs = tuner.model, list(tuner.peft_config.values())
    tags = {tag for config in configs for tag in method_of(config).tags}
    tags |= set(model_tags(network))
    if is_pretrained(network):
        tags.add("transformers")
    said = config_field(network, "_name_or_path")
    named = [said if isinstance(said, str) else None, name_or_path(network)]
    named += [config.base_model_name_or_path for config in configs]
    causal = bool(configs) and configs[0].task_type == TaskType.CAUSAL_LM
    return CardFacts(tuple(filter(None, named)), tuple(tags), "text-generation" if causal else None)


def _check_place(name: str) -> None:
    """Raises ValueError for an adapter whose name, as that of a folder, leads elsewhere."""
    place = Path(name)
    if place.is_absolute() or ".." in place.parts or not place.parts:
        raise ValueError(
            f"the adapter {name!r} would be saved outside of its folder: its name is that of a subfolder. Load it under "
            "another name to save it."
        )


def config_text(config: PeftConfig, network: nn.Module) -> str:
    """The text of `adapter_config.json` for an adapter of `network`."""
    name = config.base_model_name_or_path
    if name is None:
        name = name_or_path(network)
    mapping, cls = None, original_class(network)
    if config.task_type is None:
        mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    return copy_config(config, base_model_name_or_path=name).to_json(mapping)


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, torch.Tensor]:
    """The tensors of one adapter under the names that stand in a checkpoint.

    They are the live tensors, or copies of those in slots (`PeftModel.slots`): whoever keeps them would keep all the slots.

    Args:
        model: a PeftModel, or a network that carries adapters (then names have no `base_model.model.`).
        state_dict: a state dict of `model` to take the tensors from, with its own or the reference's names. Of a part of one
            the result is a part too.
        adapter_name: which adapter.
        unwrap_compiled: accepted for compatibility: of a compiled model what was compiled is looked at in any case.
        save_embedding_layers: "auto" adds the base's embeddings where they are targets or were resized; True always does,
            False never.

    Raises:
        KeyError: there is no such adapter.
    """
    if state_dict is not None:
        state_dict = {name.replace(COMPILED, ""): tensor for name, tensor in state_dict.items()}
    tuner, prefix = tuner_of(uncompiled(model))
    divide_again(tuner)
    if not prefix and any(map(is_divided, model.parameters())) and not is_sharded(model):
        # transformers asks so in the process that writes alone, while the others gather every tensor of the network in its
        # order: they would wait for this one, or be sent a tensor that they have not asked for.
        state_dict = {name: whole(tensor) for name, tensor in (state_dict or tuner.model.state_dict()).items()}
    tensors = tensors_to_save(tuner, adapter_name, state_dict, save_embedding_layers, partly=True)
    if prefix:
        return tensors
    # A layer that is tied to another one shares its tensors, transposed: savers of other libraries cannot write such views.
    return {key.removeprefix(PREFIX): tensor.contiguous() for key, tensor in tensors.items()}


def tensors_to_save(
    tuner: Tuner,
    adapter_name: str,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    save_embedding_layers: str | bool = "auto",
    partly: bool = False,
) -> dict[str, torch.Tensor]:
    """The tensors of one adapter by their keys; arguments as in `get_peft_model_state_dict`.

    Raises:
        KeyError: there is no such adapter, or (unless `partly`) `state_dict` lacks one of its tensors.
    """
    if adapter_name not in tuner.placed:
        raise KeyError(f"no adapter {adapter_name!r}; there are {list(tuner.placed)}")
    result = {}
    for path, layer in tuner.placed[adapter_name].items():
        stack = tuner.adapted[path].splice_host.stack if path in tuner.adapted else None  # not of what all layers share
        held = dict(layer.named_slots())
        if state_dict is not None:
            held = _given(state_dict, layer, path, adapter_name, partly)
        for suffix, tensor in layer.file_form.to_file(layer, held):
            key = layer.names.key(path, suffix)
            # Savers of other libraries know nothing of parts.
            value = whole(tensor) if layer.divides else tensor
            result[key] = value.detach().clone() if stack is not None and stack.owns(value) else value
        for shared in layer.shared:
            for suffix in shared.written_on_layers if isinstance(shared, SharedTensors) else ():
                once = shared.names.key(SHARED_PATH, suffix)  # before the layers, since it stands before them
                if once in result:
                    result[layer.names.key(path, suffix)] = result[once]
    if save_embedding_layers == "auto":
        embeddings = _targeted_embeddings(tuner, adapter_name)
        if not embeddings and _is_resized(tuner, adapter_name):
            warn("Setting `save_embedding_layers` to `True` as the vocabulary was resized.")
            embeddings = _all_embeddings(tuner, adapter_name)
    else:
        embeddings = _all_embeddings(tuner, adapter_name) if save_embedding_layers else {}
    for key, tensor in embeddings.items():
        plain = key.replace(".base_layer.", ".")
        found = None if state_dict is None else _first(state_dict, (key, plain))
        if found is not None:
            result[key] = found
        elif state_dict is None or not is_divided(tensor):
            result[key] = tensor
        elif not partly:  # to gather it here would be to wait for processes that were given nothing to save
            raise KeyError(f"the given state_dict has none of {(key, plain)}, so {key} cannot be saved")
    return result


def _given(
    state_dict: Mapping[str, torch.Tensor], layer: AdapterLayer, path: str, adapter_name: str, partly: bool
) -> dict[str, torch.Tensor]:
    """The tensors of a layer, by suffix, out of a state dict of the model."""
    names, found = layer.names, {}
    stored = dict(layer.named_slots())
    for suffix in (*stored, *layer.file_form.works_with):
        spelled = tuple(name(path, suffix, adapter_name) for name in (names.in_tree, names.in_reference))
        tensor = _first(state_dict, spelled)
        if tensor is not None:
            found[suffix] = tensor
        elif layer.registered[suffix].slot.hidden:
            found[suffix] = stored[suffix]  # no state dict of a model holds it, and nobody trains it
        elif not partly and suffix in stored:
            key = names.key(path, suffix)
            raise KeyError(f"the given state_dict has none of {spelled}, so {key} cannot be saved")
    # A part that has nothing of the layer has not that either.
    return found if any(not layer.registered[suffix].slot.hidden for suffix in found) else {}


def _all_embeddings(tuner: Tuner, adapter_name: str) -> dict[str, torch.Tensor]:
    """The base's input and output embeddings; of those that the adapter is on, their weight alone."""
    modules = walk_bare(tuner.model)
    paths = (input_embeddings(tuner.model, modules).path, output_embeddings_path(tuner.model, modules))
    if not paths[0]:
        warn("Could not identify the embedding layers of the base model; none are saved.")
    found, adapted = {}, set[str]()
    for path in filter(None, paths):
        layer = tuner.placed[adapter_name].get(path)
        if layer is None:
            found.update({format_key(path, name): tensor.detach() for name, tensor in own_tensors(modules[path])})
        elif layer.names.base == "base_layer.":
            adapted.add(path)
            weight = modules[path]._parameters.get("weight")
            found.update({} if weight is None else {format_key(path, "base_layer.weight"): weight.detach()})
    if not adapted:
        return found
    return {key: tensor for key, tensor in found.items() if key.endswith(".base_layer.weight")}


def _is_resized(tuner: Tuner, adapter_name: str) -> bool:
    """Whether the base has another number of tokens than its own files say; they are looked for on this machine alone."""
    from huggingface_hub import try_to_load_from_cache

    name = tuner.peft_config[adapter_name].base_model_name_or_path or name_or_path(tuner.model)
    now = config_field(tuner.model, "vocab_size")
    if not name or now is None:
        return False
    local = Path(name) / "config.json"
    try:
        cached = str(local) if local.is_file() else try_to_load_from_cache(name, "config.json")
        then = (
            json.loads(Path(cached).read_text(encoding="utf-8")).get("vocab_size") if isinstance(cached, str) else None
        )
    except (OSError, ValueError):  # no files of it here, or no name of a repository
        return False
    return then is not None and then != now


def _targeted_embeddings(tuner: Tuner, adapter_name: str) -> dict[str, torch.Tensor]:
    """The base's own embeddings, where the adapter's targets name them: the reference writes them beside the adapter."""
    if any(isinstance(layer, TokenRows) for layer in tuner.placed[adapter_name].values()):
        return {}  # what such an adapter changes of them is in its own tensors
    targets = tuner.peft_config[adapter_name].target_rule().target_modules
    named = [] if isinstance(targets, str) else [name for name in EMBEDDING_NAMES if name in (targets or ())]
    found = {}
    for path, layer in tuner.placed[adapter_name].items():
        adapted = tuner.adapted.get(path)  # none for what all layers share
        weight = None if adapted is None else cast(nn.Module, adapted)._parameters.get("weight")
        if path.rpartition(".")[2] in named and layer.names.base == "base_layer." and weight is not None:
            found[format_key(path, "base_layer.weight")] = weight.detach()
    if found:
        warn(f"Setting `save_embedding_layers` to `True` as embedding layers are targets: {sorted(found)}")
    return found


def _first(state_dict: Mapping[str, torch.Tensor], names: tuple[str, ...]) -> torch.Tensor | None:
    for name in names:
        if name in state_dict:
            return state_dict[name]
    for name in names:  # of a network without its PeftModel
        if name.removeprefix(PREFIX) in state_dict:
            return state_dict[name.removeprefix(PREFIX)]
    return None


def _without_elements(tuner: Tuner, name: str) -> set[str]:
    """The keys of tensors that were planned without elements: a method trains nothing there."""
    slots = (
        (path, layer, s, item.slot)
        for path, layer in tuner.placed[name].items()
        for s, item in layer.registered.items()
    )
    return {layer.names.key(path, suffix) for path, layer, suffix, slot in slots if 0 in slot.shape}


def _warn_of_shards(tensors: Mapping[str, torch.Tensor], known: Collection[str]) -> None:
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0 and name not in known]
    if empty:
        warn(
            f"{counted(len(empty), 'tensor has', 'tensors have')} no elements ({empty[0]}): under ZeRO-3 or FSDP, gather the "
            "parameters and pass them as `state_dict`. What is written now cannot be loaded.",
            PeftWarning,
        )
