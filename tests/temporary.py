"""Where the quick tests put their files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

# A file system in memory, as Linux has it. All that the quick tests write at once is a tenth of what has to be free.
_MEMORY = Path("/dev/shm")
_FREE = 4 << 30


def put_into_memory(config: pytest.Config) -> None:
    """For `-m "not slow"`, pytest's temporary folders lie in memory where there is room.

    A save waits until each of its files is on the disk, some milliseconds in which nothing else goes on; tests save thousands
    of times. What slow tests write may be larger than the memory.
    """
    if config.option.markexpr != "not slow" or not _MEMORY.is_dir():
        return
    if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > _FREE:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))
