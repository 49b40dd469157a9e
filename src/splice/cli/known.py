"""What is known of the methods without importing them: `methods.json`, which `make docs` writes from their records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from splice.checkpoint.patterns import value_for


class Known(NamedTuple):
    """A method, as far as its files are concerned; the fields are those of an entry of `methods.json`."""

    # What it does, in one sentence.
    summary: str
    # The first components of its tensors' names.
    tensors: tuple[str, ...]
    # Whether it acts on the call of the whole network: then its tensors belong to no layer.
    whole_call: bool
    # Fields that older files have and that mean nothing any more.
    legacy: tuple[str, ...]
    # Every field of its config -> what it holds where nobody set it.
    fields: Mapping[str, object]
    # As `rank_field` of its config.
    rank: str
    # As `scale_fields` of its config.
    scale: tuple[str, ...]

    def rank_of(self, fields: Mapping[str, object], path: str) -> int | None:
        """The rank that a config with these fields gives to the layer at `path`; None where there is none."""
        pattern = fields.get("rank_pattern")
        found = value_for(pattern if isinstance(pattern, dict) else {}, path, self._value(fields, self.rank))
        return found if isinstance(found, int) else None

    def scale_of(self, fields: Mapping[str, object]) -> float | None:
        """What a config with these fields has updates multiplied with; None where that is 1, or more is needed to know it."""
        values = [self._value(fields, name) for name in self.scale]
        numbers = [value for value in values if isinstance(value, (int, float))]
        if not numbers or len(numbers) < len(values):
            return None
        first, *others = numbers
        return first if not others else first / sum(others) if sum(others) > 0 else None

    def _value(self, fields: Mapping[str, object], name: str) -> object:
        return fields.get(name, self.fields.get(name))


def known(peft_type: object) -> Known | None:
    """What is known of a `peft_type`; None where there is no such method."""
    entry = _all().get(peft_type) if isinstance(peft_type, str) else None
    return None if entry is None else Known(*(entry[name] for name in Known._fields))


def known_methods() -> list[str]:
    """The `peft_type` of every method."""
    return sorted(_all())


@cache
def _all() -> Mapping[str, dict[str, Any]]:
    # Of the types that `Known` says: the file is made with it in mind.
    found: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("methods.json").read_bytes())
    return found
