"""The config of a save that was cut off between its two files: told by the digest that the weights carry."""

from __future__ import annotations

import hashlib
from pathlib import Path

from splice.checkpoint.format import BIN_NAME, SAFETENSORS_NAME
from splice.checkpoint.header import read_header
from splice.errors import CheckpointError

# A config that belongs to weights which may be in place already; a load finishes what a crash cut off.
INCOMING_CONFIG = "adapter_config.json.incoming"

# What a `.bin` file cannot say itself: the digest of the weights that the incoming config belongs to.
INCOMING_DIGEST = "adapter_model.bin.incoming"

# Where the metadata of a safetensors file says which config is that of its tensors. By digest and not by the time of the
# files: copies and downloads do not keep it.
CONFIG_DIGEST = "config_sha256"


def finished_config(config: Path) -> bytes:
    """The bytes of the config that belongs to the weights beside it: the incoming one, where a save was cut off."""
    # Reading only, never renaming: the folder may be read-only, or another process may be in the middle of its save.
    first = preferred_weights(config.parent)
    try:
        if first is not None and is_incoming_of(first):
            return (config.parent / INCOMING_CONFIG).read_bytes()
    except FileNotFoundError:
        pass  # that other process has come to its end meanwhile, and the incoming config has its name
    return config.read_bytes()


def preferred_weights(folder: Path) -> Path | None:
    """The file of weights that a load takes from `folder`; None where there is none."""
    weights = (folder / name for name in (SAFETENSORS_NAME, BIN_NAME))
    return next((path for path in weights if path.exists()), None)


def is_incoming_of(weights: Path) -> bool:
    """Whether the incoming config is that of these weights."""
    incoming = weights.parent / INCOMING_CONFIG
    if not incoming.exists() or not weights.is_file():
        return False
    if weights.name == BIN_NAME:
        noted = weights.parent / INCOMING_DIGEST
        return noted.exists() and noted.read_text(encoding="utf-8") == digest_of(weights)
    try:
        wanted = read_header(weights).metadata.get(CONFIG_DIGEST)
    except CheckpointError:
        return False  # the load will say what is wrong with the weights
    return hashlib.sha256(incoming.read_bytes()).hexdigest() == wanted


def digest_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    # In pieces of 1 MiB: files of weights may be larger than the memory.
    with open(path, "rb") as file:
        found = hashlib.sha256()
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()
