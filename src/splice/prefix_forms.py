"""The forms in which two architectures took keys and values before transformers 4.36, for programs that ask for them.

A prefix is given as one tensor for each layer: (2, batch, heads, tokens, size of a head), keys first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["bloom_model_postprocess_past_key_value", "starcoder_model_postprocess_past_key_value"]


def bloom_model_postprocess_past_key_value(
    past_key_values: Sequence[torch.Tensor],
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """For each layer its keys, (batch * heads, size, tokens), and its values, (batch * heads, tokens, size).

    The first half of all tensors, one after the other, is keys. Their numbers are those of (batch, tokens, heads, size),
    in the shape above. Both is as the reference has it.
    """
    flat = [part for tensor in past_key_values for part in tensor]
    batch, heads, tokens, size = flat[0].shape
    keys = [part.transpose(1, 2).reshape(batch * heads, size, tokens) for part in flat[: len(flat) // 2]]
    return tuple(zip(keys, (part.flatten(0, 1) for part in flat[len(flat) // 2 :])))


def starcoder_model_postprocess_past_key_value(past_key_values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """For each layer keys and values side by side, (batch, tokens, 2 * size): all heads share those of the first."""
    return tuple(torch.cat([keys[:, 0], values[:, 0]], dim=-1) for keys, values in past_key_values)
