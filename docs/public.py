"""What is made from the table of public names: a stub with their types, and the pages of the API reference.

The names are imported when they are first asked for, which neither type checkers nor mkdocstrings can follow: they are told
where each is from. In a stub, and not behind `if TYPE_CHECKING` in the table: that would import the methods, which nobody
outside of these may.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import splice
from splice.discovery import public_names

_STUB_HEAD = """# Written by `make docs`: the public names with their types, for editors and type checkers.
# isort: skip_file

"""


class Page(NamedTuple):
    """A page of the reference."""

    title: str
    # What stands below the title.
    text: str
    # Where its names are defined: modules, with those inside of them. Those of no page are on the last one.
    modules: tuple[str, ...]
    # Names that come before the others, which are in the order of the alphabet.
    first: tuple[str, ...] = ()
    # What else belongs there, as mkdocstrings has it.
    more: str = ""


PAGES: Mapping[str, Page] = {
    "model": Page(
        "Models",
        "What people call. `PeftModel.from_pretrained` and `get_peft_model` choose a class by the config's `task_type`.",
        ("splice.model", "splice.tasks", "splice.mixed", "splice.auto", "splice.fleet.store", "splice.fleet.limits"),
        ("PeftModel", "get_peft_model"),
    ),
    "configs": Page(
        "Configs",
        "Inert dataclasses: they are read from `adapter_config.json`, and written back. Each has the fields that every "
        "config has (`PeftConfig`) and its own.",
        ("splice.config", "splice.checkpoint.types", "splice.methods"),
        ("PeftConfig", "get_peft_config", "PeftType", "TaskType", "LoraConfig"),
    ),
    "reports": Page(
        "Reports",
        "What a load did, and what a model carries.",
        ("splice.loading.report", "splice.status", "splice.fleet"),
        ("LoadReport",),
        "::: splice.loading.load.LoadResult\n\n::: splice.status.ModelStatus\n\n::: splice.status.LayerStatus\n",
    ),
    "errors": Page(
        "Errors and warnings",
        "Each is also of the built-in class that the reference raises.",
        ("splice.errors",),
        ("PeftError", "AdapterMismatchError"),
    ),
    "functions": Page(
        "Functions",
        "For programs that handle tensors themselves.",
        (),
        more="""## Without a PeftModel

From `splice.functional`, for a network that adapters were put on without a `PeftModel` around it.

::: splice.functional
    options:
      show_root_heading: false
      show_root_toc_entry: false
      members: [set_adapter, delete_adapter, set_requires_grad, cast_adapter_dtype]
""",
    ),
}


def places() -> dict[str, str]:
    """Public name -> the module that defines it."""
    return {name: getattr(splice, name).__module__ for name in splice.__all__} | public_names()


def stub() -> str:
    """The types of the public names: where each is imported from."""
    imports = [_imported(module, name) for module, name in sorted((m, n) for n, m in places().items())]
    listed = "".join(f'    "{name}",\n' for name in splice.__all__)
    return f"{_STUB_HEAD}{''.join(imports)}\n__version__: str\n__all__ = [\n{listed}]\n"


def _imported(module: str, name: str) -> str:
    """The import of a name that is passed on, as the formatter writes it."""
    line = f"from {module} import {name} as {name}\n"
    return line if len(line) <= 121 else f"from {module} import (\n    {name} as {name},\n)\n"


def shim_stub() -> str:
    """The same for the shim. What follows from the methods' records is not known before the program runs."""
    imports = "".join(_imported("splice", name) for name in sorted(places()))
    return (
        f"{_STUB_HEAD}from typing import Any\n\n{imports}\n__version__: str\n\ndef __getattr__(name: str) -> Any: ...\n"
    )


def reference() -> dict[str, str]:
    """Name of a page of the reference -> its text."""
    names: dict[str, list[str]] = {page: [] for page in PAGES}
    modules = places()
    for name, module in modules.items():
        names[_page_of(name, module)].append(name)
    return {page: _text(PAGES[page], names[page], modules) for page in PAGES}


def _page_of(name: str, module: str) -> str:
    *pages, last = PAGES
    if module.startswith("splice.methods.") and not inspect.isclass(getattr(splice, name)):
        return last  # a function of a method, which is no config
    return next((p for p in pages if any(f"{module}.".startswith(f"{m}.") for m in PAGES[p].modules)), last)


def _text(page: Page, names: Iterable[str], modules: Mapping[str, str]) -> str:
    rest = sorted(set(names) - set(page.first), key=str.lower)
    entries = [f"::: {modules[name]}.{name}\n" for name in (*page.first, *rest)]
    return "\n".join([f"# {page.title}\n", f"{page.text}\n", *entries, page.more]).rstrip() + "\n"
