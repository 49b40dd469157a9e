"""Trained rows of an embedding or an output layer: the rows of chosen tokens take the place of the base's own.

A tensor of the checkpoint holds the rows themselves and not what they add; its name in the file says otherwise for
historical reasons. W' is W with rows `token_indices` replaced, and the layer computes with W'. It is never built where the
layer is a plain one: only the looked-up rows, or the outputs, of the chosen tokens are put in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Protocol, cast

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.bare import original_class
from splice.base.foreign_models import embed_scale
from splice.base.layers import LayerKind, features, kind_of, padding_row
from splice.base.weight_access import check_readable, is_plain
from splice.config import PeftConfig
from splice.errors import UnsupportedLayerError, counted
from splice.kinds.casting import check_values
from splice.kinds.effect import Action, Effect, Forward
from splice.kinds.file_form import FileForm, Stored
from splice.kinds.layer import AdapterLayer
from splice.kinds.names import LayerNames, Place
from splice.kinds.original import original_weight, tensor_in_use
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held


class NamesRows(Protocol):
    """What a layer with trained rows asks of its config, which may be that of a method."""

    # Which rows, in the order of the tensor.
    token_indices: list[int]
    # Whether they start as the base's own; otherwise at random.
    init_weights: bool


@dataclass
class RowsConfig(PeftConfig):
    """The config of rows beside the layers of another method, whose own config names their tokens in one of its fields."""

    # See `NamesRows`.
    token_indices: list[int] = field(default_factory=list)
    # See `NamesRows`.
    init_weights: bool = True


_KINDS = (LayerKind.EMBEDDING, LayerKind.LINEAR)


class TokenRows(AdapterLayer):
    """The rows (n, dim) of n tokens, on an embedding (vocabulary, dim) or a linear layer with weight (vocabulary, dim)."""

    mergeable = True
    action = Action.OWN_ROWS
    starts_from_weight = True
    stands_in = True
    # Of the tensor with the rows.
    suffix: ClassVar[str]
    # Worked out from the indices: which tokens, in order, and the row of each.
    sorted_tokens = Held()
    row_of = Held()

    @property
    def rows(self) -> torch.Tensor:
        """The trained rows, (n, dim)."""
        return self.tensor(self.suffix)

    @classmethod
    def slots(cls, base: nn.Module, config: NamesRows, path: str) -> dict[str, Slot]:
        kind = kind_of(base)
        if kind not in _KINDS:
            raise UnsupportedLayerError(
                f"{path!r} is a {type(base).__name__}; rows of tokens can be trained on Embedding and Linear layers."
            )
        first, second = features(base)
        count, dim = (first, second) if kind is LayerKind.EMBEDDING else (second, first)
        check_indices(config.token_indices, count, path)
        return {cls.suffix: Slot((len(config.token_indices), dim))}

    def prepare(self, base: nn.Module, config: NamesRows, path: str) -> None:
        self.tokens = tuple(config.token_indices)
        # Of a token that is named twice the last row counts.
        rows = {token: row for row, token in enumerate(self.tokens)}
        device = self.rows.device
        ordered = sorted(rows)
        self.keep("sorted_tokens", torch.tensor(ordered, device=device))
        self.keep("row_of", torch.tensor([rows[token] for token in ordered], device=device))
        self.is_linear = kind_of(base) is LayerKind.LINEAR
        padding = padding_row(base)
        self.padding_row = None if padding is None else rows.get(padding)
        if not _is_plain(base):
            check_readable(base, path, "an adapter with rows of its own, on a layer with a forward of its own,")
            self.shows = True

    @classmethod
    @torch.no_grad()
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: NamesRows) -> None:
        rows = tensors[cls.suffix]
        if not config.init_weights:
            nn.init.normal_(rows)
            return
        weight = original_weight(base)
        rows.copy_(weight[torch.tensor(config.token_indices, device=weight.device)])

    def around(self, x: torch.Tensor, inner: Forward) -> torch.Tensor:
        y: torch.Tensor = inner(x)
        check_values(self.rows, y)
        rows = self.rows.to(y.dtype)
        if self.is_linear:
            chosen = rows[self.row_of]
            bias = tensor_in_use(self.base, "bias", self)
            found = F.linear(x, chosen, None if bias is None else bias[self.sorted_tokens])
            return y.index_copy(-1, self.sorted_tokens, found.to(y.dtype))
        ids = x.long()
        # Not a table with an entry for each token of the vocabulary: it would be as long as that on every such layer.
        place = torch.searchsorted(self.sorted_tokens, ids).clamp(max=len(self.sorted_tokens) - 1)
        hit = self.sorted_tokens[place] == ids
        found = F.embedding(self.row_of[place], rows, self.padding_row)
        scale = embed_scale(self.base)
        if scale is not None:
            found = found * (scale.to(found.dtype) if isinstance(scale, torch.Tensor) else scale)
        return torch.where(hit.unsqueeze(-1), found, y)

    def wrapped(self, inner: Forward) -> Forward:
        return inner if self.shows else super().wrapped(inner)  # the host calls it with the rows in place

    def shown(self, base: nn.Module) -> dict[str, torch.Tensor]:
        # As an attribute, not from `_parameters`: another adapter may show a weight of its own.
        return {**super().shown(base), **self.replaced({"weight": cast("torch.Tensor", base.weight)})}

    def replaced(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weight = tensors["weight"]
        rows = self.rows[self.row_of].to(device=weight.device, dtype=weight.dtype)
        places = self.sorted_tokens.to(weight.device)
        found = {"weight": weight.index_copy(0, places, rows)}
        bias = tensor_in_use(self.base, "bias", self) if self.is_linear and "bias" in tensors else None
        if bias is not None:  # to these rows nothing is added that stands below, nor to their bias
            found["bias"] = tensors["bias"].index_copy(0, places, bias.detach()[places])
        return found

    def deltas(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {}

    @property
    def changed_names(self) -> tuple[str, ...]:
        return ("weight",)

    def conflict(self, other: Effect) -> str:
        both = set(self.tokens) & set(other.tokens) if isinstance(other, TokenRows) else None
        return f"both bring rows for the tokens {sorted(both)}" if both else ""


class OfLeader(FileForm):
    """Only the layer whose rows others share is in a checkpoint."""

    def to_file(self, layer: Stored, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        assert isinstance(layer, TokenRows)
        yield from () if layer.leaders else tensors.items()


class TrainedRows(TokenRows):
    """Rows that are all of an adapter."""

    suffix = "trainable_tokens_delta"


class TokenRowsBeside(TokenRows):
    """Rows beside the layers of another method (`trainable_token_indices`)."""

    suffix = "token_adapter.trainable_tokens_delta"
    names = LayerNames(
        "token_adapter.base_layer.", MappingProxyType({suffix: Place("token_adapter.trainable_tokens_delta", "")})
    )
    file_form = OfLeader()


def check_indices(indices: Sequence[int], count: int, path: str) -> None:
    """Raise for token indices that a layer with `count` rows does not have.

    Raises:
        ValueError: there are no indices, or one is not a row of the layer.
    """
    if not isinstance(indices, (list, tuple)) or not indices:
        raise ValueError(f"{path}: token indices are a list of at least one number, got {indices!r}")
    for index in indices:
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < count:
            raise ValueError(
                f"token index {index!r} is none of {path!r}, which has {counted(count, 'row')}. If the vocabulary was "
                "resized before training, call `model.resize_token_embeddings(...)` with the size of the adapter's "
                "tokenizer first."
            )


def _is_plain(base: nn.Module) -> bool:
    """Whether the layer's rows can be put in place one by one, and not only by calling it with another weight."""
    # By the forward itself: a subclass that changes nothing in it is as plain as its parent.
    cls = original_class(base)
    if not isinstance(base, nn.Embedding):
        return cls.forward is nn.Linear.forward or not is_plain(base)
    if base.max_norm is not None or base.scale_grad_by_freq or base.sparse:
        return False
    return cls.forward is nn.Embedding.forward or embed_scale(base) is not None or not is_plain(base)
