"""An adapter's files in the dialect of another program: other names and another place for the scale, the same adapter."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from splice.base.foreign_models import key_renaming
from splice.checkpoint.dialects import OWN, Dialect, Part, dialects
from splice.checkpoint.files import beside
from splice.checkpoint.foreign import foreign_names
from splice.checkpoint.keys import parse_key, renamed
from splice.checkpoint.unread import UnreadWeights, unread_in
from splice.config import read_config
from splice.errors import PeftError, UnsupportedFeatureError
from splice.kinds.reading import Checkpoint
from splice.kinds.registry import method_named
from splice.loading.load import plan_new
from splice.loading.on_disk.parts import Parts, read_parts, write_own
from splice.loading.options import LoadOptions
from splice.loading.plan import Fitted
from splice.loading.renaming import renamed_part
from splice.pipeline_bases import Bases
from splice.surgery.tuner import Tuner
from splice.surgery.undo import Undo
from splice.tasks import PeftModel


class TranslatedPart(NamedTuple):
    """The adapter of one network, as it was written."""

    # The network's name in a pipeline; "" where nothing says it.
    component: str
    # How many layers have an adapter.
    layers: int
    # How many tensors it has in the format's own form.
    tensors: int


class Translated(NamedTuple):
    """What a translation has written."""

    # The folder, or the file.
    place: Path
    # The dialect that it was read in.
    read_as: str
    # The dialect that it is in now.
    dialect: str
    # One for each network.
    parts: tuple[TranslatedPart, ...]
    # A line for each thing that was read in another way than it is written.
    notes: tuple[str, ...] = ()


def translate_files(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    dialect: str = OWN,
    base: str | os.PathLike[str] | None = None,
    rename: Mapping[str, str] | None = None,
    component: str | None = None,
    base_revision: str | None = None,
    class_name: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Translated:
    """Write an adapter in the dialect of another program, or under other names: what it computes stays the same.

    Tensors are copied one at a time, byte for byte where the dialect allows it (all but GGUF).

    Args:
        adapter: its folder, its file of weights, or its id on the Hub, in any dialect that can be read. A folder with one
            folder for each component of a pipeline is taken as a whole.
        out: the folder to be made, or the file; of a dialect that is one file, a folder gets a file in it.
        dialect: "peft" (the format's own), "kohya", "diffusers" or "gguf".
        base: folder of the base model or of the pipeline, the file of a config, or its id on the Hub; configs are enough.
            Layers are then brought under the names that the base has, where that is certain, and compared with its shapes.
        rename: regular expression -> replacement, applied to the path of every module in turn.
        component: the network of a pipeline that the adapter is for, or the one of several that is meant; None for all.
        base_revision: of the base on the Hub.
        class_name: of a class of transformers to make the base with; None for what the adapter and the config say.
        trust_remote_code: run code that lies in the base's folder.
        **options: of `PeftModel.from_pretrained`.

    Returns:
        What was written.

    Raises:
        FileExistsError: `out` is there already.
        PeftError: there is no such dialect; nothing would change; a rename matches nothing or makes two names one; a name
            cannot be told; the base is needed.
        UnsupportedFeatureError: the dialect has no place for what the adapter is; the message says what to do.
        CheckpointError: the adapter or the base cannot be found, or is damaged.
        AdapterMismatchError: the adapter does not fit the base.
    """
    target = _target(dialect)
    place = _free_place(Path(out), target)
    bases = Bases(None if base is None else os.fspath(base), base_revision, class_name, trust_remote_code)
    if target is not None and target.needs_base and base is None:
        raise PeftError(
            f"{dialect} names layers by the base's architecture: give the base; a folder with its config is enough"
        )
    found = read_parts(adapter, component, lambda of: bases.paths_of(of) if component in (None, of) else None, options)
    if found.dialect == dialect and base is None and not rename:
        raise PeftError(_nothing_to_do(found, dialect))
    parts, notes = list(found.parts), list[str]()
    if rename:
        parts = [renamed_part(part, rename, found.place) for part in parts]
    if base is not None:
        parts = [_at_home(part, bases, found.place, notes) for part in parts]
    if target is None:
        _write_folder(parts, place)
    else:
        _check_method(parts, target)
        fields = bases.fields() if target.needs_base else {}
        notes += _write_file(lambda path: target.write(parts, fields, path), place)
    told = tuple(TranslatedPart(part.component, _layers(part), len(part.tensors)) for part in parts)
    return Translated(place, found.dialect, dialect, told, tuple(notes))


def _nothing_to_do(found: Parts, dialect: str) -> str:
    foreign = next(filter(None, (foreign_names(part.tensors) for part in found.parts)), None)
    if dialect == OWN and foreign is not None:
        return f"{found.place} has a config, but {foreign} For that, name the file itself"
    return f"{found.place} is in the dialect {dialect!r} already: give `rename` or `base`, or another dialect"


def _target(name: str) -> Dialect | None:
    """The dialect; None for the format's own."""
    known = dialects()
    if name != OWN and name not in known:
        raise PeftError(f"there is no dialect {name!r}; there are {', '.join((OWN, *known))}")
    return known.get(name)


def _free_place(out: Path, target: Dialect | None) -> Path:
    place = out if target is None or out.suffix == Path(target.file_name).suffix else out / target.file_name
    is_empty = target is None and place.is_dir() and not any(place.iterdir())
    if place.exists() and not is_empty:
        raise FileExistsError(f"{place} is there already, and nothing there is overwritten")
    return place


def _check_method(parts: list[Part], target: Dialect) -> None:
    for part in parts:
        named = part.fields["peft_type"]
        if named != target.peft_type:
            raise UnsupportedFeatureError(
                f"{target.name} holds adapters of {target.peft_type}, and this is one of {named}: write it as one first "
                f"(`splice convert --to {target.peft_type.lower()}`)"
            )


def _at_home(part: Part, bases: Bases, place: str, notes: list[str]) -> Part:
    """The adapter with its layers where the base has them: by the plan of a load."""
    own = UnreadWeights(part.tensors, place)
    read = read_config(json.dumps(part.fields).encode(), place)
    checkpoint = Checkpoint(read.config, own, {name: name for name in own.entries}, read.legacy, read.notes)
    network = bases.network(part.component, checkpoint)
    mapping = key_renaming(network)
    if mapping:
        checkpoint = checkpoint._replace(names=renamed(own.entries, mapping))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = _planned(network, checkpoint)
    notes += [*found.notes, *found.warnings, *(str(each.message) for each in caught)]
    names = found.checkpoint.names
    if found.checkpoint.weights is own and all(new == old for new, old in names.items()):
        return part
    fields = json.loads(found.config.to_json())
    return Part(part.component, fields, unread_in(found.checkpoint.weights, names))


def _planned(network: nn.Module, checkpoint: Checkpoint) -> Fitted:
    tuner = Tuner.of(network)
    heads = PeftModel.class_for(checkpoint.config).heads
    return plan_new(tuner, checkpoint, LoadOptions.plain({}), heads, Undo(tuner))


def _write_folder(parts: list[Part], place: Path) -> None:
    place = place.absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    with beside(place) as work:
        try:
            write_own(parts, work)
            if place.exists():
                place.rmdir()
            os.rename(work, place)
        finally:
            if work.exists():
                shutil.rmtree(work)


def _write_file(write: Callable[[Path], Sequence[str]], place: Path) -> Sequence[str]:
    place = place.absolute()
    is_new = not place.parent.exists()
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        with beside(place) as new:
            notes = write(new)
            os.replace(new, place)
            return notes
    except BaseException:
        if is_new:
            with suppress(OSError):  # somebody else has put something there
                place.parent.rmdir()
        raise


def _layers(part: Part) -> int:
    names = method_named(part.fields["peft_type"], "the config").tensor_names
    parsed = (parse_key(key, names) for key in part.tensors)
    return len({key.path for key in parsed if key is not None})
