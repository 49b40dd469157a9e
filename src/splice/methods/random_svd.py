"""A decomposition of a weight that begins at random, and is the same for everybody who has the weight and the seed."""

from __future__ import annotations

import torch


def svd_from_seed(
    weight: torch.Tensor, rank: int, iterations: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (out, rank), S (rank) and V (rank, in) of about the largest singular values; no random state is touched."""
    # By the global state and not by a generator: `svd_lowrank` takes none, and trained checkpoints depend on its numbers.
    devices = [] if weight.device.type in ("cpu", "meta") else [weight.device]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(weight, q=rank, niter=iterations)
    return u, s, v.T
