"""Files that are no adapters of this format: what they are, told by how their fields and tensors are named.

Other libraries' forms of one method's adapters are that method's business: it registers them (`register_foreign`) in a file
of its own called `foreign.py`, and `find_beside` imports that file without the method. Here are those of no single method.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from splice.discovery import find_beside

LFS_START = b"version https://git-lfs"


def lfs_pointer(place: str) -> str:
    """The sentence for a three-line text file that stands where a large file was not fetched."""
    return f"{place} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"


class ForeignNames(NamedTuple):
    """How another library names its tensors."""

    # A regular expression that is found in such names, and in no name of this format.
    pattern: str
    # The library, as the message calls it. Several patterns of one library are counted together.
    library: str
    # What to do with such a file: the second half of the sentence.
    remedy: str


class ForeignConfig(NamedTuple):
    """How the config of another tool is told from one of this format that lacks its `peft_type`."""

    # Of each group, one field at least is there and not null.
    fields: tuple[tuple[str, ...], ...]
    # What the file is and what to do with it.
    sentence: str
    # False where the fields only suggest it: such a reading comes after all that are certain.
    certain: bool = True


# The adapters library, for those who register more of its names.
ADAPTERS_LIBRARY = "the `adapters` library (adapter-transformers, AdapterHub)"
ADAPTERS_REMEDY = "load it with `model.load_adapter` of that library"

_NAMES: list[ForeignNames] = []
_CONFIGS: list[ForeignConfig] = []


def register_foreign(names: Iterable[ForeignNames] = (), configs: Iterable[ForeignConfig] = ()) -> None:
    """Make it known how other libraries name the tensors of a method, and the fields of their configs.

    The order counts: of two patterns that are found in one name, the one that was registered first decides.
    """
    _NAMES.extend(names)
    _CONFIGS.extend(configs)


def foreign_names(names: Collection[str]) -> str | None:
    """A sentence if most of these tensors are named as another library names its own."""
    find_beside("foreign")
    # Those of methods before the general ones. Half of the tensors will do: files have tensors without telling names.
    patterns: dict[str, list[str]] = {}
    remedies: dict[str, str] = {}
    for entry in (*_NAMES, *_GENERAL_NAMES):
        patterns.setdefault(entry.library, []).append(entry.pattern)
        remedies.setdefault(entry.library, entry.remedy)
    for library, own in patterns.items():
        found = [name for name in names if any(re.search(pattern, name) for pattern in own)]
        if found and 2 * len(found) >= len(names):
            return f"the tensors are named as {library} names them ({found[0]}); {remedies[library]}."
    return None


def what_config(fields: Mapping[str, object]) -> str:
    """What a config without `peft_type` is, as a sentence with a space in front; "" where nothing is known."""
    find_beside("foreign")
    if fields and {name for name, value in fields.items() if value is not None} <= _OF_THE_BASE:
        return _ONLY_THE_BASE if any(fields.values()) else ""
    entries = sorted((*_CONFIGS, *_GENERAL_CONFIGS), key=lambda entry: not entry.certain)
    for entry in entries:
        if all(any(fields.get(name) is not None for name in group) for group in entry.fields):
            return f" {entry.sentence}"
    return ""


# Fields that any adapter has, and that say nothing of its method.
_OF_THE_BASE = {
    "base_model_name_or_path",
    "base_model",
    "base_model_name",
    "revision",
    "task_type",
    "inference_mode",
    "peft_version",
}
_ONLY_THE_BASE = (
    " It names a base model and nothing else. If the folder holds a whole model, load it with the model's own class; if it "
    "holds an adapter, ask its author for the config that was saved with the weights."
)

_GENERAL_NAMES = (
    ForeignNames(
        r"(\.adapters?\.[^.]+\.adapter_(down|up)\b)|(\.prefix_tunings?\.)",
        ADAPTERS_LIBRARY,
        ADAPTERS_REMEDY,
    ),
    ForeignNames(
        r"(^|\.)adapter_query\.weight$|^layers\.\d+\.attention\.gate\d?$|\.(adapter_wte|gating_factor)(\.weight)?$",
        "LLaMA-Adapter's own code",
        "load it with that code: its names and its model are those of the original LLaMA release",
    ),
)

_GENERAL_CONFIGS = (
    ForeignConfig(
        fields=(("config",), ("model_type", "model_class")),
        sentence=f"It is a config of {ADAPTERS_LIBRARY}: {ADAPTERS_REMEDY}.",
    ),
    ForeignConfig(
        fields=(("adapter_len",), ("adapter_layer",)),
        sentence="It is a config of LLaMA-Adapter's own code; load it with that code.",
    ),
    ForeignConfig(
        fields=(("base_model", "base_model_name"),),
        sentence="It only describes how an adapter was trained; ask its author for the config that was saved with the "
        "weights.",
        certain=False,
    ),
)
