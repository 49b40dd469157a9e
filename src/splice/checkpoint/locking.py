"""A lock on a folder that other processes see."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl


class Lock:
    """A lock on a folder, given back at the latest when nobody has this object any more."""

    def __init__(self, folder: Path) -> None:
        # One, or none once it is closed. Taken out and closed in one line: an interrupt comes before it or after it.
        self.descriptors: list[int] = []
        self.descriptors.append(os.open(folder, os.O_RDONLY))

    def take(self) -> None:
        """Wait until no other process has it."""
        if sys.platform != "win32":
            with suppress(OSError):
                fcntl.flock(self.descriptors[0], fcntl.LOCK_EX)

    def close(self) -> None:
        """Give it back; a second time does nothing."""
        while self.descriptors:
            os.close(self.descriptors.pop())

    def __del__(self) -> None:
        self.close()
