"""Paths of a base model as a tree, with something said of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from splice.cli.output import shown

if TYPE_CHECKING:
    from rich.tree import Tree


@dataclass
class _Node:
    """A step on the way to paths."""

    # The next steps.
    below: dict[str, _Node] = field(default_factory=dict)
    # What is said -> the names of which it is, which stand on one line.
    lines: dict[str, list[str]] = field(default_factory=dict)


def tree(title: str, said: Iterable[tuple[str, str]]) -> Tree:
    """(path, what is said of it) as a tree of rich. Names below one step of which the same is said stand on one line."""
    from rich.tree import Tree

    root = _Node()
    for path, text in said:
        *steps, last = _steps(path)
        node = root
        for step in steps:
            node = node.below.setdefault(step, _Node())
        node.lines.setdefault(text, []).append(last)
    drawn = Tree(title)
    _draw(root, drawn)
    return drawn


def _draw(node: _Node, into: Tree) -> None:
    for text, names in node.lines.items():
        into.add(f"{shown(', '.join(names))}  {shown(text)}".strip())
    for step, below in node.below.items():
        # Where only one way goes on, its steps stand on one line.
        while not below.lines and len(below.below) == 1:
            ((further, below),) = below.below.items()
            step += f".{further}"
        _draw(below, into.add(shown(step)))


def _steps(path: str) -> list[str]:
    """A path in the steps of the tree: a number goes with the list that it counts in."""
    steps: list[str] = []
    # Ranges have dots of their own.
    for part in path.replace("..", "\0").split("."):
        if steps and (part[:1] == "{" or part.isdigit()):
            steps[-1] += f".{part}"
        else:
            steps.append(part)
    return [step.replace("\0", "..") for step in steps]
