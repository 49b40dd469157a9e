"""A load from end to end: plan, check, read, commit, report."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import NamedTuple, Protocol, cast

import torch
from torch import nn

from splice.base.bare import walk_bare
from splice.base.dense import device_of
from splice.base.sharding import divide_again, divided_like
from splice.checkpoint.parts import read_for
from splice.config import PeftConfig, copy_config
from splice.errors import PeftWarning, warn
from splice.kinds.arena import side_by_side
from splice.kinds.layer import AdapterLayer
from splice.kinds.original import original_tensor
from splice.kinds.reading import Checkpoint
from splice.kinds.registry import Method, method_of
from splice.kinds.shared import SharedTensors
from splice.kinds.worked_out import WorkedOut
from splice.loading.checking import check_base_copies, check_repeated, refuse_or_warn
from splice.loading.commit import build_loaded
from splice.loading.config_fields import field_names, field_value
from splice.loading.converting import from_file, indices
from splice.loading.fingerprint import Match
from splice.loading.kept_config import other_values
from splice.loading.opening import open_checkpoint
from splice.loading.options import LoadOptions as LoadOptions  # where callers look for it
from splice.loading.other_base import about_base, both_bases, compare_base
from splice.loading.patterns import paths_for_patterns, unmatched
from splice.loading.plan import Fitted, Plan, plan_of_present, write_back
from splice.loading.published.fitting import fitted
from splice.loading.published.vocabulary import fitted_resized
from splice.loading.report import LoadReport
from splice.loading.wanted import NewAdapter, PresentAdapter, Wanted
from splice.surgery.coexistence import check_together
from splice.surgery.placement import Built, Placement
from splice.surgery.stacks import Where
from splice.surgery.tuner import Tuner
from splice.surgery.undo import Undo

logger = logging.getLogger("splice")


class LoadResult(NamedTuple):
    """What a load gives back, in the shape of torch's own result of `load_state_dict`."""

    # Names of tensors that the adapter needs and the checkpoint lacks.
    missing_keys: list[str]
    # Names of tensors of the checkpoint that have no place.
    unexpected_keys: list[str]


class Loaded(NamedTuple):
    """A finished load."""

    # What the caller gets: keys without a tensor, and names without a place; both empty unless strictness was waived.
    result: LoadResult
    # What was done, for people.
    report: LoadReport


