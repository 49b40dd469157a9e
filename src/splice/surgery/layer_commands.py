"""What can be done to one adapted layer alone, in the reference's words: libraries loop over layers and call these.

Most users change the model (`PeftModel.set_adapter`...), where a change costs nothing per layer. A layer that is told
something of its own gets a selection of its own, until the model is told the next time.
"""

from __future__ import annotations

from collections.abc import Sequence

from splice.errors import warn
from splice.kinds.host import Host
from splice.kinds.registry import method_of_layer
from splice.surgery.detach import detach
from splice.surgery.layer_attributes import View, method_view
from splice.surgery.merging import merge_layer, unmerge_layer


def _number_names(host: Host) -> tuple[str, ...]:
    found: list[str] = []
    for adapter in host.layers.values():
        method = method_of_layer(adapter)
        found += [name for name, attribute in adapter.numbers.items() if attribute in vars(adapter)]
        found += method.layer_views if method is not None else ()
    return tuple(dict.fromkeys(found))


def _tensor_names(host: Host) -> tuple[str, ...]:
    found: list[str] = []
    for adapter in host.layers.values():
        method = method_of_layer(adapter)
        found += method.containers if method is not None else ()
        found += [name.partition(".")[0] for name, _ in adapter.named_slots()]
    return tuple(dict.fromkeys(found))


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
        for name, adapter in host.layers.items():
            adapter.set_trained(enabled and name in host.selection.active)

    @method_view
    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Whether these adapters are trained on this layer."""
        self.splice_host.selection.root.flags_changed = True
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.splice_host.layers:
                self.splice_host.layers[name].set_trained(requires_grad)

    @method_view
    def delete_adapter(self, adapter_name: str) -> None:
        """Take the adapter off this layer; an unknown name is ignored."""
        if adapter_name in self.splice_host.merged:
            raise ValueError(f"Adapter {adapter_name!r} is merged here; call `unmerge()` before deleting it.")
        if adapter_name in self.splice_host.layers:
            detach(self.splice_host.base, adapter_name)

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

    adapter_layer_names = View(_tensor_names)
    other_param_names = View(_number_names)
