"""Finding the methods: every file below `splice/methods/` is imported once, and makes itself known as it is.

No list names them. A config class registers when it is defined (`config.py`), a record when it is made
(`kinds/registry.py`); both ask here first, so that whoever looks a method up finds all of them.

What a method says without torch stands in files of its own beside it: of other libraries' files in `foreign.py`, of what its
tensors are in `outline.py`, of engines in `engines.py`. Readers of checkpoints find those alone, and do not import torch for
it.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])

_PACKAGE = "splice.methods"
_FACADE = "splice.tasks"
# What a method has that is public: configs, the choices that are fields of these, and functions that say so.
# With the end of the line before it and not `^`: what begins with fixed bytes is found six times as fast.
_PUBLIC = (re.compile(rb"\nclass ([A-Z]\w*(?:Config|Init|Type))\b"), re.compile(rb"\n@public\n(?:@.*\n)*def (\w+)\b"))
_found = False
# The names of files beside methods that have been imported, wherever there are any.
_found_beside: set[str] = set()


def public(function: F) -> F:
    """Mark a function of a method as a public name of splice: `@public`, on a line of its own above its `def`
    or above its other decorators."""
    return function


def find_methods() -> None:
    """Import every module of the package of methods. After the first time it costs nothing."""
    global _found
    if _found:
        return
    _found = True  # before the walk: a method that looks another one up on its way must not begin again
    try:
        _walk(_PACKAGE, None)
    except BaseException:
        _found = False
        raise


def find_beside(name: str) -> None:
    """Import every module called `name` among the methods. After the first time it costs nothing."""
    if name not in _found_beside:
        _walk(_PACKAGE, name)
        _found_beside.add(name)


def find_facade() -> None:
    """Import what people call, which enters itself: for functions of a method that build a model, and may be called first."""
    importlib.import_module(_FACADE)


def _walk(package: str, only: str | None) -> None:
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        if module.ispkg:
            _walk(module.name, only)
        elif only is None or module.name.endswith(f".{only}"):
            importlib.import_module(module.name)


@cache
def public_names() -> dict[str, str]:
    """Name of a public class or function of the methods -> the module that defines it, for whoever asks by name.

    The files are read and not imported: a program that needs one config would otherwise wait for all methods.
    """
    found: dict[str, str] = {}
    (root,) = importlib.import_module(_PACKAGE).__path__
    for folder, _, files in os.walk(root):
        package = _PACKAGE + folder.removeprefix(root).replace(os.sep, ".")
        for file in files:
            if file.endswith(".py"):
                text = Path(folder, file).read_bytes()
                names = (name.decode() for pattern in _PUBLIC for name in pattern.findall(text))
                found.update(dict.fromkeys(names, f"{package}.{file.removesuffix('.py')}"))
    return found
