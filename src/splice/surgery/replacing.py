"""Another base layer below the adapters: `layer.base_layer = module`, as quantisers and initialisations do it."""

from __future__ import annotations

from torch import nn

from splice.base.bare import HOST, bare_children
from splice.base.foreign_models import forward_places
from splice.base.layers import LayerKind, features, kind_of
from splice.kinds.host import Host, host_of
from splice.surgery.generated import Generated, generated
from splice.surgery.layer_attributes import bare_layer
from splice.surgery.reading import publish_tensors

# By which names the layer below the adapters is told.
BASE_NAMES = ("base_layer", "original_module")


def replace_base(layer: nn.Module, module: object, name: str, mixin: type[Generated]) -> None:
    """Let `layer` be what `module` is, of its class and with its tensors; the object and its adapters stay.

    Args:
        layer: an adapted layer.
        module: the new base layer.
        name: what the caller calls it.
        mixin: what is put in front of the class of an adapted layer.

    Raises:
        TypeError: `module` is no module.
        ValueError: it is no layer that the adapters fit on, it or the layer is hooked, or adapters are in the old one's
            tensors. Nothing has been changed.
    """
    host = host_of(layer)
    assert host is not None
    if not isinstance(module, nn.Module):
        raise TypeError(f"{host.path}.{name} must be a module, got {type(module).__name__}")
    _check(host, module, name)
    cls = generated(mixin, type(module))
    publish_tensors(cls, module, type(module))
    # The object stays, so the network and whoever holds the layer need not be told; hooks on it stay with it.
    old, state = vars(layer), dict(vars(module))
    for key, value in old.items():
        if key.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            state[key] = value
    state["_parameters"], state["_buffers"] = dict(module._parameters), dict(module._buffers)
    state["_modules"] = {**module._modules, **host.added}
    state.update({HOST: host, "training": layer.training})
    host.original = type(module)
    layer.__class__ = cls
    old.clear()
    old.update(state)


def _check(host: Host, module: nn.Module, name: str) -> None:
    what = f"{host.path}.{name} cannot be replaced by this {type(module).__name__}"
    if host_of(module) is not None:
        raise ValueError(f"{what}: it carries adapters itself. Give the layer without them (`{name}` of it).")
    if host.merged:
        raise ValueError(f"{what} while the adapters {host.merged} are merged into the old one; unmerge them first.")
    if host.displaced:
        raise ValueError(f"{what}: adapter {host.displaced_by!r} trains the bias in the place of the old one's.")
    if forward_places(module) or forward_places(host.base):
        raise ValueError(
            f"{what}: one of the two has a forward of its own, as accelerate's hooks are. Remove it first."
        )
    taken = [child for child, _ in bare_children(module) if child in host.added]
    if taken:
        raise ValueError(f"{what}: it has a module {taken[0]!r}, where the tensors of an adapter stand.")
    old = bare_layer(host)
    kinds = kind_of(old), kind_of(module)
    sizes = [features(each) if kind is not None else None for each, kind in zip((old, module), kinds)]
    # A linear layer may be stored in another way (quantised); of all others the adapters know more than the sizes.
    alike = kinds[0] is LayerKind.LINEAR or (type(old) is type(module) and old.extra_repr() == module.extra_repr())
    if kinds[0] is not kinds[1] or sizes[0] != sizes[1] or not alike:
        raise ValueError(f"{what}: the adapters are for {old}, and it is {module}.")