@contextmanager
def without_collections() -> Iterator[None]:
    """Keep the garbage collector from starting.

    A load makes thousands of objects that all stay; a collection in the middle of it looks through everything the
    program holds, finds nothing, and takes several times as long as the load.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _count_as_old() -> None:
    """Have the garbage collector take all objects that there are for ones that have lived long.

    Otherwise its next two runs would look through all that a load has made, and find nothing. Not for each of many loads: it
    would take what becomes garbage between them for old as well, which it looks through seldom.
    """
    if not gc.get_freeze_count():  # what somebody else has set aside stays so
        gc.freeze()
        gc.unfreeze()


@without_collections()
def load_new(
    tuner: Tuner,
    checkpoint: Checkpoint,
    options: LoadOptions,
    heads: Sequence[str],
    freeze_base: bool,
    undo: Undo,
) -> Loaded:
    """Load a checkpoint as a new adapter of the network. What fails, fails before the network is touched.

    Where the caller asked for it, the base is resized first; `undo` takes that back.
    """
    is_first = not tuner.placed
    loaded = place_new(tuner, plan_new(tuner, checkpoint, options, heads, undo), options, freeze_base, undo)
    if is_first:
        _count_as_old()
    return loaded


@without_collections()
def place_new(tuner: Tuner, found: Fitted, options: LoadOptions, freeze_base: bool, undo: Undo) -> Loaded:
    """Read what has been planned, and put it on the network."""
    name, plan, config = options.adapter_name, found.plan, found.config
    write_back(config, plan)
    built = build_loaded(plan, config, found.checkpoint.weights, options.autocast, _room(tuner, found, options, undo))
    tuner.commit(name, config, built, freeze_base, undo.modules, plan)
    # The flags of this adapter alone: loading one never changes those of another.
    if options.is_trainable:
        tuner.set_requires_grad(name, True)
    elif config.trained_biases() != "none":
        _leave_biases_trainable(built)
    return _finished(tuner, found, options)


def plan_new(tuner: Tuner, checkpoint: Checkpoint, options: LoadOptions, heads: Sequence[str], undo: Undo) -> Fitted:
    """The plan by which a checkpoint becomes a new adapter of the network, with all that can be checked before that.

    Of the adapters that it stands on, and of layers that the base calls more than once, more than the plan is made: `undo`
    takes that back.

    Raises:
        AdapterMismatchError: the checkpoint does not fit.
        ValueError: the config cannot be applied to this network.
    """
    name = options.adapter_name
    tuner.check_new(name)
    # A copy: the caller's config is never changed, and several loads may be given the same one.
    config = copy_config(checkpoint.config, inference_mode=not options.is_trainable)
    _set_runtime(config, options)
    load_experts(tuner, config, options, undo)
    # Before the plan is made: adapters that cannot stand beside one another are told by their configs alone.
    check_together(tuner, config)
    if tuner.stack_layers(config):
        undo.modules = walk_bare(tuner.model)
    method = method_of(config)
    found = _planned(
        tuner,
        lambda: NewAdapter(tuner.model, undo.modules, method, heads),
        checkpoint,
        config,
        options,
        undo,
    )
    return found._replace(warnings=(*found.warnings, *_lost_patterns(found, method)))


def load_experts(tuner: Tuner, config: PeftConfig, options: LoadOptions, undo: Undo) -> None:
    """Load the adapters that one with this config stands on; they are frozen, and none of them is active.

    Raises:
        ValueError: one cannot be loaded, is of another method, or a name of theirs is taken.
    """
    experts = method_of(config).experts
    if experts is None:
        return
    extra = {name: value for name, value in options.extra.items() if name != "subfolder"}
    for name, place in experts.places(config, options.extra).items():
        own = options._replace(adapter_name=name, is_trainable=False, key_mapping=None, extra=extra)
        checkpoint = open_checkpoint(place, None, own, None)
        if checkpoint.config.peft_type != experts.of:
            raise ValueError(
                f"{place}: an expert of {config.peft_type} is {experts.of}, this is {checkpoint.config.peft_type}"
            )
        load_new(tuner, checkpoint, own, (), False, undo)


@without_collections()
def load_into(tuner: Tuner, checkpoint: Checkpoint, options: LoadOptions, undo: Undo) -> Loaded:
    """Load weights over those of an adapter that is there, by the plan that it was made by.

    The tensors stay the same objects. Everything is read and checked before the first value changes. With `strict=False`
    the checkpoint may hold some of the tensors; the others stay as they are.
    """
    name = options.adapter_name
    if name in tuner.merged:
        raise ValueError(f"adapter {name!r} is merged; call `unmerge_adapter()` before loading new weights into it")
    method, kept = method_of(tuner.peft_config[name]), plan_of_present(tuner, name)
    found = _planned(
        tuner,
        lambda: PresentAdapter(tuner.model, undo.modules, method, kept, not options.strict),
        checkpoint,
        tuner.peft_config[name],
        options,
        undo,
    )
    _check_reaches(found, name)
    found = found._replace(warnings=(*found.warnings, *_kept_config(found, checkpoint, name)))
    _overwrite(tuner, found, options, undo)
    return _finished(tuner, found, options)


def _room(tuner: Tuner, found: Fitted, options: LoadOptions, undo: Undo) -> Mapping[Where, torch.Tensor]:
    """Memory for factors that mixed batches read together: of a slot where some are reserved, or beside adapters like it."""
    reserved, name, plan, room = tuner.reserved_slots, options.adapter_name, found.plan, dict[Where, torch.Tensor]()
    shared = {follower.leader for follower in plan.followers}
    if reserved is not None:
        undo.also(lambda: reserved.release(name))
        room = reserved.room_for(name, plan.placements, shared, options.autocast)
    # The first adapter of a network has none beside it.
    return room if room or not tuner.placed else _room_beside(found, shared, options.autocast)


def _room_beside(found: Fitted, shared: Container[str], autocast: bool) -> Mapping[Where, torch.Tensor]:
    """Memory at an equal distance from adapters whose factors have the same shapes, for those of layers on the CPU."""
    plan, entries = found.plan, found.checkpoint.weights.entries
    own = [
        p
        for p in plan.placements
        if p.is_product and not p.leaders and p.path not in shared and device_of(p.base).type == "cpu"
    ]
    pieces = [
        (
            entries[plan.sources[p.keys[suffix]]].offset,
            (p.path, suffix),
            (torch.Size(slot.shape), p.dtype(suffix, autocast)),
        )
        for p in own
        for suffix, slot in p.slots.items()
        if p.keys[suffix] in plan.sources
    ]
    # As they lie in the file, which is then read in one go.
    pieces.sort(key=itemgetter(0))
    return dict(zip((where for _, where, _ in pieces), side_by_side(tuple(layout for _, _, layout in pieces)) or ()))


def _check_reaches(found: Fitted, name: str) -> None:
    """Raise where all that was given follows from tensors of the adapter that are not among it, so that none would change.

    Raises:
        ValueError: so it is.
    """
    follows = found.plan.redundant.intersection(found.checkpoint.entries)
    if follows and not found.plan.sources:
        raise ValueError(
            f"adapter {name!r}: {', '.join(map(repr, sorted(follows)))} is what comes of the tensors that it trains, and "
            "those are not among what was given. Load it under another name, where it is trained and used as it is."
        )


def _lost_patterns(found: Fitted, method: Method) -> list[str]:
    """A line for values of single layers that no layer gets, of fields that the shapes of the tensors do not tell."""
    config = found.config
    if not any(field_value(config, name) for name in config.pattern_fields):
        return []
    told = config.computed()
    fields = [name for name, field in config.pattern_fields.items() if field in told]
    return [line.removesuffix(".") for line in unmatched(config, paths_for_patterns(found.plan, method), fields)]


def _kept_config(found: Fitted, checkpoint: Checkpoint, name: str) -> list[str]:
    """A line where the adapter, with the config that it keeps, computes something else than the checkpoint's would."""
    # Where layers were renamed since, patterns in the two configs speak of different paths.
    renamed = found.checkpoint.names != checkpoint.names
    paths = [""] if renamed else paths_for_patterns(found.plan, method_of(found.config))
    others = other_values(found.said or checkpoint.config, found.config, paths)
    if not others:
        return []
    return [
        f"it keeps its own config, and that of the checkpoint differs: {'; '.join(others)}. What it computes now is not "
        f"what was trained. To have the checkpoint's, call `delete_adapter({name!r})` before loading it"
    ]


