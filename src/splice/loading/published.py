"""Adapters as people published them: what does not fit to the letter and has one meaning all the same is read so.

Nothing here is looked at while a checkpoint fits as it is. Every mend gives names and a config of their own, and counts
only if with them *every* tensor is placed and *no* slot stays empty; otherwise the checkpoint is refused as it stands.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from splice.config import PeftConfig, copy_config
from splice.loading.covering import explicit, same_values, uncovered
from splice.loading.header import Entry
from splice.loading.keys import PREFIX, SHORT_PREFIX, format_key, parse_key
from splice.loading.merged_linear import as_plain
from splice.loading.plan import Plan, fit, lay_out
from splice.loading.relocate import Move, find_moves
from splice.methods.registry import Method
from splice.surgery.whole import own_tensors

if TYPE_CHECKING:
    from splice.loading.load import Checkpoint

# Modules that other libraries put around a part of a model while it is trained.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"})
# How the table of virtual tokens is called in memory.
_PROMPT = re.compile(r"(base_model\.)?prompt_encoder(\.[^.]+)?\.embedding\.weight")


@dataclass
class Fitted:
    """A plan, the checkpoint and the config that it is for, and what was read in another way than it is written."""

    plan: Plan
    checkpoint: Checkpoint
    config: PeftConfig
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


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
            if mender.hints:
                raise type(error)(f"{error} {' '.join(mender.hints)}") from error
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
        plain = as_plain(self.checkpoint, self.config)
        if plain is not None:
            self.checkpoint, self.config, note = plain
            self.notes.append(note)
            plan = self._plan(self.config, self.checkpoint)
            if plan is not None and plan.fits:
                return Fitted(plan, self.checkpoint, self.config, self.notes)
        names = self._mended_names(plan)
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
            if owned is None or not getattr(self.config, "target_parameters", None):  # few methods have the field
                return False
            try:
                needed = owned.slots(base, self.config, old)
            except (ValueError, TypeError):
                return False
        return {suffix: entry.shape for suffix, entry in tensors.items()} == dict(needed)

    # -- names

    def _mended_names(self, plan: Plan | None) -> dict[str, str] | None:
        """Name in the grammar -> name in the checkpoint; None where two tensors would have the same."""
        loose = list(self.checkpoint.entries if plan is None else plan.unexpected)
        own_parts = {part for path in self.modules for part in path.split(".")}
        wrappers = _WRAPPERS - own_parts
        spelled = {name: _bare(name, wrappers, self.method) for name in loose}
        self._note_names(spelled)
        spelled = self._without_adapter_name(spelled, plan)
        names = {name: name for name in self.checkpoint.entries if name not in spelled}
        names.update({new: old for old, new in spelled.items()})
        return names if len(names) == len(self.checkpoint.entries) else None

    def _note_names(self, spelled: Mapping[str, str]) -> None:
        lacking = [old for old, new in spelled.items() if new == PREFIX + old]
        if self.method.network_layer is not None:
            self.notes += [f"{old!r} is read as {new!r}" for old, new in spelled.items() if old != new]
            return
        wrapped = sorted({p for old, new in spelled.items() for p in set(old.split(".")) - set(new.split("."))})
        if lacking:
            self.notes.append(f"{len(lacking)} names lack the prefix {PREFIX!r}")
        if wrapped:
            shown = ", ".join(repr(part) for part in wrapped)
            self.notes.append(f"the names carry {shown} of a wrapper that this model is not in: left out")

    def _without_adapter_name(self, spelled: dict[str, str], plan: Plan | None) -> dict[str, str]:
        """Names as in a raw state dict of the reference hold the adapter's name behind the name of the tensor."""
        markers = self.method.tensor_names | {"modules_to_save"}
        own = {part for p in plan.placements for s in p.slots for part in s.split(".")[1:]} if plan else set()
        own |= {"weight", "bias"}
        tails = {old: _tail(new, markers) for old, new in spelled.items()}
        found = {tail[1] for tail in tails.values() if len(tail) > 1 and tail[1] not in own}
        if len(found) > 1:
            shown = ", ".join(repr(name) for name in sorted(found))
            self.hints.append(
                f"the names hold the adapter names {shown}: these are several adapters in one file. Keep the tensors of one."
            )
            return spelled
        shared = _shared_name([tail for tail in tails.values() if len(tail) > 1 and tail[1] in found], own)
        if not shared:
            return spelled
        self.notes.append(f"the adapter name {'.'.join(shared)!r} stands inside the names: left out")
        return {old: _shortened(new, tails[old], shared) for old, new in spelled.items()}

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
        if config.trained_biases() != "none" and not any(name.endswith(".bias") for name in names):
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


def _bare(name: str, wrappers: Collection[str], method: Method) -> str:
    """`name` with the prefix of the grammar, and without the components that wrappers put there."""
    if method.network_layer is not None:
        return "prompt_embeddings" if _PROMPT.fullmatch(name) else name
    if name.startswith(SHORT_PREFIX) and name.split(".")[1] in method.tensor_names:
        return name  # what all layers share
    rest = ".".join(part for part in name.removeprefix(PREFIX).split(".") if part not in wrappers)
    return PREFIX + rest


def _tail(name: str, markers: Collection[str]) -> list[str]:
    """The components of `name` from the last marker on; nothing where there is none."""
    parts = name.split(".")
    start = next((i for i in range(len(parts) - 1, 0, -1) if parts[i] in markers), len(parts))
    return parts[start:]


def _shared_name(tails: Sequence[Sequence[str]], own: Collection[str]) -> list[str]:
    """The components behind the first that all tails have in common, up to what is a tensor's `own`."""
    if not tails:
        return []
    common: list[str] = []
    for parts in zip(*(tail[1:] for tail in tails)):
        if len(set(parts)) > 1 or parts[0] in own:
            break
        common.append(parts[0])
    return common


def _shortened(name: str, tail: Sequence[str], shared: Sequence[str]) -> str:
    if list(tail[1 : 1 + len(shared)]) != list(shared):
        return name
    front = name[: len(name) - len(".".join(tail))]
    kept = tail[1 + len(shared) :] if tail[0] == "modules_to_save" else [tail[0], *tail[1 + len(shared) :]]
    return front + ".".join(kept)


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
