"""What an adapter layer does to a call of its base layer: `y = around(x, inner)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import torch
from torch import nn

from splice.kinds.scale import Rescaled
from splice.selection import Rows

# A call of the base layer, or of the next adapter layer in. It takes what the base layer's forward takes, and gives what
# that gives: a tensor mostly, a tuple from attention, anything at all from a network.
Forward: TypeAlias = Callable[..., Any]


class Factors(NamedTuple):
    """An update of a linear layer that is a plain product: `scale * b a`."""

    # (r, in)
    a: torch.Tensor
    # (out, r)
    b: torch.Tensor
    # What the product is multiplied with.
    scale: float


class KeepsScale(Protocol):
    """Memory that factors lie in, and that knows their scales too."""

    def rescaled(self, layer: Effect) -> None:
        """Be told that the scale of a layer is another one now."""


class Action(Enum):
    """How an effect stands to others on the same layer: those of one action, but the last, give the same in any order."""

    ADDS = "adds to the output something that the layer's input alone decides"
    SCALES_INPUT = "multiplies each feature of the input with a number"
    SCALES_OUTPUT = "multiplies each feature of the output with a number"
    OWN_ROWS = "puts rows in the place of some of the weight's, never the same as another of this action"
    OTHER = "anything else, whose place among others matters"


class Effect:
    """The effect on a call. A method supplies `around`; the host composes the selected ones."""

    # True where `inner` is called with the very input `x`: then its output may be computed once for several adapters.
    keeps_input: bool = True
    # Of several active adapters the first is the innermost; the first that the input meets where this is True.
    first_outside: ClassVar[bool] = False
    # What it does, as far as it matters to others beside it.
    action: Action = Action.OTHER
    # Suffixes of the tensors that `factors` gives, a and b, of layers that have no others: then they may lie in a stack, with
    # those of other adapters. Empty of all others.
    stacked_names: ClassVar[tuple[str, ...]] = ()
    # The stack that they lie in, which the layer tells when its scale changes; None where they lie in none.
    stack: KeepsScale | None = None
    # Whether `shown` gives anything. It is asked at every call, so it is a flag and not a method.
    shows: bool = False
    # Whether what it makes of the layer's tensors is the layer's own for everybody who reads them, and not only for the
    # network: it has put them in the place of the base's, and added nothing.
    stands_in: ClassVar[bool] = False

    # Whether `before` and `after` are all that it does.
    two_steps: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # By the methods themselves: a class that does something else in one of them would say so nowhere.
        whole = cls.around is Effect.around and cls.wrapped is Effect.wrapped and cls.wrapped_for is Effect.wrapped_for
        two_steps = whole and (cls.before is not Effect.before or cls.after is not Effect.after)
        if two_steps is not cls.two_steps:
            cls.two_steps = two_steps

    def around(self, x: torch.Tensor, inner: Forward) -> Any:
        """The adapted output for `x`, of the shape and dtype that `inner` gives.

        Effects that only change what goes in, or what comes out, do so in `before` and `after`: then all rows of a mixed
        batch share one call of the base.

        Args:
            x: what the layer is called with: (..., in), or token ids (...) of an embedding.
            inner: the base layer, or the next adapter layer in.
        """
        return self.after(inner(self.before(x)))

    def before(self, x: torch.Tensor) -> torch.Tensor:
        """What `inner` is called with in the place of `x`, of its shape and dtype; where not `x`, `keeps_input` is False."""
        return x

    def after(self, y: Any) -> Any:
        """The output in the place of what `inner` gave, (..., out)."""
        return y

    def wrapped(self, inner: Forward) -> Forward:
        """`around` as a function of the base layer's own arguments."""
        # A new function at every call of the layer. One that is kept would have to be thrown away whenever the selection,
        # what is merged, or the base's own forward changes.
        around = self.around
        return lambda x: around(x, inner)

    def wrapped_for(self, inner: Forward, rows: torch.Tensor, batch: int) -> Forward:
        """`wrapped` for these rows of a batch alone, which are all that it is called with.

        Args:
            inner: the base layer, or the next adapter layer in.
            rows: which rows they are, (n).
            batch: how many there are; more than the call's, where `generate` repeats these.
        """
        return self.wrapped(inner)

    @classmethod
    def wrapped_rows(cls, layers: Mapping[str, Effect], rows: Rows, inner: Forward) -> Forward | None:
        """`wrapped` for a batch with an adapter for each row, of methods for which rows cannot be taken one by one.

        Args:
            layers: the adapter layers of the base layer, by adapter name.
            rows: which adapter each row has.
            inner: the base layer.
        """
        return None

    def factors(self) -> Factors | None:
        """The update as a plain product of the layer's input, where it is one now: then rows are worked out together."""
        return None

    def product_scale(self) -> float | None:
        """The scale of `factors` alone; None where the update is no plain product now."""
        return None

    def shown(self, base: nn.Module) -> dict[str, torch.Tensor]:
        """Tensors that take the place of the base's own of the same name, and have its shape, while `base` computes."""
        return {}

    def conflict(self, other: Effect) -> str:
        """Why this one and that of another adapter on the same layer cannot take effect together; empty if they can."""
        return ""


def note_rescaled(layer: Effect) -> None:
    """Tell whoever keeps the scale of a layer that it may be another one now."""
    Rescaled.note()
    if layer.stack is not None:
        layer.stack.rescaled(layer)
