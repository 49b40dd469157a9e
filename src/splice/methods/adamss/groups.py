"""How a weight is split: its largest singular directions, and groups of rows that are alike in them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from splice.errors import PeftError
from splice.methods.adamss.config import AdamssConfig
from splice.methods.random_svd import svd_from_seed


class Groups(NamedTuple):
    """The split of one weight, with the bias as a further column where there is one."""

    # (R, in) or (R, in + 1): the directions.
    directions: torch.Tensor
    # (out, R): the rows of the weight in these, each direction scaled to length 1.
    left: torch.Tensor
    # The rows of each group, ascending; together they are all rows.
    rows: tuple[torch.Tensor, ...]

    def rank(self, number: int, config: AdamssConfig) -> int:
        """The rank of the update that a new adapter has for one of the groups."""
        rows = self.left[self.rows[number]]
        rank: int = min(*rows.shape, config.subspace_rank)
        if not config.use_dynamic_rank:
            return rank
        # Of the rows' products with one another, as trained checkpoints had it: the squares.
        values = torch.linalg.svdvals(rows)[:rank].square()
        return max(1, int((values > config.svd_threshold * values[0]).sum()))


def split(weight: torch.Tensor, bias: torch.Tensor | None, config: AdamssConfig) -> Groups:
    """The groups of `weight` (out, in), always the same for the same weight and bias."""
    wide = weight.float()
    if bias is not None:
        wide = torch.cat((wide, bias.detach().to(wide)[:, None]), dim=1)
    left, _, directions = svd_from_seed(wide, min(config.r, *wide.shape), 2, config.random_seed)
    labels = _labels(left, min(config.num_subspaces, len(wide)))
    rows = tuple((labels == number).nonzero()[:, 0] for number in range(min(config.num_subspaces, len(wide))))
    return Groups(directions.to(weight.dtype), left, rows)


def _labels(points: torch.Tensor, count: int) -> torch.Tensor:
    """(n): the group of each of the points (n, R), on their device."""
    try:
        from sklearn.cluster import KMeans  # type: ignore[import-untyped]
    except ImportError:
        raise _MissingError(
            "AdaMSS groups the rows of a weight with scikit-learn, as checkpoints do not hold the groups: "
            "`pip install scikit-learn`"
        ) from None
    # All of it decides which rows a trained tensor is for.
    method = KMeans(n_clusters=count, init="random", n_init=1, max_iter=10, random_state=123456789)
    return torch.from_numpy(method.fit_predict(points.float().cpu().numpy())).to(points.device)


class _MissingError(PeftError, ImportError):
    """A library that only this method needs is not installed."""
