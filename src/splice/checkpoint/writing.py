"""Writing a checkpoint so that the folder holds the old one or the new one at any moment, never half of each."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch

from splice.checkpoint.files import alone_in, beside, flush, write_text
from splice.checkpoint.format import BIN_NAME, CONFIG_NAME, METADATA_KEY, SAFETENSORS_NAME
from splice.checkpoint.incoming import (
    CONFIG_DIGEST,
    INCOMING_CONFIG,
    INCOMING_DIGEST,
    digest_of,
    is_incoming_of,
    preferred_weights,
)


def write_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: str, safe_serialization: bool, base: str = ""
) -> None:
    """Put a checkpoint into `folder`; `base` is the fingerprint of its base.

    Both files are complete on disk before either takes its name. The weights go first, and it is written down which config
    is theirs; should a crash come between the two, the new config lies beside and a load takes it (`finished_config`).
    """
    # Not into a folder of another name that then takes this one's place: files of others in it would be lost.
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / (SAFETENSORS_NAME if safe_serialization else BIN_NAME)
    with alone_in(folder):
        _finish(folder)
        try:
            _put(folder, weights, tensors, config, base)
        finally:
            _finish(folder)
            for name in (INCOMING_CONFIG, INCOMING_DIGEST):
                (folder / name).unlink(missing_ok=True)


def _put(folder: Path, weights: Path, tensors: Mapping[str, torch.Tensor], config: str, base: str) -> None:
    with beside(weights) as new_weights:
        if weights.name == SAFETENSORS_NAME:
            # Imported when it is used: a load has no need of it.
            from safetensors.torch import save_file

            digest = hashlib.sha256(config.encode()).hexdigest()
            metadata = {"format": "pt", CONFIG_DIGEST: digest, **({METADATA_KEY: base} if base else {})}
            save_file(_independent(tensors), new_weights, metadata=metadata)
            _sort_metadata(new_weights)
        else:
            # Into an open file: to a path torch writes the path's name too, which is another one each time.
            with open(new_weights, "wb") as file:
                torch.save({name: tensor.detach() for name, tensor in tensors.items()}, file)
            write_text(folder / INCOMING_DIGEST, digest_of(new_weights))
        flush(new_weights)
        write_text(folder / INCOMING_CONFIG, config)
        os.replace(new_weights, weights)
        if weights.name == BIN_NAME:
            # A load prefers safetensors. While an older file of these is there, the old checkpoint is what the folder holds;
            # in the moment in which it goes, the new one is.
            (folder / SAFETENSORS_NAME).unlink(missing_ok=True)


def _finish(folder: Path) -> None:
    """Finish a save that put its weights in place and not yet its config."""
    first = preferred_weights(folder)
    with suppress(FileNotFoundError):  # another process that saves the same has just done it
        if first is not None and is_incoming_of(first):
            os.replace(folder / INCOMING_CONFIG, folder / CONFIG_NAME)


def _sort_metadata(path: Path) -> None:
    """Bring the metadata of a safetensors file into one order, so that a checkpoint can be told by its hash."""
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # it is padded with spaces
            file.seek(8)
            file.write(text.ljust(size))


def _independent(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors that share no memory with one another, as safetensors needs them."""
    # Told as the reference tells it: by the storage, not by the tensor, since two may begin at different places in it.
    # With its device, since two devices may use the same address.
    seen: set[tuple[torch.device, int, int]] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        shares = tensor.numel() > 0 and storage in seen
        seen.add(storage)
        result[name] = tensor.clone() if shares else tensor
    return result
