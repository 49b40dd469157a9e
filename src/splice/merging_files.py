"""Merging adapters into the files of a base model, in the memory of a few tensors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from splice.errors import CheckpointError, PeftError
from splice.loading.on_disk.base_folder import BaseFolder, read_base_folder
from splice.loading.on_disk.changes import changes_of
from splice.loading.on_disk.merging import Progress, Written, check_free, write_merged
from splice.loading.on_disk.outline import outline_of
from splice.surgery.merging import adapters_to_merge
from splice.tasks import PeftModel

_MERGED = "merged"
# Files of a base on the Hub that a merge reads or carries along: repositories often hold the weights in other formats too.
_OF_A_BASE = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.py", "*.txt", "*.tiktoken", "LICENSE*", "*.md"]


def merge_files(
    base: str | os.PathLike[str],
    adapters: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    safe_merge: bool = False,
    base_revision: str | None = None,
    task_class: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Written:
    """Merge adapters into the files of a base model, as `merge_and_unload` and `save_pretrained` of the loaded model would.

    The model is never loaded: one layer at a time is read, merged and written. What the adapters leave alone is copied.

    Args:
        base: folder of the base model, in safetensors, or its id on the Hub.
        adapters: folders or Hub ids, applied in this order.
        out: the folder to be made. It appears when it is complete. Cut short, a merge goes on where it stopped when it is
            started again.
        weights: a factor for each adapter: the sum is merged that `add_weighted_adapter` makes ("cat").
        dtype: of the merged model's floating tensors; None for the one that each tensor of the base has.
        safe_merge: refuse values that are not finite.
        base_revision: of the base on the Hub.
        task_class: class of transformers to build the base with, where not the one that its config names.
        trust_remote_code: run code that lies in the base's folder.
        progress: told how many bytes have been written.
        **options: of `PeftModel.from_pretrained`, for each adapter.

    Returns:
        What was written.

    Raises:
        FileExistsError: `out` is there already.
        NotImplementedError: an adapter cannot be merged.
        UnsupportedFeatureError: the base's files hold quantised weights, no safetensors, or a layer that changes in parts.
        CheckpointError: the base or an adapter is damaged.
        AdapterMismatchError: an adapter does not fit.
        PeftError: another process is merging into `out`.
    """
    if not adapters:
        raise PeftError("there is no adapter to merge")
    if weights is not None and len(weights) != len(adapters):
        raise PeftError(
            f"there are {len(adapters)} adapters and {len(weights)} weights: give one weight for each adapter"
        )
    check_free(Path(out))
    folder = read_base_folder(_local(base, base_revision))
    outline = outline_of(folder, dtype, task_class, trust_remote_code)
    names = [f"adapter {number}" for number in range(len(adapters))]
    model = PeftModel.from_pretrained(outline.network, adapters[0], names[0], **options)
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(adapter, name, **options)
    if weights is not None:
        model.add_weighted_adapter(names, list(weights), _MERGED, combination_type="cat")
        names = [_MERGED]
    model.base_model.set_adapter(names)
    tuner = model.base_model
    names = adapters_to_merge(tuner.hosts.values(), tuner.selection, tuner.peft_config, names)
    changes = changes_of(tuner.hosts, names, safe_merge)
    identity = {
        "base": _identity(folder),
        "adapters": [_digest(Path(adapter)) for adapter in adapters],
        "weights": None if weights is None else list(weights),
        "dtype": str(dtype),
        "class": task_class,
    }
    return write_merged(folder, outline, changes, Path(out), identity, dtype, progress)


def _local(base: str | os.PathLike[str], revision: str | None) -> Path:
    """The folder of the base, fetched from the Hub where it is an id of it."""
    path = Path(base)
    if path.is_dir():
        return path
    if path.is_absolute() or os.fspath(base).count("/") > 1 or os.fspath(base).startswith("."):
        raise CheckpointError(f"{base} is no folder")
    # Imported when it is used: merging a folder has no need of it.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(os.fspath(base), revision=revision, allow_patterns=_OF_A_BASE))
    except Exception as error:
        raise CheckpointError(f"{base} is no folder, and cannot be fetched from the Hub: {error}") from error


def _identity(folder: BaseFolder) -> list[list[object]]:
    # By size and time and not by content: reading a base to find out whether it has changed takes as long as merging it.
    files = [folder.path / name for name in (*folder.shards, "config.json")]
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _digest(adapter: Path) -> str:
    if not adapter.is_dir():
        return str(adapter)
    found = hashlib.sha256()
    for file in sorted(adapter.glob("adapter_*")):
        found.update(file.name.encode())
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                found.update(block)
    return found.hexdigest()
