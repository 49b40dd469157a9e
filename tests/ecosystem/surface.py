"""What a library called `peft` offers: the names at each path, and how they are called."""

from __future__ import annotations

import enum
import inspect
import pkgutil
from importlib import import_module
from types import ModuleType
from typing import Any

# A parameter: its name, the kind of it, and what its default is written like; None where there is none.
Parameter = tuple[str, str, str | None]


def paths() -> list[str]:
    """Every module that can be imported."""
    import peft

    return ["peft", *(item.name for item in pkgutil.walk_packages(peft.__path__, "peft."))]


def names(path: str) -> list[str]:
    """The names that a module offers: its `__all__`, what is defined in it, and constants."""
    module = import_module(path)
    listed = set(getattr(module, "__all__", ()))
    found = []
    for name in sorted(listed.union(dir(module))):
        value = getattr(module, name)
        own = getattr(value, "__module__", None) == path or (name.isupper() and not isinstance(value, ModuleType))
        if name in listed or (own and not name.startswith("_")):
            found.append(name)
    return found


def parameters(value: Any) -> list[Parameter] | None:
    """How a function or a class is called; None of what is not called, or hides it."""
    if not callable(value) or (inspect.isclass(value) and issubclass(value, enum.Enum)):
        return None
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return None
    return [(p.name, p.kind.name, _default(p)) for p in signature.parameters.values()]


def _default(parameter: inspect.Parameter) -> str | None:
    value = parameter.default
    if value is parameter.empty:
        return None
    if inspect.isclass(value) or inspect.isfunction(value):
        return value.__name__
    return repr(value).replace("<factory>", "factory")


def surface() -> dict[str, dict[str, list[Parameter] | None]]:
    """Path -> name -> how it is called, of the library that is called `peft` here."""
    found: dict[str, dict[str, Any]] = {}
    for path in paths():
        try:
            found[path] = {name: parameters(getattr(import_module(path), name)) for name in names(path)}
        except ImportError:  # it needs something that is not installed
            continue
    return found


def constants() -> dict[str, Any]:
    """The constants and tables of `peft.utils.constants`."""
    module = import_module("peft.utils.constants")
    return {name: getattr(module, name) for name in names(module.__name__) if name.isupper()}


def everything() -> tuple[dict[str, dict[str, list[Parameter] | None]], dict[str, Any], str, str]:
    """The surface, the constants, the version and where the library is."""
    import peft

    return surface(), constants(), peft.__version__, str(peft.__file__)
