"""Every exception and warning class of splice, the one way to warn, and what messages are worded with."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

# Packages whose frames a warning never blames: what stands between us and whoever called us.
_BETWEEN = frozenset({"splice", "torch", "contextlib", "functools"})


class PeftError(Exception):
    """Root of the errors that splice raises about adapters."""


class PeftWarning(UserWarning):
    """A load or a save that works, with something the caller should know."""


# Those below are built-in errors as well, of the classes that the reference raises: scripts written for it catch these.


class NoMatchingPeftModuleError(PeftError, ValueError):
    """The config selects no module of the base model."""


class CheckpointError(PeftError, ValueError):
    """The checkpoint cannot be found, read or understood; the model has not been looked at."""


class FieldTypeError(CheckpointError, TypeError):
    """A field of a config file has a value of a type that it cannot have. The reference raises a TypeError."""


class UnknownMethodError(PeftError, KeyError):
    """`peft_type` names no method that is known here."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0])


class UnsupportedLayerError(PeftError, ValueError, TypeError):
    """The method cannot be put on a layer that the config selects. The reference raises either kind, by method."""


class UnsupportedFeatureError(PeftError, NotImplementedError):
    """The config asks for something that would change the output and is not implemented."""


class NoRoomError(PeftError, RuntimeError):
    """Registered adapters cannot all be on the model at once within the limits of the store. Nothing was evicted."""


class AdapterMismatchError(PeftError, RuntimeError):
    """The checkpoint does not fit the model. The model is as it was.

    One error holds the whole list: whoever mends a checkpoint wants to know all of it at once.

    Attributes:
        missing: names of tensors that the adapter needs and the checkpoint lacks.
        unexpected: names of tensors of the checkpoint that have no place in the model.
        mismatched: names of tensors whose shape or dtype does not fit their place.
    """

    def __init__(
        self,
        message: str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        mismatched: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.missing = list(missing)
        self.unexpected = list(unexpected)
        self.mismatched = list(mismatched)


def sized(nbytes: int) -> str:
    """A number of bytes for people: "45.1 MB"."""
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.1f} kB"


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun: "1 layer", "3 layers"; `many` where that is not `one` with an s."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn, and blame the first frame that is neither ours nor torch's: the line that a reader can change."""
    # A fixed `stacklevel` would be wrong for most calls: the same warning comes from a load, from a forward, and from both
    # through a task class. `skip_file_prefixes` does this, from Python 3.12 on.
    level, frame = 2, sys._getframe(1).f_back
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, category, stacklevel=level + 1 if frame is not None else level)
