"""Adapters as people published them: what does not fit to the letter and has one meaning all the same is read so.

Nothing here is looked at while a checkpoint fits as it is. Every mend gives names and a config of their own, and counts
only if with them *every* tensor is placed and *no* slot stays empty; otherwise the checkpoint is refused as it stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from splice.base.asking import asked
from splice.base.bare import own_tensors
from splice.checkpoint.foreign import foreign_names
from splice.checkpoint.header import Entry
from splice.checkpoint.keys import PREFIX, format_key, parse_key
from splice.config import PeftConfig, copy_config
from splice.kinds.registry import Method
from splice.kinds.slot import shapes_of
from splice.loading.plan import Fitted, Plan, fit, lay_out
from splice.loading.published.covering import explicit, same_values, uncovered
from splice.loading.published.relocating import Move, find_moves
from splice.loading.published.spelling import spelled

if TYPE_CHECKING:
    from splice.kinds.reading import Checkpoint


def fitted(
    network: nn.Module,
    checkpoint: Checkpoint,
    config: PeftConfig,
    method: Method,
    heads: Sequence[str],
    modules: Mapping[str, nn.Module],
) -> Fitted:
    """The plan for `checkpoint`; where it does not fit as it is, the plan for what it means, if that is certain.

    Raises:
        As `lay_out`, where no meaning is found.
    """
    mender = _Mender(network, checkpoint, config, method, heads, modules)
    try:
        plan = fit(lay_out(network, config, method, heads, modules), checkpoint.entries)
    except ValueError as error:
        mended = mender.mend(None)
        if mended is None:
            foreign = foreign_names(checkpoint.entries)
            hints = [foreign[0].upper() + foreign[1:]] if foreign else mender.hints
            if hints:
                raise type(error)(f"{error} {' '.join(hints)}") from error
            raise
        return mended
    if plan.fits:
        return Fitted(plan, checkpoint, config)
    mended = mender.mend(plan)
    plan.hints += mender.hints
    return mended or Fitted(plan, checkpoint, config)


@dataclass
class _Mender:
    """One checkpoint that does not fit as it is; `hints` say why it could not be read otherwise."""

    network: nn.Module
    checkpoint: Checkpoint
    config: PeftConfig
    method: Method
    heads: Sequence[str]
    modules: Mapping[str, nn.Module]
    notes: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    def mend(self, plan: Plan | None) -> Fitted | None:
        """What the checkpoint means; `plan` is that of what it says, if there is one."""
        for reader in self.method.readings:
            reading = reader(self.checkpoint, self.config, self.network, self.modules)
            if reading is None:
                continue
            self.checkpoint, self.config = reading.checkpoint, reading.config
            self.notes += reading.notes
            plan = self._plan(self.config, self.checkpoint)
            if plan is not None and plan.fits:
                return Fitted(plan, self.checkpoint, self.config, self.notes)
        meant = spelled(self.checkpoint.entries, plan, self.modules, self.method)
        self.notes += meant.notes
        self.hints += meant.hints
        names = meant.names
        if names is None:
            return None
        if self.method.network_layer is not None:
            return self._tried(self.config, names)
        layers = _layers(names, self.checkpoint.entries, self.method)
        moves = find_moves(list(layers), self.modules, self.network, self._fits(layers)) if layers else []
        if len(moves) > 1:
            self.hints.append(_both(moves))
        return self._moved(names, layers, moves[0]) if len(moves) == 1 else None

    def _moved(self, names: dict[str, str], layers: Collection[str], move: Move) -> Fitted | None:
        """The fit of the checkpoint with its layers where `move` takes them, and the config made to say so."""
        if move.said:
            self.notes.append(move.said)
        names = {_moved_name(name, move, self.method): own for name, own in names.items()}
        config = self._with_heads_and_biases(self.config, names)
        if same_values(config, move):
            found = self._tried(config, names)
            if found is not None:
                return found
        cover = uncovered(self.method, config, move, self.network, self.modules)
        if not cover.complete:
            self.hints += filter(None, [cover.why_not])
            return None
        self.notes += cover.notes
        found = self._tried(explicit(config, move, self.modules, cover.rule), names)
        if found is not None:
            found.warnings += cover.left_out
        return found

    def _tried(self, config: PeftConfig, names: dict[str, str]) -> Fitted | None:
        entries = self.checkpoint.entries
        if len(names) < len(entries):  # two tensors would have one name
            return None
        own = {name: self.checkpoint.names[given] for name, given in names.items()}
        checkpoint = dataclasses.replace(self.checkpoint, names=own)
        plan = self._plan(config, checkpoint)
        return Fitted(plan, checkpoint, config, self.notes) if plan is not None and plan.fits else None

    def _plan(self, config: PeftConfig, checkpoint: Checkpoint) -> Plan | None:
        try:
            return fit(lay_out(self.network, config, self.method, self.heads, self.modules), checkpoint.entries)
        except (ValueError, TypeError):
            return None

    def _fits(self, layers: Mapping[str, Mapping[str, Entry]]) -> Any:
        """Whether the tensors of a layer of the checkpoint are those that the config asks for on a module."""
        known: dict[tuple[str, str], bool] = {}

        def fits(old: str, new: str) -> bool:
            if (old, new) not in known:
                known[old, new] = self._layer_fits(layers[old], old, self.modules[new])
            return known[old, new]

        return fits

    def _layer_fits(self, tensors: Mapping[str, Entry], old: str, base: nn.Module) -> bool:
        try:
            layer = self.method.layer_for(base, old, self.config)
            needed = layer.slots(base, self.config, old)
        except (ValueError, TypeError):
            owned = self.method.parameters_layer
            if owned is None or not asked(self.config, "target_parameters"):  # few methods have the field
                return False
            try:
                needed = owned.slots(base, self.config, old)
            except (ValueError, TypeError):
                return False
        return {suffix: entry.shape for suffix, entry in tensors.items()} == shapes_of(needed)

    # -- config

    def _with_heads_and_biases(self, config: PeftConfig, names: Collection[str]) -> PeftConfig:
        """The config, saying of heads and biases what the file holds."""
        fields = vars(config)
        changes: dict[str, Any] = {}
        heads = self._heads_among(names)
        if heads and "modules_to_save" in fields:
            changes["modules_to_save"] = [*(fields["modules_to_save"] or ()), *heads]
            shown = ", ".join(repr(head) for head in heads)
            self.notes.append(f"{shown} in the file is not in the config's modules_to_save: loaded as a trained module")
        whole = (*(vars(config).get("modules_to_save") or ()), *self.heads, *(changes.get("modules_to_save") or ()))
        paths = {name.rpartition(".")[0].removesuffix(".base_layer") for name in names if name.endswith(".bias")}
        if config.trained_biases() != "none" and all(_is_inside(path.removeprefix(PREFIX), whole) for path in paths):
            changes["bias"] = "none"
            self.notes.append(
                f"bias={config.trained_biases()!r} in the config, and the file holds no bias: read as 'none'"
            )
        return copy_config(config, **changes) if changes else config

    def _heads_among(self, names: Collection[str]) -> list[str]:
        """Modules outside the numbered layers that the file holds whole, though the config names them nowhere."""
        saved = (*(vars(self.config).get("modules_to_save") or ()), *self.heads)
        heads: list[str] = []
        for name in names:
            if parse_key(name, self.method.tensor_names) or not name.startswith(PREFIX):
                continue
            parts = name[len(PREFIX) :].split(".")[:-1]
            if any(part.isdigit() for part in parts):
                continue
            paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
            head = next((path for path in paths if path in self.modules and self._is_whole(path, names)), None)
            known = head is not None and (head in heads or (saved and head.endswith(saved)))
            if head is not None and not known:
                heads.append(head)
        return heads

    def _is_whole(self, path: str, names: Collection[str]) -> bool:
        tensors = [format_key(path, name) for name, _ in own_tensors(self.modules[path])]
        return bool(tensors) and all(key in names for key in tensors)


def _is_inside(path: str, names: Collection[str]) -> bool:
    """Whether the module at `path` is one that these names call, or is in one."""
    dotted = f".{path}."
    return any(f".{name}." in dotted for name in names)


def _layers(names: Mapping[str, str], entries: Mapping[str, Entry], method: Method) -> dict[str, dict[str, Entry]]:
    """The layers that these names speak of: path -> suffix -> entry."""
    layers: dict[str, dict[str, Entry]] = {}
    for name, own in names.items():
        key = parse_key(name, method.tensor_names)
        if key is not None:
            layers.setdefault(key.path, {})[key.suffix] = entries[own]
    return layers


def _moved_name(name: str, move: Move, method: Method) -> str:
    key = parse_key(name, method.tensor_names)
    if key is not None:
        return format_key(move.to[key.path], key.suffix)
    if not name.startswith(PREFIX):
        return name
    path, _, leaf = name[len(PREFIX) :].rpartition(".")
    layer = path.removesuffix(".base_layer")
    return format_key(move.of_name(layer) + path[len(layer) :], leaf)


def _both(moves: Sequence[Move]) -> str:
    old = next(path for path in moves[0].to if moves[0].to[path] != moves[1].to[path])
    shown = " and ".join(repr(move.to[old]) for move in moves[:4])
    text = (
        f"the tensors of {old!r} fit {len(moves)} modules of this model, {shown}, and none of them is chosen for you."
    )
    fronts = [move.front for move in moves if move.front is not None]
    if fronts:
        had, needs = fronts[0]
        text += f" Say which with key_mapping, for example {{{'^' + had.replace('.', chr(92) + '.')!r}: {needs!r}}}."
    return text
