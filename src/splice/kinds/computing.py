"""Which adapted layers compute now in this thread, and what their own tensors read as meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from splice.kinds.host import Host


class _Computing(threading.local):
    """What one thread is in the middle of."""

    # Not entries in the dicts of the layers: other threads would read these. Not a `ContextVar`: a compiled graph cannot
    # look into one, and can into this.

    # Hosts of the layers whose forward is running, the innermost last; each with tensors that stand in for its own, by name.
    # A tuple that is exchanged and never changed, so that going back to what was before cannot fail.
    stack: tuple[tuple[Host, Mapping[str, torch.Tensor]], ...]

    def __init__(self) -> None:
        # Not a default of the class: a graph that is compiled at a thread's first call takes note that the thread has no
        # entry of its own, and is thrown away once it has one.
        self.stack = ()


computing = _Computing()


@contextmanager
def reading_as(host: Host, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, this thread reads `tensors` on the layer in the place of its own, by name."""
    before = computing.stack
    computing.stack = (*before, (host, tensors))
    try:
        yield
    finally:
        computing.stack = before
