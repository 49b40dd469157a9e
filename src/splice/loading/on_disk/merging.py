"""Merging adapters into the files of a base model: shard by shard, whole or not at all, and going on where it stopped.

All is written into a folder beside the place where the result is to be, which gets its name when nothing is left to do.
What is finished there is told by the names of its files, and what it belongs to by a note beside the folder.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from splice.base.bare import original_class
from splice.base.embeddings import scales_while_tied
from splice.base.foreign_models import config_field
from splice.checkpoint.files import write_text
from splice.errors import PeftError, UnsupportedFeatureError
from splice.loading.on_disk.base_folder import CONFIG_NAME, INDEX_NAME, BaseFolder
from splice.loading.on_disk.base_on_disk import BaseOnDisk
from splice.loading.on_disk.changes import Changes
from splice.loading.on_disk.layout import Shard, has_new_head, is_untied, lay_out
from splice.loading.on_disk.writing import write_shard

if sys.platform != "win32":
    import fcntl

_UNFINISHED = ".unfinished"
_TIED = "tie_word_embeddings"
# Of T5 and its kin, since transformers 5.
_SCALES = "scale_decoder_outputs"
# What configs of transformers say of a head.
_OF_HEADS = ("id2label", "label2id", "problem_type")


class Progress(NamedTuple):
    """How far a merge is, told while it runs."""

    # Told once: bytes that are left to write, and bytes of the whole result.
    begin: Callable[[int, int], object]
    # Told again and again: bytes that have been written since the last time.
    advance: Callable[[int], object]


class Written(NamedTuple):
    """What a merge has written."""

    # The folder of the merged model.
    folder: Path
    # Bytes of its files of weights.
    size: int
    # How many of its tensors the merge changed, or added.
    changed: int
    # Files of weights that an earlier start had finished.
    resumed: tuple[str, ...]


class Places(NamedTuple):
    """Where a merge works."""

    # Of the result.
    out: Path
    # Of what is not finished.
    work: Path
    # Of the note that tells what that belongs to.
    note: Path

    @classmethod
    def of(cls, out: Path) -> Places:
        """Beside `out`: a rename is atomic only within a file system."""
        out = out.absolute()
        return cls(out, out.with_name(f".{out.name}.merging"), out.with_name(f".{out.name}.merging.json"))


def check_free(out: Path) -> None:
    """Raise where something is in the place of the result.

    Raises:
        FileExistsError: it is a file, or a folder that is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        _forget_finished(Places.of(out))
        raise FileExistsError(
            f"{out} exists already, and nothing there is overwritten: name another folder, or remove it"
        )


def _forget_finished(places: Places) -> None:
    """Remove the note of a merge that was killed when all else was done."""
    if not places.note.exists() or places.work.exists():
        return
    with suppress(PeftError), _alone(places):  # else it is running, and does so itself
        pass


