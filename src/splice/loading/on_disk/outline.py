"""A base model without its weights: all layers, on the meta device, that read their tensors from the files when asked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from splice.base.conversions import key_renaming_of
from splice.base.offload import KEPT
from splice.checkpoint.header import Entry
from splice.errors import CheckpointError, PeftError
from splice.loading.on_disk.base_folder import BaseFolder
from splice.loading.on_disk.from_files import TORCH_DTYPES, FromFiles


class Outline(NamedTuple):
    """The model, and which of its tensors the files hold under which name."""

    # On the meta device.
    network: nn.Module
    # Name of a tensor in the network -> its name in the files. Of tied ones one has an entry.
    stored: Mapping[str, str]
    # Names in the network of each parameter that has more than one.
    ties: tuple[tuple[str, ...], ...]
    # Names in the network of the parameters that the files have no tensor for, also under no other name.
    lacking: tuple[str, ...]

    def tied_to(self, name: str) -> tuple[str, ...]:
        """All names in the network of the parameter of this name, itself among them."""
        return next((names for names in self.ties if name in names), (name,))


def outline_of(
    folder: BaseFolder, dtype: torch.dtype | None, task_class: str | None = None, trust_remote_code: bool = False
) -> Outline:
    """Build the model of `folder` on the meta device.

    Args:
        folder: of the base model.
        dtype: that its floating tensors are read in; None for the one that each is stored in.
        task_class: class of transformers to build with, where not the one that the config names.
        trust_remote_code: run code that lies in the folder.

    Raises:
        PeftError: transformers is not installed, or the config names no class that transformers has.
        CheckpointError: the files lack tensors of the model.
    """
    network = _network(folder, task_class, trust_remote_code)
    rename = key_renaming_of(network)
    own = dict(_tensors(network))
    stored = {}
    for key in folder.entries:
        name = rename(key)
        if name in own:
            stored[name] = key
    _tie(network, folder, stored)
    by_parameter = defaultdict(list)
    for name, parameter in network.named_parameters(remove_duplicate=False):
        by_parameter[id(parameter)].append(name)
    ties = tuple(tuple(names) for names in by_parameter.values() if len(names) > 1)
    known = {each for names in (*ties, *((name,) for name in own)) if any(n in stored for n in names) for each in names}
    lacking = tuple(name for name, _ in network.named_parameters(remove_duplicate=False) if name not in known)
    outline = Outline(network, stored, ties, lacking)
    entries = {name: folder.entries[key] for name, key in stored.items()}
    _take_dtypes(network, entries, dtype)
    _read_when_asked(outline, folder)
    return outline


def _network(folder: BaseFolder, task_class: str | None, trust_remote_code: bool) -> nn.Module:
    try:
        transformers: Any = import_module("transformers")
    except ImportError as error:
        raise PeftError(
            f"to merge into files, transformers is needed, and {error.name} is not installed: "
            "`pip install 'splice[transformers]'`"
        ) from error
    config = transformers.AutoConfig.from_pretrained(str(folder.path), trust_remote_code=trust_remote_code)
    names = [task_class] if task_class else list(config.architectures or ())
    found = next((name for name in names if name in dir(transformers)), None)
    with torch.device("meta"):
        if found is not None:
            maker = vars(transformers).get(found) or getattr(transformers, found)
            network = maker.from_config(config) if found.startswith("AutoModel") else maker(config)
        elif trust_remote_code:
            network = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        else:
            raise PeftError(
                f"{folder.path}: the config names the class {names}, and transformers has none of this name"
            )
    return cast(nn.Module, network.eval())


def _tensors(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from network.named_parameters(remove_duplicate=False)
    yield from network.named_buffers(remove_duplicate=False)


def _tie(network: nn.Module, folder: BaseFolder, stored: Mapping[str, str]) -> None:
    """Tie what transformers ties as it loads these files."""
    tie: Any = getattr(network, "tie_weights", None)  # a network of transformers, whose name for it is public
    if tie is None:
        return
    before = dict(network.named_parameters(remove_duplicate=False))
    tie()
    after = dict(network.named_parameters(remove_duplicate=False))
    for name, parameter in after.items():
        same = [other for other, p in after.items() if p is parameter and other in stored]
        # Where the files hold both, they are one parameter only if they hold the same.
        if len(same) > 1 and name in same[1:] and not _equal(folder, stored[same[0]], stored[name]):
            owner, _, leaf = name.rpartition(".")
            network.get_submodule(owner)._parameters[leaf] = before[name]


def _equal(folder: BaseFolder, one: str, other: str) -> bool:
    (shard, first), (second_shard, second) = folder.entries[one], folder.entries[other]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    step = 1 << 24
    with open(folder.path / shard, "rb") as a, open(folder.path / second_shard, "rb") as b:
        for begin in range(0, first.size, step):
            count = min(step, first.size - begin)
            a.seek(first.offset + begin)
            b.seek(second.offset + begin)
            if a.read(count) != b.read(count):
                return False
    return True


def _take_dtypes(network: nn.Module, entries: Mapping[str, tuple[str, Entry]], dtype: torch.dtype | None) -> None:
    """Give each tensor on the meta device the dtype that it is to be read in."""
    for name, (_, entry) in entries.items():
        owner, _, leaf = name.rpartition(".")
        module = network.get_submodule(owner)
        tensor = module._parameters.get(leaf)
        if tensor is None:
            continue
        if tuple(tensor.shape) != entry.shape:
            raise CheckpointError(
                f"{name!r} has the shape {list(entry.shape)} in the files, and {list(tensor.shape)} by the config: they are "
                "not of one model"
            )
        wanted = read_as(entry, dtype)
        if tensor.dtype != wanted:
            tensor.data = torch.empty(tensor.shape, dtype=wanted, device="meta")


def read_as(entry: Entry, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that a tensor of the files is read in, where floating ones are to be of `dtype`."""
    own = TORCH_DTYPES[entry.dtype]
    return dtype if dtype is not None and own.is_floating_point else own


def _read_when_asked(outline: Outline, folder: BaseFolder) -> None:
    """Let each layer get its tensors from the files whenever somebody needs them at hand."""
    for path, module in outline.network.named_modules():
        names = {leaf: f"{path}.{leaf}" if path else leaf for leaf in module._parameters}
        files = {}
        for leaf, name in names.items():
            found = next((each for each in outline.tied_to(name) if each in outline.stored), None)
            if found is not None:
                shard, entry = folder.entries[outline.stored[found]]
                files[leaf] = (folder.path / shard, entry)
        if names:
            # Also where the files have nothing: it says that what an adapter puts there has values.
            module.__dict__[KEPT] = FromFiles(files)
