"""Modules that hold names of other modules and look each up when it is asked for."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec


def lazy_names(
    module: str, sources: Iterable[str] = (), submodules: Callable[[], Iterable[str]] | None = None
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a module whose names are its submodules and those of the `sources`.

    Nothing is imported before somebody asks for a name; `from module import *` gives every name without an underscore.

    Args:
        module: its name; a package.
        sources: names of modules, asked in turn: those in their `__all__`, or else all that they hold.
        submodules: further submodules than there are files of.
    """

    def children() -> set[str]:
        found = {child.name for child in pkgutil.iter_modules(sys.modules[module].__path__)}
        return found.union(submodules()) if submodules is not None else found

    def told() -> set[str]:
        return {name for source in sources for name in _names_of(source)}

    def get(name: str) -> object:
        if name == "__all__":
            return sorted(name for name in told() if not name.startswith("_"))
        if not name.startswith("__"):
            if find_spec(f"{module}.{name}") is not None:
                return import_module(f"{module}.{name}")
            for source in sources:
                if name in _names_of(source):
                    value = vars(sys.modules[module])[name] = getattr(import_module(source), name)
                    return value
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    def tell() -> list[str]:
        return sorted({*vars(sys.modules[module]), *children(), *told()})

    return get, tell


def _names_of(source: str) -> Iterable[str]:
    module = import_module(source)
    try:
        listed: Iterable[str] = module.__all__
    except AttributeError:
        return [name for name in vars(module) if not name.startswith("__")]
    return listed
