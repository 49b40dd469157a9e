"""What is worked out once and kept, whichever call happens to come first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

# Where torch may be told to compute in half precision.
_DEVICES = ("cpu", "cuda", "xpu", "mps")


@contextmanager
def lasting() -> Iterator[None]:
    """Inside, what is computed holds for every later call, in whatever mode: without a graph, and not rounded by autocast."""
    with ExitStack() as stack:
        # In this order: gradients are on where inference mode is switched off.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
