"""Weighted sums of tensors of which some values are left out: the smallest, random ones, those that are outvoted.

TIES is Yadav et al., arXiv 2306.01708; DARE is Yu et al., arXiv 2311.03099.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from splice.kinds.combining import Combination

PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")


def _weighted_sum(tensors: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    factors = torch.tensor(weights, dtype=tensors.dtype, device=tensors.device)
    summed: torch.Tensor = torch.tensordot(factors, tensors, dims=1)
    return summed


def _by_magnitude(tensors: torch.Tensor, density: float) -> torch.Tensor:
    """Each tensor with all but its largest values set to zero."""
    flat = tensors.flatten(1)
    kept = int(density * flat.shape[1]) if density < 1 else flat.shape[1]
    mask = torch.zeros_like(flat).scatter_(1, flat.abs().topk(kept, dim=1).indices, 1.0)
    return (flat * mask).reshape(tensors.shape)


def _at_random(tensors: torch.Tensor, density: float) -> torch.Tensor:
    """Each value kept with this probability, and the kept ones enlarged to leave the expectation as it was."""
    if density >= 1:
        return tensors
    return tensors * torch.bernoulli(torch.full_like(tensors, density)) / density


def _elected(pruned: torch.Tensor, weights: Sequence[float], method: str) -> torch.Tensor:
    """TIES: values that disagree with the elected sign are left out, the others averaged over their number."""
    votes = pruned.sign().sum(0) if method == "frequency" else pruned.sum(0)
    agrees = pruned.sign() == torch.where(votes >= 0, 1.0, -1.0)
    factors = torch.tensor(weights, dtype=pruned.dtype, device=pruned.device)
    summed: torch.Tensor = torch.tensordot(factors, pruned * agrees, dims=1)
    return summed / agrees.sum(0).clamp(min=1)


# Tensors of adapters (n, ...), their weights and what was asked for -> one tensor.
Merge = Callable[[torch.Tensor, Sequence[float], Combination], torch.Tensor]


MERGES: dict[str, Merge] = {
    "linear": lambda t, w, how: _weighted_sum(t, w),
    "magnitude_prune": lambda t, w, how: _weighted_sum(_by_magnitude(t, how.density or 0), w),
    "dare_linear": lambda t, w, how: _weighted_sum(_at_random(t, how.density or 0), w),
    "ties": lambda t, w, how: _elected(_by_magnitude(t, how.density or 0), w, how.majority_sign_method),
    "dare_ties": lambda t, w, how: _elected(_at_random(t, how.density or 0), w, how.majority_sign_method),
}
