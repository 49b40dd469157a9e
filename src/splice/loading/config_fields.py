"""Fields that some methods' configs have and others do not, asked for by name.

A method that could tie layers, save modules whole or train rows of single tokens says so by having the field. Only what a
config's class declares counts: an attribute that somebody put on an object means nothing.
"""

from __future__ import annotations

import dataclasses

from splice.config import PeftConfig


def field_names(config: PeftConfig) -> frozenset[str]:
    """The names of all fields of a config."""
    return frozenset(field.name for field in dataclasses.fields(config))


def field_value(config: PeftConfig, name: str) -> object:
    """The value of the field `name`; None where the config has no such field."""
    return getattr(config, name) if name in field_names(config) else None