def _planned(
    tuner: Tuner,
    wanted: Callable[[], Wanted],
    checkpoint: Checkpoint,
    config: PeftConfig,
    options: LoadOptions,
    undo: Undo,
) -> Fitted:
    """The plan for a checkpoint, with all that can be checked of it before the network changes.

    Args:
        tuner: the network.
        wanted: what the checkpoint is loaded as. It is asked once more where the base has been resized meanwhile.
        checkpoint: as it was opened.
        config: of the adapter.
        options: the caller's.
        undo: takes the resizing back.

    Raises:
        AdapterMismatchError: the checkpoint does not fit.
        ValueError: the config cannot be applied to this network.
    """

    # What is wanted is put together anew each time: a base that has been resized has other modules.
    def fit_again() -> Fitted:
        return fitted(wanted(), checkpoint, config)

    found = fit_again()
    if options.resizes_vocabulary and not found.plan.fits:
        found = fitted_resized(tuner, found, undo, fit_again)
    # First what names and shapes tell. Tensors are read for comparison only where the checkpoint fits.
    plan = refuse_or_warn(found, tuner.model, wanted().method, options)
    found = found._replace(plan=plan)
    check_base_copies(found, found.checkpoint.weights)
    check_repeated(found, found.checkpoint.weights)
    return found


