"""Where the layers of a checkpoint are now, in a base model whose modules were renamed or wrapped since.

Three ways of looking, each of which gives a move only where every layer of the checkpoint finds a module that its tensors
fit: the renamings that transformers itself applies to old weights of this model; another front before every path; and
the same numbered layers under other names, told by their shapes and by what attention projections are called.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import product
from typing import NamedTuple

from torch import nn

from splice.base.conversions import renaming_of
from splice.errors import counted

Fits = Callable[[str, str], bool]


class Move(NamedTuple):
    """Paths in the checkpoint -> paths in the network.

    Attributes:
        to: for every layer of the checkpoint.
        back: the path that a module of the network had when the adapter was trained, as far as the move says.
        reaches: whether a module of the network is one that the move speaks of.
        said: the move in words.
        front: what stands before the paths in the checkpoint and in the network, where that is the whole difference.
    """

    to: Mapping[str, str]
    back: Callable[[str], str]
    reaches: Callable[[str], bool]
    said: str
    front: tuple[str, str] | None = None

    def of_name(self, path: str) -> str:
        """Where the module at `path` is now, that need not be a layer of the checkpoint."""
        if path in self.to or self.front is None:
            return self.to.get(path, path)
        had, needs = self.front
        return needs + path[len(had) :] if path.startswith(had) else path


def stay(paths: Iterable[str]) -> Move:
    """The move of a checkpoint whose layers are where it says."""
    return Move({path: path for path in paths}, lambda path: path, lambda path: True, "")


def template(path: str) -> str:
    """`path` without its numbers: layers that differ in nothing else are of the same kind."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def find_moves(paths: Collection[str], modules: Mapping[str, nn.Module], network: nn.Module, fits: Fits) -> list[Move]:
    """All moves that are equally good: none, the one, or several of which none may be chosen.

    Args:
        paths: of the checkpoint's layers.
        modules: of the network, by path.
        network: the network.
        fits: whether the tensors of the first path fit the module at the second.
    """
    astray = [path for path in paths if not (path in modules and fits(path, path))]
    at_home = {path: path for path in paths if path not in set(astray)}
    if not astray:
        return [stay(paths)]
    # The surest way first: transformers knows its own renamings, another front leaves the names as they are, and shapes
    # with the customs of naming are the last resort.
    for look in (_by_table, _by_front, _by_structure):
        found = look(astray, modules, network, fits)
        # Two layers of the checkpoint cannot be the same module.
        free = [move for move in found if not set(move.to.values()) & set(at_home)]
        if free:
            return [_joined(move, at_home) for move in free]
    return []


def _joined(move: Move, at_home: Mapping[str, str]) -> Move:
    return Move({**at_home, **move.to}, move.back, move.reaches, move.said, move.front)


# -- the renamings of transformers


def _by_table(paths: Collection[str], modules: Mapping[str, nn.Module], network: nn.Module, fits: Fits) -> list[Move]:
    rename = renaming_of(network)
    if rename is None:
        return []
    to = {path: rename(path) for path in paths}
    if not _all_fit(to, fits, modules):
        return []
    return [_move_of_templates({template(old): template(new) for old, new in to.items()}, to)]


# -- another front


def _by_front(paths: Collection[str], modules: Mapping[str, nn.Module], network: nn.Module, fits: Fits) -> list[Move]:
    """Of the fronts that can be exchanged, those that leave the longest end of every path as it is."""
    first = next(iter(paths))
    # The shortest front first: what is exchanged should be as little as possible.
    for had in _common_fronts(paths):
        rest = first[len(had) :]
        found: dict[tuple[str, ...], Move] = {}
        for path in modules:
            if path != rest and not path.endswith("." + rest):
                continue
            needs = path[: len(path) - len(rest)]
            to = {old: needs + old[len(had) :] for old in paths}
            if needs != had and _numbers_agree(first, path) and _all_fit(to, fits, modules):
                found.setdefault(tuple(to.values()), _move_of_front(had, needs, to))
        if found:
            return list(found.values())
    return []


def _common_fronts(paths: Collection[str]) -> list[str]:
    """What all paths begin with, from nothing to as much as they share, up to a dot."""
    split = [path.split(".")[:-1] for path in paths]
    fronts = [""]
    for parts in zip(*split):
        if len(set(parts)) > 1:
            break
        fronts.append(f"{fronts[-1]}{parts[0]}.")
    return fronts


