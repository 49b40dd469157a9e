"""LoRA as kohya's sd-scripts write it, which A1111 and ComfyUI read: names with underscores, and an alpha for each layer."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from splice.checkpoint.dialects import Dialect, Part, PathsOf
from splice.checkpoint.keys import format_key
from splice.checkpoint.tensors import Weights
from splice.checkpoint.unread import Unread, made, unread_in, write_tensors
from splice.errors import PeftError, UnsupportedFeatureError
from splice.methods.lora.written.components import KOHYA_PREFIXES, guessed, with_text_front
from splice.methods.lora.written.factors import DOWN, UP, Factors, factors_of, left_out
from splice.methods.lora.written.scales import Scale, alpha_in, fields_of, rank_of
from splice.methods.lora.written.underscores import flattened, path_of
from splice.methods.lora.written.unet_blocks import from_numbered, is_numbered, is_numbered_there, to_numbered

_SUFFIXES = {"lora_down.weight": DOWN, "lora_up.weight": UP}
_ALPHA = "alpha"
# Of code that is not diffusers': there several layers of these models are one.
_OTHER_CODE = re.compile(r"^(double_blocks|single_blocks|joint_blocks|diffusion_model|blocks|layers)_\d")
# Layers whose alphas diffusers 0.42 reads from such files under names that it then finds nowhere.
_PROJECTION = re.compile(r"\.(to_[qkv]|to_out\.0|[qkv]_proj|out_proj)$")
_OF_DIFFUSERS = (
    "layers differ in alpha: sd-scripts, A1111 and ComfyUI give each its own, diffusers gives all projections of attention "
    "the most frequent one; for diffusers write it as `diffusers`"
)
_PREFIX = re.compile("^(" + "|".join(prefix for many in KOHYA_PREFIXES.values() for prefix in many) + ")")


def _recognises(names: Collection[str]) -> bool:
    return any(_PREFIX.match(name) for name in names)


def _read(weights: Weights, paths_of: PathsOf) -> list[Part]:
    layers: dict[str, dict[str, dict[str, str]]] = {}
    for key in weights.entries:
        component, name, suffix = _split(key, weights.place)
        layers.setdefault(component, {}).setdefault(name, {})[suffix] = key
    return [_part(weights, component, named, paths_of(component)) for component, named in layers.items()]


def _split(key: str, place: str) -> tuple[str, str, str]:
    front, _, suffix = key.partition(".")
    found = _PREFIX.match(front)
    if found is None:
        known = ", ".join(prefix for many in KOHYA_PREFIXES.values() for prefix in many)
        raise PeftError(f"{place}: {key!r} begins with none of {known}, as names in kohya's files do")
    if suffix not in _SUFFIXES and suffix != _ALPHA:
        raise UnsupportedFeatureError(
            f"{place}: {key!r} is no tensor of a plain LoRA, whose layers have lora_down.weight, lora_up.weight and "
            "alpha; it is one of LyCORIS or of a variant of LoRA, which cannot be converted"
        )
    component = next(name for name, prefixes in KOHYA_PREFIXES.items() if found[1] in prefixes)
    return component, front[len(found[1]) :], suffix


def _part(
    weights: Weights, component: str, named: Mapping[str, Mapping[str, str]], paths: Collection[str] | None
) -> Part:
    other = next((name for name in named if _OTHER_CODE.match(name)), None)
    if other is not None:
        raise UnsupportedFeatureError(
            f"{weights.place}: {other!r} is a layer of the model's original code, where layers that are several in diffusers "
            "are one; load the file with the pipeline's `load_lora_weights`, and save it from there with `save_lora_weights`"
        )
    # Of the first text encoder there are two names; a file has one of them.
    numbered = component == "unet" and is_numbered(named)
    scales: dict[str, Scale] = {}
    names: dict[str, str] = {}
    for name, keys in named.items():
        lacking = [suffix for suffix in _SUFFIXES if suffix not in keys]
        if lacking:
            raise PeftError(f"{weights.place}: {name!r} has no {lacking[0]}: the file is damaged")
        path = path_of(from_numbered(name) if numbered else name, component, paths)
        if path in scales:
            raise PeftError(f"{weights.place}: {name!r} and another layer are both {path!r} of {component}")
        down, up = (weights.entries[keys[suffix]].shape for suffix in _SUFFIXES)
        rank = rank_of(down, up, f"{weights.place}: {name}")
        # A file without alphas is of a time when there was no scale.
        alpha = alpha_in(weights, keys[_ALPHA]) if _ALPHA in keys else float(rank)
        scales[path] = Scale(rank, alpha)
        names.update({format_key(path, own): keys[suffix] for suffix, own in _SUFFIXES.items()})
    return Part(component, fields_of(scales), unread_in(weights, names))


def _write(parts: Sequence[Part], base: Mapping[str, object], path: Path) -> Sequence[str]:
    tensors: dict[str, Unread] = {}
    notes: list[str] = []
    has_two = any(part.component == "text_encoder_2" for part in parts)
    for part in parts:
        layers = factors_of(part, "kohya's form", (DOWN, UP))
        component = part.component or guessed(layers)
        if component not in KOHYA_PREFIXES or component.startswith("transformer"):
            raise UnsupportedFeatureError(
                f"kohya's files have no {component}: of transformers they name layers as the model's original code does; "
                "write it as `diffusers`"
            )
        prefix = KOHYA_PREFIXES[component][-1 if has_two else 0]
        for layer, name in _names(component, layers).items():
            front = f"{prefix}{name}"
            tensors[f"{front}.lora_down.weight"] = layers[layer].down
            tensors[f"{front}.lora_up.weight"] = layers[layer].up
            tensors[f"{front}.{_ALPHA}"] = made(torch.tensor(float(layers[layer].scale.alpha)))
        notes += left_out(part)
        alphas = {factors.scale.alpha for factors in layers.values()}
        if len(alphas) > 1 and any(_PROJECTION.search(layer) for layer in layers):
            notes.append(_OF_DIFFUSERS)
    write_tensors(path, tensors, {"format": "pt"})
    return tuple(dict.fromkeys(notes))


def _names(component: str, layers: Mapping[str, Factors]) -> dict[str, str]:
    """Path -> what the layer is called behind the prefix."""
    grouped = next((path for path, each in layers.items() if each.up.shape[1] != each.scale.rank), None)
    if grouped is not None:
        raise UnsupportedFeatureError(f"kohya's form has no place for a convolution in groups: {grouped!r}")
    names = {path: flattened(with_text_front(component, path)) for path in layers}
    if len(set(names.values())) < len(names):
        twice = next(path for path in names if list(names.values()).count(names[path]) > 1)
        raise PeftError(f"{twice!r} and another layer are {names[twice]!r} both, with underscores for dots")
    if component == "unet" and is_numbered_there(names.values()):
        return {path: to_numbered(name) for path, name in names.items()}
    return names


KOHYA = Dialect("kohya", "LORA", "adapter.safetensors", _recognises, _read, _write)
