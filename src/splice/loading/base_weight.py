"""The weights of base layers as they are without any adapter, and whether a checkpoint says the same of them."""

from __future__ import annotations

import torch
from torch import nn

from splice.base.bare import own_tensors
from splice.base.sharding import whole
from splice.kinds.original import original_tensor


def base_weight(layer: nn.Module) -> torch.Tensor | None:
    """The weight of `layer` as it was before an adapter was merged into it; None where it has none."""
    return original_tensor(layer, "weight") if "weight" in layer._parameters else None


def base_tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of `layer` and of what is below it, as they were before an adapter was merged into it, by their names."""
    originals = ((name, original_tensor(layer, name)) for name in layer._parameters)
    return {**dict(own_tensors(layer)), **{name: tensor for name, tensor in originals if tensor is not None}}


def says_the_same(stored: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether a stored tensor is the base's `own` one, but for rounding where one of the two was rounded to its dtype."""
    own = own.detach()
    if stored.shape != own.shape:
        return False
    # Of one that is divided all, and not each process's part: what one refuses, all have to refuse.
    own = whole(own)
    if stored.dtype == own.dtype or not (stored.is_floating_point() and own.is_floating_point()):
        return torch.equal(stored.to(own), own)
    stored = stored.to(own.device)
    # Mostly one was rounded to the dtype of the other: then these are equal to the bit.
    if torch.equal(stored.to(own.dtype), own) or torch.equal(own.to(stored.dtype), stored):
        return True
    # Of float16 and bfloat16 neither holds the other's values: both may have been rounded, from what nobody has here.
    both = torch.finfo(stored.dtype), torch.finfo(own.dtype)
    if max(info.bits for info in both) > 16:
        return False
    rounding = max(info.eps for info in both)
    least = max(info.smallest_normal * info.eps for info in both)
    return torch.allclose(stored.to(torch.float32), own.to(torch.float32), rtol=rounding, atol=least)
