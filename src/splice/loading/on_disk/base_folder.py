"""The folder of a base model as transformers writes it: shards of tensors, an index of them, and what lies beside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from splice.checkpoint.header import Entry
from splice.checkpoint.tensors import SafetensorsFile
from splice.errors import CheckpointError, UnsupportedFeatureError

WHOLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "config.json"
# Weights in other formats, which hold what was there before a merge: of no use beside what is merged, and misleading.
_OTHER_WEIGHTS = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors")
_OTHER_INDEX = ".index.json"


class BaseFolder(NamedTuple):
    """What the files of a base model hold, before any tensor is read."""

    # Where they are.
    path: Path
    # The fields of its config.
    config: Mapping[str, Any]
    # Name of a shard's file -> the file, in the order of the names. Each is opened once: what replaces it later is not read.
    shards: Mapping[str, SafetensorsFile]
    # The fields of the index; None where one file holds all.
    index_fields: Mapping[str, Any] | None
    # Names of the files to be carried along: tokenizer, settings of generation, code.
    others: tuple[str, ...]

    @property
    def entries(self) -> dict[str, tuple[str, Entry]]:
        """Name of a tensor in the files -> the shard that holds it, and where."""
        return {name: (shard, entry) for shard, file in self.shards.items() for name, entry in file.entries.items()}


def read_base_folder(path: Path, may_lack_weights: bool = False) -> BaseFolder:
    """Read config, index and headers.

    Args:
        path: of the folder.
        may_lack_weights: whether a folder of a config alone will do.

    Raises:
        CheckpointError: the folder holds no base model, or one that is damaged or incomplete.
        UnsupportedFeatureError: its weights are quantised, or in another format than safetensors.
    """
    config = _fields(path / CONFIG_NAME)
    if config.get("quantization_config"):
        how = config["quantization_config"].get("quant_method", "quantised")
        raise UnsupportedFeatureError(
            f"{path}: the weights are stored quantised ({how}); files are merged only where they hold plain weights. Merge "
            "into the base that was quantised, or load the model and call `merge_and_unload(dequantize=True)`."
        )
    index = _fields(path / INDEX_NAME) if (path / INDEX_NAME).exists() else None
    names = [WHOLE_NAME] if index is None else sorted(set(index.get("weight_map", {}).values()))
    if index is None and not (path / WHOLE_NAME).exists() and may_lack_weights:
        names = []
    elif index is None and not (path / WHOLE_NAME).exists():
        found = sorted(each.name for each in path.glob("*") if each.suffix in _OTHER_WEIGHTS)
        raise UnsupportedFeatureError(
            f"{path}: there is neither {WHOLE_NAME} nor {INDEX_NAME}; there is {', '.join(found) or 'no file of weights'}. "
            "Load the model and save it with `save_pretrained`, which writes safetensors."
        )
    shards = {name: _shard(path, name) for name in names}
    folder = BaseFolder(path, config, shards, index, tuple(sorted(_others(path))))
    for name, shard in (index or {}).get("weight_map", {}).items():
        if name not in shards[shard].entries:
            raise CheckpointError(f"{path}: {INDEX_NAME} says that {shard} holds {name!r}, and it does not")
    seen: dict[str, str] = {}
    for shard, file in shards.items():
        for name in file.entries:
            if seen.setdefault(name, shard) != shard:
                raise CheckpointError(f"{path}: both {seen[name]} and {shard} hold {name!r}")
    return folder


def _shard(folder: Path, name: str) -> SafetensorsFile:
    if Path(name).name != name:
        raise CheckpointError(f"{folder}: {INDEX_NAME} names {name!r}, which is no file of this folder")
    if not (folder / name).exists():
        raise CheckpointError(f"{folder}: {INDEX_NAME} names {name}, and there is no such file")
    return SafetensorsFile(folder / name)


def _fields(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return fields


def _others(path: Path) -> list[str]:
    return [
        each.name
        for each in path.iterdir()
        if each.is_file()
        and each.suffix not in _OTHER_WEIGHTS
        and not each.name.endswith(_OTHER_INDEX)
        and each.name != CONFIG_NAME
        and not each.name.startswith(".")
    ]
