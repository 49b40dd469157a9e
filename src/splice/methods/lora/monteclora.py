"""MonteCLoRA: LoRA whose A is blurred by learned noise while it is trained; evaluated it is LoRA.

Sengupta et al., "Robust and Efficient Fine-tuning of LLMs with Bayesian Reparameterization of Low-Rank Adaptation", arXiv
2411.04358, section 3: `A' = sum_n w_n (A + noise_n)`, with N experts' noise of a learned variance and learned weights w.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.dense import dtype_of
from splice.errors import PeftWarning, warn
from splice.kinds.adapters import Adapters, layers_of, names_or_active
from splice.kinds.slot import Role, Slot
from splice.kinds.tensors import Held
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.layers import OnLinear
from splice.methods.lora.subconfigs import MontecloraConfig, options_of

_SAMPLER = "lora_monteclora_sampler"
_LAST_SAMPLE = (f"{_SAMPLER}.gaussian_var_prior", f"{_SAMPLER}.expert_weights")


class MontecloraLinear(OnLinear):
    """MonteCLoRA on a linear layer, stored either way round."""

    std_prior, expert_weights_prior = Held(f"{_SAMPLER}.std_prior"), Held(f"{_SAMPLER}.expert_weights_prior")
    gaussian_var_prior, expert_weights = (Held(name) for name in _LAST_SAMPLE)
    # Variances and weights of the last draw, with their graph; None before the first.
    sampled: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, Slot]:
        rank, count = cls.rank(config, path), options_of(config.monteclora_config, MontecloraConfig).num_samples
        sampler = {"std_prior": (rank,), "expert_weights_prior": (count,)}
        last = dict(zip(_LAST_SAMPLE, ((rank, rank), (count,))))
        return {
            **super().slots(base, config, path),
            **{f"{_SAMPLER}.{name}": Slot(shape) for name, shape in sampler.items()},
            **{name: Slot(shape, Role.BUFFER, dtype=dtype_of(base)) for name, shape in last.items()},
        }

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: LoraConfig) -> None:
        super().initialise(tensors, base, config)
        nn.init.uniform_(tensors[f"{_SAMPLER}.std_prior"])
        nn.init.uniform_(tensors[f"{_SAMPLER}.expert_weights_prior"])
        variance, weights = (tensors[name] for name in _LAST_SAMPLE)
        nn.init.eye_(variance)
        nn.init.constant_(weights, 1 / len(weights))

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.options = options_of(config.monteclora_config, MontecloraConfig)

    def down(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._blurred(self.a) if self.training else self.a)

    def _blurred(self, a: torch.Tensor) -> torch.Tensor:
        """A (r, in) with one draw of noise, which is remembered as the last one."""
        (rank, size), count = a.shape, len(self.expert_weights)
        spread = torch.exp(self.std_prior.float())
        variance = (spread.square() * _wishart_diagonal(rank, a.device)).clamp(min=1e-3)
        alpha = torch.exp(self.expert_weights_prior.float()).clamp(min=1e-6)
        logs, inverse = alpha.log(), 1 / alpha
        width = (inverse * (1 - 2 / count) + inverse.sum() / count**2).clamp(min=1e-6) + 1e-6
        drawn = torch.randn(count, device=a.device)
        weights = torch.softmax(width.sqrt() * drawn + logs - logs.mean(), 0)
        # The weights add up to 1, so A itself stays as it is.
        noise = (
            torch.einsum("n,nir->ri", weights, torch.randn(count, size, rank, device=a.device))
            * variance.sqrt()[:, None]
        )
        blurred: torch.Tensor = a + (self.options.sample_scaler * noise).to(a.dtype)
        if not bool(torch.isfinite(blurred.detach()).all()):
            warn("MonteCLoRA drew noise that is not finite; A is used without it.", PeftWarning)
            return a
        with torch.no_grad():
            self.gaussian_var_prior.copy_(torch.diag(variance))
            self.expert_weights.copy_(weights)
        self.sampled = (variance, weights)
        return blurred

    def penalty(self) -> torch.Tensor:
        """How far noise and weights are from their priors; 0 in evaluation."""
        if not self.training:
            return self.std_prior.new_zeros(())
        options, rank, count = self.options, self.r, len(self.expert_weights)
        alpha = torch.exp(self.expert_weights_prior.float()).clamp(min=1e-6)
        prior = torch.full_like(alpha, options.dirichlet_prior)
        dirichlet = (
            *(torch.lgamma(alpha.sum()) - torch.lgamma(prior.sum()), (torch.lgamma(alpha) - torch.lgamma(prior)).sum()),
            ((alpha - prior) * (torch.digamma(alpha) - torch.digamma(alpha.sum()))).sum(),
        )
        spread = torch.exp(self.std_prior.float()).square()
        wishart = (-rank * spread.log().sum() + rank * spread.sum() - rank**2) / 2
        variance, weights = self._last_sample()
        variance = variance.clamp(min=1e-6)
        normal = count / 2 * (variance.sum() - variance.log().sum() - rank)
        found: torch.Tensor = options.kl_loss_weight * (sum(dirichlet) + wishart + normal)
        return found + weights.square().sum() if options.use_entropy else found

    def _last_sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Variances and weights of the last draw, with their graph where there was one."""
        if self.sampled is not None:
            return self.sampled
        return self.gaussian_var_prior.diagonal().float(), self.expert_weights.float()


def _wishart_diagonal(rank: int, device: torch.device) -> torch.Tensor:
    """The diagonal of a draw from the Wishart distribution of `rank` degrees of freedom, by Bartlett's decomposition."""
    degrees = torch.arange(rank, 0, -1, device=device, dtype=torch.float32)
    lower = torch.randn(rank, rank, device=device).tril(-1)
    squares: torch.Tensor = lower.square().sum(1) + 2 * torch._standard_gamma(degrees / 2)
    return squares


def monteclora_loss(adapters: Adapters, adapter_names: str | Iterable[str] | None = None) -> torch.Tensor | float:
    """The mean of MonteCLoRA's penalties, for a training loop to add to its loss; 0.0 where there is none.

    Args:
        adapters: found on the model.
        adapter_names: of these adapters; of the active ones, if None.
    """
    names = names_or_active(adapters, adapter_names)
    penalties = [layer.penalty() for name in names for layer in layers_of(adapters, [name], MontecloraLinear).values()]
    return torch.stack(penalties).mean() if penalties else 0.0
