"""Functions that choose which entries of a weight are trained. A config may have any other in the place of these."""

from __future__ import annotations

import torch
from torch import nn

from splice.base.layers import features
from splice.discovery import public
from splice.methods.coefficients import locations


@public
def random_mask(base_layer: nn.Module, r: int, random_seed: int | None = None, **kwargs: object) -> torch.Tensor:
    """A mask (out, in) that is true at r (in + out) places, drawn at random.

    Args:
        base_layer: the linear layer whose weight it is for.
        r: as in the config.
        random_seed: of the draw; None for that of every new generator of torch, so that it is the same draw each time.
        **kwargs: for other functions of its like, and not used.
    """
    size_in, size_out = features(base_layer)
    seed = torch.Generator().initial_seed() if random_seed is None else random_seed
    mask = torch.zeros(size_out * size_in, dtype=torch.bool)
    mask[locations(size_out * size_in, r * (size_in + size_out), seed)] = True
    return mask.view(size_out, size_in)
