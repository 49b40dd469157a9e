"""A vocabulary that was resized before training: told by the shapes of embeddings, and done to the base if asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import NamedTuple, Protocol, cast

import torch
from torch import nn

from splice.base.bare import own_tensors, walk_bare
from splice.base.embeddings import input_embeddings, output_embeddings_path
from splice.base.foreign_models import can_resize_vocabulary, is_pretrained
from splice.base.layers import LayerKind, kind_of
from splice.checkpoint.header import Entry
from splice.checkpoint.keys import PREFIX
from splice.kinds.module_copy import WholeModule
from splice.kinds.reading import Checkpoint
from splice.loading.plan import Fitted, Plan
from splice.surgery.tuner import Tuner
from splice.surgery.undo import Undo

# What output layers are called, for models that do not say which one is theirs.
_OUTPUTS = ("lm_head", "embed_out")


class _Resizable(Protocol):
    """A model that can be given another number of tokens: those of transformers can."""

    def resize_token_embeddings(self, new_num_tokens: int, /) -> object: ...


class Resize(NamedTuple):
    """Another vocabulary in the checkpoint than in the base.

    Attributes:
        size: tokens in the checkpoint.
        present: tokens in the base.
        sign: the name and the shape of a tensor that says so.
        paths: of the base's layers with a row for each token.
    """

    size: int
    present: int
    sign: str
    paths: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"the vocabulary was resized before training ({self.sign}: {self.size} tokens, here {self.present}). Pass "
            f"resize_vocabulary=True, or call `model.resize_token_embeddings({self.size})` before loading."
        )


def resize_of(
    plan: Plan, entries: Mapping[str, Entry], network: nn.Module, modules: Mapping[str, nn.Module]
) -> Resize | None:
    """The resize that explains shapes which do not fit; None where they are not about the vocabulary."""
    holders = dict(_holders(network, modules))
    mismatched = [wrong.key for wrong in plan.mismatched]
    slots = dict(plan.slots())
    for key, layer in plan.base_copies.items():
        weight = layer._parameters["weight"]
        slots.update({} if weight is None else {key: tuple(weight.shape)})
    found: dict[int, str] = {}
    present = {weight.shape[0] for weight in holders.values()}
    # Embeddings of several sizes: a text model and another one. Which vocabulary was resized cannot be told.
    if len(present) != 1:
        return None
    (count,) = present
    for name in (*mismatched, *plan.unexpected):
        path = next((path for path in holders if name.startswith(f"{PREFIX}{path}.")), None)
        if path is None or name not in entries:
            continue
        needed = slots.get(name) if name in mismatched else _own_shape(modules[path], name[len(PREFIX + path) + 1 :])
        size = _other_count(entries[name].shape, needed, count)
        if size is not None:
            shape = str(entries[name].shape).replace(" ", "")
            found.setdefault(size, f"{name} {shape}")
    if len(found) != 1:
        return None
    ((size, sign),) = found.items()
    return Resize(size, count, sign, tuple(holders))


def _holders(network: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weight of every layer with a row for each token, by path."""
    known = _embeddings_said_by(network, modules)
    for path, module in modules.items():
        if known:
            is_one = path in known
        else:
            last = path.rpartition(".")[2]
            is_one = last in _OUTPUTS or (
                kind_of(module) is LayerKind.EMBEDDING and "pos" not in last and last != "wpe"
            )
        weight = module._parameters.get("weight")
        if is_one and weight is not None and weight.dim() == 2:
            yield path, weight


def _embeddings_said_by(network: nn.Module, modules: Mapping[str, nn.Module]) -> set[str]:
    """Paths of the modules that a model of transformers calls its embeddings; none where it calls none so."""
    if not is_pretrained(network):
        return set()
    return {input_embeddings(network, modules).path, output_embeddings_path(network, modules)} - {""}


def _own_shape(module: nn.Module, name: str) -> tuple[int, ...] | None:
    return next((tuple(tensor.shape) for own, tensor in own_tensors(module) if own == name), None)


def _other_count(found: tuple[int, ...], needed: tuple[int, ...] | None, count: int) -> int | None:
    """The size of the dimension that alone differs, if in the base it is that of the vocabulary."""
    if needed is None or len(found) != len(needed):
        return None
    differing = [(a, b) for a, b in zip(found, needed) if a != b]
    return differing[0][0] if len(differing) == 1 and differing[0][1] == count else None


