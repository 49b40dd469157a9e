"""What each file of a merged model will hold, in order, before anything is written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from splice.checkpoint.header import Entry
from splice.checkpoint.tensors import DTYPE_NAMES, DTYPES
from splice.errors import CheckpointError, UnsupportedFeatureError
from splice.loading.on_disk.base_folder import BaseFolder
from splice.loading.on_disk.base_on_disk import BaseOnDisk, read_as
from splice.loading.on_disk.changes import Changes

# Of the header, as the safetensors library pads it: so that the values begin at a multiple of it.
_ALIGNMENT = 8
_SHOWN = 3


class Piece(NamedTuple):
    """One tensor of a file to be written."""

    # Its name in the file.
    key: str
    # As it will be written.
    dtype: torch.dtype
    # As it will be written; empty of a single number.
    shape: tuple[int, ...]
    # Where the base's own values are, those that change too; None of a tensor that the base's files lack.
    source: Entry | None
    # The base's file that they are in; empty of a tensor that the base's files lack.
    file: str
    # Their name there; likewise.
    stored: str
    # Its name in the network, where the merge changes it; None where the base's values stay.
    changed: str | None

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def is_copied_from(self, file: str) -> bool:
        """Whether the very bytes of that file of the base are written."""
        own = self.changed is None and self.source is not None and self.dtype == DTYPES[self.source.dtype]
        return own and self.file == file


class Shard(NamedTuple):
    """One file to be written."""

    # Name of the file, in the base's folder and in the new one.
    name: str
    # Header with its length in front, as it stands in the file.
    head: bytes
    # Each tensor with its offset from the start of the file.
    pieces: tuple[tuple[int, Piece], ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.head) + sum(piece.size for _, piece in self.pieces)


def lay_out(folder: BaseFolder, base: BaseOnDisk, changes: Changes, dtype: torch.dtype | None) -> list[Shard]:
    """Decide what stands where.

    Args:
        folder: of the base model.
        base: its model.
        changes: what the merge changes.
        dtype: of all floating tensors; None for the one that each has.

    Raises:
        UnsupportedFeatureError: a tensor that changes stands in the files in parts.
        CheckpointError: the files lack a tensor of the model.
    """
    _check_complete(folder, base, changes)
    names = {key: name for name, key in base.stored.items()}
    shards = []
    for shard, file in folder.shards.items():
        entries = sorted(file.entries.items(), key=lambda item: item[1].offset)
        pieces = [_piece(key, (shard, entry), names.get(key), base, changes, dtype) for key, entry in entries]
        if shard == max(folder.shards):
            pieces += [_extra(name, folder, base, changes, dtype) for name in _untied(base, changes)]
        shards.append(_shard(shard, file.metadata, pieces))
    return shards


def _piece(
    key: str,
    place: tuple[str, Entry],
    name: str | None,
    base: BaseOnDisk,
    changes: Changes,
    dtype: torch.dtype | None,
) -> Piece:
    """A tensor that the base's files have too."""
    file, entry = place
    if name is None or changes.origin(name) is None:
        return Piece(key, read_as(entry, dtype), entry.shape, entry, file, key, None)
    return _changed(key, name, base, changes, dtype)._replace(source=entry, file=file, stored=key)


def _extra(name: str, folder: BaseFolder, base: BaseOnDisk, changes: Changes, dtype: torch.dtype | None) -> Piece:
    """A tensor that the base's files have none of its own for."""
    if changes.origin(name) is not None:
        return _changed(name, name, base, changes, dtype)
    stored = next(each for each in base.tied_to(name) if each in base.stored)
    file, entry = folder.entries[base.stored[stored]]
    return Piece(name, read_as(entry, dtype), entry.shape, entry, file, base.stored[stored], None)


def _changed(key: str, name: str, base: BaseOnDisk, changes: Changes, dtype: torch.dtype | None) -> Piece:
    tensor = changes.copies.get(name)
    if tensor is None:
        owner, _, leaf = name.rpartition(".")
        tensor = base.network.get_submodule(owner)._parameters[leaf]
        assert tensor is not None
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return Piece(key, wanted, tuple(tensor.shape), None, "", "", name)


def _all_the_same(names: tuple[str, ...], changes: Changes) -> bool:
    return len({changes.origin(name) for name in names}) == 1


def _untied(base: BaseOnDisk, changes: Changes) -> Iterator[str]:
    """Names of tensors that need an entry and that the files have none for."""
    for name in changes.copies:
        if name not in base.stored and len(base.tied_to(name)) == 1:
            yield name
    for names in base.ties:
        if _all_the_same(names, changes):
            continue
        stored = [name for name in names if name in base.stored]
        known = {changes.origin(name) for name in stored}
        yield from (name for name in names if name not in stored and changes.origin(name) not in known)


def is_untied(base: BaseOnDisk, changes: Changes) -> bool:
    """Whether tensors that are one parameter of the base differ after the merge."""
    return any(not _all_the_same(names, changes) for names in base.ties)


def has_new_head(base: BaseOnDisk, changes: Changes) -> bool:
    """Whether the adapter brings whole modules that the base's files have nothing of."""
    return any(name not in base.stored and len(base.tied_to(name)) == 1 for name in changes.copies)


def _check_complete(folder: BaseFolder, base: BaseOnDisk, changes: Changes) -> None:
    lacking: list[str] = []
    joined: list[str] = []
    for name in base.lacking:
        if name in changes.copies:
            continue
        changed = any(changes.origin(each) is not None for each in base.tied_to(name))
        (joined if changed else lacking).append(name)
    unknown = [key for key in folder.entries if key not in set(base.stored.values())]
    if joined:
        raise UnsupportedFeatureError(
            f"{folder.path}: the files keep {_some(joined)} in parts or under names that transformers puts together as it "
            "loads, and the adapter changes it. Load the model and call `merge_and_unload` instead."
        )
    if lacking and not unknown:
        raise CheckpointError(f"{folder.path}: the files lack {_some(lacking)}, which the model has by its config")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def _shard(name: str, metadata: Mapping[str, str], pieces: list[Piece]) -> Shard:
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begin, offsets = 0, []
    for piece in pieces:
        offsets.append(begin)
        fields[piece.key] = {
            "dtype": DTYPE_NAMES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [begin, begin + piece.size],
        }
        begin += piece.size
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    return Shard(name, head, tuple((len(head) + offset, piece) for offset, piece in zip(offsets, pieces, strict=True)))