def _leave_biases_trainable(built: Sequence[Built]) -> None:
    """The reference trains biases that an adapter brings even where the adapter is loaded for inference."""
    for item in built:
        bias = item.layer.trained_bias
        if bias is not None:
            bias.requires_grad = True


class _Offloading(Protocol):
    """A `runtime_config`."""

    ephemeral_gpu_offload: bool


class _HasRuntime(Protocol):
    """A config of a method that can offload."""

    runtime_config: _Offloading


def _set_runtime(config: PeftConfig, options: LoadOptions) -> None:
    """Record in `config`, the adapter's own copy, that it may be offloaded."""
    if not options.ephemeral_gpu_offload:
        return
    if "runtime_config" in field_names(config):
        cast(_HasRuntime, config).runtime_config.ephemeral_gpu_offload = True
    else:
        warn("Ephemeral GPU offloading is not supported by this method; it is ignored.")


def _overwrite(tuner: Tuner, found: Fitted, options: LoadOptions, undo: Undo) -> None:
    """Put the tensors of the checkpoint into those of the adapter, which stay the objects they are."""
    layers = tuner.placed[options.adapter_name]
    divide_again(tuner)
    undo.also(_give_memory(found.plan, layers))
    live = _live_tensors(found.plan, layers)
    # Built layers would be thrown away again, and would draw values for slots that the checkpoint has nothing for.
    # All are read before the first one is written: a file that is cut off leaves the adapter as it was.
    values = read_for(found.checkpoint.weights, [(found.plan.sources[key], tensor) for key, tensor in live.items()])
    for key, (tensor, own) in (*_biases_of_base(found.plan, layers).items(), *_converted(found, layers).items()):
        live[key] = tensor
        values.append(own)
    slots = {p.layer_class.names.key(p.path, s): slot for p in found.plan.placements for s, slot in p.slots.items()}
    values = [
        value if tensor.is_floating_point() else indices(value, slots[key], tensor.dtype, key)
        for (key, tensor), value in zip(live.items(), values)
    ]
    # For a moment the adapter takes twice its memory; without the copies what fails later could not be undone.
    before = [tensor.clone() for tensor in live.values()]
    undo.also(lambda: _copy(zip(live.values(), before)))
    undo.also(lambda: _work_out_again(layers.values()))
    _copy(zip(live.values(), values))
    _work_out_again(layers.values())


def _work_out_again(layers: Iterable[AdapterLayer]) -> None:
    """Work out what follows from tensors that changed: calls of a compiled graph would not ask."""
    for layer in layers:
        if isinstance(layer, WorkedOut) and layer.is_outdated():
            layer.work_out_now()


def _give_memory(plan: Plan, layers: dict[str, AdapterLayer]) -> Callable[[], None]:
    """Let tensors that were left without values have memory on their layers' devices; the result takes that back.

    They become other objects: a tensor on the meta device cannot get values. What shares one, as tied layers do, gets the
    new one too.
    """
    empty = {
        id(layers[p.path].tensor(suffix)): device_of(p.base)
        for p in plan.placements
        for suffix, key in _in_memory(p)
        if (key in plan.sources or key in plan.from_base) and layers[p.path].tensor(suffix).is_meta
    }
    made: dict[int, torch.Tensor] = {}
    before = []
    for layer in layers.values() if empty else ():
        for registry, name, _ in layer.registered.values():
            old: torch.Tensor = registry[name]
            if id(old) not in empty:
                continue
            before.append((registry, name, old))
            if id(old) not in made:
                tensor = torch.empty_like(old, device=empty[id(old)], requires_grad=False)
                is_parameter = isinstance(old, nn.Parameter)
                made[id(old)] = nn.Parameter(tensor, requires_grad=old.requires_grad) if is_parameter else tensor
            registry[name] = made[id(old)]

    def take_back() -> None:
        for registry, name, tensor in before:
            registry[name] = tensor

    return take_back


