"""Files that are there whole or not at all: written under another name first, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with beside(path) as new:
        new.write_text(text, encoding="utf-8")
        flush(new)
        os.replace(new, path)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, which is gone afterwards if it was not renamed."""
    # The same folder and not `tempfile`'s: renaming is atomic only within a file system. The number of the process keeps
    # two that save at once from writing into each other's file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Return once the file's bytes are on the disk itself."""
    # Without it a rename may reach the disk before the bytes do, and a power cut leave an empty file under the new name.
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
