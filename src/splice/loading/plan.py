"""The plan: where every tensor of a checkpoint goes in a given model, and everything that does not fit.

A plan is laid out from a config (`laying_out.py`), then fitted to a checkpoint (`fit`). Neither reads a tensor, allocates
memory or changes the model; both work on a model on the `meta` device. Whoever wants another plan makes a new one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from splice.checkpoint.header import Entry
from splice.checkpoint.tensors import DTYPES
from splice.config import PeftConfig
from splice.kinds.layer import AdapterLayer
from splice.kinds.names import BIAS
from splice.kinds.reading import Checkpoint
from splice.kinds.slot import Slot
from splice.kinds.trained_bias import BiasOnly
from splice.loading.config_fields import field_names
from splice.surgery.placement import Placement
from splice.surgery.tuner import Tuner


class Repeated(NamedTuple):
    """What another tensor of the checkpoint says once more: some layers share their tensors."""

    # The key of the tensor that is repeated.
    key: str
    # Whether it is repeated the other way round: (out, in) for (in, out).
    transposed: bool


class Mismatch(NamedTuple):
    """A tensor that has a place and does not fit it."""

    # The key of the place.
    key: str
    # Its shape, or its dtype, in the checkpoint.
    found: str
    # What it must be.
    needed: str


class Plan(NamedTuple):
    """What one adapter consists of on one model, and which tensor of a checkpoint becomes which part of it.

    Attributes:
        placements: the adapter layers to build, in the order of the model.
        followers: adapter layers that share the tensors of others, which `placements` hold.
        resolved: values for fields that the config leaves open.
        base_copies: keys under which a checkpoint may repeat a weight of the base -> the layer of the base that owns it.
        repeated: keys under which a checkpoint may repeat tensors of the adapter -> the tensors that they repeat.
        redundant: keys that a checkpoint may have and that nothing has to be done with.
        sources: key of a slot -> name of its tensor in the checkpoint's weights; empty before `fit`, as are the rest.
        from_base: keys of biases that the checkpoint has nothing for: they are the base's own.
        missing: keys of slots that the checkpoint has no tensor for.
        unexpected: names of tensors that have no place.
        mismatched: tensors that do not fit their place.
    """

    placements: tuple[Placement, ...]
    followers: tuple[Placement, ...]
    resolved: Mapping[str, object]
    # The layers and not their weights: whoever trains or shards the base may put another Parameter in the place of one.
    base_copies: Mapping[str, nn.Module]
    repeated: Mapping[str, Repeated]
    redundant: frozenset[str]
    sources: Mapping[str, str]
    from_base: frozenset[str] = frozenset()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[Mismatch, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether every tensor of the checkpoint has its place and every place its tensor."""
        return not (self.missing or self.unexpected or self.mismatched)

    def slots(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(key, shape) of every tensor that the adapter has."""
        for placement in self.placements:
            for suffix, slot in placement.stored.items():
                yield placement.key(suffix), slot.shape


def fit(plan: Plan, checkpoint: Checkpoint) -> Plan:
    """`plan` with where each tensor of the checkpoint goes, and with all that does not fit."""
    entries, names = checkpoint.entries, checkpoint.names
    # By the names in the weights and not by those that the plan sees: whoever reads needs the plan alone.
    sources: dict[str, str] = {}
    missing: list[str] = []
    mismatched: list[Mismatch] = []
    # Collected on the way and compared at the end, so that what is unexpected comes in the order of the file.
    known = {*plan.redundant, *plan.base_copies, *plan.repeated}
    # Where one of these is all that the checkpoint has of a tensor, it is read in its place.
    copies = {of.key: key for key, of in plan.repeated.items() if key in entries and not of.transposed}
    for placement in plan.placements:
        keys = placement.keys
        known.update(keys.values())
        for suffix, slot in (_unshared(placement) if placement.leaders else placement.stored).items():
            if not slot.stored:  # made again from the config, and not read even if it is there
                continue
            key = found = keys[suffix]
            entry = entries.get(key)
            if entry is None and key in copies:
                found = copies[key]
                entry = entries[found]
            if entry is None:
                missing.append(key)
            elif entry.shape != slot.shape and not slot.takes(entry.shape):
                mismatched.append(Mismatch(key, _shape_text(entry.shape), _shape_text(slot.shape)))
            elif not _is_floating(entry.dtype) and (slot.dtype is None or slot.dtype.is_floating_point):
                mismatched.append(Mismatch(key, f"dtype {entry.dtype}", "a floating-point dtype"))
            else:
                sources[key] = names[found]
    mismatched += [*_misshapen_base_copies(plan, entries), *_misshapen_repeats(plan, entries, sources)]
    unexpected = tuple(name for name in entries if name not in known)
    return plan._replace(sources=sources, missing=tuple(missing), unexpected=unexpected, mismatched=tuple(mismatched))


def _unshared(placement: Placement) -> dict[str, Slot]:
    """The slots of a layer but for those whose tensors are another layer's."""
    return {suffix: slot for suffix, slot in placement.stored.items() if suffix not in placement.leaders}


def repeats(placement: Placement, leading: Mapping[str, Placement]) -> dict[str, Repeated]:
    """The keys under which a checkpoint may hold again what a layer shares; `leading` are the layers before it, by path."""
    leaders = placement.leaders.items()
    return {placement.key(s): Repeated(leading[path].key(of), transposed) for s, (path, of, transposed) in leaders}


def with_biases_of_base(plan: Plan) -> Plan:
    """`plan`, where none of the biases that the adapter trains need be in the checkpoint."""
    keys = {p.key(s) for p in plan.placements for s in p.slots if s == BIAS or p.layer_class is BiasOnly}
    missing = tuple(key for key in plan.missing if key not in keys)
    return plan._replace(missing=missing, from_base=frozenset(keys.difference(plan.sources)))


def _misshapen_base_copies(plan: Plan, entries: Mapping[str, Entry]) -> Iterator[Mismatch]:
    for key, layer in plan.base_copies.items():
        weight = layer._parameters["weight"]
        if key in entries and weight is not None and entries[key].shape != tuple(weight.shape):
            yield Mismatch(key, _shape_text(entries[key].shape), _shape_text(weight.shape))


def _misshapen_repeats(plan: Plan, entries: Mapping[str, Entry], sources: Mapping[str, str]) -> Iterator[Mismatch]:
    for key, of in plan.repeated.items():
        if key in entries and of.key in sources and of.key in entries:
            shape = entries[key].shape[::-1] if of.transposed else entries[key].shape
            if shape != entries[of.key].shape:
                yield Mismatch(key, _shape_text(entries[key].shape), f"that of {of.key}")


def _shape_text(shape: Sequence[int]) -> str:
    return str(tuple(shape)).replace(" ", "")


def _is_floating(dtype: str) -> bool:
    known = DTYPES.get(dtype)
    return known is not None and known.is_floating_point


def write_back(config: PeftConfig, plan: Plan) -> None:
    """What the config left open is filled in, as users of the reference read it: default targets, "all-linear", heads."""
    # On the config and not beside it: a save writes the config, and the reference's users read these fields there.
    own = field_names(config)
    for name, value in plan.resolved.items():
        # Heads of a task are saved whole also by methods whose configs cannot say so.
        if value is not None and name in own and value != getattr(config, name):
            setattr(config, name, value)


def plan_of_present(tuner: Tuner, name: str) -> Plan:
    """The plan that the adapter `name` was made by. Its shapes are those of the tensors that are there now.

    Some methods leave out ranks while they train, so the tensors may be smaller than they were planned.
    """
    plan = tuner.plans[name]
    # The room below keeps plans for this one and looks into none of them.
    assert isinstance(plan, Plan)
    placed = tuner.placed[name]
    now = [_as_it_is(placement, placed[placement.path]) for placement in plan.placements]
    # A new plan for each load would be as much work as laying one out; nearly always the kept one is right as it is.
    changed = any(one is not other for one, other in zip(now, plan.placements))
    return plan._replace(placements=tuple(now)) if changed else plan


def _as_it_is(placement: Placement, layer: AdapterLayer) -> Placement:
    """`placement` with the shapes that the layer's tensors have now; itself where they are as they were planned."""
    shapes = {suffix: tuple(tensor.shape) for suffix, tensor in layer.named_slots()}
    slots = placement.slots
    if placement.in_file is not None:
        return placement
    if all(shapes[suffix] == slot.shape for suffix, slot in slots.items() if slot.stored):
        return placement
    changed = {s: slot._replace(shape=shapes[s]) if slot.stored else slot for s, slot in slots.items()}
    return replace(placement, slots=changed)


class Fitted(NamedTuple):
    """A plan, the checkpoint and the config that it is for, and what was read in another way than it is written.

    Attributes:
        plan: where every tensor of `checkpoint` goes.
        checkpoint: as it was read: its names are those of the plan, wherever it fits.
        config: the adapter's, saying what was read.
        notes: a line for each thing that was read in another way than it is written.
        warnings: those of them that change what the adapter computes.
        said: the checkpoint's config, as it is read for an adapter that is there and keeps its own; None: it is `config`.
        hints: why the checkpoint could not be read in another way, where one was near.
    """

    plan: Plan
    checkpoint: Checkpoint
    config: PeftConfig
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    said: PeftConfig | None = None
