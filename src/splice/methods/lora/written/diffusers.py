"""LoRA as pipelines of diffusers write it: the component in front of each name, and the config in the file's metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from splice.checkpoint.dialects import Dialect, Part, PathsOf
from splice.checkpoint.keys import PREFIX, format_key, parse_key
from splice.checkpoint.tensors import Weights
from splice.checkpoint.unread import Unread, unread_in, write_tensors
from splice.errors import CheckpointError, PeftError, UnsupportedFeatureError
from splice.methods.lora.written.components import COMPONENTS, guessed, is_text, with_text_front, without_text_front
from splice.methods.lora.written.factors import DOWN, MAGNITUDE, UP, UP_BIAS, factors_of, left_out
from splice.methods.lora.written.scales import Scale, alpha_in, fields_of, rank_of, targets

# Where diffusers keeps the configs: fields of all components, each with its component in front.
_METADATA = "lora_adapter_metadata"
_ALPHA = "alpha"
# What stands behind the path of a layer: today's names, and those before `peft`.
_ENDS: tuple[tuple[re.Pattern[str], Mapping[str, str]], ...] = (
    (re.compile(r"\.lora_(A|B)\.weight$"), {"A": DOWN, "B": UP}),
    (re.compile(r"\.(lora_B\.bias)$"), {"lora_B.bias": UP_BIAS}),
    (re.compile(r"\.(lora_magnitude_vector)(?:\.weight)?$"), {MAGNITUDE: MAGNITUDE}),
    (re.compile(r"\.(?:lora|lora_linear_layer)\.(down|up)\.weight$"), {"down": DOWN, "up": UP}),
    (re.compile(r"\.lora_(down|up)\.weight$"), {"down": DOWN, "up": UP}),
    (re.compile(r"_lora\.(down|up)\.weight$"), {"down": DOWN, "up": UP}),
    (re.compile(r"\.(alpha)$"), {_ALPHA: _ALPHA}),
)
# The projections of text encoders, which had the names of UNets' there.
_TEXT_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# Fields that a config has without saying anything by it; a reader of another version might not know them.
_EMPTY: tuple[object, ...] = (None, False, "", [], {}, "none")


def _recognises(names: Collection[str]) -> bool:
    return bool(names) and all(_split(name) is not None for name in names)


def _split(name: str) -> tuple[str, str] | None:
    """The path of the layer, with its component in front, and the tensor's own suffix."""
    for pattern, suffixes in _ENDS:
        found = pattern.search(name)
        if found is not None:
            return name[: found.start()], suffixes[found[1]]
    return None


def _read(weights: Weights, paths_of: PathsOf) -> list[Part]:
    names: dict[str, dict[str, str]] = {}
    alphas: dict[str, dict[str, float]] = {}
    for key in weights.entries:
        split = _split(key)
        assert split is not None, key  # those that are recognised
        front, _, rest = split[0].partition(".")
        component = front if front in COMPONENTS else ""
        path = _today(component, rest if component else split[0])
        if split[1] == _ALPHA:
            alphas.setdefault(component, {})[path] = alpha_in(weights, key)
            continue
        own = names.setdefault(component, {})
        if format_key(path, split[1]) in own:
            raise PeftError(f"{weights.place}: {key!r} and {own[format_key(path, split[1])]!r} are the same tensor")
        own[format_key(path, split[1])] = key
    if "" in names and len(names) > 1:
        raise PeftError(
            f"{weights.place}: some names begin with a component ({', '.join(filter(None, names))}), and "
            f"{next(iter(names['']))[len(PREFIX) :]!r} does not"
        )
    found = []
    for component, own in names.items():
        fields = _noted(weights, component)
        if fields is None:
            fields = _worked_out(weights, own, alphas.get(component, {}))
        elif component in alphas:
            raise PeftError(f"{weights.place}: both its metadata and tensors give alphas for {component}")
        found.append(Part(component, fields, unread_in(weights, own)))
    return found


