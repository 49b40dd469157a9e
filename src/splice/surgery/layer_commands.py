"""What can be done to one adapted layer alone, in the reference's words: libraries loop over layers and call these.

Most users change the model (`PeftModel.set_adapter`...), where a change costs nothing per layer. A layer that is told
something of its own gets a selection of its own, until the model is told the next time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Protocol, cast

from torch import nn

from splice.base.bare import HOST, TUNER, carried
from splice.base.foreign_models import TAKES_ADAPTERS_OFF, is_called_from
from splice.base.sharding import divide_again
from splice.errors import warn
from splice.kinds.host import Host
from splice.kinds.registry import method_of_layer
from splice.kinds.slot import Role
from splice.surgery.detach import detach
from splice.surgery.layer_attributes import View, bare_layer, method_view
from splice.surgery.merging import merge_layer, unmerge_layer


def _number_names(host: Host) -> tuple[str, ...]:
    found: list[str] = []
    for adapter in host.layers.values():
        method = method_of_layer(adapter)
        found += [name for name, attribute in adapter.numbers.items() if attribute in vars(adapter)]
        found += method.layer_views if method is not None else ()
        found += [name.partition(".")[0] for name, item in adapter.registered.items() if item.slot.role is Role.BUFFER]
    return tuple(dict.fromkeys(found))


def _tensor_names(host: Host) -> tuple[str, ...]:
    found: list[str] = []
    for adapter in host.layers.values():
        method = method_of_layer(adapter)
        found += method.containers if method is not None else ()
        slots = ((name, item.slot) for name, item in adapter.registered.items())
        found += [name.partition(".")[0] for name, slot in slots if slot.stored and slot.role is not Role.BUFFER]
    return tuple(dict.fromkeys(found))


class _Tuner(Protocol):
    """What a network with adapters keeps of them, as far as one of its layers tells it something."""

    def left(self, path: str, name: str) -> None:
        """Note that the adapter `name` was taken off the layer at `path` alone."""
        ...


def _take_off(host: Host, names: Iterable[str]) -> None:
    """Take these adapters off a layer alone; the network is told."""
    network = host.network.get()
    tuner = None if network is None else cast("tuple[_Tuner] | None", carried(network, TUNER))
    for name in names:
        detach(host.base, name)
        if carried(host.base, HOST) is not None and name in host.selection.active:
            _let_others_act(host, name)
        if tuner is not None:
            tuner[0].left(host.path, name)


def _let_others_act(host: Host, gone: str) -> None:
    """Go on with the other active adapters of a layer that one has been taken off; where there are none, with its first."""
    names = [name for name in host.selection.active if name != gone]
    if not names:
        names = [min(host.layers)]
        warn(f"Adapter {gone!r} was active and is deleted now; {names[0]!r} is active instead.")
        host.selection.root.flags_changed = True
        host.layers[names[0]].set_trained(True)
    host.selection = host.selection.only_here()
    host.selection.set(names)


class LayerCommands:
    """Methods of an adapted layer; each gives way to a method of the same name of the base layer's own class."""

    splice_host: Host

    @method_view
    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters active on this layer, and trainable unless `inference_mode`; others are frozen."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        host = self.splice_host
        if host.merged:
            warn("Adapter cannot be set when the layer is merged. Unmerging it first.")
            unmerge_layer(host)
        host.selection = host.selection.only_here()
        host.selection.set(names)
        # Told to the model as a mark, not as a list of flags: it looks at all of them when it is told something itself.
        host.selection.root.flags_changed = True
        divide_again(host.network.get())
        for name, adapter in host.layers.items():
            adapter.set_trained(name in names and not inference_mode)

    @method_view
    def enable_adapters(self, enabled: bool) -> None:
        """Whether adapters take effect on this layer. Enabling makes the active ones trainable, disabling freezes all."""
        host = self.splice_host
        if not enabled and host.merged:
            unmerge_layer(host)
        host.selection = host.selection.only_here()
        host.selection.enable(enabled)
        host.selection.root.flags_changed = True
        divide_again(host.network.get())
        for name, adapter in host.layers.items():
            adapter.set_trained(enabled and name in host.selection.active)

    @method_view
    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Whether these adapters are trained on this layer."""
        self.splice_host.selection.root.flags_changed = True
        divide_again(self.splice_host.network.get())
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.splice_host.layers:
                self.splice_host.layers[name].set_trained(requires_grad)

    @method_view
    def delete_adapter(self, adapter_name: str) -> None:
        """Take the adapter off this layer; an unknown name is ignored."""
        if adapter_name in self.splice_host.merged:
            raise ValueError(f"Adapter {adapter_name!r} is merged here; call `unmerge()` before deleting it.")
        if adapter_name in self.splice_host.layers:
            _take_off(self.splice_host, [adapter_name])

    @method_view
    def get_base_layer(self) -> nn.Module:
        """The layer without adapters: the same tensors, seen through the class that the layer had."""
        host = self.splice_host
        if is_called_from(sys._getframe(1), TAKES_ADAPTERS_OFF):
            # What it gets takes this layer's place. That is the layer itself: its hooks and whoever holds it stay right,
            # and the adapters' tensors are freed. What is merged stays in the weights, as the reference has it.
            _take_off(host, list(host.layers))
            return host.base
        return bare_layer(host)

    @method_view
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add these adapters (the active ones, if none are named) to this layer's weights."""
        merge_layer(self.splice_host, adapter_names, safe_merge)

    @method_view
    def unmerge(self) -> None:
        """Give this layer back the very parameters it had before."""
        if not self.splice_host.merged:
            warn("Already unmerged. Nothing to do.")
        unmerge_layer(self.splice_host)

    @method_view
    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Names of this adapter's tensors in a checkpoint -> in the tree of modules, both behind the layer's path."""
        layer = self.splice_host.layers.get(adapter_name)
        found = () if layer is None else layer.named_slots()
        return {suffix: layer.names.on_layer(suffix, adapter_name) for suffix, _ in found if layer is not None}

    adapter_layer_names = View(_tensor_names)
    other_param_names = View(_number_names)
