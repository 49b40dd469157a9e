"""What a PeftModel was called with, for methods that must know it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from splice.kinds.adapters import Adapters


@dataclass(eq=False, repr=False)
class Call:
    """One call of a PeftModel."""

    # The tokens, (batch, T), if it was given any.
    input_ids: torch.Tensor | None
    # All named arguments, as they are passed on.
    options: dict[str, Any]
    # Whether it is a call of `generate`.
    generates: bool
    # What it returned; None before it has.
    result: object = None


class ReadsCall(ABC):
    """An ability of adapter layers: they know what the PeftModel was called with."""

    @classmethod
    @abstractmethod
    def call_context(cls, adapters: Adapters, names: Sequence[str], call: Call) -> AbstractContextManager[None]:
        """What holds while the PeftModel is called.

        Args:
            adapters: those of the model.
            names: its adapters with such layers.
            call: what it was called with; options that are not the base model's are taken out.
        """
