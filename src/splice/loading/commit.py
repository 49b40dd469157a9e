"""Commit: the plan becomes adapter layers on the model. All that can fail is done before the model is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import nn

from splice.base.dense import device_of
from splice.base.offload import at_hand, is_offloaded
from splice.base.sharding import divided_by_first, is_divided, whole_tensors
from splice.base.weight_access import check_readable
from splice.base.zero3 import gathered, is_zero3_enabled
from splice.checkpoint.header import Entry
from splice.checkpoint.parts import read_for
from splice.checkpoint.reading import Reading
from splice.checkpoint.tensors import DTYPES, Weights, begin_to_read
from splice.config import PeftConfig
from splice.kinds.lasting import lasting
from splice.kinds.layer import AdapterLayer
from splice.kinds.layout import LaidOut
from splice.kinds.module_copy import WholeModule
from splice.kinds.names import BIAS
from splice.kinds.shared import SharedTensors
from splice.kinds.trained_bias import copy_bias
from splice.loading.converting import from_file, indices
from splice.loading.plan import Plan
from splice.loading.tying import tensors_for
from splice.surgery.placement import Built, Placement
from splice.surgery.stacks import Where

_BATCH_BYTES = 8_000_000


@lasting()
def build_loaded(
    plan: Plan,
    config: PeftConfig,
    weights: Weights,
    autocast: bool,
    room: Mapping[Where, torch.Tensor] | None = None,
) -> list[Built]:
    """Read every tensor into its own memory, on its layer's device and in its final dtype, and build the layers.

    Slots that the checkpoint has nothing for (only with `strict=False`) are initialised as those of a new adapter. Tensors
    for which there is `room`, each of its final shape, dtype and device, are read into that.
    """
    room = room or {}
    built: list[Built] = []
    leading = _leading(plan)
    led: dict[str, AdapterLayer] = {}
    for batch in _batches(plan.placements, weights.entries, plan.sources, autocast):
        where = {
            (p.path, suffix): plan.sources[key]
            for p in batch
            if not p.layer_class.divides
            for suffix, key in p.keys.items()
            if key in plan.sources
        }
        names = list(where.values())
        into = {name: room[at] for at, name in where.items() if at in room} if room else None
        reading = begin_to_read(weights, names, into)
        read = dict(zip(names, reading.tensors))
        for placement in (p for p in batch if p.layer_class.divides):
            read.update(_read_divided(placement, plan.sources, weights))
        for placement in batch:
            tensors = tensors_for(placement, led) if placement.leaders else {}
            if placement.layer_class.reads_values or placement.in_file is not None:
                reading.wait()
            item = _build_loaded(
                placement, plan.sources, read, config, autocast, room, tensors, _shared(built), reading
            )
            built.append(item)
            if placement.path in leading:
                led[placement.path] = item.layer
        reading.wait()
    return built + _followers(plan, built, config)


def _read_divided(placement: Placement, sources: Mapping[str, str], weights: Weights) -> dict[str, torch.Tensor]:
    """What this process has of the tensors of a layer that is divided, by their names in `weights`."""
    wanted = [
        (sources[key], placement.layer_class.template(placement.base, suffix, placement.slots[suffix]))
        for suffix, key in placement.keys.items()
        if key in sources
    ]
    return dict(zip((name for name, _ in wanted), read_for(weights, wanted)))


def _batches(
    placements: Sequence[Placement], entries: Mapping[str, Entry], sources: Mapping[str, str], autocast: bool
) -> Iterator[list[Placement]]:
    """Placements whose tensors are read in one go: few calls, and little memory beside the result if they change."""
    batch: list[Placement] = []
    size = 0
    for placement in placements:
        batch.append(placement)
        size += sum(entries[sources[key]].size for key in placement.keys.values() if key in sources)
        if size >= _BATCH_BYTES:
            size = 0
            # One tells of the others: on a mistake more memory is taken for a moment.
            if _is_converted(placement, entries, sources, autocast):
                yield batch
                batch = []
    if batch:
        yield batch


def _is_converted(
    placement: Placement, entries: Mapping[str, Entry], sources: Mapping[str, str], autocast: bool
) -> bool:
    """Whether a layer's tensors are others than those that are read."""
    if placement.in_file is not None or device_of(placement.base).type != "cpu":
        return True
    found = ((suffix, entries[sources[key]]) for suffix, key in placement.keys.items() if key in sources)
    return any(DTYPES.get(entry.dtype) is not placement.dtype(suffix, autocast) for suffix, entry in found)


