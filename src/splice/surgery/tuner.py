"""The network with its adapters: attaching, selecting, freezing and taking off. What `PeftModel.base_model` is."""

from __future__ import annotations

from _thread import RLock
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import nn

from splice.base.bare import TUNER, carried, walk_bare
from splice.base.foreign_models import loss_of
from splice.base.sharding import divide_again
from splice.checkpoint.keys import PREFIX
from splice.checkpoint.types import PeftType
from splice.config import PeftConfig
from splice.errors import warn
from splice.kinds.adapters import Adapters
from splice.kinds.call import ReadsCall
from splice.kinds.host import first_conflict
from splice.kinds.layer import AdapterLayer
from splice.kinds.module_copy import WholeModule
from splice.kinds.network import NetworkLayer
from splice.kinds.registry import method_named, method_of, question
from splice.kinds.shared import SharedTensors
from splice.kinds.tensors import Home
from splice.selection import BASE, OwnLock, Rows, Selection
from splice.surgery.adapted_layer import Adapted
from splice.surgery.attach import attach
from splice.surgery.base_changes import BaseChanges
from splice.surgery.bringing import Store
from splice.surgery.configs import Configs
from splice.surgery.detach import detach, detach_all
from splice.surgery.first_name import FirstName
from splice.surgery.in_order import InOrder
from splice.surgery.merging import adapters_to_merge, merge, merge_for_good, note_untied, unmerge
from splice.surgery.placement import Built
from splice.surgery.registering import register, tie, unregister
from splice.surgery.spellings import guard_parents
from splice.surgery.stacks import Stacks
from splice.surgery.trained import Trained
from splice.surgery.tuner_attributes import TunerViews
from splice.surgery.weight_readers import weight_readers

# Under which attribute a network keeps the configs of its adapters; its tuner is under `TUNER`.
CONFIGS = "peft_config"

# What the rooms above can do with a tuner, by the name under which it is called there; they enter it.
COMMANDS: dict[str, Callable[..., object]] = {}

T = TypeVar("T")


class _HasLoss(Protocol):
    """The output of a network that was given labels."""

    loss: torch.Tensor


