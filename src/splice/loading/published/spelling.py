"""The names of a checkpoint's tensors as the grammar spells them.

What stands there beside: no prefix, or half of it, or twice; components that wrappers of a model put into its paths; the
adapter's own name, as in a raw state dict of the reference.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from splice.checkpoint.keys import PREFIX, SHORT_PREFIX
from splice.kinds.registry import Method
from splice.loading.plan import Plan

# Modules that other libraries put around a part of a model while it is trained.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"})
# How the table of virtual tokens is called in memory.
_PROMPT = re.compile(r"(base_model\.)?prompt_encoder(\.[^.]+)?\.embedding\.weight")


@dataclass
class Spelled:
    """Names as they were meant.

    Attributes:
        names: name in the grammar -> name in the checkpoint; None where two tensors would have the same.
        notes: a line for each way in which they were read otherwise than they are written.
        hints: why a name could not be.
    """

    names: dict[str, str] | None = None
    notes: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)


def spelled(entries: Collection[str], plan: Plan | None, paths: Collection[str], method: Method) -> Spelled:
    """The names `entries` of a checkpoint as the grammar spells them.

    Args:
        entries: the names.
        plan: that of the names as they are, if there is one; names that have their place in it stay.
        paths: of all modules of the network: a component that is one of its own is nobody's wrapper.
        method: the adapter's.
    """
    loose = list(entries if plan is None else plan.unexpected)
    own_parts = {part for path in paths for part in path.split(".")}
    meant = {name: _bare(name, _WRAPPERS - own_parts, method) for name in loose}
    result = Spelled(notes=_notes(meant, method))
    meant = _without_adapter_name(meant, plan, method, result)
    names = {name: name for name in entries if name not in meant}
    names.update({new: old for old, new in meant.items()})
    result.names = names if len(names) == len(entries) else None
    return result


def _notes(meant: Mapping[str, str], method: Method) -> list[str]:
    if method.network_layer is not None:
        return [f"{old!r} is read as {new!r}" for old, new in meant.items() if old != new]
    notes = []
    lacking = [old for old, new in meant.items() if new == PREFIX + old]
    wrapped = sorted({p for old, new in meant.items() for p in set(old.split(".")) - set(new.split("."))})
    if lacking:
        notes.append(f"{len(lacking)} names lack the prefix {PREFIX!r}")
    if wrapped:
        shown = ", ".join(repr(part) for part in wrapped)
        notes.append(f"the names carry {shown} of a wrapper that this model is not in: left out")
    return notes


def _without_adapter_name(meant: dict[str, str], plan: Plan | None, method: Method, result: Spelled) -> dict[str, str]:
    """Names as in a raw state dict of the reference hold the adapter's name behind the name of the tensor."""
    markers = method.tensor_names | {"modules_to_save"}
    own = {part for p in plan.placements for s in p.slots for part in s.split(".")[1:]} if plan else set()
    own |= {"weight", "bias"}
    tails = {old: _tail(new, markers) for old, new in meant.items()}
    found = {tail[1] for tail in tails.values() if len(tail) > 1 and tail[1] not in own}
    if len(found) > 1:
        shown = ", ".join(repr(name) for name in sorted(found))
        result.hints.append(
            f"the names hold the adapter names {shown}: these are several adapters in one file. Keep the tensors of one."
        )
        return meant
    shared = _shared_name([tail for tail in tails.values() if len(tail) > 1 and tail[1] in found], own)
    if not shared:
        return meant
    result.notes.append(f"the adapter name {'.'.join(shared)!r} stands inside the names: left out")
    return {old: _shortened(new, tails[old], shared) for old, new in meant.items()}


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
