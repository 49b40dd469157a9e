"""Layers of a base that share the weight of its input embeddings, and adapter layers that share their tensors.

A tied layer may *follow* the input embeddings: its adapter layer shares the tensors of theirs, so that the two ends stay
one. It does where the config says so (`ensure_weight_tying`), and always where rows of single tokens are trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from splice.base.embeddings import InputEmbeddings
from splice.kinds.layer import AdapterLayer
from splice.surgery.placement import Placement

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


def tensors_for(placement: Placement, layers: Mapping[str, AdapterLayer]) -> dict[str, torch.Tensor]:
    """The tensors that a layer shares with others of its adapter, which are built: the very parameters, or views of them."""
    found = {}
    for suffix, (path, of, transposed) in placement.leaders.items():
        own = layers[path].tensor(of)
        found[suffix] = nn.Parameter(own.detach().T, requires_grad=own.requires_grad) if transposed else own
    return found