def _numbers_agree(old: str, new: str) -> bool:
    a, b = _numbers(old), _numbers(new)
    return a[len(a) - len(b) :] == b if len(a) >= len(b) else b[len(b) - len(a) :] == a


def _numbers(path: str) -> list[str]:
    return [part for part in path.split(".") if part.isdigit()]


def _move_of_front(had: str, needs: str, to: Mapping[str, str]) -> Move:
    def back(path: str) -> str:
        return had + path[len(needs) :] if path.startswith(needs) else path

    layers = counted(len(to), "layer of the checkpoint begins", "layers of the checkpoint begin")
    said = f"{layers} with {had!r} where this model has {needs!r}"
    return Move(to, back, lambda path: path.startswith(needs), said, (had, needs))


# -- other names for the same layers

# What models call the projections of attention; their shapes are often the same.
_ROLES: tuple[tuple[str, ...], ...] = (
    ("q", "query", "q_proj", "q_lin", "query_proj", "to_q", "wq"),
    ("k", "key", "k_proj", "k_lin", "key_proj", "to_k", "wk"),
    ("v", "value", "v_proj", "v_lin", "value_proj", "to_v", "wv"),
    ("o_proj", "out_proj", "out_lin", "attention.output.dense"),
)


def _role(path: str) -> int | None:
    dotted = "." + path
    return next((i for i, names in enumerate(_ROLES) if dotted.endswith(tuple("." + name for name in names))), None)


def _by_structure(
    paths: Collection[str], modules: Mapping[str, nn.Module], network: nn.Module, fits: Fits
) -> list[Move]:
    kinds: dict[str, dict[tuple[str, ...], str]] = {}
    for path in modules:
        kinds.setdefault(template(path), {})[tuple(_numbers(path))] = path
    layers: dict[str, list[str]] = {}
    for path in paths:
        layers.setdefault(template(path), []).append(path)
    choices = [_places(old, members, kinds, fits) for old, members in layers.items()]
    moves = []
    for images in product(*choices) if all(choices) and _are_few(choices) else ():
        if len(set(images)) == len(images):
            renaming = dict(zip(layers, images))
            to = {p: kinds[renaming[old]][tuple(_numbers(p))] for old, members in layers.items() for p in members}
            moves.append(_move_of_templates(renaming, to))
    return moves


def _are_few(choices: Iterable[Collection[str]]) -> bool:
    """Whether trying all combinations is quick; where there are more than these, there are several that fit."""
    count = 1
    for choice in choices:
        count *= len(choice)
    return count <= 64


def _places(old: str, members: list[str], kinds: Mapping[str, Mapping[tuple[str, ...], str]], fits: Fits) -> list[str]:
    """The kinds of layer that these members of one kind fit, all of them; those of the same role, if there are any."""
    numbers = [tuple(_numbers(path)) for path in members]
    found = [
        kind
        for kind, there in kinds.items()
        if all(n in there and fits(path, there[n]) for n, path in zip(numbers, members))
    ]
    role = _role(old)
    if role is None:
        alike = [kind for kind in found if kind.rpartition(".")[2] == old.rpartition(".")[2] and _role(kind) is None]
    else:
        alike = [kind for kind in found if _role(kind) == role]
    return alike or [kind for kind in found if _role(kind) is None]


def _move_of_templates(renaming: Mapping[str, str], to: Mapping[str, str]) -> Move:
    olds = {new: old for old, new in renaming.items()}

    def back(path: str) -> str:
        old = olds.get(template(path))
        if old is None:
            return path
        numbers = iter(_numbers(path))
        return re.sub(r"\*", lambda _: next(numbers, "*"), old)

    shown = [f"{old!r} is {new!r} here" for old, new in renaming.items() if old != new]
    return Move(to, back, lambda path: template(path) in olds, "; ".join(shown))


def _all_fit(to: Mapping[str, str], fits: Fits, modules: Mapping[str, nn.Module]) -> bool:
    return len(set(to.values())) == len(to) and all(new in modules and fits(old, new) for old, new in to.items())
