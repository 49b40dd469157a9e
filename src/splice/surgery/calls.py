"""One call of a PeftModel: which adapters it uses, what methods must know of it, and whether it reached any adapter."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TypeVar, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from splice.base.sharding import is_managed, is_sharded
from splice.errors import PeftWarning, counted, warn
from splice.kinds.call import Call
from splice.selection import BASE, Choice, Rows
from splice.surgery.seating import note_seats
from splice.surgery.slot_rows import SlotRows
from splice.surgery.tuner import Tuner

T = TypeVar("T")

# Under which key a graph holds the adapters that its backward may need.
_HELD = "splice_adapters"

# Layers that a warning names.
_LISTED = 8


def call_network(
    tuner: Tuner,
    function: Callable[..., T],
    args: Sequence[object],
    options: dict[str, object],
    adapter_names: Sequence[str] | SlotRows | None,
    generates: bool,
    training: bool,
) -> T:
    """What `function` of the network gives with the selected adapters, or with one adapter for each row of the batch.

    Args:
        tuner: of the network.
        function: its forward or its `generate`.
        args: its arguments.
        options: its named arguments; those that only adapters understand are taken out.
        adapter_names: one adapter for each row; None for the selected ones.
        generates: whether `function` is `generate`, which may repeat rows.
        training: whether the PeftModel is in training mode.

    Raises:
        ValueError: rows cannot have these adapters: a name is unknown, adapters are merged, the model is in training mode,
            or an adapter is in experts.
    """
    if torch.compiler.is_compiling():  # there is one thread, and a lock would break the graph
        return _call(tuner, function, args, options, adapter_names, generates, training)
    with tuner.selection.one_call(), _brought_in(tuner, adapter_names, training):
        result = _call(tuner, function, args, options, adapter_names, generates, training)
        if torch.is_grad_enabled():
            _keep_for_backward(tuner, result, adapter_names)
    if tuner.awaits_training and torch.is_grad_enabled():
        tuner.awaits_training = False
        _warn_if_apart(tuner)
    if tuner.awaits_call:
        tuner.awaits_call = False
        _warn_if_unused(tuner)
    return result


def _call(
    tuner: Tuner,
    function: Callable[..., T],
    args: Sequence[object],
    options: dict[str, object],
    adapter_names: Sequence[str] | SlotRows | None,
    generates: bool,
    training: bool,
) -> T:
    with (
        _chosen(tuner, adapter_names, generates, training, (*args, *options.values())),
        _told(tuner, generates, args, options) as told,
    ):
        result = function(*args, **options)
        if told is not None:
            told.result = result
        return result


def _brought_in(
    tuner: Tuner, adapter_names: Sequence[str] | SlotRows | None, training: bool
) -> AbstractContextManager[None]:
    """Inside, those adapters that the call uses and that are registered are on the network."""
    if tuner.store is None:
        return nullcontext()
    if adapter_names is not None and tuner.selection.enabled:
        # Nothing is loaded for a call that is refused.
        _check_rows(tuner, adapter_names, training, tuner.store)
    return tuner.store.using(_names_in(tuner, adapter_names))


def _names_in(tuner: Tuner, adapter_names: Sequence[str] | SlotRows | None) -> Sequence[str]:
    """The adapters that a call uses: those of its rows, or the selected ones."""
    if adapter_names is None or not tuner.selection.enabled:
        return tuner.selection.current().names
    if isinstance(adapter_names, SlotRows):  # of which one that has left its slot is not brought back to it
        return [name for name in adapter_names.names if name in tuner.placed]
    return adapter_names


def _keep_for_backward(tuner: Tuner, result: object, adapter_names: Sequence[str] | SlotRows | None) -> None:
    """Let what a backward of `result` recomputes (gradient checkpointing) use the adapters that computed it."""
    selection, store = tuner.selection, tuner.store
    choice = selection.current()
    held = None if store is None else store.held(_names_in(tuner, adapter_names))
    for tensor in tree_leaves(result):
        if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
            tensor.register_hook(lambda _: selection.keep_for_backward(choice))  # type: ignore[no-untyped-call]
            if held is not None:  # as long as the graph: it may be gone before the tensor, and the other way round
                cast("dict[str, object]", tensor.grad_fn.metadata)[_HELD] = held


def _chosen(
    tuner: Tuner,
    adapter_names: Sequence[str] | SlotRows | None,
    generates: bool,
    training: bool,
    given: Sequence[object],
) -> AbstractContextManager[None]:
    # Where adapters are switched off, all rows are the base's, whatever their names.
    if adapter_names is None or not tuner.selection.enabled:
        return nullcontext()
    _check_rows(tuner, adapter_names, training)
    if isinstance(adapter_names, SlotRows):
        rows = adapter_names.rows(tuner, generates)
    else:
        rows = note_seats(tuner, tuner.rows(adapter_names, generates))
    rows.note_sizes(given)
    chosen = tuner.selection.for_this_call(Choice(rows=rows))
    return _measured(tuner, rows, chosen) if generates else chosen


def _check_rows(
    tuner: Tuner, adapter_names: Sequence[str] | SlotRows, training: bool, registered: Container[str] = ()
) -> None:
    """Raise where rows of a batch cannot have these adapters now, nor when those that are `registered` are brought in."""
    by_slots = isinstance(adapter_names, SlotRows)
    if not by_slots and not isinstance(adapter_names, (list, tuple)):
        raise TypeError(f"adapter_names must be a list or a tuple of names, got {type(adapter_names).__name__}")
    if training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode; call `model.eval()` first.")
    if tuner.merged:
        raise ValueError(
            f"Cannot pass `adapter_names` when there are merged adapters ({tuner.merged}), please call "
            "`unmerge_adapter` first."
        )
    if isinstance(adapter_names, SlotRows):
        if torch.is_grad_enabled():
            raise ValueError(
                "rows by slots give no gradients: call inside `torch.no_grad()` or `torch.inference_mode()`, or pass names"
            )
        return
    absent = {name for name in adapter_names if name != BASE and name not in tuner.peft_config}
    unknown = sorted(name for name in absent if name not in registered)
    if unknown:
        told = "" if tuner.store is None else tuner.store.told(unknown)
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; there are {list(tuner.peft_config)}."
            f"{told}"
        )


@contextmanager
def _measured(tuner: Tuner, rows: Rows, chosen: AbstractContextManager[None]) -> Iterator[None]:
    """Inside, `rows` know how large a batch the network gets at each of its calls: `generate` alone decides that."""

    def look(_: nn.Module, args: tuple[object, ...], options: dict[str, object]) -> None:
        # Another thread may call the network meanwhile, with rows of its own.
        if tuner.selection.current().rows is rows:
            rows.note_sizes((*args, *options.values()))

    hook = tuner.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with chosen:
            yield
    finally:
        hook.remove()


def _told(
    tuner: Tuner, generates: bool, args: Sequence[object], options: dict[str, object]
) -> AbstractContextManager[Call | None]:
    # Asked first: few models have such adapters, and all others should not pay for a generator at each call.
    return _reading(tuner, generates, args, options) if tuner.reading else nullcontext()


@contextmanager
def _reading(tuner: Tuner, generates: bool, args: Sequence[object], options: dict[str, object]) -> Iterator[Call]:
    """Inside, adapters that have to know what the PeftModel was called with have been told."""
    named = (options[name] for name in ("input_ids", "inputs") if options.get(name) is not None)
    ids = next(named, args[0] if args else None)
    call = Call(ids if isinstance(ids, torch.Tensor) else None, options, generates)
    with ExitStack() as stack:
        # A copy: another thread may bring an adapter in.
        for layer_class, names in list(tuner.reading.items()):
            stack.enter_context(layer_class.call_context(tuner, list(names), call))
        yield call


def _all_of(layers: Sequence[str]) -> str:
    if len(layers) == 1:
        return f"its only layer ({layers[0]})"
    return f"any of its {len(layers)} layers ({_listed(layers)})"


def _warn_if_unused(tuner: Tuner) -> None:
    """Loaded is not yet applied: warn where adapters are active and the first call has stepped around layers of theirs."""
    if not tuner.selection.enabled or not tuner.selection.active:
        return
    active, unused = tuner.active_paths(), tuner.unused_layers()
    read = [path for path in unused if tuner.adapted[path].splice_host.read]
    # Some layers of a name may well be left out (the experts that no token was sent to); all of a name hardly.
    reached = {_name(path) for path in set(active).difference(unused)}
    unreached = [path for path in unused if path not in read and _name(path) not in reached]
    adapter = f"The active adapter {tuner.active_adapter!r}"
    if read:
        warn(
            f"{adapter} had no effect on {len(read)} of its {counted(len(active), 'layer')}: the first call read the weights "
            f"of {_listed(read)} instead of calling these layers, and they are stored in a form (packed, or offloaded) that "
            "nothing can be added to. See `model.unused_layers()`.",
            PeftWarning,
        )
    if unreached:
        if len(unreached) == len(active):
            what = f"had no effect: the first call did not reach {_all_of(unreached)}"
        else:
            missed = len(unreached)
            what = (
                f"had no effect on {counted(missed, 'layer')}: the first call reached all but {missed} of its {len(active)} "
                f"layers, and not {_listed(unreached)}"
            )
        warn(
            f"{adapter} is in place and {what}. The model may not use this part at all, or not in this call. See "
            "`model.unused_layers()`.",
            PeftWarning,
        )


def _trained_apart(tuner: Tuner) -> list[str]:
    """Active adapters with trained tensors that FSDP does not know of."""
    found = []
    for name in tuner.selection.active:
        layers = tuner.placed[name].values()
        is_trained = any(
            registry[key].requires_grad for layer in layers for registry, key, _ in layer.registered.values()
        )
        if is_trained and not all(is_managed(module) for layer in layers for module in layer.holders()):
            found.append(name)
    return found


def _warn_if_apart(tuner: Tuner) -> None:
    """Warn where an adapter came after FSDP had divided the network: nobody averages its gradients."""
    apart = _trained_apart(tuner) if is_sharded(tuner.model) else []
    if apart:
        first = apart[0]
        warn(
            f"Adapter {first!r} is trained on a model that FSDP divides among processes, and FSDP does not know of it: each "
            "process trains a copy of its own, and these come apart. Put the adapter on before `fully_shard`, or call "
            "`fully_shard` on each of the modules that hold its tensors.",
            PeftWarning,
        )


def _name(path: str) -> str:
    """What a layer is called, whichever of its kind it is: the last part of its path that is no number."""
    return next((part for part in reversed(path.split(".")) if not part.isdigit()), path)


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(paths[:_LISTED]) + (f" and {len(paths) - _LISTED} more" if len(paths) > _LISTED else "")
