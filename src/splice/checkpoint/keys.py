"""The grammar of a checkpoint's keys, with its inverse.

    key    := prefix path "." suffix
    prefix := "base_model.model."
    path   := dotted path of the target in the base model
    suffix := the adapter layer's own name of the tensor; its first component is one of the method's names

Adapter names take no part in it. A suffix begins at the *last* component that is one of the method's names, so a base
module may be called `lora_A` itself.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

# The reference's object tree: a PeftModel's `base_model`, whose `model` is the base. It stands in files, whoever wrote them.
PREFIX = "base_model.model."
# Of tensors that all layers share, and that so belong to no target.
SHORT_PREFIX = "base_model."


class Key(NamedTuple):
    """A parsed key."""

    # The target's dotted path in the base model.
    path: str
    # The name of the tensor on it: `lora_A.weight`.
    suffix: str

    def __str__(self) -> str:
        return format_key(self.path, self.suffix)


def format_key(path: str, suffix: str) -> str:
    """The key of the tensor `suffix` on the target at `path`."""
    return f"{PREFIX}{path}.{suffix}" if path else PREFIX + suffix


def parse_key(key: str, names: Collection[str]) -> Key | None:
    """The parts of `key`, or None where it is not of this grammar; `str(parse_key(key))` is `key`.

    Args:
        key: a key of a checkpoint.
        names: what the first component of a suffix can be (`lora_A`, `lora_B`...).
    """
    if not key.startswith(PREFIX):
        return None
    # By whole components, from the right. A search for "lora_A" in the text would also find a module called `my_lora_A2`.
    parts = key[len(PREFIX) :].split(".")
    for index in range(len(parts) - 1, 0, -1):
        if parts[index] in names:
            return Key(".".join(parts[:index]), ".".join(parts[index:]))
    return None


def renamed(keys: Iterable[str], key_mapping: Mapping[str, str]) -> dict[str, str]:
    """New key -> key for every key, after the caller's regular expressions.

    For each key the first expression (in the order of the mapping) that is found in it is applied, to the part behind
    the prefix.

    Raises:
        ValueError: a key has no prefix, or two keys become the same one.
    """
    # From new to old: the caller looks tensors up in the file by what this gives.
    result: dict[str, str] = {}
    for key in keys:
        prefix = next((p for p in (PREFIX, SHORT_PREFIX) if key.startswith(p)), None)
        if prefix is None:
            raise ValueError(f"`key_mapping` needs keys that begin with {PREFIX!r}; got {key!r}")
        rest = key[len(prefix) :]
        for pattern, replacement in key_mapping.items():
            rest, count = re.subn(pattern, replacement, rest)
            if count:
                break
        if prefix + rest in result:
            raise ValueError(
                f"`key_mapping` gives {result[prefix + rest]!r} and {key!r} the same name {prefix + rest!r}"
            )
        result[prefix + rest] = key
    return result