class Tuner(TunerViews, nn.Module):
    """Holds a network and everything that is known about its adapters.

    Making one changes nothing in the network; `commit` does.

    Attributes:
        model: the network.
        peft_config: the configs, by adapter name, in the order they were added.
        selection: which adapters take effect.
        adapted: the adapted layers by path, in the order they were first adapted.
        placed: for each adapter its adapter layers, by path.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.peft_config: dict[str, PeftConfig] = Configs()
        self.selection = Selection()
        # Plain dicts, so that nothing here is registered as a submodule a second time.
        self.adapted: dict[str, Adapted] = {}
        self.placed: dict[str, dict[str, AdapterLayer]] = {}
        # What each adapter was made by, kept for `loading`: new weights over an adapter follow the same plan.
        self.plans: dict[str, object] = {}
        # Modules that adapters put here, by their names: containers of tensors that all layers of an adapter share.
        self.added: dict[str, nn.Module] = {}
        # Where layers that act on the call of the network have their tensors: here, or in the PeftModel around it.
        self.around = Home(self._modules, self.added, self.model)
        # The adapters of each method. Names and not a number of them: taking back an interrupted commit, nobody could tell
        # whether the adapter had been counted.
        self._of_method: dict[PeftType, dict[str, None]] = {}
        # Adapters that have a say in which others may come beside them, in the order they came.
        self.ruling: dict[str, None] = {}
        # Layers that have to know what the model is called with, and the adapters that have such, in the order they came.
        self.reading: dict[type[ReadsCall], dict[str, None]] = {}
        # What each adapter's own method adds to the loss.
        self.loss_terms: dict[str, Callable[[Adapters, str], torch.Tensor]] = {}
        self._trained = Trained(self.placed)
        self._first_name = FirstName(self.peft_config)
        self._in_order = InOrder()
        self._base_changes = BaseChanges()
        # Slots for the factors of adapters; None while none are reserved.
        self.reserved_slots: Stacks | None = None
        # Adapters that are registered, and brought in when they are used; None where none ever were.
        self.store: Store | None = None
        # Held while adapters are put on or taken off: calls of other threads may bring some in at any time.
        self._changing = OwnLock()
        # Adapter -> its number, larger than those of all that were there before.
        self.order: dict[str, int] = {}
        # Whether adapters may be of several methods.
        self.mixes_methods = False
        # Whether no call has come since the last load: the first one shows whether the adapter is reached at all.
        self.awaits_call = False
        # Whether tensors became trainable since the last call that could train them.
        self.awaits_training = False

    @classmethod
    def of(cls, network: nn.Module) -> Tuner:
        """The tuner of a network that carries adapters already, else a new one."""
        # In a tuple: what looks through the attributes of a network for modules must not find one that holds the network.
        existing = cast("tuple[Tuner] | None", carried(network, TUNER))
        if existing is not None and carried(network, CONFIGS) is None:
            existing[0]._forget_replaced()
            existing = cast("tuple[Tuner] | None", carried(network, TUNER))
        return cls(network) if existing is None else existing[0]

    def forward(self, *args: object, **kwargs: object) -> Any:
        return self.model(*args, **kwargs)

    def with_loss_terms(self, output: T) -> T:
        """The output of a forward, with what the methods of adapters in training add to its loss."""
        loss = loss_of(output)
        if loss is not None:
            for name in self.selection.current().names:
                term = self.loss_terms.get(name)
                if term is not None and name in self._trained:
                    loss = loss + term(self, name)
            cast(_HasLoss, output).loss = loss
        return output

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # Of a copy: all else is there by now.
        for name in self.reserved_slots.awaited if self.reserved_slots is not None else ():
            self.take_slot(name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "_of_method"):  # not there before __init__, as while unpickling
                raise
            if name in COMMANDS:
                return partial(COMMANDS[name], self)
            # By method, of which there are one or two, and not by adapter, of which there may be a thousand.
            for peft_type in self._of_method:
                method = method_named(peft_type, "an adapter")
                if name in method.tuner_methods:
                    return partial(method.tuner_methods[name], self)
                if name in method.tuner_views:
                    return method.tuner_views[name](self)
            asked = question(name)
            if asked is not None and self._of_method:
                return partial(asked, self)
            return getattr(self.model, name)

    @property
    def stands_alone(self) -> bool:
        """Whether no PeftModel is around the network."""
        return self.around.modules is self._modules

    def stand_in(self, modules: dict[str, nn.Module | None]) -> Callable[[], None]:
        """Let what acts on the call of the network have its tensors among these modules, those of a PeftModel.

        The result takes that back.
        """
        before, self.around = self.around, Home(modules, {}, self.model)
        for placed in self.placed.values():
            for layer in placed.values():
                if isinstance(layer, NetworkLayer) and layer.home is before:  # of a PeftModel that was there first
                    layer.home = self.around
        self.around.added.update({n: m for n, m in before.added.items() if before.modules is not self._modules})
        modules.update(self.around.added)
        mine = self.around

        def take_back() -> None:
            self.around = before
            for placed in self.placed.values():
                for layer in placed.values():
                    if layer.home is mine:
                        layer.home = before

        return take_back

    # -- attaching

    def commit(
        self,
        name: str,
        config: PeftConfig,
        built: Sequence[Built],
        freeze_base: bool,
        modules: Mapping[str, nn.Module] | None = None,
        plan: object = None,
    ) -> None:
        """Attach a finished adapter. A caller that is cut short in the middle takes it back with `Undo`."""
        # What `_forget` needs to find the adapter comes first, its layers last: what fails in between can be taken back.
        modules = walk_bare(self.model) if modules is None else modules
        readers = weight_readers(modules)
        self.order[name] = self.last_commit + 1
        self.placed[name] = {item.placement.path: item.layer for item in built}
        self.peft_config[name], self.plans[name] = config, plan
        self._first_name.add(name)
        method = method_of(config)
        self._of_method.setdefault(method.name, {})[name] = None
        if method.check_beside is not None and method.check_beside.concerns(config):
            self.ruling[name] = None
        if method.loss_term is not None:
            self.loss_terms[name] = method.loss_term
        vars(self.model).update({TUNER: (self,), CONFIGS: self.peft_config})
        self.awaits_call = True
        self._share(name, [item.layer for item in built])
        for layer_class in {type(item.layer): None for item in built if isinstance(item.layer, ReadsCall)}:
            self.reading.setdefault(layer_class, {})[name] = None
        for item in built:
            path, base = item.placement.path, item.placement.base
            if isinstance(item.layer, SharedTensors):
                continue
            home = None
            if isinstance(item.layer, NetworkLayer):
                home = Home(self._modules, self.added, self.model) if item.layer.on_tuner else self.around
            if item.layer.names.above:
                above = self.adapted[path.rpartition(".")[0]].splice_host
                home = Home(above.base._modules, above.added, above.base)
            attach(base, path, name, item.layer, self.selection, readers, home, self.model)
            self.adapted[path] = cast(Adapted, base)
            if item.layer.leaders:  # which are attached by now
                tie(self.placed[name], item.layer, name)
        self.take_slot(name)
        guard_parents(modules, self.adapted, self._base_changes.looking_ahead)
        if freeze_base:
            divide_again(self)
            self._base_changes.make(self.model, modules)

    def _share(self, name: str, layers: Sequence[AdapterLayer]) -> None:
        for common in (layer for layer in layers if isinstance(layer, (SharedTensors, NetworkLayer))):
            if isinstance(common, SharedTensors):  # which the layers have been told of
                register(common, name, Home(self._modules, self.added, self.model))
                continue
            for layer in layers:  # a network layer is attached like any other
                layer.join(common)

    def take_slot(self, name: str) -> None:
        """Let the factors of an adapter lie in a slot, where there are slots and one is free."""
        if self.reserved_slots is not None:
            for path, stack in self.reserved_slots.admit(name, self.placed[name]).items():
                self.adapted[path].splice_host.stack = stack

    @property
    def changing(self) -> RLock:
        """The lock of whoever changes which adapters there are."""
        return self._changing.lock

    def discard(self, name: str, for_good: bool = True) -> None:
        """Take an adapter off, finished or half attached, and forget it.

        Where there is a store, other threads may be in the middle of a call: layers without adapters stay adapted. With
        `for_good` these very layers are not put on again.
        """
        detach_all(self.model, self.placed[name], self.adapted, name, self.store is not None, for_good)
        self._forget(name)
        if not self.placed and self.store is None:
            self.restore_base()

    def left(self, path: str, name: str) -> None:
        """Note that an adapter was taken off the layer at `path` alone. With the last of its layers it is forgotten."""
        placed = self.placed.get(name, {})
        if placed.pop(path, None) is None:
            return
        self._trained.moved(name)
        if not isinstance(self.adapted.get(path), Adapted):
            self.adapted.pop(path, None)
        if any(not isinstance(layer, SharedTensors) for layer in placed.values()):
            return
        shown = self.shown_configs()
        self.discard(name)
        self.selection.forget(name)
        if shown is not None:
            vars(self.model)[CONFIGS] = shown

    def shown_configs(self) -> Configs | None:
        """A copy of the configs that the network shows; None where somebody has deleted them."""
        # Whoever takes an adapter off layer by layer takes its config out of the network's afterwards, and expects it there.
        shown = cast("dict[str, PeftConfig] | None", carried(self.model, CONFIGS))
        return None if shown is None else Configs({**self.peft_config, **shown})

    def _forget_replaced(self) -> None:
        """Forget adapters on layers that somebody has put others in the places of."""
        there = {id(module) for module in walk_bare(self.model).values()}
        for path, host in self.hosts.items():
            for name in list(host.layers) if id(host.base) not in there else ():
                detach(host.base, name)
                self.left(path, name)

    def _forget(self, name: str) -> None:
        self.plans.pop(name, None)
        self.peft_config.pop(name, None)
        self._first_name.forget(name)
        # Looked for in all of these tables: there are as many as methods, and a table from name to method could disagree.
        for names in self._of_method.values():
            names.pop(name, None)
        self._of_method = {method: names for method, names in self._of_method.items() if names}
        for told in self.reading.values():
            told.pop(name, None)
        self.reading = {layer_class: told for layer_class, told in self.reading.items() if told}
        self.loss_terms.pop(name, None)
        self.ruling.pop(name, None)
        self.order.pop(name, None)
        if self.store is not None:
            self.store.left(name)
        self._trained.forget(name)
        self._in_order.forget(name)
        if self.reserved_slots is not None:
            self.reserved_slots.release(name, partial(self.placed.__setitem__, name, {}))
        # Last: what an interrupt cuts short can be done again.
        del self.placed[name]

    @property
    def last_commit(self) -> int:
        """The number of the adapter that came last; 0 where there is none."""
        return next(reversed(self.order.values()), 0)

    def of_method(self, method: PeftType) -> Collection[str]:
        """The adapters of a method, in the order they came."""
        return self._of_method.get(method, {}).keys()

    @property
    def methods(self) -> Collection[PeftType]:
        """Those of the adapters that are there."""
        return self._of_method.keys()

    def stack_layers(self, config: PeftConfig) -> bool:
        """Let the network use its layers as often as `config` says; whether that changed it."""
        ranges = config.layer_ranges()
        return ranges is not None and self._base_changes.stack(self.model, ranges, adapted=bool(self.peft_config))

    def restore_base(self, keep_layers: bool = False) -> None:
        """Give the network back the flags and layers it had, and forget that it carried adapters."""
        for path, host in self.hosts.items():
            if not host.layers:
                detach(host.base, "")
                self.adapted.pop(path)
        self._base_changes.take_back(self.model, keep_layers)
        for name in (TUNER, CONFIGS):
            vars(self.model).pop(name, None)

    # -- selecting

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones, in this order; their outputs add up.

        Activated adapters become trainable, all others are frozen; with `inference_mode` all are frozen.

        Raises:
            ValueError: there is no such adapter, or two of them replace the same module.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_registered(names)
        with self.using(names):
            self._check_apart(names)
            if self.merged:
                warn("Adapter cannot be set when the model is merged. Unmerging the model first.")
                self.unmerge_adapter()
            self.selection.set(names)
            self.train_only([] if inference_mode else names)

    def using(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """Inside, those of these adapters that are registered are on the network; others are as they are."""
        return nullcontext() if self.store is None else self.store.using(names)

    def _check_registered(self, names: Iterable[str]) -> None:
        """`check_known`, also of what is registered and would be brought in."""
        store = self.store
        self.check_known(names if store is None else [name for name in names if name not in store])

    def check_new(self, name: str) -> None:
        """Raise where no adapter can be called `name`.

        Raises:
            ValueError: it is empty, taken, or the name for "no adapter".
        """
        if not isinstance(name, str) or not name or name == BASE:
            raise ValueError(f"adapter_name must be a non-empty string other than {BASE!r}, got {name!r}")
        if name in self.peft_config:
            raise ValueError(
                f"Adapter with name {name!r} already exists. Choose another name, or load new weights into it with "
                "`model.load_adapter`."
            )
        if self.store is not None and self.store.keeps_from(name):
            raise ValueError(
                f"Adapter {name!r} is registered (`register_adapters`). Choose another name, or call "
                f"`delete_adapter({name!r})` first."
            )

    def check_known(self, names: Iterable[str], said: str = "not found") -> None:
        """Raise where one of these adapters is not there; scripts look for what is `said` of it.

        Raises:
            ValueError: there is no such adapter.
        """
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            registered = "" if self.store is None else self.store.told(unknown)
            raise ValueError(f"Adapter {unknown[0]} {said}; there are {list(self.peft_config)}.{registered}")

    def _check_apart(self, names: Sequence[str]) -> None:
        """Raise where two of these adapters cannot take effect together on some layer."""
        if len(names) < 2:
            return
        for path in {path: None for name in names for path in self.placed[name] if path in self.adapted}:
            clash = first_conflict(self.adapted[path].splice_host.layers, names)
            if clash is not None:
                one, two, why = clash
                host = self.adapted[path].splice_host
                what = "ModulesToSaveWrapper " if isinstance(host.layers[one], WholeModule) else ""
                raise ValueError(
                    f"Only one adapter can be set at a time for {what}{host.place}, of {one!r} and {two!r}: {why}."
                )

    def train_only(self, names: Sequence[str]) -> None:
        """Make the tensors of these adapters trainable, and those of all others not."""
        if self.selection.flags_changed:  # on some layer alone: nothing is known of any adapter
            self._trained.suspect_all()
            self.selection.flags_changed = False
        for name in self._trained.all_but(names):
            self.set_requires_grad(name, False)
        for name in names:
            self.set_requires_grad(name, True)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Whether the tensors of these adapters are trained; which adapters are active does not change."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if names:  # a switch that changes no flags is to cost nothing
            divide_again(self)
        self.awaits_training |= requires_grad
        for name in names:
            self._trained.set(name, requires_grad)

    def enable_adapter_layers(self) -> None:
        """Let the active adapters take effect again; they become trainable."""
        self.selection.enable(True)
        self.train_only(self.selection.active)

    def disable_adapter_layers(self) -> None:
        """Let no adapter take effect, as if there were none. Merged weights are unmerged."""
        if self.merged:
            self.unmerge_adapter()
        self.selection.enable(False)
        self.train_only([])

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the network computes what it did without adapters."""
        was_enabled = self.selection.enabled
        # Only layers that were told something alone can differ.
        if self.selection.flags_changed and len({host.selection.enabled for host in self.hosts.values()}) > 1:
            was_enabled = True
            warn(
                "The model contains some adapter layers that are enabled and others that are disabled. This is most likely "
                "unintentional. After exiting the disable_adapter context, all adapters will be enabled."
            )
        self.disable_adapter_layers()
        try:
            yield
        finally:
            if was_enabled:
                self.enable_adapter_layers()

    def eval_network(self, modules: Iterable[nn.Module]) -> None:
        """`self.eval()`, at a tenth of its cost: those of the network's `modules` that are in eval mode are left alone."""
        for module in modules:
            if not module.training:
                continue
            if type(module).train is nn.Module.train:
                vars(module)["training"] = False  # past `__setattr__`, which is most of what `eval()` costs
            else:  # a class with rules of its own
                module.train(False)
        for added in (self.added, *(host.added for host in self.hosts.values())):
            for module in added.values():
                module.train(False)
        self.training = False

    # -- merging and taking off

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add the adapters (the active ones, if none are named) to the base weights; see `surgery/merging.py`."""
        with self.using(adapter_names or ()):
            names = adapters_to_merge(self.hosts.values(), self.selection, self.peft_config, adapter_names)
            self.merge_report = merge(self.model, self.hosts, self.selection, names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Give every merged layer back the very parameters it had before."""
        unmerge(self.hosts.values(), self.selection)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off and forget it.

        Raises:
            ValueError: there is no such adapter, or it is merged.
        """
        if self.store is None or adapter_name not in self.store:
            self.check_known([adapter_name], "does not exist")
        if adapter_name in self.merged:
            raise ValueError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first: "
                "`unmerge_adapter()`."
            )
        with self.changing:
            if self.store is not None:
                self.store.forget(adapter_name)
            was_active = adapter_name in self.selection.active
            if adapter_name in self.placed:  # else it was registered and not here
                self.discard(adapter_name)
            if was_active:
                self._activate_after_deletion(adapter_name)

    def _activate_after_deletion(self, deleted: str) -> None:
        remaining = [name for name in self.selection.active if name != deleted]
        if not remaining and self.peft_config:
            remaining = [self._first_name.find()]
            warn(f"Adapter {deleted} was active which is now deleted. Setting active adapter to {remaining[0]}.")
            self.set_requires_grad(remaining)
        self.selection.set(remaining)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The network with the adapters in its weights and nothing else left of them. This object is done with."""
        names = adapters_to_merge(self.hosts.values(), self.selection, self.peft_config, adapter_names)
        self.merge_report = merge_for_good(self.model, self.hosts, names, safe_merge, progressbar)
        network = self._take_off(names or self.active_adapters, keep_layers=True)
        note_untied(network)
        return network

    def unload(self) -> nn.Module:
        """The network as it was before the first adapter came, trained heads and biases included."""
        if self.merged:
            self.unmerge_adapter()
        return self._take_off([])

    def _take_off(self, keep_copies_of: list[str], keep_layers: bool = False) -> nn.Module:
        """Detach everything; copies of whole modules stay in place for the adapters named."""
        for path, host in self.hosts.items():
            layers = [host.layers[name] for name in keep_copies_of if name in host.layers]
            copies = [layer for layer in layers if isinstance(layer, WholeModule) and layer.stays_merged]
            for name in list(host.layers) or [""]:
                detach(host.base, name)
            if copies:
                self.model.set_submodule(path, copies[0].module)
        for name in list(self.placed):
            for layer in self.placed[name].values():
                if isinstance(layer, SharedTensors):
                    unregister(layer, name)
            self._forget(name)
        self.adapted.clear()
        self.reserved_slots = self.store = None
        self.selection.merged.clear()
        self.selection.set([])
        self.restore_base(keep_layers)
        return self.model

    # -- calling

    def rows(self, adapter_names: Sequence[str], may_repeat: bool) -> Rows:
        """One adapter for each row of a batch.

        Raises:
            ValueError: an adapter is in experts.
        """
        rows = Rows(tuple(adapter_names), may_repeat)
        if not rows.alike:
            self._in_order.check(adapter_names, self.placed, self.adapted)
        return rows

    def _load_from_state_dict(
        self, state_dict: dict[str, object], prefix: str, local_metadata: object, strict: bool, *lists: list[str]
    ) -> None:
        # Where adapters act on the call, the reference wraps nothing, and has the network itself in this place.
        if any(method_named(method, "an adapter").network_layer is not None for method in self._of_method):
            for key in [k for k in state_dict if k.startswith(prefix) and not k.startswith(f"{prefix}model.")]:
                if key[len(prefix) :].partition(".")[0] in self.model._modules:
                    state_dict[f"{prefix}model.{key[len(prefix) :]}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)


def tuner_of(model: nn.Module) -> tuple[Tuner, str]:
    """The tuner of a PeftModel or of a network that carries adapters, and what stands before paths in its state dict."""
    below = model._modules.get("base_model")
    return (below, PREFIX) if isinstance(below, Tuner) else (Tuner.of(model), "")
