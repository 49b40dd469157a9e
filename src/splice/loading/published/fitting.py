"""Adapters as people published them: what does not fit to the letter and has one meaning all the same is read so.

Nothing here is looked at while a checkpoint fits as it is. Every mend gives names and a config of their own, and counts
only if with them *every* tensor is placed and *no* slot stays empty; otherwise the checkpoint is refused as it stands. Only
an adapter that is there may be given some of its tensors, if the caller says so: then the others stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from splice.checkpoint.foreign import foreign_names
from splice.checkpoint.header import Entry
from splice.checkpoint.keys import PREFIX, format_key, parse_key
from splice.config import PeftConfig
from splice.kinds.reading import Checkpoint
from splice.kinds.registry import Method
from splice.loading.plan import Fitted, Plan, fit, with_biases_of_base
from splice.loading.published.covering import explicit, same_values, uncovered
from splice.loading.published.heads import with_heads_and_biases
from splice.loading.published.relocating import Fits, Move, find_moves
from splice.loading.published.repeats import repeats_of_base
from splice.loading.published.spelling import spelled
from splice.loading.wanted import Wanted


def fitted(wanted: Wanted, checkpoint: Checkpoint, config: PeftConfig) -> Fitted:
    """The plan for `checkpoint`; where it does not fit as it is, the plan for what it means, if that is certain.

    Args:
        wanted: the adapter that it is to become.
        checkpoint: as it was opened.
        config: the adapter's: of a new one what the checkpoint says, of one that is there its own.

    Raises:
        ValueError: the config cannot be applied to this network, and no other meaning is found.
    """
    mender = _Mender(wanted, checkpoint, config)
    try:
        plan = fit(wanted.plan(config, checkpoint.names), checkpoint)
    except ValueError as error:
        mended = mender.mend(None)
        if mended is not None:
            return mended
        foreign = foreign_names(checkpoint.entries)
        hints = [foreign[0].upper() + foreign[1:]] if foreign else mender.hints
        if hints:
            raise type(error)(f"{error} {' '.join(hints)}") from error
        raise
    if wanted.is_served_by(plan):
        return Fitted(plan, checkpoint, config)
    return mender.mend(plan) or Fitted(plan, checkpoint, config, hints=tuple(mender.hints))


@dataclass(eq=False, repr=False)
class _Mender:
    """One checkpoint that does not fit as it is."""

    # The adapter that it is to become.
    wanted: Wanted
    # The checkpoint, as it has been read so far.
    checkpoint: Checkpoint
    # The adapter's config, as it has been read so far.
    config: PeftConfig
    # A line for each thing that was read in another way than it is written.
    notes: list[str] = field(default_factory=list)
    # Why it could not be read in another way, where one was near.
    hints: list[str] = field(default_factory=list)
    # The config of the checkpoint as a reading of its method has it; None where there was none.
    said: PeftConfig | None = None
    # Whether the adapter trains biases and the checkpoint holds none of them.
    lacks_biases: bool = False

    def mend(self, plan: Plan | None) -> Fitted | None:
        """What the checkpoint means; `plan` is that of what it says, if there is one."""
        wanted = self.wanted
        for reader in wanted.method.readings:
            # Of an adapter that is there the config is settled, and may be no longer what such a file was written with.
            said = self.config if wanted.follows_config else self.checkpoint.config
            reading = reader(self.checkpoint, said, wanted.network, wanted.modules)
            if reading is None:
                continue
            self.checkpoint = reading.checkpoint
            self.said = reading.config
            self.config = reading.config if wanted.follows_config else self.config
            self.notes += reading.notes
            plan = self._plan(self.config, self.checkpoint)
            if plan is not None and wanted.is_served_by(plan):
                return Fitted(plan, self.checkpoint, self.config, tuple(self.notes), said=self.said)
        meant = spelled(self.checkpoint.entries, plan, wanted.modules, wanted.method)
        self.notes += meant.notes
        self.hints += meant.hints
        if meant.names is None:
            return None
        names = self._without_repeats(meant.names)
        found = self._tried(self.config, names) if len(names) < len(meant.names) else None
        if found is not None or not wanted.method.on_layers:
            return found or self._tried(self.config, names)
        layers = _layers(names, self.checkpoint.entries, wanted.method)
        if not layers:  # only what all layers share, which is nowhere and so cannot have moved
            return self._tried(self._with_heads_and_biases(names), names)
        moves = find_moves(list(layers), wanted.modules, wanted.network, self._fits(layers))
        # Of several that are equally good none is taken: a wrong one computes something, and nobody would notice.
        if len(moves) > 1:
            self.hints.append(_choices(moves))
        return self._moved(names, moves[0]) if len(moves) == 1 else None

    def _without_repeats(self, names: dict[str, str]) -> dict[str, str]:
        """`names` without those of tensors that repeat the base's own, which are left out of the checkpoint as well."""
        renamed = self.checkpoint._replace(names={name: self.checkpoint.names[own] for name, own in names.items()})
        plan = self._plan(self.config, renamed)
        repeats = repeats_of_base(plan.unexpected if plan else (), renamed, self.wanted.modules)
        if repeats.different:
            self.hints.append(
                f"the checkpoint holds weights of its base model ({', '.join(repeats.different[:3])}), and they differ from "
                "those of the given model: the base was trained too, or it is another one."
            )
        if not repeats.equal:
            return names
        self.notes.append(f"{len(repeats.equal)} tensors of the file are the base's own ({repeats.equal[0]}): left out")
        kept = {name: own for name, own in names.items() if name not in set(repeats.equal)}
        self.checkpoint = self.checkpoint._replace(names={own: self.checkpoint.names[own] for own in kept.values()})
        return kept

    def _moved(self, names: dict[str, str], move: Move) -> Fitted | None:
        """The fit of the checkpoint with its layers where `move` takes them, and the config made to say so."""
        wanted = self.wanted
        if move.said:
            self.notes.append(move.said)
        names = {_moved_name(name, move, wanted.method): own for name, own in names.items()}
        names = self._without_repeats(names) if move.said else names
        config = self._with_heads_and_biases(names)
        if not wanted.follows_config:
            return self._tried(self.config, names)
        # The config as it is, if it says the same of the layers where they are now: then the adapter stays as its author
        # wrote it, and so does what is saved again.
        if same_values(config, move):
            found = self._tried(config, names)
            if found is not None:
                return found
        cover = uncovered(wanted.method, config, move, wanted.network, wanted.modules)
        if not cover.complete:
            self.hints += filter(None, [cover.why_not])
            return None
        self.notes += cover.notes
        found = self._tried(explicit(config, move, wanted.modules, cover.rule), names)
        return None if found is None else found._replace(warnings=cover.left_out)

    def _with_heads_and_biases(self, names: dict[str, str]) -> PeftConfig:
        """The config as these names have it, where they tell of heads that it does not name."""
        config, notes, self.lacks_biases = with_heads_and_biases(self.config, names, self.wanted)
        self.notes += notes
        return config

    def _tried(self, config: PeftConfig, names: dict[str, str]) -> Fitted | None:
        """The fit of the checkpoint under these names; None where that is not good enough to be followed."""
        if len(names) < len(self.checkpoint.names):  # two tensors would have one name
            return None
        own = {name: self.checkpoint.names[given] for name, given in names.items()}
        checkpoint = self.checkpoint._replace(names=own)
        plan = self._plan(config, checkpoint)
        if plan is None or not self.wanted.is_served_by(plan):
            return None
        return Fitted(plan, checkpoint, config, tuple(self.notes), said=self.said)

    def _plan(self, config: PeftConfig, checkpoint: Checkpoint) -> Plan | None:
        try:
            plan = fit(self.wanted.plan(config, checkpoint.names), checkpoint)
            return with_biases_of_base(plan) if self.lacks_biases else plan
        except (ValueError, TypeError):  # the config, as it is read here, cannot be applied: this is not what was meant
            return None

    def _fits(self, layers: Mapping[str, Mapping[str, Entry]]) -> Fits:
        """Whether the tensors of a layer of the checkpoint are those that are wanted on a module."""
        shapes = {path: {suffix: e.shape for suffix, e in tensors.items()} for path, tensors in layers.items()}
        # Every way of looking for a move asks about the same pairs again.
        known: dict[tuple[str, str], bool] = {}

        def fits(old: str, new: str) -> bool:
            if (old, new) not in known:
                known[old, new] = self.wanted.takes(shapes[old], old, new, self.config)
            return known[old, new]

        return fits


def _layers(names: Mapping[str, str], entries: Mapping[str, Entry], method: Method) -> dict[str, dict[str, Entry]]:
    """The layers that these names speak of: path -> suffix -> entry."""
    layers: dict[str, dict[str, Entry]] = {}
    again = frozenset[str]() if method.shared is None else method.shared.written_on_layers
    for name, own in names.items():
        key = parse_key(name, method.tensor_names)
        if key is not None and key.suffix not in again:
            layers.setdefault(key.path, {})[key.suffix] = entries[own]
    return layers


def _moved_name(name: str, move: Move, method: Method) -> str:
    key = parse_key(name, method.tensor_names)
    if key is not None:
        return format_key(move.of_name(key.path), key.suffix)
    if not name.startswith(PREFIX):
        return name
    path, _, leaf = name[len(PREFIX) :].rpartition(".")
    layer = path.removesuffix(".base_layer")
    return format_key(move.of_name(layer) + path[len(layer) :], leaf)


def _choices(moves: Sequence[Move]) -> str:
    """A sentence: the modules that a layer of the checkpoint could be, and how to choose one."""
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
