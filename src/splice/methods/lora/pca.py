"""Principal components of data that comes in batches.

Ross et al., "Incremental Learning for Robust Visual Tracking" (2008), section 3: each batch, with the components so far as
further rows and one more for the shift of the mean, is decomposed anew.
"""

from __future__ import annotations

import torch

# Of the randomised decomposition: how many directions it looks at for each that is wanted, and how often it refines them.
_OVERSAMPLED, _ROUNDS, _SEED = 2, 4, 42


class IncrementalPCA:
    """The first components of all rows seen so far, about their mean.

    Args:
        count: how many components; at most the number of features, and no batch may have fewer rows.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        # Of the rows seen so far: their number, the mean and the variance of each feature, in float64.
        self.seen = 0
        self.mean = self.variance = torch.zeros(())
        # (count, features), (count), and for each component its share in the variance, (count); the largest first.
        self.components = self.singular_values = self.ratios = torch.zeros(0)

    def update(self, rows: torch.Tensor) -> None:
        """Take `rows` (n, features) in, with n at least the number of components."""
        x = rows.float()
        mean, variance, total = self._moments(x)
        own_mean = x.double().mean(0)
        if self.seen:
            shift = (self.seen * len(x) / total) ** 0.5 * (self.mean - own_mean)
            stacked = torch.cat(
                [self.singular_values[:, None] * self.components, x - own_mean.float(), shift.float()[None]]
            )
        else:
            stacked = x - mean.float()
        s, vh = self._decomposed(stacked)
        largest = vh.abs().argmax(1, keepdim=True)
        vh = vh * vh.gather(1, largest).sign()  # of the two directions of a component always the same
        self.mean, self.variance, self.seen = mean, variance, total
        self.components, self.singular_values = vh[: self.count], s[: self.count]
        whole = (variance.sum() * total).clamp_min(torch.finfo(torch.float32).tiny)
        self.ratios = self.singular_values.double().square() / whole

    def _moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Mean, variance and number of all rows, with `x` among them."""
        wide = x.double()
        mean, variance = wide.mean(0), wide.var(0, unbiased=False)
        if not self.seen:
            return mean, variance, len(x)
        total = self.seen + len(x)
        old, new = self.seen / total, len(x) / total
        shift = self.mean - mean
        return old * self.mean + new * mean, old * self.variance + new * variance + old * new * shift * shift, total

    def _decomposed(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Singular values and right singular vectors of `rows`."""
        wanted = _OVERSAMPLED * self.count
        if wanted >= min(rows.shape):
            _, s, vh = torch.linalg.svd(rows, full_matrices=False)
            return s, vh
        with torch.random.fork_rng(devices=[rows.device] if rows.device.type == "cuda" else []):
            torch.manual_seed(_SEED)
            _, s, v = torch.svd_lowrank(rows, q=wanted, niter=_ROUNDS)
        return s, v.T
