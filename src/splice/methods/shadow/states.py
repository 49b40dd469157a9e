"""The states that travel beside the hidden states through the blocks of one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from splice.kinds.call import Telling


@dataclass(eq=False, repr=False)
class State:
    """The state of one adapter."""

    # Makes it of the input of the first block, (batch, T, d), where the network was given neither tokens nor embeddings.
    of_hidden: Callable[[torch.Tensor], torch.Tensor]
    # As it is now, (batch, T, d), for all rows of the batch; None before the first block, in such a network.
    now: torch.Tensor | None = None

    def at(self, hidden: torch.Tensor, path: str) -> torch.Tensor:
        """As the block at `path` meets it, beside its input `hidden` (batch, T, d).

        Raises:
            ValueError: the two are not of the same tokens.
        """
        if self.now is None:
            self.now = self.of_hidden(hidden)
        # Blocks may be on several devices.
        found = self.now = self.now.to(hidden.device)
        if found.shape[:-1] != hidden.shape[:-1]:
            raise ValueError(
                f"{path}: the shadow network gave states for tokens {tuple(found.shape[:-1])}, and the block is called with "
                f"{tuple(hidden.shape[:-1])}. A model that puts other tokens among those that it is called with cannot be "
                "shadowed."
            )
        return found


@dataclass(eq=False, repr=False)
class States:
    """The states of one call of the trunk."""

    # By adapter name.
    of: dict[str, State]
    # Whether gradients were wanted when it began.
    with_gradients: bool = field(default_factory=torch.is_grad_enabled)
    # Whether a block runs whose adapter stands outside of it: it is computed again in the backward, alone.
    inside: bool = False

    def inside_of(self, run: Callable[..., object]) -> Callable[..., object]:
        """`run`, inside of which blocks are computed alone."""

        def call(*args: object, **kwargs: object) -> object:
            self.inside = True
            try:
                return run(*args, **kwargs)
            finally:
                self.inside = False

        return call

    def check_gradients(self, path: str) -> None:
        """Raise where the block at `path` runs without gradients in a call with them: they would be lost.

        Raises:
            ValueError: so it is.
        """
        if self.with_gradients and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise ValueError(
                f"{path}: the block runs inside a checkpoint that holds its adapter as well and gives the state no gradient. "
                "Use `gradient_checkpointing_enable()` of the model instead."
            )


# What blocks are told: the states of the running call of the trunk.
STATES: Telling[States] = Telling("SHADOW", "states")


@dataclass(eq=False, repr=False)
class Heard:
    """What the loss of a call of the PeftModel needs."""

    # The states that the shadow networks began with in the last call of the trunk, by adapter name.
    begun: dict[str, torch.Tensor] = field(default_factory=dict)


# What the trunk is told: where to put it. None while the network is called without its PeftModel.
HEARD: Telling[Heard] = Telling("SHADOW", "first states")