def _build_loaded(
    placement: Placement,
    sources: Mapping[str, str],
    read: dict[str, torch.Tensor],
    config: PeftConfig,
    autocast: bool,
    room: Mapping[Where, torch.Tensor],
    tensors: dict[str, torch.Tensor],
    shared: AdapterLayer | None,
    reading: Reading,
) -> Built:
    """Build one layer; `tensors` are those that it shares with layers before it, `shared` is what all layers share.

    Those that were read may be on their way; `reading` is waited for where their values are needed. Those that are lent are
    copied.
    """
    device = device_of(placement.base)
    if placement.in_file is not None:
        found = {suffix: read[sources[key]] for suffix, key in placement.keys.items() if key in sources}
        for suffix, given in from_file(placement, found).items():
            tensors[suffix] = _moved(given, device, placement.dtype(suffix, autocast), placement, suffix, reading.lent)
    for suffix, key in placement.keys.items() if placement.in_file is None else ():
        name = sources.get(key)
        if name is not None:
            given, own = read.pop(name), room.get((placement.path, suffix)) if room else None
            if own is None:
                dtype = placement.dtype(suffix, autocast)
                changes = given.dtype is not dtype or given.device != device or not dtype.is_floating_point
                if changes or reading.lent:
                    reading.wait()
                    given = _moved(given, device, dtype, placement, suffix, reading.lent)
                tensors[suffix] = given
            elif given is own:
                tensors[suffix] = own
            else:
                reading.wait()
                tensors[suffix] = own.copy_(given)
    if BIAS in placement.slots and BIAS not in tensors:
        tensors[BIAS] = _own_bias(placement).to(device)
    if len(tensors) < len(placement.slots):
        fresh = new_tensors(placement, config, autocast)
        tensors = {s: tensors[s] if s in tensors else fresh[s] for s in placement.slots}
    elif placement.leaders:  # which came first, and a save has the order of the layer
        tensors = {suffix: tensors[suffix] for suffix in placement.slots}
    return _build(placement, config, tensors, shared)


def _moved(
    tensor: torch.Tensor, device: torch.device, dtype: torch.dtype, placement: Placement, suffix: str, lent: bool
) -> torch.Tensor:
    if not dtype.is_floating_point:
        tensor = indices(tensor, placement.slots[suffix], dtype, placement.key(suffix))
    return tensor.to(device=device, dtype=dtype, copy=lent)


@lasting()
def build_new(plan: Plan, config: PeftConfig, autocast: bool, on_meta: bool = False) -> list[Built]:
    """Adapter layers with the initial values of the method, or (`on_meta`) without values."""
    built: list[Built] = []
    leading = _leading(plan)
    led: dict[str, AdapterLayer] = {}
    for placement in plan.placements:
        # What it shares it draws as well, like the reference: one seed, one adapter.
        tensors = new_tensors(placement, config, autocast)
        tensors.update(tensors_for(placement, led) if placement.leaders else {})
        with _values(placement):
            built.append(_build(placement, config, tensors, _shared(built)))
        if placement.path in leading:
            led[placement.path] = built[-1].layer
    for item in built:
        with _values(item.placement):
            item.layer.begin()
    for item in built if on_meta else ():  # after all have begun, some of which look at what they share
        item.layer.leave_empty()
        for suffix, leader in item.layer.leaders.items():
            item.layer.keep(suffix, led[leader.path].tensor(leader.suffix))
    return built + _followers(plan, built, config)


