"""Any optimizer with the gradients of A and B preconditioned by r x r matrices.

Zhang and Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", arXiv 2402.02347, section 3:

    dA <- (B^T B + reg I)^-1 dA        dB <- dB (A A^T + reg I)^-1
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from splice.discovery import public
from splice.methods.lora.pairs import Pair, pairs_of


@public
def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[torch.optim.Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> torch.optim.Optimizer:
    """An optimizer of a subclass of `optimizer_cls`, for all that is trained now.

    Args:
        model: with LoRA on linear layers, or on parameters of experts. What stands on embeddings and convolutions, and all
            else, is trained as `optimizer_cls` does it.
        optimizer_cls: AdamW, SGD...
        lr: its learning rate.
        reg: added to the diagonals before they are inverted. B starts as zeros, and then this alone is there.
        **kwargs: passed to `optimizer_cls`.

    Raises:
        ValueError: the model has no such LoRA layer in training. In `step`: a closure is given.
    """
    pairs = [pair for pair in pairs_of(model) if pair.is_linear and (pair.a.requires_grad or pair.b.requires_grad)]
    if not pairs:
        raise ValueError(
            "create_riemannian_optimizer did not find any trainable lora_A/lora_B parameter pairs on the model. The "
            "Riemannian preconditioner only applies to LoRA-style adapters, on linear layers."
        )

    def step(self: torch.optim.Optimizer, closure: Callable[[], float] | None = None) -> float | None:
        if closure is not None:
            raise ValueError(
                "The Riemannian-preconditioned optimizer does not support closures: they work the gradients out anew inside "
                "`step`, in the place of the preconditioned ones. Call `backward()` first, and `step()` without one."
            )
        precondition(pairs, reg)
        return optimizer_cls.step(self)

    # A class and no hook for steps: of a hook no copy of an optimizer knows.
    name = f"RiemannianPreconditioned{optimizer_cls.__name__}"
    made: Callable[..., torch.optim.Optimizer] = type(name, (optimizer_cls,), {"step": step, "__module__": __name__})
    return made([parameter for parameter in model.parameters() if parameter.requires_grad], lr=lr, **kwargs)


@torch.no_grad()
def precondition(pairs: Sequence[Pair], reg: float) -> None:
    """Exchange the gradients of these factors for preconditioned ones, worked out in float32."""
    for pair in pairs:
        a, b = pair.stacked_a(pair.a), pair.stacked_b(pair.b)
        damping = reg * torch.eye(a.shape[1], device=a.device)
        # Both by the factors as they are now: neither is changed before the step.
        if pair.a.grad is not None:
            pair.a.grad = pair.like_a(torch.linalg.solve(b.mT @ b + damping, pair.stacked_a(pair.a.grad)))
        if pair.b.grad is not None:
            solved = torch.linalg.solve(a @ a.mT + damping, pair.stacked_b(pair.b.grad).mT)
            pair.b.grad = pair.like_b(solved.mT)
