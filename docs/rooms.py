"""The rooms of the house as the imports draw them: which file imports which, and which room stands on which.

Every import statement counts, also those inside functions and those for type checkers alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SRC = Path(__file__).parent.parent / "src" / "splice"

_LOWER_FILES = ("config", "errors", "discovery", "lazy", "selection")
# Every file beside the rooms that is not named as one below.
_CALLED = tuple(sorted(path.stem for path in SRC.glob("[!_]*.py") if path.stem not in _LOWER_FILES))

# From the top down, with what each holds. A room imports from those below it, never the other way.
ROOMS: dict[str, tuple[tuple[str, ...], str]] = {
    "cli/": (("cli", "__main__"), "the program `splice`: a command is one file in commands/"),
    "what people call": (
        _CALLED,
        "PeftModel and its classes for tasks, reports, the functions other libraries use",
    ),
    "fleet/": (("fleet",), "many adapters on one model: slots, the store"),
    "loading/": (("loading",), "plan, commit, load, report, saving; published/: adapters as people wrote them"),
    "surgery/": (("surgery",), "changes to a model, all reversible: swap, detach, tuner, merging, rows of a batch"),
    "methods/": (("methods",), "one file for each method; nobody outside imports from here"),
    "kinds/": (("kinds",), "what a method builds on: slots, names, adapter layers, their host, the record"),
    "config.py": (("config",), "configs: inert dataclasses"),
    "checkpoint/": (("checkpoint",), "the folder on disk: files, keys, fields, bytes; knows no model"),
    "base/": (("base",), "what a base model is: walks, kinds of layers, embeddings, weights, other libraries' objects"),
    "words": (
        ("errors", "discovery", "lazy", "selection"),
        "errors.py, discovery.py, lazy.py, selection.py: what all rooms know",
    ),
}


@dataclass
class House:
    """All modules with what they import of each other."""

    # Dotted name of a module -> its file.
    files: dict[str, Path] = field(default_factory=dict)
    # Module -> the modules it imports.
    imports: dict[str, set[str]] = field(default_factory=dict)
    # "file:line -> module" of every import of ours inside a function.
    inside_functions: list[str] = field(default_factory=list)

    @classmethod
    def read(cls) -> House:
        """As it stands. The public table in `__init__` hands names on, and is no room."""
        house = cls()
        for path in sorted(SRC.rglob("*.py")):
            parts = ("splice", *path.relative_to(SRC).with_suffix("").parts)
            house.files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        for module, path in house.files.items():
            found = list(house._imports_of(module, path)) if module != "splice" else []
            house.imports[module] = {other for other, _, _ in found if other not in ("splice", module)}
            place = path.relative_to(SRC.parent)
            house.inside_functions += [f"{place}:{line} -> {other}" for other, inside, line in found if inside]
        return house

    def _imports_of(self, module: str, path: Path) -> Iterator[tuple[str, bool, int]]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = (n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))
        inside = {id(node) for function in functions for node in ast.walk(function)}
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                front = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                source = ".".join([*front, *([node.module] if node.module else [])])
                names = [f"{source}.{alias.name}" for alias in node.names]
                names = [name if name in self.files else source for name in names]
            else:
                continue
            for name in names:
                if name in self.files:
                    yield name, id(node) in inside, node.lineno

    def circles(self) -> list[list[str]]:
        """Modules that reach themselves by their imports, each with what is on the way."""
        return [[module, *sorted(self._reached(module))] for module in self.files if module in self._reached(module)]

    def _reached(self, module: str) -> set[str]:
        found: set[str] = set()
        waiting = list(self.imports[module])
        while waiting:
            other = waiting.pop()
            if other not in found:
                found.add(other)
                waiting += self.imports[other]
        return found

    def room_of(self, module: str) -> str:
        """The room that a module is in.

        Raises:
            KeyError: it is in none: give it one in `ROOMS`.
        """
        head = module.split(".")[1]
        for room, (heads, _) in ROOMS.items():
            if head in heads:
                return room
        raise KeyError(f"{module} is in no room; see ROOMS in docs/rooms.py")

    def below(self, room: str) -> list[str]:
        """The rooms that files of this one import from, from the top down."""
        own = [module for module in self.files if module != "splice" and self.room_of(module) == room]
        used = {self.room_of(other) for module in own for other in self.imports[module]}
        return [other for other in ROOMS if other in used and other != room]

    def upwards(self) -> list[str]:
        """Imports that point up."""
        order = list(ROOMS)
        return [
            f"{module} -> {other}"
            for module in self.files
            if module != "splice"
            for other in sorted(self.imports[module])
            if order.index(self.room_of(other)) < order.index(self.room_of(module))
        ]


def drawing() -> str:
    """The rooms from the top down, with what is in each and what it stands on."""
    house = House.read()
    lines = []
    for room, (heads, what) in ROOMS.items():
        files = [m for m, path in house.files.items() if m.split(".")[1:2] and m.split(".")[1] in heads]
        count = sum(house.files[module].name != "__init__.py" for module in files)
        lines.append(f"┌─ {room} ".ljust(30, "─") + f" {count} file{'' if count == 1 else 's'} ".ljust(12, "─"))
        lines.append(f"│  {what}")
        below = house.below(room)
        if below:
            lines.append(f"└──▶ {' · '.join(below)}")
        else:
            lines.append("└─── stands on nothing")
    return "\n".join(lines)
