"""Finding the methods: every file below `splice/methods/` is imported once, and makes itself known as it is.

No list names them. A config class registers when it is defined (`config.py`), a record when it is made
(`kinds/registry.py`); both ask here first, so that whoever looks a method up finds all of them.
"""

from __future__ import annotations

import importlib
import pkgutil

_PACKAGE = "splice.methods"
_found = False


def find_methods() -> None:
    """Import every module of the package of methods. After the first time it costs nothing."""
    global _found
    if _found:
        return
    _found = True  # before the walk: a method that looks another one up on its way must not begin again
    try:
        _walk(_PACKAGE)
    except BaseException:
        _found = False
        raise


def _walk(package: str) -> None:
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
        if module.ispkg:
            _walk(module.name)
        else:
            importlib.import_module(module.name)
