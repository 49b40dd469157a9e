"""Merging adapters into the files of a base model, in the memory of a few tensors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from splice import __version__
from splice.base_from_config import empty_base
from splice.checkpoint.download import fetched_folder
from splice.checkpoint.source import looks_like_a_path
from splice.checkpoint.tensors import memory_of
from splice.errors import CheckpointError, PeftError
from splice.kinds.registry import method_of
from splice.loading.on_disk.base_folder import BaseFolder, read_base_folder
from splice.loading.on_disk.base_on_disk import BaseOnDisk, base_on_disk
from splice.loading.on_disk.changes import changes_of
from splice.loading.on_disk.merging import Progress, Written, check_free, write_merged
from splice.loading.opening import open_checkpoint
from splice.loading.options import LoadOptions
from splice.loading.saving import get_peft_model_state_dict
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
    class_name: str | None = None,
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
        class_name: of a class of transformers to make the base with; None for what the adapter and the config say.
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
    folder = read_base_folder(local_base(base, base_revision))
    stored = base_for(folder, adapters[0], dtype, class_name, trust_remote_code, options)
    names = [f"adapter {number}" for number in range(len(adapters))]
    model = PeftModel.from_pretrained(stored.network, adapters[0], names[0], **options)
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(adapter, name, **options)
    identity = {
        "base": _identity(folder),
        "adapters": [_digest(model, name) for name in names],
        "weights": None if weights is None else list(weights),
        "dtype": str(dtype),
        "safe": safe_merge,
        "versions": [__version__, torch.__version__],
    }
    if weights is not None:
        model.add_weighted_adapter(names, list(weights), _MERGED, combination_type="cat")
        names = [_MERGED]
    tuner = model.base_model
    tuner.set_adapter(names)
    names = adapters_to_merge(tuner.hosts.values(), tuner.selection, tuner.peft_config, names)
    changes = changes_of(tuner.hosts, names, safe_merge)
    return write_merged(folder, stored, changes, Path(out), identity, dtype, progress)


def base_for(
    folder: BaseFolder,
    adapter: str | os.PathLike[str],
    dtype: torch.dtype | None,
    class_name: str | None,
    trust_remote_code: bool,
    options: Mapping[str, Any],
) -> BaseOnDisk:
    """The base that lies in `folder`, of the class that the adapter is for.

    Raises:
        NotImplementedError: the adapter changes no weights, so there is nothing to be done with the files of a base.
    """
    checkpoint = open_checkpoint(adapter, None, LoadOptions.plain(options), None)
    method = method_of(checkpoint.config)
    # Asked here: without weights, what acts on the call of the network may not even be put on it.
    if not method.merges and method.experts is None:
        raise NotImplementedError(
            f"{adapter}: an adapter of {method.name.value} changes no weights, so that nothing can be merged or converted"
        )
    network = empty_base(str(folder.path), checkpoint, None, class_name, trust_remote_code)
    return base_on_disk(network, folder, dtype)


def local_base(base: str | os.PathLike[str], revision: str | None) -> Path:
    """The folder of the base, fetched from the Hub where it is an id of it."""
    path = Path(base)
    if path.is_dir():
        return path
    if looks_like_a_path(os.fspath(base)):
        raise CheckpointError(f"{base} is no folder")
    return fetched_folder(os.fspath(base), revision, _OF_A_BASE)


def _identity(folder: BaseFolder) -> list[list[object]]:
    # By size and time and not by content: reading a base to find out whether it has changed takes as long as merging it.
    files = [folder.path / name for name in (*folder.shards, "config.json")]
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _digest(model: PeftModel, name: str) -> str:
    """What tells an adapter from others: its config and its values, wherever they came from."""
    found = hashlib.sha256(model.peft_config[name].to_json().encode())
    for key, tensor in sorted(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False).items()):
        found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        tensor = tensor.detach().contiguous()
        if tensor.numel():
            found.update(memory_of(tensor))
    return found.hexdigest()