def write_merged(
    folder: BaseFolder,
    base: BaseOnDisk,
    changes: Changes,
    out: Path,
    identity: Mapping[str, object],
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write the merged model into `out`.

    Args:
        folder: of the base model.
        base: its model, with the adapters on it.
        changes: what merging them changes.
        out: the folder to be made.
        identity: what tells this merge from others: the files it reads, and how they are merged. What an earlier start with
            the same identity has finished is kept.
        dtype: of all floating tensors; None for the one that each has.
        progress: told how far it is.

    Raises:
        FileExistsError: `out` is there already.
        PeftError: another process is merging into it.
        As `lay_out`; OSError where the disk is full. What has been finished is kept for the next start.
    """
    check_free(out)
    places = Places.of(out)
    shards = lay_out(folder, base, changes, dtype)
    if is_untied(base, changes) and scales_while_tied(base.network):
        raise UnsupportedFeatureError(
            f"{original_class(base.network).__name__} multiplies what goes into its head only while its config says that "
            "embeddings are tied, and after this merge they are not. Merge in memory (`merge_and_unload`, then "
            "`save_pretrained`), or with transformers 5, whose configs say both. Nothing was written."
        )
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with _alone(places):
        check_free(out)
        done = _resumed(places, identity, shards)
        if progress is not None:
            left = sum(shard.size for shard in shards if shard.name not in done)
            progress.begin(left, sum(shard.size for shard in shards))
        advance = progress.advance if progress is not None else _ignored
        _write_all(folder, places, [shard for shard in shards if shard.name not in done], changes, advance)
        _write_others(folder, base, changes, shards, places, dtype)
        if places.out.exists():
            places.out.rmdir()  # it is empty
        os.rename(places.work, places.out)
        _sync(places.out.parent)
    changed = sum(piece.changed is not None for shard in shards for _, piece in shard.pieces)
    return Written(out, sum(shard.size for shard in shards), changed, tuple(sorted(done)))


def _ignored(count: int) -> None:
    pass


@contextmanager
def _alone(places: Places) -> Iterator[None]:
    """Inside, no other process merges into the same place; the note is gone afterwards if the result is there."""
    # The note is locked, which has its name until the end. The system takes the lock back when the process dies.
    with open(places.note, "ab") as file:
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PeftError(f"another process is merging into {places.out}: wait for it, or stop it") from None
        yield
        places.note.unlink(missing_ok=True)


def _resumed(places: Places, identity: Mapping[str, object], shards: list[Shard]) -> set[str]:
    """Names of the files that an earlier start of the same merge has finished; nothing else stays in the folder."""
    text = json.dumps(identity, sort_keys=True)
    if places.note.read_text("utf-8") != text:
        shutil.rmtree(places.work, ignore_errors=True)
        # Into the very file that is locked.
        with open(places.note, "r+", encoding="utf-8") as file:
            file.truncate()
            file.write(text)
    places.work.mkdir(exist_ok=True)
    sizes = {shard.name: shard.size for shard in shards}
    done = {each.name for each in places.work.iterdir() if sizes.get(each.name) == each.stat().st_size}
    for each in places.work.iterdir():
        if each.name not in done:
            each.unlink()
    return done


def _write_all(
    folder: BaseFolder, places: Places, shards: list[Shard], changes: Changes, advance: Callable[[int], object]
) -> None:
    # While one file goes to the disk, the next one is worked out.
    with ThreadPoolExecutor(1) as disk:
        waiting = []
        for shard in shards:
            unfinished = places.work / (shard.name + _UNFINISHED)
            write_shard(folder.shards, unfinished, shard, changes, advance)
            waiting.append(disk.submit(_finish, unfinished, places.work / shard.name))
        for each in waiting:
            each.result()


def _sync(path: Path) -> None:
    """Return once a file or a folder is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finish(unfinished: Path, final: Path) -> None:
    # On the disk before it has its name: after a power cut, too, what has a name is whole.
    _sync(unfinished)
    os.replace(unfinished, final)


def _write_others(
    folder: BaseFolder,
    base: BaseOnDisk,
    changes: Changes,
    shards: list[Shard],
    places: Places,
    dtype: torch.dtype | None,
) -> None:
    """Config, index, tokenizer and what else lies beside the weights."""
    for name in folder.others:
        shutil.copy2(folder.path / name, places.work / name)
    config = dict(folder.config)
    if is_untied(base, changes):
        _untie(config, config_field(base.network, _SCALES))
    if dtype is not None:
        _set_dtype(config, str(dtype).removeprefix("torch."))
    if has_new_head(base, changes):
        _take_head(config, base)
    if config == folder.config:
        shutil.copy2(folder.path / CONFIG_NAME, places.work / CONFIG_NAME)
    else:
        write_text(places.work / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
    if folder.index_fields is not None:
        weight_map = {piece.key: shard.name for shard in shards for _, piece in shard.pieces}
        total = sum(piece.size for shard in shards for _, piece in shard.pieces)
        index = {**folder.index_fields, "metadata": {**folder.index_fields.get("metadata", {}), "total_size": total}}
        index["weight_map"] = dict(sorted(weight_map.items()))
        write_text(places.work / INDEX_NAME, json.dumps(index, indent=2) + "\n")


def _take_head(config: dict[str, object], base: BaseOnDisk) -> None:
    """Say of which class the model is that has the adapter's head, and what its labels are."""
    own: dict[str, object] = cast(Any, base.network).config.to_dict()
    config["architectures"] = [original_class(base.network).__name__]
    config.update({name: own[name] for name in _OF_HEADS if own.get(name) is not None})


def _untie(config: dict[str, object], scales: object) -> None:
    config[_TIED] = False
    # Files of transformers 4 do not say it, and would be read as if being untied meant that nothing is scaled.
    if scales is not None:
        config.setdefault(_SCALES, scales)
    for part in config.values():
        if isinstance(part, dict) and part.get(_TIED):
            part[_TIED] = False


def _set_dtype(config: dict[str, object], dtype: str) -> None:
    names = [name for name in ("dtype", "torch_dtype") if name in config]
    for name in names or ["torch_dtype"]:
        config[name] = dtype
    for part in config.values():
        if isinstance(part, dict):
            for name in ("dtype", "torch_dtype"):
                if name in part:
                    part[name] = dtype