def _why_not(tuner: Tuner, resize: Resize) -> str | None:
    """A sentence, where the base cannot be resized."""
    if not can_resize_vocabulary(tuner.model):
        return "resize_vocabulary=True: this model has no `resize_token_embeddings`; resize its embeddings yourself."
    for name, layers in tuner.placed.items():
        path = next((path for path in resize.paths if path in layers), None)
        if path is not None:
            return (
                f"resize_vocabulary=True: the adapter {name!r} is on {path!r}, and would not fit any more. Load this one "
                "first, or onto a base of its own."
            )
    return None


def fitted_resized(tuner: Tuner, found: Fitted, undo: Undo, again: Callable[[], Fitted]) -> Fitted:
    """What `again` finds once the base has the vocabulary of the checkpoint; `found` where that is not the matter.

    The base is resized as transformers does it, with the new rows that the checkpoint repeats beside its adapter, if it
    does. The caller's random state is left alone, and `undo` makes the base what it was.
    """
    network = tuner.model
    resize = resize_of(found.plan, found.checkpoint.entries, network, undo.modules)
    if resize is None:
        return found
    reason = _why_not(tuner, resize)
    if reason is not None:
        return found._replace(hints=(*found.hints, reason))
    undo.at_last(_memory_of(undo.modules))
    # transformers draws the new rows; the caller's random numbers go on as if it had not.
    with torch.random.fork_rng(devices=[]):
        cast(_Resizable, network).resize_token_embeddings(resize.size)
    undo.modules = walk_bare(network)
    made_up = _fill(undo.modules, resize, found.checkpoint) if resize.size > resize.present else []
    found = again()
    note = f"the base's vocabulary was resized from {resize.present} to {resize.size} tokens"
    warnings = (*found.warnings, *_not_in(made_up, resize, found.plan))
    return found._replace(notes=(note, *found.notes), warnings=warnings)


@torch.no_grad()
def _fill(modules: Mapping[str, nn.Module], resize: Resize, checkpoint: Checkpoint) -> list[str]:
    """Rows of the base that the checkpoint repeats beside its adapter."""
    entries, made_up = checkpoint.entries, []
    filled: set[int] = set()
    for path in resize.paths:
        weight = modules[path]._parameters["weight"]
        assert weight is not None
        key = f"{PREFIX}{path}.base_layer.weight"
        if key in entries and entries[key].shape == tuple(weight.shape):
            (stored,) = checkpoint.weights.read([checkpoint.names[key]])
            weight.data[resize.present :] = stored[resize.present :].to(weight)
            filled.add(id(weight))
        elif id(weight) not in filled:
            made_up.append(path)
    return made_up


def _not_in(made_up: list[str], resize: Resize, plan: Plan) -> list[str]:
    """A line for each layer whose new rows are neither in the checkpoint nor replaced by what is."""
    whole = {p.path for p in plan.placements if issubclass(p.layer_class, WholeModule)}
    return [
        f"rows {resize.present} to {resize.size - 1} of {path!r} are new, the checkpoint does not hold what they were in "
        "training, and they were made up as `resize_token_embeddings` does"
        for path in made_up
        if path not in whole
    ]


def _memory_of(modules: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Remember everything that resizing changes. Calling the result puts it back, as the same objects."""
    # The dicts of the modules and not their `state_dict`: whoever holds a parameter or a layer goes on holding it.
    registries: list[MutableMapping[str, object]] = []
    for module in modules.values():
        own = vars(module)
        registries += [own["_parameters"], own["_buffers"], own["_modules"], own]
        registries += [vars(config) for config in _configs(own)]
    before = [(registry, dict(registry)) for registry in registries]
    data = [(p, p.data) for m in modules.values() for p in m._parameters.values() if p is not None]

    def take_back() -> None:
        for registry, values in before:
            registry.clear()
            registry.update(values)
        for parameter, tensor in data:
            parameter.data = tensor

    return take_back


def _configs(values: Mapping[str, object]) -> Iterator[object]:
    """The configs of transformers among `values`, and those inside them."""
    for value in list(values.values()):
        if any(cls.__name__.lower() == "pretrainedconfig" for cls in type(value).__mro__):
            yield value
            yield from _configs(vars(value))
