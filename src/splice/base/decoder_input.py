"""What a decoder gets where it is given its labels alone."""

from __future__ import annotations

import torch


def shift_tokens_right(input_ids: torch.Tensor, pad_token_id: int, decoder_start_token_id: int) -> torch.Tensor:
    """The input of a decoder for these labels (batch, tokens): one token later, with -100 as padding.

    Raises:
        ValueError: `pad_token_id` is None.
    """
    if pad_token_id is None:
        raise ValueError("pad_token_id has to be defined: give the id by which this model pads.")
    shifted = torch.cat([torch.full_like(input_ids[:, :1], decoder_start_token_id), input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)
