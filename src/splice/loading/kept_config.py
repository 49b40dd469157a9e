"""New weights for an adapter that keeps its config: what the checkpoint's own config says otherwise."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from splice.config import PeftConfig
from splice.kinds.matching import value_for
from splice.loading.config_fields import field_value


def other_values(said: PeftConfig, kept: PeftConfig, paths: Collection[str], also: Collection[str] = ()) -> list[str]:
    """A phrase for each field by which an adapter with the config `said` computes something else than one with `kept`.

    Args:
        said: the checkpoint's config.
        kept: the adapter's.
        paths: of its layers, for values of single layers.
        also: further fields to compare, which the tensors would tell.
    """
    theirs, own = ({**c.computed(), **{field: field_value(c, field) for field in also}} for c in (said, kept))
    patterned = {field: pattern for pattern, field in kept.pattern_fields.items() if field in own and field in theirs}
    found = [_phrase(name, theirs[name], own[name]) for name in own if name in theirs and name not in patterned]
    # Not the fields but what they come to: one adapter may be written with patterns and without.
    for name, pattern in patterned.items():
        is_flat = not any(field_value(config, pattern) for config in (said, kept))
        each = (
            (path, *(_at(config, pattern, name, path) for config in (said, kept)))
            for path in ([""] if is_flat else paths)
        )
        place, one, other = next(((p, one, other) for p, one, other in each if one != other), ("", None, None))
        found.append(_phrase(f"{name} of {place!r}" if place else name, one, other))
    return [phrase for phrase in found if phrase]


def _at(config: PeftConfig, pattern: str, field: str, path: str) -> object:
    values = field_value(config, pattern)
    default = field_value(config, field)
    return value_for(values, path, default) if isinstance(values, Mapping) else default


def _phrase(name: str, theirs: object, own: object) -> str:
    return "" if _plain(theirs) == _plain(own) else f"{name} is {theirs!r} there and {own!r} here"


def _plain(value: object) -> object:
    # What a file has as a list, memory may have as a set or a tuple.
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return list(value) if isinstance(value, tuple) else value
