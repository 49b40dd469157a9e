"""Modules that hold names of other modules and look each up when it is asked for."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TypeAlias

# Where names are from: a module (what is in its `__all__`, or else all of it), or a table of names with their modules.
Source: TypeAlias = "str | Callable[[], Mapping[str, str]]"


def lazy_names(
    module: str, sources: Sequence[Source] = (), submodules: Callable[[], Iterable[str]] | None = None
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a module whose names are its submodules and those of the `sources`.

    Nothing is imported before somebody asks for a name; `from module import *` gives every name without an underscore.

    Args:
        module: its name.
        sources: asked in turn for a name.
        submodules: further submodules than there are files of.
    """

    def is_package() -> bool:
        spec = sys.modules[module].__spec__
        return spec is not None and spec.submodule_search_locations is not None

    def children() -> set[str]:
        found = {child.name for child in pkgutil.iter_modules(sys.modules[module].__path__)} if is_package() else set()
        return found.union(submodules()) if submodules is not None else found

    def told() -> set[str]:
        return {name for source in sources for name in _names_of(source)}

    def get(name: str) -> object:
        if name == "__all__":
            return sorted(name for name in told() if not name.startswith("_"))
        if not name.startswith("__"):
            if is_package() and find_spec(f"{module}.{name}") is not None:
                return import_module(f"{module}.{name}")
            for source in sources:
                names = _names_of(source)
                if name in names:
                    value = vars(sys.modules[module])[name] = getattr(import_module(names[name]), name)
                    return value
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    def tell() -> list[str]:
        return sorted({*vars(sys.modules[module]), *children(), *told()})

    return get, tell


def _names_of(source: Source) -> Mapping[str, str]:
    """Name -> the module that has it."""
    if not isinstance(source, str):
        return source()
    module = import_module(source)
    try:
        listed: Iterable[str] = module.__all__
    except AttributeError:
        listed = [name for name in vars(module) if not name.startswith("__")]
    return dict.fromkeys(listed, source)
