"""Writes what is made from the code: `python docs/generate.py` (`make docs`).

That is docs/methods.md and what the command line knows of methods without importing them, from their records; the drawing of
the rooms in docs/architecture.md, from the imports; and the types of the public names and the pages of the API reference,
from the table of those.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from splice.config import PeftConfig
from splice.kinds.combining import Summed
from splice.kinds.registry import Method, all_methods

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE), str(_HERE.parent)]

import public  # noqa: E402  (beside this file, which is no package)
from benchmarks.methods import REQUIRED, Figures, read_figures  # noqa: E402
from parameters import parameters  # noqa: E402
from rooms import drawing  # noqa: E402

_BEGIN, _END = "<!-- rooms: written by `make docs` -->", "<!-- end of rooms -->"
_HEAD = """# Methods

One row for every record in `src/splice/methods/`; written by `make docs`. Every method is loaded,
created, trained and saved, switched, disabled and deleted, and may stand in a batch of mixed rows.

| `peft_type` | what it does | config | on | merges | several active | weighted sums | paper |
|---|---|---|---|---|---|---|---|
"""


_FIGURES = """
## What they cost

**Parameters**: what a new adapter with the config's defaults trains on one linear layer of 4096 x 4096; of methods that act
on the call, or on other layers, on a Llama of that width with one block, with 16 virtual tokens or 16 tokens. Of P-tuning
most are needed in training alone.

**Load**: how many times as long the reference takes for the same checkpoint on the same base (a Llama of 16 blocks, hidden
size 128), by the processor's time, in turns. Where a decomposition of the weights is most of it, both do the same one.

**Call**: what the adapter adds to the time of a call of that base with one token, beside what LoRA adds in splice; in
brackets what it adds in the reference, in the same unit. Differences below a tenth are noise.

**Mixed**: 32 rows of one token, each with an adapter of its own, in one call of that base: how many times as long a call for
each row takes, with `set_adapter` in between.

`python -m benchmarks --only methods` measures all three (`make bench` does too) and keeps them in
`benchmarks/methods.json`, from which `make docs` makes this page.

| `peft_type` | parameters | load | call | mixed |
|---|---|---|---|---|
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
        _word(method.merges),
        _word(not method.exclusive),
        combining(method),
        method.paper,
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def costs(method: Method, measured: Figures | None) -> str:
    """One line of the second table; a method that came after the last measurement has no figures yet."""
    count = parameters(method, 4096, REQUIRED.get(method.name.value, {}))
    said = "by its experts" if count is None else f"{count:,}"
    load = "not measured" if measured is None else f"{measured.load:.1f}x"
    call = "not measured" if measured is None else f"{measured.call:.1f} ({measured.reference_call:.1f})"
    mixed = "" if measured is None or measured.mixed is None else f"{measured.mixed:.1f}x"
    return f"| `{method.name.value}` | {said} | {load} | {call} | {mixed} |"


def _word(value: bool) -> str:
    return "yes" if value else "no"


def page() -> str:
    """The whole page."""
    # By name: the order in which the methods were imported is nobody's choice.
    methods, measured = [method for _, method in sorted(all_methods().items())], read_figures()
    first, second = map(row, methods), (costs(method, measured.get(method.name.value)) for method in methods)
    return "\n".join((_HEAD.rstrip("\n"), *first, _FIGURES.rstrip("\n"), *second, ""))


def for_the_command_line() -> str:
    """What `splice inspect` knows of the methods: JSON, one line for each, so that a new one is one line more."""
    lines = [f'"{name.value}": {json.dumps(_known(method))}' for name, method in sorted(all_methods().items())]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _known(method: Method) -> dict[str, object]:
    config = method.config
    stored = [field for field in dataclasses.fields(config) if field.init and field.name not in config.runtime_fields]
    return {
        "summary": method.summary,
        "tensors": sorted(method.tensor_names),
        "whole_call": method.network_layer is not None,
        "legacy": sorted(config.legacy_fields),
        "fields": {field.name: _default(field, config) for field in stored},
        "rank": config.rank_field,
        "scale": config.scale_fields,
    }


def _default(field: dataclasses.Field[object], config: type[PeftConfig]) -> object:
    """What a field holds that nobody set, as a file spells it; null where it has no value of its own."""
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        return dataclasses.asdict(made) if dataclasses.is_dataclass(made) and not isinstance(made, type) else made
    return None if field.default is dataclasses.MISSING else field.default


def architecture() -> str:
    """The page of the architecture with the rooms as the imports draw them now."""
    text = (_HERE / "architecture.md").read_text(encoding="utf-8")
    front, _, rest = text.partition(_BEGIN)
    return f"{front}{_BEGIN}\n\n```\n{drawing()}\n```\n\n{_END}{rest.partition(_END)[2]}"


def written() -> dict[Path, str]:
    """The files that are made from the code, and what is in them."""
    reference = {_HERE / "api" / f"{name}.md": text for name, text in public.reference().items()}
    pages = {_HERE / "methods.md": page(), _HERE / "architecture.md": architecture(), **reference}
    root = _HERE.parent
    stubs = {
        root / "src" / "splice" / "cli" / "methods.json": for_the_command_line(),
        root / "src" / "splice" / "__init__.pyi": public.stub(),
        root / "peft-shim" / "src" / "peft" / "__init__.pyi": public.shim_stub(),
    }
    return pages | stubs


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")
