"""Writes what is made from the code: `python docs/generate.py` (`make docs`).

That is docs/methods.md, from the records of the methods; the drawing of the rooms in docs/architecture.md, from the imports;
and the types of the public names, from the table of those.
"""

from __future__ import annotations

import sys
from pathlib import Path

import splice
from splice.discovery import public_names
from splice.kinds.combining import Summed
from splice.kinds.registry import Method, all_methods

_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE))

from rooms import drawing  # noqa: E402  (beside this file, which is no package)

_BEGIN, _END = "<!-- rooms: written by `make docs` -->", "<!-- end of rooms -->"
_HEAD = """# Methods

One row for every record in `src/splice/methods/`; written by `make docs`. Every method is loaded,
created, trained and saved, switched, disabled and deleted, and may stand in a batch of mixed rows.

| `peft_type` | what it does | config | on | merges | several active | weighted sums | paper |
|---|---|---|---|---|---|---|---|
"""


def layers_of(method: Method) -> list[str]:
    """What it is put on, in words."""
    names = [kind.name.replace("_", " ").lower() for kind in method.layers]
    if method.other_layer is not None:
        names.append("any layer")
    if method.parameters_layer is not None:
        names.append("bare parameters")
    if method.network_layer is not None:
        names.append("the network's call")
    return names


def merges(method: Method) -> bool:
    """Whether any of its adapter layers can be merged."""
    layers = [*method.layers.values(), method.parameters_layer, method.other_layer]
    return any(layer is not None and layer.mergeable for layer in layers)


def combining(method: Method) -> str:
    """How several of its adapters become one, in words."""
    if method.combine is None:
        return ""
    summed = isinstance(method.combine, Summed)
    return (
        "each tensor is the weighted sum of theirs" if summed else "by their low-rank factors, in one of several ways"
    )


def row(method: Method) -> str:
    """One line of the table."""
    cells = [
        f"`{method.name.value}`",
        method.summary.rstrip("."),
        f"`{method.config.__name__}`",
        ", ".join(layers_of(method)),
        _word(merges(method)),
        _word(not method.exclusive),
        combining(method),
        method.paper,
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _word(value: bool) -> str:
    return "yes" if value else "no"


def page() -> str:
    """The whole page."""
    return _HEAD + "\n".join(row(method) for method in all_methods().values()) + "\n"


def architecture() -> str:
    """The page of the architecture with the rooms as the imports draw them now."""
    text = (_HERE / "architecture.md").read_text(encoding="utf-8")
    front, _, rest = text.partition(_BEGIN)
    return f"{front}{_BEGIN}\n\n```\n{drawing()}\n```\n\n{_END}{rest.partition(_END)[2]}"


# The public names are imported when they are first asked for, which no type checker can follow: it reads a stub beside the
# table. No `if TYPE_CHECKING` in the table, which would import the methods then, and nobody outside of these may.
_STUB_HEAD = """# Written by `make docs`: the public names with their types, for editors and type checkers.

"""
_STUB = Path(splice.__file__).with_suffix(".pyi")


def stub() -> str:
    """The types of the public names: where each is imported from."""
    modules = {name: getattr(splice, name).__module__ for name in splice.__all__} | public_names()
    places = sorted((module, name) for name, module in modules.items())
    imports = [f"from {module} import {name} as {name}\n" for module, name in places]
    listed = "".join(f'    "{name}",\n' for name in splice.__all__)
    return f"{_STUB_HEAD}{''.join(imports)}\n__version__: str\n__all__ = [\n{listed}]\n"


if __name__ == "__main__":
    _STUB.write_text(stub(), encoding="utf-8")
    (_HERE / "methods.md").write_text(page(), encoding="utf-8")
    (_HERE / "architecture.md").write_text(architecture(), encoding="utf-8")
