"""The tensors of a checkpoint by the layers that they belong to, and layers that are alike put together."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from splice.checkpoint.header import Entry
from splice.checkpoint.keys import PREFIX, SHORT_PREFIX, parse_key
from splice.checkpoint.outline import Outline
from splice.cli.known import Known
from splice.cli.opened import Opened


class Layer(NamedTuple):
    """What an adapter has for one layer of its base."""

    # The layer's path in the base; "" of what belongs to no layer.
    path: str
    # Suffix -> the tensor's name in the file.
    names: Mapping[str, str]
    # Suffix -> the tensor.
    entries: Mapping[str, Entry]
    # Whether these are tensors of the method. Others are modules that were saved whole, and biases.
    own: bool
    # The rank; None where it has none, or nobody knows.
    rank: int | None
    # What its update is multiplied with; likewise.
    scale: float | None

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(math.prod(entry.shape) for entry in self.entries.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Suffix -> shape."""
        return {suffix: entry.shape for suffix, entry in self.entries.items()}


class Group(NamedTuple):
    """Layers that differ in nothing but the numbers in their paths."""

    # Their path, with the numbers that occur: `model.layers.{0..3}.self_attn.q_proj`.
    path: str
    # The layers.
    layers: tuple[Layer, ...]


def layers_of(opened: Opened, method: Known | None, outline: Outline | None) -> list[Layer]:
    """The layers of an adapter, in the order of its file. Names that speak of no layer are left out."""
    found: dict[tuple[str, bool], dict[str, str]] = {}
    for name in opened.header.entries:
        place = _place(name, method)
        if place is not None:
            path, suffix, own = place
            found.setdefault((path, own), {})[suffix] = name
    return [_layer(opened, path, names, own, method, outline) for (path, own), names in found.items()]


def strange_names(opened: Opened, method: Known | None) -> list[str]:
    """Names of tensors that are not those of this format."""
    return [name for name in opened.header.entries if _place(name, method) is None]


def _place(name: str, method: Known | None) -> tuple[str, str, bool] | None:
    """(path, suffix, whether it is the method's) of a tensor."""
    names = method.tensors if method else ()
    key = parse_key(name, names)
    if key is not None:
        return key.path, key.suffix, True
    if name.startswith(PREFIX):
        path, _, suffix = name.removeprefix(PREFIX).rpartition(".")
        return path, suffix, False
    bare = name.removeprefix(SHORT_PREFIX)
    if method and (method.whole_call or bare != name or bare.partition(".")[0] in names):
        return "", bare, True
    return None


def _layer(
    opened: Opened, path: str, names: Mapping[str, str], own: bool, method: Known | None, outline: Outline | None
) -> Layer:
    entries = {suffix: opened.header.entries[name] for suffix, name in names.items()}
    layer = Layer(path, names, entries, own, None, None)
    if not own or not path or (outline is None and method is None):
        return layer
    if outline is None:
        assert method is not None
        return layer._replace(rank=method.rank_of(opened.fields, path), scale=method.scale_of(opened.fields))
    rank = outline.rank(opened.fields, path, layer.shapes)
    return layer._replace(rank=rank, scale=None if rank is None else outline.scale(opened.fields, path, rank))


def grouped(layers: Iterable[Layer]) -> list[Group]:
    """Layers put together that are alike, in the order in which the first of each came."""
    alike: dict[tuple[object, ...], list[Layer]] = {}
    for layer in layers:
        looks = (re.sub(r"\d+", "#", layer.path), layer.own, layer.rank, layer.scale, tuple(sorted(_looks(layer))))
        alike.setdefault(looks, []).append(layer)
    return [Group(common_path([layer.path for layer in same]), tuple(same)) for same in alike.values()]


def _looks(layer: Layer) -> Iterable[tuple[str, str, tuple[int, ...]]]:
    return ((suffix, entry.dtype, entry.shape) for suffix, entry in layer.entries.items())


def common_path(paths: Sequence[str]) -> str:
    """One path for several that differ in numbers: these stand in braces."""
    if len(paths) == 1:
        return paths[0]
    texts = re.split(r"\d+", paths[0])
    columns = zip(*(re.findall(r"\d+", path) for path in paths))
    spelled = [_braces(sorted({int(n) for n in column})) for column in columns]
    return "".join(text + number for text, number in zip(texts, [*spelled, ""]))


def _braces(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    spans: list[list[int]] = []
    for value in numbers:
        if spans and value == spans[-1][1] + 1:
            spans[-1][1] = value
        else:
            spans.append([value, value])
    return "{" + ",".join(str(a) if a == b else f"{a},{b}" if b == a + 1 else f"{a}..{b}" for a, b in spans) + "}"
