"""Layers of a base that share the weight of its input embeddings, and adapter layers that share their tensors.

A tied layer may *follow* the input embeddings: its adapter layer shares the tensors of theirs, so that the two ends stay
one. It does where the config says so (`ensure_weight_tying`), and always where rows of single tokens are trained.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from splice.base.embeddings import InputEmbeddings
from splice.kinds.layer import AdapterLayer

# What the reference calls embeddings when it decides what to tie and what to save.
EMBEDDING_NAMES = ("embed_tokens", "lm_head")


class Tying(NamedTuple):
    """What the tied layers of a base mean for one adapter.

    Attributes:
        embeddings: the input embeddings of the base.
        targets: whether tied layers follow the method's own layer on the input embeddings.
        whole: whether they follow the copy of the input embeddings (`modules_to_save`).
    """

    embeddings: InputEmbeddings = InputEmbeddings()
    targets: bool = False
    whole: bool = False

    @property
    def left_out(self) -> tuple[str, ...]:
        """Layers that are no targets of their own."""
        return self.embeddings.tied if self.targets else ()


def tensors_for(cls: type[AdapterLayer], leader: AdapterLayer) -> dict[str, torch.Tensor]:
    """The tensors of a follower of this class: the very parameters of its leader, or views of them."""
    own = dict(leader.named_slots())
    if cls is type(leader):
        return own
    return {
        suffix: nn.Parameter(own[of].detach().T, requires_grad=own[of].requires_grad)
        for suffix, of in cls.transposes.items()
    }
