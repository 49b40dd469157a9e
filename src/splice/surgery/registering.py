"""Putting the tensors of an adapter layer into the tree of modules, and taking them out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, cast

from torch import nn

from splice.base.offload import forget_elsewhere, is_offloaded, keep_elsewhere
from splice.kinds.container import Container, Holder, Owner, Tie
from splice.kinds.effect import Forward
from splice.kinds.host import Host, host_of
from splice.kinds.layer import AdapterLayer
from splice.kinds.slot import Role
from splice.kinds.tensors import Home, Registered
from splice.surgery.layer_attributes import bare_layer


def register(adapter: AdapterLayer, name: str, home: Home, owner: Owner | None = None) -> None:
    """Register the tensors of `adapter`, which is called `name`, in containers at `home`.

    `owner` is told where somebody hooks what holds them.
    """
    # First of all, so that `unregister` finds what an interrupt cuts short.
    adapter.home = home._replace(has_bare=True) if adapter.loose else home
    for path, entry in adapter.entries.items():
        container = _container(home, path, adapter.training, adapter.base)
        if type(entry) is not Holder:
            if entry.training is not container.training:
                entry.train(container.training)
            if isinstance(entry, Holder):
                entry.link(adapter)
        container._modules[name] = entry
        for module in entry.modules() if entry._modules else (entry,):
            if isinstance(module, Holder):  # others are the base's own kinds, and are called
                module.__dict__["owner"] = owner
    for suffix, (registry, path, slot) in adapter.registered.items() if adapter.loose else ():
        if registry is not adapter.loose:
            continue
        nameless = adapter.names.nameless(suffix)
        if nameless is not None:
            _register_nameless(adapter, name, suffix, home)
            continue
        if adapter.names.is_on_layer(suffix, name):
            _register_on_layer(adapter, suffix)
            continue
        container = _container(home, path, adapter.training, adapter.base)
        is_buffer = slot.role is Role.BUFFER
        in_tree = container._buffers if is_buffer else container._parameters
        in_tree[name] = registry[path]
        if is_buffer and not slot.persistent:
            container._non_persistent_buffers_set.add(name)
        adapter.registered[suffix] = Registered(in_tree, name, slot)
        if is_offloaded(container):
            keep_elsewhere(container, name, adapter.tensor(suffix))
        container.__dict__["owner"] = owner
    adapter.loose.clear()


def tie(layers: Mapping[str, AdapterLayer], follower: AdapterLayer, name: str) -> None:
    """Have whoever exchanges a parameter that registered adapter layers called `name` share exchange it in all of them."""
    for suffix, (path, of, transposed) in follower.leaders.items():
        leader, there = layers[path], follower.registered[suffix]
        here = leader.registered[of]
        if there.slot.role is Role.BUFFER:
            continue
        first, also = _module_with(leader, of, name), _module_with(follower, suffix, name)
        if first is None or also is None:
            continue
        places = first.ties.get(here.name) or [Tie(here.registry, here.name, False)]
        places.append(Tie(there.registry, there.name, transposed))
        for module, key in ((first, here.name), (also, there.name)):
            module.__dict__.setdefault("ties", {})[key] = places


def _module_with(adapter: AdapterLayer, suffix: str, name: str) -> Container | Holder | None:
    """The module in the tree that holds the parameter `suffix` of `adapter`, which is called `name`."""
    home, registry = adapter.home, adapter.registered[suffix].registry
    container = None if home is None else _module_at(home, adapter.names.place(suffix).container.split("."))
    entry = None if container is None else container._modules.get(name, container)
    for module in () if entry is None else entry.modules():
        if isinstance(module, (Container, Holder)) and module._parameters is registry:
            return module
    return None


def unregister(adapter: AdapterLayer, name: str, owner: Owner | None = None, for_good: bool = True) -> None:
    """Take the tensors of `adapter` out of the tree, also where putting them there was interrupted at any point.

    Args:
        adapter: the adapter layer.
        name: of its adapter.
        owner: as it was registered with.
        for_good: whether hooks that keep its values elsewhere forget them: it is not registered again.
    """
    home = adapter.home
    if home is None:
        return
    # A deletion comes by here for every layer: for nearly all methods the tensors stand in entries alone.
    bare = _unregister_bare(adapter, name, home) if home.has_bare else ()
    hooked, added = for_good and (owner is None or owner.hooked), home.added
    for path, entry in adapter.entries.items():
        if type(entry) is not Holder:
            if isinstance(entry, Holder):
                entry.link(None)
            if for_good:
                forget_values([entry])
        elif hooked:
            forget_values([entry])
        container = added.get(path)
        if not isinstance(container, Container):  # inside another module, or its registration was interrupted
            _drop(home, path, name)
        elif not container.drop(name):
            home.modules.pop(path, None)
            del added[path]
    for path in bare:
        _drop(home, path, name)
    adapter.home = None


def _unregister_bare(adapter: AdapterLayer, name: str, home: Home) -> list[str]:
    """Take back the tensors that stand in no entry of the adapter's; the containers that they are entries of."""
    paths = []
    for suffix, (registry, _, slot) in list(adapter.registered.items()):
        if adapter.names.nameless(suffix) is not None:
            _unregister_nameless(adapter, suffix, home)
            continue
        path, leaf = adapter.names.place(suffix)
        if adapter.names.is_on_layer(suffix, name):
            _unregister_on_layer(adapter, suffix)
            continue
        # The layer keeps its tensors: whoever still holds it can go on reading them.
        if not leaf and registry is not adapter.loose:
            adapter.loose[path] = registry[name]
            adapter.registered[suffix] = Registered(adapter.loose, path, slot)
        if not leaf:
            paths.append(path)
    return paths


