"""What can be merged, asked while nothing has been changed yet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from splice.base.offload import shelf_of
from splice.base.weight_access import bias_of, dense_tensors, is_plain, why_unwritable
from splice.errors import PeftWarning, UnsupportedFeatureError, warn
from splice.kinds.effect import Action
from splice.kinds.host import Host, first_conflict, in_order
from splice.kinds.layer import AdapterLayer


def still_to_merge(host: Host, names: Iterable[str]) -> list[str]:
    """Those of these adapters that a merge still has to put into the weights of this layer."""
    # Copies of the whole layer go on computing, and `merge_and_unload` puts them in place.
    return [
        name
        for name in dict.fromkeys(names)
        if name in host.layers and name not in host.merged and not host.layers[name].stays_merged
    ]


def check_order(hosts: Iterable[Host], names: Iterable[str]) -> None:
    """Raise where merging these, and not other active adapters, would change the output.

    What is merged is below all that is not: so it has to be there already, or its place must not matter.

    Raises:
        ValueError: an active adapter that would not be merged takes effect below one that would.
    """
    names = list(names)
    for host in hosts:
        active = in_order(host.layers, host.selection.current().names)
        if len(active) < 2:
            continue
        new = set(still_to_merge(host, names))
        below = [name for name in active if name not in host.merged]
        for index, two in enumerate(below):
            for one in below:
                if two in new and one not in new and not _may_stay(host, one, two, one in below[:index]):
                    raise ValueError(
                        f"{host.place}: merging {two!r} without {one!r} would change the output: both are active, and they "
                        f"give something else in another order. Merge {[*below[: index + 1]]} together, or make {two!r} "
                        "the only active adapter first (`set_adapter`)."
                    )


def _may_stay(host: Host, one: str, two: str, is_below: bool) -> bool:
    """Whether `two` may be merged while `one` goes on beside it."""
    stays, merged = host.layers[one], host.layers[two]
    if stays.action is merged.action is Action.OWN_ROWS:
        return True
    if stays.shows and _hidden(host, stays).intersection(merged.changed_names):
        return False
    return not is_below or stays.action is merged.action is not Action.OTHER


def _hidden(host: Host, adapter: AdapterLayer) -> set[str]:
    """Tensors of the base, with all that is merged into them, that are not seen while `adapter` shows its own."""
    return {*adapter.replaced(dense_tensors(host.base)), *(("bias",) if adapter.trained_bias is not None else ())}


def with_companions(hosts: Iterable[Host], names: Sequence[str], active: Iterable[str]) -> list[str]:
    """These adapters, behind those that are merged with them.

    Raises:
        ValueError: an active adapter that is not among them makes something of one that is.
    """
    found, active = list(names), set(active)
    for name, adapter in ((name, adapter) for host in hosts for name, adapter in host.layers.items()):
        if not adapter.merged_with:
            continue
        twice = next((other for other in adapter.merged_with if other in names), None)
        if name in names:
            found = [*adapter.merged_with, *found]
        elif name in active and twice is not None:
            raise ValueError(
                f"merging {twice!r} without {name!r} would have it take effect twice: {name!r} is active, and makes "
                f"something of it. Merge {name!r}, or make {twice!r} the active adapter first (`set_adapter`)."
            )
    return list(dict.fromkeys(found))


def check_mergeable(hosts: Iterable[Host], names: Iterable[str]) -> None:
    """Raise for what cannot be merged, while nothing has been changed yet.

    Raises:
        NotImplementedError: an update is no change of the layer's weight.
        RuntimeError: an update has a bias and the base layer has none.
        ValueError: two adapters put different things in the place of the same tensors.
    """
    # All layers before the first is changed: what is found at the tenth must not leave nine merged.
    names = list(names)
    for host in hosts:
        clash = first_conflict(host.layers, [*host.merged, *names])
        if clash is not None:
            raise ValueError(f"{host.place}: adapters {clash[0]!r} and {clash[1]!r} cannot both be merged: {clash[2]}.")
        _check_reaches_output(host, [*host.merged, *names])
        for name in names:
            adapter = host.layers.get(name)
            if adapter is None:
                continue
            what = f"{host.place}: adapter {name!r}"
            if not adapter.mergeable:
                raise NotImplementedError(f"{what} cannot be merged: what it does is no change of weights")
            if not adapter.merges_exactly:
                warn(f"{what} {adapter.lost_when_merged}", PeftWarning)
            _check_at_hand(host, what)
            _check_writable(host, adapter, what)
            lacking = [n for n in adapter.changed_names if n != "weight" and not _has(host, n)]
            if lacking:
                raise RuntimeError(f"{what} changes the {lacking[0]}, and the base layer has none to merge it into")


def _has(host: Host, name: str) -> bool:
    return host.base._parameters.get(name) is not None or (name == "bias" and bias_of(host.base) is not None)


def _check_at_hand(host: Host, what: str) -> None:
    """Raise where the layer's tensors have no values, and are kept nowhere that is known, or in a form that is not plain."""
    for name, parameter in host.base._parameters.items():
        if parameter is not None and parameter.is_meta and not (is_plain(host.base) and shelf_of(host.base, name)):
            raise NotImplementedError(
                f"{what} cannot be merged: the layer's {name} is on the meta device"
                + ("" if is_plain(host.base) else ", offloaded in a quantised form")
                + ". Load the base model where it has room, or merge before it is offloaded."
            )


def _check_writable(host: Host, adapter: AdapterLayer, what: str) -> None:
    for name in adapter.changed_names:
        reason = why_unwritable(host.base, name) if name == "weight" or _has(host, name) else ""
        if reason:
            raise UnsupportedFeatureError(
                f"{what} cannot be merged into a {host.original.__name__}: {reason}. It works as it is, without merging."
            )


def _check_reaches_output(host: Host, names: list[str]) -> None:
    """What stands around a copy of the whole layer cannot go into the base's weight: the copy does not read that."""
    present = in_order(host.layers, names)
    whole = [host.layers[name].stays_merged for name in present]
    if True in whole and not whole[-1]:
        raise NotImplementedError(
            f"{host.place}: adapter {present[-1]!r} cannot be merged together with {present[whole.index(True)]!r}, which "
            "uses a copy of the whole layer in its place. Merge one of them, or load them in the other order."
        )
