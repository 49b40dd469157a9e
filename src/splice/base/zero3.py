"""DeepSpeed's ZeRO-3: each process keeps a part of every parameter elsewhere, and an empty tensor in its place.

Nothing is imported for it: where it is on, others have imported what is asked here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

# Where transformers keeps the settings that it was given for DeepSpeed.
_SETTINGS = "transformers.integrations.deepspeed"


def is_zero3_enabled() -> bool:
    """Whether the models of this process are divided by ZeRO-3."""
    module = sys.modules.get(_SETTINGS)
    return module is not None and bool(module.is_deepspeed_zero3_enabled())


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], modifier_rank: int | None = None) -> Iterator[None]:
    """Inside, what ZeRO-3 has divided of these parameters is whole; without ZeRO-3 nothing happens.

    Args:
        parameters: all processes have to come by with the same ones.
        modifier_rank: the process whose changes reach the others; None for reading alone.
    """
    if not is_zero3_enabled():
        yield
        return
    # It leaves out parameters that it has not divided.
    with sys.modules["deepspeed"].zero.GatheredParameters(list(parameters), modifier_rank=modifier_rank):
        yield