def forget_values(entries: Iterable[nn.Module]) -> None:
    """Let hooks that bring the tensors of what an adapter has left behind keep none of them."""
    for module in (module for entry in entries for module in entry.modules()):
        if is_offloaded(module):
            for name in (*module._parameters, *module._buffers):
                forget_elsewhere(module, name)


class BaseLayer(Holder):
    """What the reference calls `base_layer` and has tensors of an adapter in; all else that is asked of it is the base's."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        del self._parameters["bias"]  # of one that is not held here, the base is asked
        self.__dict__["base"] = base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = vars(self)["base"]
            host = host_of(base)
            return getattr(base if host is None else bare_layer(host), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        host = host_of(vars(self)["base"])
        assert host is not None
        return bare_layer(host)(*args, **kwargs)


def _register_nameless(adapter: AdapterLayer, name: str, suffix: str, home: Home) -> None:
    """Register a tensor that has no adapter's name in its own: where the base has such a parameter, in its place."""
    _, path, slot = adapter.registered[suffix]
    *parents, key = (adapter.names.nameless(suffix) or "").split(".")
    registry: dict[str, Any] = _holder(home, parents, adapter.base)._parameters if parents else adapter.base._parameters
    host = host_of(adapter.base)
    if not parents and host is not None:
        host.displaced[key], host.displaced_by = registry[key], name
    registry[key] = adapter.loose[path]
    adapter.registered[suffix] = Registered(registry, key, slot)


def _unregister_nameless(adapter: AdapterLayer, suffix: str, home: Home) -> None:
    registry, key, slot = adapter.registered[suffix]
    *parents, leaf = (adapter.names.nameless(suffix) or "").split(".")
    host = host_of(adapter.base)
    if registry is not adapter.loose:
        adapter.loose[suffix] = registry[key]
        adapter.registered[suffix] = Registered(adapter.loose, suffix, slot)
    holder = _module_at(home, parents)
    if isinstance(holder, Holder):  # also what an interrupt came before it was noted
        holder._parameters.pop(leaf, None)
    if not parents and host is not None and key in host.displaced:
        own = host.displaced.pop(key)
        if host.displaced_by not in host.merged:  # else it was merged for good, and what is there stays
            adapter.base._parameters[key] = own
    _drop_holders(home, parents)


def _register_on_layer(adapter: AdapterLayer, suffix: str) -> None:
    """Register a tensor as a parameter of the layer itself.

    Raises:
        ValueError: the layer has something of that name.
    """
    base, host = adapter.base, host_of(adapter.base)
    _, path, slot = adapter.registered[suffix]
    if host is None or suffix in base._parameters or suffix in base._modules:
        raise ValueError(f"the base layer has a {suffix!r} of its own, where a tensor of an adapter stands. Rename it.")
    host.held.add(suffix)  # first, so that what an interrupt cuts short is found
    base._parameters[suffix] = adapter.loose[path]
    adapter.registered[suffix] = Registered(cast("dict[str, Any]", base._parameters), suffix, slot)


def _unregister_on_layer(adapter: AdapterLayer, suffix: str) -> None:
    registry, key, slot = adapter.registered[suffix]
    host, path = host_of(adapter.base), adapter.names.place(suffix).container
    if registry is not adapter.loose:
        adapter.loose[path] = registry[key]
        adapter.registered[suffix] = Registered(adapter.loose, path, slot)
    if host is not None and suffix in host.held:  # also what an interrupt came before it was noted
        adapter.base._parameters.pop(suffix, None)
        host.held.discard(suffix)


def _holder(home: Home, parents: list[str], base: nn.Module) -> nn.Module:
    """The module below `home` that these components lead to, made where it is not there yet."""
    modules, outermost = home.modules, True
    found: nn.Module | None = None
    for parent in parents:
        found = modules.get(parent)
        if found is None:
            of = home.layer if outermost else base
            found = modules[parent] = BaseLayer(of) if parent == "base_layer" else Holder()
            if outermost:
                home.added[parent] = found
        modules, outermost = found._modules, False
    assert found is not None
    return found


