"""A load from end to end: open the checkpoint, plan, check, read, commit, report."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from splice.base.bare import original_class, walk_bare
from splice.checkpoint.keys import renamed
from splice.checkpoint.source import Source
from splice.checkpoint.tensors import open_weights
from splice.config import PeftConfig, ReadConfig, copy_config, read_config
from splice.errors import AdapterMismatchError, PeftWarning, warn
from splice.kinds.layer import AdapterLayer
from splice.kinds.reading import Checkpoint
from splice.kinds.registry import Method, method_named
from splice.kinds.shared import SharedTensors
from splice.kinds.slot import Slot
from splice.loading.advice import advice, outdated
from splice.loading.commit import build_loaded
from splice.loading.fingerprint import Match
from splice.loading.other_base import about_base, compare_base, other_architecture
from splice.loading.plan import Fitted, Plan, fit, write_back
from splice.loading.published.fitting import fitted
from splice.loading.published.vocabulary import fitted_resized
from splice.loading.report import LoadReport, grouped, mismatch_error
from splice.loading.tying import repeated_keys
from splice.surgery.coexistence import check_together
from splice.surgery.placement import Built, Placement
from splice.surgery.tuner import Tuner
from splice.surgery.undo import Undo

logger = logging.getLogger("splice")

# The shape of torch's own result of `load_state_dict`.
LoadResult = namedtuple("LoadResult", ["missing_keys", "unexpected_keys"])


@dataclass(frozen=True)
class LoadOptions:
    """What the caller of a load asked for; the fields are the arguments of `PeftModel.from_pretrained`."""

    adapter_name: str
    is_trainable: bool
    autocast: bool
    ephemeral_gpu_offload: bool
    key_mapping: Mapping[str, str] | None
    strict: bool
    extra: Mapping[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @property
    def ignores_sizes(self) -> bool:
        return bool(self.extra.get("ignore_mismatched_sizes"))

    @property
    def resizes_vocabulary(self) -> bool:
        return bool(self.extra.get("resize_vocabulary"))


@dataclass(frozen=True)
class Loaded:
    """A finished load."""

    result: LoadResult
    report: LoadReport


def open_checkpoint(
    model_id: str | os.PathLike[str],
    config: PeftConfig | None,
    options: LoadOptions,
    key_mapping: Mapping[str, str] | None,
) -> Checkpoint:
    """Find a checkpoint and read its config and the header of its weights. No model is involved.

    Raises:
        CheckpointError: it cannot be found or read.
        ValueError: `config` is no PeftConfig.
    """
    if config is not None and not isinstance(config, PeftConfig):
        raise ValueError(f"The input config must be a PeftConfig, got {type(config).__name__}")
    source = Source.from_options(model_id, options.extra.get("subfolder"), options.extra)
    read = ReadConfig(config) if config is not None else read_config(source.config_text(), source.config_place)
    weights = open_weights(Path(source.weights()))
    names = renamed(weights.entries, key_mapping) if key_mapping else {name: name for name in weights.entries}
    return Checkpoint(read.config, weights, names, read.legacy, read.notes)


@contextmanager
def _without_collections() -> Iterator[None]:
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


@_without_collections()
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
    tuner.check_new(options.adapter_name)
    config = copy_config(checkpoint.config, inference_mode=not options.is_trainable)
    _set_runtime(config, options)
    check_together(tuner, config)
    if tuner.stack_layers(config):
        undo.modules = walk_bare(tuner.model)
    method = method_named(config.peft_type, "the config")

    def refit() -> Fitted:
        return fitted(tuner.model, checkpoint, config, method, heads, undo.modules)

    found = refit()
    if options.resizes_vocabulary and not found.plan.fits:
        found = fitted_resized(tuner, found, undo, refit)
    plan, checkpoint, config = found.plan, found.checkpoint, found.config
    settle(plan, tuner.model, checkpoint, config, method, options)
    check_base_copies(plan, checkpoint)
    check_repeated(plan, checkpoint)
    write_back(config, plan)
    plan.sources = {key: checkpoint.names[name] for key, name in plan.sources.items()}
    built = build_loaded(plan, config, checkpoint.weights, options.autocast)
    tuner.commit(options.adapter_name, config, built, freeze_base, undo.modules)
    if options.is_trainable:
        tuner.set_requires_grad(options.adapter_name, True)
    elif config.trained_biases() != "none":
        _leave_biases_trainable(built)
    base = compare_base(tuner, checkpoint.weights, options.adapter_name)
    for line in (*found.warnings, *about_base(base, _bases(config, tuner.model)), *method.loading_notes(config)):
        warn(f"adapter {options.adapter_name!r}: {line}.", PeftWarning)
    return report(plan, built, options, (*checkpoint.notes, *found.notes), base.match)


def _leave_biases_trainable(built: Sequence[Built]) -> None:
    """The reference trains biases that an adapter brings even where the adapter is loaded for inference."""
    for item in built:
        bias = item.layer.trained_bias
        if bias is not None:
            bias.requires_grad = True


def _set_runtime(config: Any, options: LoadOptions) -> None:
    if not options.ephemeral_gpu_offload:
        return
    if "runtime_config" in vars(config):
        config.runtime_config = replace(config.runtime_config, ephemeral_gpu_offload=True)
    else:
        warn("Ephemeral GPU offloading is not supported by this method; it is ignored.")


def check_base_copies(plan: Plan, checkpoint: Checkpoint) -> None:
    """Weights of the base that a checkpoint repeats must be those of this base: a load never changes the base.

    Raises:
        AdapterMismatchError: they differ.
    """
    for key, weight in plan.base_copies.items():
        (stored,) = checkpoint.weights.read([checkpoint.names[key]])
        if weight.device.type != "meta" and not torch.equal(stored.to(weight), weight.detach()):
            raise AdapterMismatchError(
                f"the checkpoint at {checkpoint.weights.place} holds weights of its base model ({key}), and they differ "
                "from those of the given model: the base was trained too, or it is another one. The model is unchanged. "
                "Load them into the base model yourself, then load the adapter.",
                mismatched=[key],
            )


def check_repeated(plan: Plan, checkpoint: Checkpoint) -> None:
    """Tensors of tied layers stand twice in a checkpoint, and must be the same both times.

    Raises:
        AdapterMismatchError: they differ.
    """
    for key, of in plan.repeated.items():
        if of.key not in plan.sources:
            continue
        one, two = checkpoint.weights.read([checkpoint.names[key], checkpoint.names[plan.sources[of.key]]])
        if not torch.equal(one.T if of.transposed else one, two):
            raise AdapterMismatchError(
                f"the checkpoint at {checkpoint.weights.place} has different tensors for {key} and {of.key}, and the layers "
                "are tied here. The model is unchanged. Set `ensure_weight_tying` to False in the config if they were "
                "trained apart, or load the adapter onto a base that is not tied.",
                mismatched=[key],
            )


def settle(
    plan: Plan, network: nn.Module, checkpoint: Checkpoint, config: PeftConfig, method: Method, options: LoadOptions
) -> None:
    """Refuse a plan that does not fit, or warn about it where the caller waived strictness.

    Raises:
        AdapterMismatchError: something is missing, unexpected or of another shape.
    """
    if plan.mismatched and options.ignores_sizes:
        shown = [f"{key}: {found} in the checkpoint, {needed} in the model" for key, found, needed in plan.mismatched]
        warn("Some weights were ignored because their sizes differ:\n" + "\n".join(shown), PeftWarning)
        plan.missing += [key for key, _, _ in plan.mismatched]
        plan.mismatched = []
        if not plan.unexpected and set(plan.missing) <= {line.partition(": ")[0] for line in shown}:
            return
    if plan.fits:
        return
    if options.strict or plan.mismatched or outdated(plan, method):
        paths = walk_bare(network)
        hints = [*plan.hints, *advice(plan, checkpoint.entries, config, method, options.adapter_name, network, paths)]
        bases = _bases(config, network) + other_architecture(checkpoint.weights, network)
        raise mismatch_error(plan, checkpoint.weights.place, bases, hints)
    for what, keys in (("missing adapter keys", plan.missing), ("unexpected keys", plan.unexpected)):
        if keys:
            text = f"Found {what} while loading the checkpoint: {grouped(keys)}."
            warn(text, PeftWarning)


def _bases(config: PeftConfig, network: nn.Module) -> str:
    """Which base the adapter names, and what was given."""
    given = network.__dict__.get("name_or_path") or "no name"
    named = config.base_model_name_or_path or "no base model"
    return f"The adapter names {named!r} as its base; given was a {original_class(network).__name__} ({given})."


def report(
    plan: Plan,
    built: Sequence[Built],
    options: LoadOptions,
    notes: tuple[str, ...] = (),
    base: Match = Match.UNKNOWN,
) -> Loaded:
    """Say what was done."""
    tensors = [tensor for item in built if not item.layer.leader for _, tensor in item.layer.named_slots()]
    line = LoadReport(
        adapter_name=options.adapter_name,
        placed=len(plan.sources),
        expected=len(tensors),
        layers=sum(not isinstance(item.layer, SharedTensors) for item in built),
        nbytes=sum(t.numel() * t.element_size() for t in tensors),
        seconds=time.perf_counter() - options.started,
        notes=notes,
        base=base,
    )
    logger.info("%s", line)
    return Loaded(LoadResult(list(plan.missing), list(plan.unexpected)), line)


def load_into(tuner: Tuner, checkpoint: Checkpoint, options: LoadOptions, undo: Undo) -> Loaded:
    """Load weights over those of an adapter that is there. The tensors stay the same objects.

    Everything is read and checked before the first value changes.
    """
    name = options.adapter_name
    if name in tuner.merged:
        raise ValueError(f"adapter {name!r} is merged; call `unmerge_adapter()` before loading new weights into it")
    method = method_named(checkpoint.config.peft_type, "the config")
    plan = fit(plan_of_present(tuner, name), checkpoint.entries)
    if not plan.fits:  # weights from before the experts' layers were stacked, over those that were made of such
        modules = walk_bare(tuner.model)
        for reader in method.readings:
            reading = reader(checkpoint, checkpoint.config, tuner.model, modules)
            if reading is not None:
                checkpoint = replace(reading.checkpoint, config=checkpoint.config)
                plan = fit(plan_of_present(tuner, name), checkpoint.entries)
    settle(plan, tuner.model, checkpoint, checkpoint.config, method, options)
    plan.sources = {key: checkpoint.names[own] for key, own in plan.sources.items()}
    values = build_loaded(plan, checkpoint.config, checkpoint.weights, options.autocast)
    present = [Built(item.placement, tuner.placed[name][item.placement.path]) for item in values]
    pairs = []
    for new, old in zip(values, present):
        targets = dict(old.layer.named_slots())
        for suffix, tensor in new.layer.named_slots():
            if new.placement.keys.get(suffix) in plan.sources:
                pairs.append((targets[suffix].data, tensor.data))
    before = [target.clone() for target, _ in pairs]
    undo.also(lambda: _overwrite([(target, old) for (target, _), old in zip(pairs, before)]))
    _overwrite(pairs)
    base = compare_base(tuner, checkpoint.weights, name)
    for line in about_base(base, _bases(tuner.peft_config[name], tuner.model)):
        warn(f"adapter {name!r}: {line}.", PeftWarning)
    return report(plan, present, options, base=base.match)


def _overwrite(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for target, value in pairs:
        target.copy_(value)


def plan_of_present(tuner: Tuner, name: str) -> Plan:
    """The plan that an adapter on the model is the result of."""
    config = tuner.peft_config[name]
    placements = [
        Placement(
            path,
            cast(nn.Module, tuner.adapted.get(path, tuner.model)),
            type(layer),
            _slots(layer),
            own_config=layer.own_config,
            leader=layer.leader,
        )
        for path, layer in tuner.placed[name].items()
    ]
    leading, following = [p for p in placements if not p.leader], [p for p in placements if p.leader]
    return Plan(leading, config.target_rule(), repeated=repeated_keys(following, leading))


def _slots(layer: AdapterLayer) -> dict[str, Slot]:
    """The slots of a layer as it is now: ranks may have been pruned."""
    stored = ((suffix, item.slot) for suffix, item in layer.registered.items() if item.slot.stored)
    return {suffix: slot._replace(shape=tuple(layer.tensor(suffix).shape)) for suffix, slot in stored}