def _in_memory(placement: Placement) -> Iterable[tuple[str, str]]:
    """(suffix in memory, a key in the checkpoint) of the tensors of a layer."""
    if placement.in_file is None:
        return placement.keys.items()
    keys = list(placement.keys.values())
    return [(suffix, key) for suffix, slot in placement.slots.items() if slot.stored for key in keys]


def _converted(found: Fitted, layers: dict[str, AdapterLayer]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A key -> the adapter's tensor and its new value, of layers whose tensors have another form in a checkpoint."""
    plan, result = found.plan, {}
    for placement in plan.placements:
        if placement.in_file is None:
            continue
        wanted = {suffix: plan.sources[key] for suffix, key in placement.keys.items() if key in plan.sources}
        read = dict(zip(wanted, found.checkpoint.weights.read(list(wanted.values()))))
        layer = layers[placement.path]
        for suffix, value in from_file(placement, read).items():
            result[layer.names.key(placement.path, suffix)] = layer.tensor(suffix).detach(), value
    return result


def _live_tensors(plan: Plan, layers: dict[str, AdapterLayer]) -> dict[str, torch.Tensor]:
    """Key -> the adapter's own tensor, for all that the checkpoint has a tensor for."""
    live = {}
    for placement in (p for p in plan.placements if p.in_file is None):
        # Detached, as autograd refuses to write into a leaf that is trained. What is worked out of the values (a router's
        # directions) is told by their version, so that `.data`, which has one of its own, would not do.
        own = dict(layers[placement.path].named_slots())
        live.update({key: own[suffix].detach() for suffix, key in placement.keys.items() if key in plan.sources})
    return live


def _biases_of_base(plan: Plan, layers: dict[str, AdapterLayer]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Key -> the adapter's bias and the base's own, for those that the checkpoint leaves to the base."""
    found = {}
    for placement in plan.placements if plan.from_base else ():
        bias, own = layers[placement.path].trained_bias, placement.base._parameters.get("bias")
        if bias is not None and own is not None:
            original = original_tensor(placement.base, "bias")
            assert original is not None
            found.update(
                {key: (bias.data, original.detach()) for key in placement.keys.values() if key in plan.from_base}
            )
    return found


def _copy(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for target, value in pairs:
        target.copy_(divided_like(value, target))


def _finished(tuner: Tuner, found: Fitted, options: LoadOptions) -> Loaded:
    """Warn of what the caller should know of a load that is done, and say what was done."""
    name, config = options.adapter_name, found.config
    base = compare_base(tuner, found.checkpoint.weights, name)
    about = about_base(base, both_bases(config, tuner.model))
    # Through `warnings` and not in the report alone: few people print that, and these lines tell of wrong results.
    for line in (*found.warnings, *about, *method_of(config).loading_notes(config)):
        warn(f"adapter {name!r}: {line}.", PeftWarning)
    return report(found, tuner.placed[name].values(), options, base.match)


def _more_in_file(placement: Placement) -> int:
    """How many tensors more than in memory a checkpoint has for a layer."""
    return 0 if placement.in_file is None else len(placement.in_file) - len(placement.slots)


def report(found: Fitted, layers: Iterable[AdapterLayer], options: LoadOptions, base: Match) -> Loaded:
    """What was done to these layers of the adapter."""
    layers = list(layers)
    # Those that a layer shares are counted where they stand first.
    tensors = [tensor for layer in layers for suffix, tensor in layer.named_slots() if suffix not in layer.leaders]
    line = LoadReport(
        adapter_name=options.adapter_name,
        placed=len(found.plan.sources),
        expected=len(tensors) - len(found.plan.from_base) + sum(map(_more_in_file, found.plan.placements)),
        layers=sum(not isinstance(layer, SharedTensors) for layer in layers),
        nbytes=sum(t.numel() * t.element_size() for t in tensors),
        seconds=time.perf_counter() - options.started,
        notes=(*found.checkpoint.notes, *found.notes),
        base=base,
    )
    logger.info("%s", line)
    return Loaded(LoadResult(list(found.plan.missing), list(found.plan.unexpected)), line)