def _drop_holders(home: Home, parents: list[str]) -> None:
    """Take away those of these modules, the innermost first, that hold nothing any more."""
    for count in range(len(parents), 0, -1):
        module = _module_at(home, parents[:count])
        if module is None or module._modules or any(p is not None for p in module._parameters.values()):
            return
        above = _module_at(home, parents[: count - 1])
        del (home.modules if above is None else above._modules)[parents[count - 1]]
        if above is None:
            home.added.pop(parents[0], None)


def _module_at(home: Home, path: list[str]) -> nn.Module | None:
    """The module below `home` that these components lead to; None where there is none, and for the home itself."""
    modules, found = home.modules, None
    for part in path:
        found = modules.get(part)
        if found is None:
            return None
        modules = found._modules
    return found


def _container(home: Home, path: str, training: bool, base: nn.Module) -> Container:
    """The container at `path`, made where it is not there yet.

    Raises:
        ValueError: the base layer has a module of its own there.
    """
    found = home.added.get(path) if "." not in path else None
    if isinstance(found, Container):
        return found
    *parents, last = path.split(".")
    modules = _holder(home, parents, base)._modules if parents else home.modules
    container = modules.get(last)
    if container is not None and not isinstance(container, Container):
        # Another name would part the tree from the files, and in its place the base's own module would be lost.
        raise ValueError(
            f"the base layer has a {type(container).__name__} of its own named {path!r}, where the tensors of an adapter "
            "stand. Rename it, or leave the layer out with `exclude_modules`."
        )
    if container is None:
        container = Container()
        container.__dict__["training"] = training
        if not parents:
            home.added[last] = container
        modules[last] = container
    return container


def _drop(home: Home, path: str, name: str) -> None:
    """Take the entry `name` out of the container at `path`; what is empty then goes too."""
    *parents, last = path.split(".")
    way: list[tuple[dict[str, nn.Module | None], str]] = []
    modules = home.modules
    for part in (*parents, last):
        module = modules.get(part)
        if module is None:
            return
        way.append((modules, part))
        modules = module._modules
    container = way[-1][0][last]
    if not isinstance(container, Container):
        return
    forget_elsewhere(container, name)
    if container.drop(name):
        return
    del way[-1][0][last]
    if not parents:
        home.added.pop(last, None)
    _drop_holders(home, parents)


def called_through(adapter: AdapterLayer, run: Forward) -> Forward:
    """`run`, called through the modules that hold the tensors of `adapter`, so that hooks on these fire around it."""
    home = adapter.home
    assert home is not None
    roots = [home.added[path.partition(".")[0]] for path in _containers(adapter)]
    for leader in adapter.shared:
        assert leader.home is not None
        roots += [leader.home.added[path.partition(".")[0]] for path in _containers(leader)]
    holders = [module for entry in adapter.entries.values() for module in entry.modules() if isinstance(module, Holder)]
    containers = [module for root in roots for module in root.modules() if isinstance(module, Container)]

    def call(*args: Any, **kwargs: Any) -> Any:
        step: Callable[[], Any] = partial(run, *args, **kwargs)
        for module in (*holders, *containers):
            step = partial(module, step)
        return step()

    return call


def share(adapter: AdapterLayer, name: str, host: Host) -> None:
    """Let the layer name the tensors too that all layers of the adapter `name` share, as the reference's layers do.

    It is the very container that holds them for the network: a second one would come apart from the first in a `.to`.
    """
    for shared in adapter.shared:
        assert shared.home is not None
        for path in _on_layers(shared):
            module = shared.home.modules[path]
            assert module is not None
            host.sharing.setdefault(path, set()).add(name)
            host.base._modules[path] = host.added[path] = module


def unshare(adapter: AdapterLayer, name: str, host: Host) -> None:
    """Take back what `share` did, unless another adapter of the layer shares as well."""
    for path in [path for shared in adapter.shared for path in _on_layers(shared)]:
        names = host.sharing.get(path, set())
        names.discard(name)
        if not names:
            host.base._modules.pop(path, None)
            host.added.pop(path, None)
            host.sharing.pop(path, None)


def _on_layers(shared: AdapterLayer) -> list[str]:
    """The containers that every layer names; not those inside others, each of which is for some of the layers."""
    return [path for path in _containers(shared) if "." not in path]


def _containers(adapter: AdapterLayer) -> list[str]:
    # In their own order and not as a set: data-parallel processes send buffers to one another in the order of the tree.
    names, own = adapter.names, adapter.base._parameters
    named = (suffix for suffix, item in adapter.registered.items() if item.registry is not own)
    return list(dict.fromkeys(names.place(suffix).container for suffix in named if names.nameless(suffix) is None))
