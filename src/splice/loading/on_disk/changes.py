"""What merging makes of the tensors of a model whose weights stand in files, worked out one layer at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from splice.kinds.host import Host
from splice.kinds.module_copy import WholeModule
from splice.surgery.merging import ToMerge, to_merge


class Changes(NamedTuple):
    """Which tensors of the network differ after a merge, and how to get them."""

    # Path of a layer -> what works out its tensors.
    layers: Mapping[str, ToMerge]
    # Name of a tensor in the network -> path of the layer whose merge gives it.
    by_layer: Mapping[str, str]
    # Name in the network -> the tensor of a trained copy of a whole module, which takes the place of the base's.
    copies: Mapping[str, torch.Tensor]

    def origin(self, name: str) -> str | None:
        """What says where the values of a tensor come from: equal for tensors that are one; None of the base's own."""
        if name in self.copies:
            return f"copy {name}"
        path = self.by_layer.get(name)
        if path is None:
            return None
        leader, leaf = self.layers[path].leader, name.rpartition(".")[2]
        return f"merge {leader} {leaf}"


def changes_of(hosts: Mapping[str, Host], names: Sequence[str], safe_merge: bool) -> Changes:
    """Find out what merging these adapters changes. No value is read.

    Raises:
        NotImplementedError: an adapter cannot be merged on one of its layers.
        ValueError: merging these and not others would change the output.
    """
    layers = to_merge(hosts, names, safe_merge)
    by_layer: dict[str, str] = {}
    copies: dict[str, torch.Tensor] = {}
    for path, host in hosts.items():
        if path in layers:
            by_layer.update({_join(path, name): path for name in _changed(host, names)})
        for name in names:
            layer = host.layers.get(name)
            if isinstance(layer, WholeModule) and layer.stays_merged:
                copies.update(_copied(path, layer.module))
    return Changes(layers, by_layer, copies)


def _changed(host: Host, names: Sequence[str]) -> list[str]:
    """Names of the tensors of a layer that merging gives anew."""
    present = [host.layers[name] for name in names if name in host.layers]
    changed = {name for layer in present for name in layer.changed_names}
    changed.update("bias" for layer in present if layer.trained_bias is not None)
    return [name for name, tensor in host.base._parameters.items() if tensor is not None and name in changed]


def _copied(path: str, module: nn.Module) -> dict[str, torch.Tensor]:
    return {_join(path, name): tensor.detach() for name, tensor in module.state_dict().items()}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
