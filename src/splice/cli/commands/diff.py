"""`splice diff`: what is different in two adapters, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import click
import numpy as np

from splice.checkpoint.values import Values
from splice.cli.opened import open_adapter
from splice.cli.options import json_option
from splice.cli.output import console, number, print_json, shown
from splice.cli.problems import listed
from splice.cli.summary import Summary, look_into
from splice.cli.updates import Update, inner_product, is_readable, updates_of
from splice.errors import counted

# Layers that the table shows: those that differ most.
_SHOWN = 10
# Fields whose names are a set, which is written in any order.
_SETS = ("exclude_modules", "modules_to_save", "target_modules")


class Difference(NamedTuple):
    """How two adapters differ on one layer that both have."""

    # The layer.
    path: str
    # The largest difference of two values of its tensors; None where no two of them are of one shape.
    largest: float | None
    # The norm of each adapter's update.
    norms: tuple[float, float]
    # Whether these are norms of updates, and not of tensors.
    of_updates: bool
    # The cosine of the angle between the updates: 1 where they do the same but for a factor. None where they are not known,
    # one of them is nothing, or they are of different shapes.
    cosine: float | None


@click.command(short_help="Compare two adapters, layer by layer.")
@click.argument("one")
@click.argument("other")
@json_option
def command(one: str, other: str, as_json: bool) -> int:
    """Compare two adapters: configs, tensors, and what they do to each layer.

    ONE and OTHER are folders, files of weights, or ids of the Hub. Ends with 1 where they differ.
    """
    summaries = (look_into(open_adapter(one)), look_into(open_adapter(other)))
    found = _compared(*summaries)
    if as_json:
        print_json(found)
    else:
        _show(summaries, found)
    return 0 if found["same"] else 1


def _compared(one: Summary, other: Summary) -> dict[str, object]:
    first, second = one.opened.header.entries, other.opened.header.entries
    both = [name for name in first if name in second]
    differences = [difference._asdict() for difference in _differences(one, other)]
    result: dict[str, object] = {
        "config": _fields(one, other),
        "only_in_one": [name for name in first if name not in second],
        "only_in_other": [name for name in second if name not in first],
        "shapes": {n: [first[n].shape, second[n].shape] for n in both if first[n].shape != second[n].shape},
        "dtypes": {n: [first[n].dtype, second[n].dtype] for n in both if first[n].dtype != second[n].dtype},
        "layers": differences,
    }
    alike = all(not value for name, value in result.items() if name != "layers")
    result["same"] = alike and all(layer["largest"] == 0 for layer in differences)
    return result


def _fields(one: Summary, other: Summary) -> dict[str, list[object]]:
    """The fields of the configs that differ: name -> both values; null is a field that is not there."""
    a, b = one.opened.fields, other.opened.fields
    names = sorted(a.keys() | b.keys())
    return {name: [a.get(name), b.get(name)] for name in names if not _alike(name, a.get(name), b.get(name))}


def _alike(name: str, one: object, other: object) -> bool:
    if name in _SETS and isinstance(one, list) and isinstance(other, list):
        return sorted(map(str, one)) == sorted(map(str, other))
    return one == other


def _differences(one: Summary, other: Summary) -> list[Difference]:
    # Side by side, in the order of the first: the updates of two large adapters do not fit into memory at once.
    places = {layer.path: layer for layer in other.layers if is_readable(layer)}
    shared = tuple(layer for layer in one.layers if is_readable(layer) and layer.path in places)
    ordered = other._replace(layers=tuple(places[layer.path] for layer in shared))
    pairs = zip(updates_of(one._replace(layers=shared)), updates_of(ordered))
    with Values(one.opened.weights) as first, Values(other.opened.weights) as second:
        return [_difference(a, b, _largest(a, b, first, second)) for a, b in pairs]


def _largest(a: Update, b: Update, first: Values, second: Values) -> float | None:
    found = [
        float(np.abs(first.read(entry) - second.read(b.layer.entries[suffix])).max(initial=0))
        for suffix, entry in a.layer.entries.items()
        if suffix in b.layer.entries and b.layer.entries[suffix].shape == entry.shape
    ]
    return max(found, default=None)


def _difference(a: Update, b: Update, largest: float | None) -> Difference:
    known, cosine = a.factors is not None and b.factors is not None, None
    if a.factors is not None and b.factors is not None and a.norm and b.norm:
        shapes = [(factors.left.shape[0], factors.right.shape[1]) for factors in (a.factors, b.factors)]
        if shapes[0] == shapes[1]:
            # Rounding may bring it a little beyond what a cosine can be.
            cosine = float(np.clip(inner_product(a.factors, b.factors) / (a.norm * b.norm), -1, 1))
    return Difference(a.layer.path, largest, (a.norm, b.norm), known, cosine)


def _show(summaries: tuple[Summary, Summary], found: Mapping[str, object]) -> None:
    out = console()
    out.print(f"{shown(summaries[0].opened.place)}  and  {shown(summaries[1].opened.place)}", style="bold")
    for title, of in (("config", "config"), ("shapes", "shapes"), ("dtypes", "dtypes")):
        values = found[of]
        assert isinstance(values, dict)
        if title == "config":
            for name, (a, b) in values.items():
                out.print(shown(f"  {name}: {a!r} and {b!r}"))
        elif values:
            names = [f"{name} ({a} and {b})" for name, (a, b) in values.items()]
            out.print(shown(f"  {counted(len(names), 'tensor')} of other {title}: {listed(names)}"))
    for title, of in (("first", "only_in_one"), ("second", "only_in_other")):
        alone = found[of]
        assert isinstance(alone, list)
        if alone:
            out.print(shown(f"  {counted(len(alone), 'tensor')} in the {title} alone: {listed(alone)}"))
    layers = found["layers"]
    assert isinstance(layers, list)
    if found["same"]:
        out.print(f"the same: {counted(len(layers), 'layer')}, every value")
    else:
        _show_layers([Difference(**layer) for layer in layers])


def _show_layers(layers: list[Difference]) -> None:
    from rich.table import Table

    if not layers:
        return
    kind = "update" if all(layer.of_updates for layer in layers) else "tensors"
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", no_wrap=True)
    for title in ("largest difference", f"norm of the {kind}", "in the other", "cosine"):
        table.add_column(title, justify="right")
    # By the angle and then by the values: those that do something else come first.
    ordered = sorted(layers, key=lambda layer: (1 if layer.cosine is None else layer.cosine, -(layer.largest or 0)))
    for layer in ordered[:_SHOWN]:
        largest, cosine = ("" if value is None else f"{value:.3g}" for value in (layer.largest, layer.cosine))
        table.add_row(shown(layer.path), largest, number(layer.norms[0]), number(layer.norms[1]), cosine)
    out = console()
    out.print(table)
    if len(ordered) > _SHOWN:
        out.print(f"and {len(ordered) - _SHOWN} more; --json has all of them")
    known = [layer.cosine for layer in layers if layer.cosine is not None]
    if known:
        out.print(f"cosine of the updates: {np.mean(known):.3f} on average over {counted(len(known), 'layer')}")