def _leading(plan: Plan) -> set[str]:
    """The paths of layers whose tensors others share, of those that the plan builds one after the other."""
    return {leader.path for p in plan.placements if p.leaders for leader in p.leaders.values()}


def _followers(plan: Plan, built: Sequence[Built], config: PeftConfig) -> list[Built]:
    """The layers that share the tensors of others."""
    layers = {item.placement.path: item.layer for item in built}
    return [_build(p, config, tensors_for(p, layers), _shared(built)) for p in plan.followers]


def _shared(built: Sequence[Built]) -> AdapterLayer | None:
    """What all layers of the adapter share, which is built first; None where they share nothing."""
    return built[0].layer if built and isinstance(built[0].layer, SharedTensors) else None


def _values(placement: Placement) -> AbstractContextManager[None]:
    """Inside, the parameters of the base layer have values, and are whole: a new adapter may take its start from them."""
    base, cls = placement.base, placement.layer_class
    # Asked first, since hardly any are kept elsewhere. What is on disk is read for those alone that look at it.
    if any(map(is_offloaded, (base, *base.children()))):
        looks = cls.starts_from_weight or cls.reads_weight or BIAS in placement.slots or issubclass(cls, WholeModule)
        return at_hand(base.modules()) if looks else nullcontext()
    return _whole(base)


def _whole(base: nn.Module) -> AbstractContextManager[None]:
    """Inside, the parameters of `base` are whole."""
    if is_zero3_enabled():
        return gathered(base.parameters())
    divided = [(base._parameters, name) for name, tensor in base._parameters.items() if is_divided(tensor)]
    return whole_tensors(divided) if divided else nullcontext()


@torch.no_grad()
def new_tensors(placement: Placement, config: PeftConfig, autocast: bool) -> dict[str, torch.Tensor]:
    """Tensors for one layer of a new adapter: drawn in float32, then brought to their dtype and device."""
    whole = issubclass(placement.layer_class, WholeModule)
    drawn = {
        suffix: torch.empty(slot.shape, dtype=placement.dtype(suffix, autocast) if whole else slot.drawn_in)
        for suffix, slot in placement.slots.items()
        if slot.stored or suffix not in placement.leaders
    }
    if placement.layer_class.starts_from_weight or placement.layer_class.reads_weight:
        check_readable(placement.base, placement.path, "the adapter")
    own = {suffix: tensor for suffix, tensor in drawn.items() if suffix != BIAS}
    with _values(placement):
        placement.initialise(own, config)
        if BIAS in drawn:
            drawn[BIAS] = _own_bias(placement)
    device, found = device_of(placement.base), {}
    for suffix, tensor in drawn.items():
        found[suffix] = tensor.to(device=device, dtype=placement.dtype(suffix, autocast))
        if placement.layer_class.divides:
            template = placement.layer_class.template(placement.base, suffix, placement.slots[suffix])
            found[suffix] = divided_by_first(found[suffix], template)
    return found


def _own_bias(placement: Placement) -> torch.Tensor:
    """A trained bias as it starts, on the CPU."""
    bias = torch.empty(placement.slots[BIAS].shape, dtype=placement.dtype(BIAS, False))
    copy_bias(bias, placement.base)
    return bias


def _build(
    placement: Placement, config: PeftConfig, tensors: Mapping[str, torch.Tensor], shared: AdapterLayer | None
) -> Built:
    config = placement.own_config or config
    given = (placement.base, config, placement.path, placement.slots, tensors)
    with _whole(placement.base) if placement.layer_class.reads_weight else nullcontext():
        layer = placement.layer_class(*given)
        if shared is not None:
            layer.join(shared)
    if placement.own_config is not None:
        layer.own_config = placement.own_config
    if placement.leaders:
        layer.leaders = placement.leaders
    if placement.layout is not None:
        cast(LaidOut, layer).prepare_in(placement.layout, placement.path)
    return Built(placement, layer)
