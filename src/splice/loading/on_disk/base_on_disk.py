"""A base model whose tensors stay in its files: all its layers, on the meta device, that read theirs when asked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from splice.base.conversions import key_renaming_of
from splice.base.foreign_models import is_pretrained
from splice.base.offload import KEPT
from splice.checkpoint.header import Entry
from splice.checkpoint.tensors import DTYPES
from splice.errors import CheckpointError
from splice.loading.on_disk.base_folder import BaseFolder
from splice.loading.on_disk.from_files import FromFiles


class BaseOnDisk(NamedTuple):
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


def base_on_disk(network: nn.Module, folder: BaseFolder, dtype: torch.dtype | None) -> BaseOnDisk:
    """Let the layers of `network` have their tensors from the files of `folder`.

    Args:
        network: the base model, on the meta device.
        folder: of its files.
        dtype: that its floating tensors are read in; None for the one that each is stored in.

    Raises:
        CheckpointError: a tensor has another shape in the files than in the network.
    """
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
    base = BaseOnDisk(network, stored, ties, lacking)
    entries = {name: folder.entries[key] for name, key in stored.items()}
    _take_dtypes(network, entries, dtype)
    _read_when_asked(base, folder)
    return base


def _tensors(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from network.named_parameters(remove_duplicate=False)
    yield from network.named_buffers(remove_duplicate=False)


def _tie(network: nn.Module, folder: BaseFolder, stored: Mapping[str, str]) -> None:
    """Tie what transformers ties as it loads these files."""
    if not is_pretrained(network):
        return
    tying: Any = network
    before = dict(network.named_parameters(remove_duplicate=False))
    tying.tie_weights()
    after = dict(network.named_parameters(remove_duplicate=False))
    for name, parameter in after.items():
        same = [other for other, p in after.items() if p is parameter and other in stored]
        # Where the files hold both, they are one parameter only if they hold the same.
        if len(same) > 1 and name in same[1:] and not _equal(folder, stored[same[0]], stored[name]):
            owner, _, leaf = name.rpartition(".")
            network.get_submodule(owner)._parameters[leaf] = before[name]


def _equal(folder: BaseFolder, one: str, other: str) -> bool:
    (shard, _), (second, _) = folder.entries[one], folder.entries[other]
    return folder.shards[second].says(other, folder.shards[shard].read([one])[0])


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
    own = DTYPES[entry.dtype]
    return dtype if dtype is not None and own.is_floating_point else own


def _read_when_asked(base: BaseOnDisk, folder: BaseFolder) -> None:
    """Let each layer get its tensors from the files whenever somebody needs them at hand."""
    for path, module in base.network.named_modules():
        names = {leaf: f"{path}.{leaf}" if path else leaf for leaf in module._parameters}
        files = {}
        for leaf, name in names.items():
            found = next((each for each in base.tied_to(name) if each in base.stored), None)
            if found is not None:
                key = base.stored[found]
                files[leaf] = (folder.shards[folder.entries[key][0]], key)
        if names:
            # Also where the files have nothing: it says that what an adapter puts there has values.
            module.__dict__[KEPT] = FromFiles(files)
