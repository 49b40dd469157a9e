"""What the forward of a module takes."""

from __future__ import annotations

import inspect

from torch import nn


def named_arguments(module: nn.Module) -> tuple[str, ...]:
    """The names of what a module's forward takes, in their order."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(n for n, p in inspect.signature(type(module).forward).parameters.items() if p.kind in named)[1:]
