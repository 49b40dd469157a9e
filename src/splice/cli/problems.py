"""What is wrong with a checkpoint, as far as it can be told without its base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from splice.checkpoint.fields import UnknownFields
from splice.checkpoint.foreign import foreign_names
from splice.checkpoint.format import FORMAT_VERSION
from splice.checkpoint.outline import Outline
from splice.cli.known import Known, known_methods
from splice.cli.layers import Layer, strange_names
from splice.cli.opened import Opened
from splice.errors import counted

# Names that one line shows.
_SHOWN = 3


class Problem(NamedTuple):
    """Something about a checkpoint that its reader should know."""

    # In one sentence.
    text: str
    # Whether the adapter may not work for it; otherwise it works, and is not what most are.
    serious: bool = True


def problems_of(
    opened: Opened, method: Known | None, outline: Outline | None, layers: Sequence[Layer]
) -> list[Problem]:
    """Everything that config, names, shapes and dtypes tell."""
    return [
        *_of_the_method(opened, method),
        *_of_the_pickle(opened),
        *_of_the_names(opened, method, layers),
        *_of_the_tensors(opened, layers),
        *(_of_the_ranks(opened, outline, layers) if outline else ()),
        *_of_the_targets(opened, layers),
    ]


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    found = list(names)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more


def _of_the_method(opened: Opened, method: Known | None) -> Iterator[Problem]:
    named = opened.fields["peft_type"]
    if method is None:
        yield Problem(f"{named!r} is no method that is known here: known are {', '.join(known_methods())}.")
        return
    unknown = UnknownFields(
        {k: v for k, v in opened.fields.items() if k not in method.fields and k not in method.legacy}
    )
    if unknown.switched_on:
        said = listed(f"{name}={value!r}" for name, value in sorted(unknown.switched_on.items()))
        yield Problem(f"the config sets fields that nobody knows here: {said}; they may change what it computes.")
    off = sorted(unknown.values.keys() - unknown.switched_on.keys())
    if off:
        yield Problem(f"the config has fields that nobody knows here, all of them switched off: {listed(off)}.", False)
    version = str(opened.fields.get("peft_version") or "")
    if _numbers(version) > _numbers(FORMAT_VERSION):
        yield Problem(f"it was written by version {version} of the format, and {FORMAT_VERSION} is known here.", False)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:3] if part.isdigit()]


def _of_the_pickle(opened: Opened) -> Iterator[Problem]:
    if opened.asks_for:
        yield Problem(
            f"the weights are a pickle that asks for {listed(opened.asks_for)}: loading it plainly runs them."
        )
    elif opened.asks_for is not None:
        yield Problem(
            "the weights are a pickle; saved again they are a safetensors file, which cannot run code.", False
        )


def _of_the_names(opened: Opened, method: Known | None, layers: Sequence[Layer]) -> Iterator[Problem]:
    names = list(opened.header.entries)
    if not names:
        yield Problem("the file holds no tensors.")
    strange = strange_names(opened, method)
    if strange and method is not None:
        foreign = foreign_names(names)
        yield Problem(
            f"{counted(len(strange), 'tensor')} {'is' if len(strange) == 1 else 'are'} not named as adapters name theirs: "
            f"{listed(strange)}{f'; {foreign}' if foreign else '.'}"
        )
    whole = [layer for layer in layers if not layer.own]
    saved = opened.fields.get("modules_to_save") or ()
    expected = bool(saved) or opened.fields.get("bias", "none") != "none"
    if whole and not expected and method is not None and method.tensors:
        paths = (layer.path for layer in whole)
        yield Problem(f"it holds tensors of the base that its config does not speak of: {listed(paths)}.", False)


def _of_the_tensors(opened: Opened, layers: Sequence[Layer]) -> Iterator[Problem]:
    entries = opened.header.entries
    empty = [name for name, entry in entries.items() if 0 in entry.shape]
    if empty:
        # Some methods have tensors that may be empty; a layer of nothing else was saved while its values were elsewhere.
        gone = any(all(0 in entry.shape for entry in layer.entries.values()) for layer in layers)
        rank_gone = any(layer.rank == 0 for layer in layers)
        yield Problem(f"{counted(len(empty), 'tensor')} without any values: {listed(empty)}.", gone or rank_gone)
    codes = [name for name, entry in entries.items() if entry.dtype in ("U8", "I8")]
    if codes:
        yield Problem(f"{counted(len(codes), 'tensor')} of whole numbers, as quantised weights are: {listed(codes)}.")


def _of_the_ranks(opened: Opened, outline: Outline, layers: Sequence[Layer]) -> Iterator[Problem]:
    own = [layer for layer in layers if layer.own]
    halves = [
        f"{layer.path} (no {', '.join(lacking)})"
        for layer in own
        for together in outline.suffixes
        for lacking in [[suffix for suffix in together if suffix not in layer.names]]
        if 0 < len(lacking) < len(together)
    ]
    if halves:
        yield Problem(f"{counted(len(halves), 'layer')} with a part of the tensors alone: {listed(halves)}.")
    planned = [(layer, outline.planned(opened.fields, layer.path)) for layer in own]
    wrong = [
        f"{layer.path} (rank {layer.rank}, not {rank})"
        for layer, rank in planned
        if rank is not None and layer.rank not in (None, rank)
    ]
    if wrong:
        yield Problem(f"{counted(len(wrong), 'layer')} of another rank than the config says: {listed(wrong)}.")


def _of_the_targets(opened: Opened, layers: Sequence[Layer]) -> Iterator[Problem]:
    targets = opened.fields.get("target_modules")
    if not isinstance(targets, list):
        return
    paths = [layer.path for layer in layers]
    without = [
        name
        for name in targets
        if isinstance(name, str) and not any(path == name or path.endswith(f".{name}") for path in paths)
    ]
    if without and paths:
        yield Problem(f"it names targets that its file has nothing for: {listed(sorted(without))}.", False)
