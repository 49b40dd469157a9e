"""Files that are there whole or not at all: written under another name first, then renamed."""

from __future__ import annotations

import os
import secrets
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from splice.checkpoint.locking import Lock


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with beside(path) as new:
        new.write_text(text, encoding="utf-8")
        flush(new)
        os.replace(new, path)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other process is at the same place with the same folder: data-parallel jobs save from every process."""
    # The folder itself is locked and not a file in it, which would have to be left there. The system takes the lock back
    # when the process dies. Where nothing can be locked (Windows, some network file systems), each file is whole none the
    # less.
    if sys.platform == "win32":
        yield
        return
    key = (threading.get_ident(), os.path.realpath(folder))
    left = _held.get(key)
    if left is not None:
        # By an interrupt between two lines, and kept by its traceback: this thread would wait for itself.
        left.close()
    lock = _held[key] = Lock(folder)
    try:
        lock.take()
        yield
    finally:
        lock.close()


# Those that are held, by thread and folder.
_held: weakref.WeakValueDictionary[tuple[int, str], Lock] = weakref.WeakValueDictionary()


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, which is gone afterwards if it was not renamed."""
    # The same folder and not `tempfile`'s: renaming is atomic only within a file system. By chance, so that two that save
    # at once do not write into each other's file: in containers all processes may have the same number.
    temporary = path.with_name(f".{path.name}.{secrets.randbelow(10**18)}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Return once the file's bytes are on the disk itself."""
    # Without it a rename may reach the disk before the bytes do, and a power cut leave an empty file under the new name.
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
