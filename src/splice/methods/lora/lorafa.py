"""LoRA-FA: A stays as it started, and the gradient of B is projected so that B A follows the full gradient.

Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", arXiv 2308.03303. With s
the scale of the update, AdamW gets `1/s^2 dB (A A^T)^-1` in the place of dB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import nn

from splice.config import PeftConfig
from splice.discovery import public
from splice.errors import warn
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.pairs import Pair, pairs_of

# Added to the diagonal of A A^T.
_DAMPING = 1e-8


class _Selected(Protocol):
    """A PeftModel, as far as this file knows it."""

    active_adapters: list[str]
    peft_config: Mapping[str, PeftConfig]


@public
def create_lorafa_optimizer(
    model: nn.Module, r: int, lora_alpha: int, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> torch.optim.Optimizer:
    """An AdamW for LoRA whose A are frozen, which this does; what else is trained, it trains as AdamW does.

    Args:
        model: a PeftModel with LoRA.
        r: accepted for compatibility, and so is `lora_alpha`: each layer's own scale counts.
        lora_alpha: see `r`.
        lr: learning rate.
        weight_decay: decoupled from the gradient, as AdamW's.
        use_rslora: deprecated; if given, it must be what the configs of the active adapters say.

    Raises:
        ValueError: there is no LoRA on the model, or `use_rslora` is not what the configs say. Nothing has been changed.
    """
    if use_rslora is not None:
        _check_rslora(cast(_Selected, model), use_rslora)
    pairs = pairs_of(model)
    if not pairs:
        raise ValueError(
            "create_lorafa_optimizer did not find any LoRA layer on the model, and freezes A of these. For other methods use "
            "`torch.optim.AdamW`."
        )
    for pair in pairs:
        pair.a.requires_grad = False
    return LoraFAOptimizer(model.parameters(), pairs, lr=lr, weight_decay=weight_decay)


def _check_rslora(model: _Selected, use_rslora: bool) -> None:
    configs = {name: model.peft_config[name] for name in model.active_adapters}
    others = [n for n, c in configs.items() if isinstance(c, LoraConfig) and c.use_rslora is not use_rslora]
    if others:
        raise ValueError(
            f"`use_rslora={use_rslora}` was passed to create_lorafa_optimizer, and the configs of the active adapters "
            f"{others} say otherwise. Set it in their LoraConfig, and leave the argument out."
        )
    text = "`use_rslora` in create_lorafa_optimizer is deprecated: the LoraConfig says it. Leave the argument out."
    warn(text, FutureWarning)


class LoraFAOptimizer(torch.optim.Optimizer):
    """AdamW with the gradients of B projected.

    Args:
        params: all parameters that may be trained, now or later; A of the pairs stay as they are.
        pairs: the factors.
        lr: learning rate.
        betas: how much of the two running averages stays in a step.
        eps: added to the root of the second one.
        weight_decay: decoupled from the gradient.
        correct_bias: whether the averages are corrected for their start at zero.

    Raises:
        ValueError: one of the numbers is out of its range.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        pairs: Iterable[Pair],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        if not (lr >= 0 and eps >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"lr and eps must be at least 0, and betas from 0 to below 1; got {lr}, {eps}, {betas}")
        self.pairs = list(pairs)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # By the tensors as they are now: they may have been exchanged since the last step.
        of_b = {id(pair.b): pair for pair in self.pairs}
        fixed = {id(pair.a) for pair in self.pairs}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or id(parameter) in fixed:
                    continue
                pair = of_b.get(id(parameter))
                gradient = parameter.grad if pair is None else projected(pair, parameter.grad)
                self._adam(parameter, gradient, group)
        return loss

    def _adam(self, parameter: nn.Parameter, gradient: torch.Tensor, group: Mapping[str, Any]) -> None:
        state, (beta1, beta2), lr = self.state[parameter], group["betas"], group["lr"]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = lr
        if group["correct_bias"]:
            size *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        parameter.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"]:
            parameter.add_(parameter, alpha=-lr * group["weight_decay"])


def projected(pair: Pair, gradient: torch.Tensor) -> torch.Tensor:
    """`1/s^2 dB (A A^T)^-1`, of the shape and dtype of B."""
    a, scale = pair.stacked_a(pair.a), pair.scale
    inverse = torch.linalg.pinv(a @ a.mT + _DAMPING * torch.eye(a.shape[1], device=a.device))
    # The product in bfloat16, as the reference rounds it: AdamW turns what is lost of a small gradient into whole steps.
    product = pair.stacked_b(gradient).to(torch.bfloat16) @ inverse.to(torch.bfloat16)
    return pair.like_b((1 / scale**2) * product)
