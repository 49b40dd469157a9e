"""The names of a checkpoint's tensors as the grammar spells them.

What files have instead: no prefix, half of it, or twice the prefix; components that wrappers of a model put into its paths;
the adapter's own name, as in a raw state dict of the reference.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from splice.checkpoint.keys import PREFIX, SHORT_PREFIX
from splice.errors import counted
from splice.kinds.registry import Method
from splice.loading.plan import Plan

# Modules that other libraries put around a part of a model while it is trained.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"})
# What the table of virtual tokens is called in memory.
_PROMPT = re.compile(r"(base_model\.)?prompt_encoder(\.[^.]+)?\.embedding\.weight")


class Spelled(NamedTuple):
    """Names as they were meant.

    Attributes:
        names: name in the grammar -> name in the checkpoint; None where two tensors would have the same.
        notes: a line for each way in which the names were read otherwise than they are written.
        hints: why a name could not be read in another way.
    """

    names: dict[str, str] | None
    notes: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()


def spelled(entries: Collection[str], plan: Plan | None, paths: Collection[str], method: Method) -> Spelled:
    """The names `entries` of a checkpoint as the grammar spells them.

    Args:
        entries: the names.
        plan: that of the names as they are, if there is one; names that have their place in it stay.
        paths: of all modules of the network: a component of one of these was put there by no wrapper.
        method: the adapter's.
    """
    loose = list(entries if plan is None else plan.unexpected)
    # A model may have a child called `module` itself; that one is part of its paths.
    own_parts = {part for path in paths for part in path.split(".")}
    meant = {name: _bare(name, _WRAPPERS - own_parts, method) for name in loose}
    notes, hints = _notes(meant, method), []
    found = _adapter_name_in(meant.values(), plan, method)
    if found.several:
        shown = ", ".join(repr(name) for name in found.several)
        hints.append(
            f"the names hold the adapter names {shown}: these are several adapters in one file. Keep the tensors of one."
        )
    elif found.parts:
        notes.append(f"the adapter name {'.'.join(found.parts)!r} stands inside the names: left out")
        markers = _markers(method)
        meant = {old: _shortened(new, _tail(new, markers), found.parts) for old, new in meant.items()}
    # Names that have their place stay: a mend must not take apart what fits.
    names = {name: name for name in entries if name not in meant}
    names.update({new: old for old, new in meant.items()})
    return Spelled(names if len(names) == len(entries) else None, tuple(notes), tuple(hints))


def _notes(meant: Mapping[str, str], method: Method) -> list[str]:
    if not method.on_layers:
        return [f"{old!r} is read as {new!r}" for old, new in meant.items() if old != new]
    notes = []
    lacking = [old for old, new in meant.items() if new == PREFIX + old]
    wrapped = sorted({p for old, new in meant.items() for p in set(old.split(".")) - set(new.split("."))})
    if lacking:
        notes.append(f"{counted(len(lacking), 'name lacks', 'names lack')} the prefix {PREFIX!r}")
    if wrapped:
        shown = ", ".join(repr(part) for part in wrapped)
        notes.append(f"the names carry {shown} of a wrapper that this model is not in: left out")
    return notes


class _AdapterName(NamedTuple):
    """An adapter's name inside the names of its tensors."""

    # Its components; none where the names hold no such name.
    parts: Sequence[str] = ()
    # Where there is more than one name: their first components, in order.
    several: Sequence[str] = ()


def _adapter_name_in(names: Iterable[str], plan: Plan | None, method: Method) -> _AdapterName:
    """A raw state dict of the reference holds the adapter's name behind the first component of a tensor's own name."""
    markers = _markers(method)
    own = {part for p in plan.placements for s in p.slots for part in s.split(".")[1:]} if plan else set()
    own |= {"weight", "bias"}
    tails = [_tail(name, markers) for name in names]
    found = {tail[1] for tail in tails if len(tail) > 1 and tail[1] not in own}
    # Several adapters in one file: which one is meant is for the user to say.
    if len(found) > 1:
        return _AdapterName(several=sorted(found))
    return _AdapterName(_shared_name([tail for tail in tails if len(tail) > 1 and tail[1] in found], own))


def _markers(method: Method) -> frozenset[str]:
    """Components behind which the reference puts an adapter's name."""
    return method.tensor_names | {"modules_to_save"}


def _bare(name: str, wrappers: Collection[str], method: Method) -> str:
    """`name` with the prefix of the grammar, and without the components that wrappers put there."""
    # Also around the PeftModel as a whole: then they stand before everything else.
    while name.partition(".")[0] in wrappers:
        name = name.partition(".")[2]
    if not method.on_layers:
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
