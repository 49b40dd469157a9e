"""Tensors whose values are on their way from a file: their memory is there at once, and the program goes on meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

import torch

# Bytes from which on reading takes longer than starting a thread for it.
_WORTH_A_THREAD = 1 << 20


class Reading:
    """Tensors that are being read.

    Args:
        tensors: all of them; they have values once `wait` has returned.
        fill: reads the values. It is called once, by a thread of its own where there is much to read.
        size: how many bytes are read.
        lent: whether they may be memory that is kept elsewhere: whoever keeps them too has to copy them.
    """

    def __init__(self, tensors: list[torch.Tensor], fill: Callable[[], None], size: int, lent: bool = False) -> None:
        self.tensors = tensors
        self.lent = lent
        self._fill = fill
        self._error: BaseException | None = None
        self._is_done = False
        # It keeps this object, and so the memory that it fills, whatever becomes of whoever should wait for it.
        self._thread = self._started() if size >= _WORTH_A_THREAD else None

    def wait(self) -> None:
        """Return when all values are there.

        Raises:
            CheckpointError: they could not be read.
        """
        if self._is_done:
            return
        if self._thread is None:
            self._fill()
        else:
            self._thread.join()
            if self._error is not None:
                raise self._error
        self._is_done = True

    def _started(self) -> Thread | None:
        thread = Thread(target=self._run, name="splice-read")
        try:
            thread.start()
        except RuntimeError:  # there can be no more of them: then it is read when it is waited for
            return None
        return thread

    def _run(self) -> None:
        try:
            self._fill()
        except BaseException as error:  # which whoever waits is to get, and not the thread's own standard error
            self._error = error
