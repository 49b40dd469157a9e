"""The fields of a config file as they stand in it, before any config class makes something of them."""

from __future__ import annotations

import json
from typing import NamedTuple

from splice.checkpoint.foreign import LFS_START, lfs_pointer
from splice.errors import CheckpointError


class UnknownFields(NamedTuple):
    """Fields of a config file that no config class here has: what a newer or another library wrote."""

    # The fields with their values, as they stand in the file.
    values: dict[str, object]

    @property
    def switched_on(self) -> dict[str, object]:
        """Those that may change what the adapter computes: set to something other than null, false or empty."""
        return {name: value for name, value in self.values.items() if value not in (None, False, 0, "", [], {})}


def read_fields(text: bytes, place: str) -> dict[str, object]:
    """Parse the bytes of a config file into its fields.

    Raises:
        CheckpointError: it is a pointer to a file that was not fetched, not UTF-8, not JSON, or not a JSON object.
    """
    if text.startswith(LFS_START):
        raise CheckpointError(lfs_pointer(place))
    try:
        # Editors of Windows put a byte order mark in front. The bytes are decoded here and not by `json.loads`, which would
        # take UTF-16 and UTF-32 as well: no other reader of adapters does.
        fields = json.loads(text.decode("utf-8-sig"))
    # Brackets inside brackets by the thousand are no config either.
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{place} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{place} holds a JSON {type(fields).__name__}; an adapter config is an object")
    return fields