def _today(component: str, path: str) -> str:
    """The path of a layer whose projections were in an attention processor."""
    above, _, last = path.rpartition(".")
    if above.endswith(".processor") or (is_text(component) and last in _TEXT_PROJECTIONS):
        above = above.removesuffix(".processor")
        if is_text(component):
            last = _TEXT_PROJECTIONS.get(last, last)
        elif last == "to_out":
            last = "to_out.0"
    return f"{above}.{last}" if above else last


def _noted(weights: Weights, component: str) -> dict[str, object] | None:
    """The config in the metadata; None where there is none."""
    text = weights.metadata.get(_METADATA)
    if text is None:
        return None
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{weights.place}: its {_METADATA} is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{weights.place}: its {_METADATA} is no object of fields")
    front = f"{component}." if component else ""
    found = {name.removeprefix(front): value for name, value in fields.items() if name.startswith(front)}
    return {**found, "peft_type": "LORA"} if found else None


def _worked_out(weights: Weights, names: Mapping[str, str], alphas: Mapping[str, float]) -> dict[str, object]:
    scales, suffixes = {}, set()
    for key, own in names.items():
        parsed = parse_key(key, frozenset({"lora_A", "lora_B", MAGNITUDE}))
        assert parsed is not None, key
        suffixes.add(parsed.suffix)
        if parsed.suffix == DOWN:
            other = names.get(format_key(parsed.path, UP))
            if other is None:
                raise PeftError(f"{weights.place}: {parsed.path!r} has no lora_B or lora_up: the file is damaged")
            rank = rank_of(weights.entries[own].shape, weights.entries[other].shape, f"{weights.place}: {parsed.path}")
            scales[parsed.path] = Scale(rank, alphas.get(parsed.path, float(rank)))
    astray = sorted(alphas.keys() - scales.keys())
    if astray or not scales:
        raise PeftError(f"{weights.place}: there is no lora_A or lora_down of {(astray or list(names))[0]!r}")
    return {**fields_of(scales), "use_dora": MAGNITUDE in suffixes, "lora_bias": UP_BIAS in suffixes}


def _write(parts: Sequence[Part], base: Mapping[str, object], path: Path) -> Sequence[str]:
    tensors: dict[str, Unread] = {}
    noted: dict[str, object] = {}
    for part in parts:
        layers = factors_of(part, "a file of diffusers", (DOWN, UP, UP_BIAS, MAGNITUDE), also=("use_dora", "lora_bias"))
        component = part.component or guessed(layers)
        if component not in COMPONENTS:
            raise UnsupportedFeatureError(
                f"no pipeline has a component {component!r}; known are {', '.join(COMPONENTS)}"
            )
        for layer, factors in layers.items():
            front = f"{component}.{with_text_front(component, layer)}"
            tensors.update({f"{front}.{suffix}": tensor for suffix, tensor in factors.tensors.items()})
        fields = _fields(component, part.fields, layers)
        noted.update({f"{component}.{name}": value for name, value in fields.items()})
    text = json.dumps(noted, indent=2, sort_keys=True)
    write_tensors(path, tensors, {"format": "pt", _METADATA: text})
    return [note for part in parts for note in left_out(part)]


def _fields(component: str, fields: Mapping[str, object], layers: Collection[str]) -> dict[str, object]:
    """Those of the config that say something, in words that hold in every release of transformers."""
    kept = {name: value for name, value in fields.items() if value not in _EMPTY or name in ("r", "lora_alpha")}
    kept.pop("peft_version", None)  # which configs of older releases do not have
    if not is_text(component):
        return kept
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = kept.get(name)
        if isinstance(pattern, dict):
            kept[name] = {_without_front(key): value for key, value in pattern.items()}
    named = fields.get("target_modules")
    if isinstance(named, list):
        kept["target_modules"] = [without_text_front(component, name) for name in named]
    elif isinstance(named, str):
        kept["target_modules"] = targets({without_text_front(component, layer): None for layer in layers})
    return kept


def _without_front(key: str) -> str:
    """A key of a pattern without the start of the path, so that it holds for what is behind that."""
    return re.sub(r"^\^?(text_model\\?\.)?", "", key)


DIFFUSERS = Dialect("diffusers", "LORA", "pytorch_lora_weights.safetensors", _recognises, _read, _write)
