"""Training the rows of a few tokens alone (no paper; a method of the reference): its config and its record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import nn

from splice.base.embeddings import input_embeddings
from splice.base.layers import LayerKind
from splice.checkpoint.types import PeftType
from splice.kinds.registry import Method, register
from splice.kinds.token_rows import TrainedRows, check_indices
from splice.methods.targeted import Targeted


@dataclass
class TrainableTokensConfig(Targeted):
    """Fields and defaults of the reference, in its order."""

    # Ids of the tokens whose rows are trained, in the order of the rows in the checkpoint; at least one.
    token_indices: list[int] = field(default_factory=list)
    # Embeddings, or linear layers with one row for each token: ends of paths, or a regular expression for whole paths;
    # None for the base's input embeddings.
    target_modules: list[str] | str | None = None
    # Whether the rows start as the base's own; otherwise they are drawn from N(0, 1).
    init_weights: bool = True

    method = PeftType.TRAINABLE_TOKENS

    def __post_init__(self) -> None:
        targets = self.target_modules
        super().__post_init__()
        self.target_modules = targets  # a list stays a list here

    def computed(self) -> dict[str, object]:
        return {"token_indices": self.token_indices}


def _check(config: TrainableTokensConfig) -> None:
    known = [i for i in config.token_indices or () if isinstance(i, int)]
    check_indices(config.token_indices, max(known, default=0) + 1, "the config")


def _input_embeddings(network: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    return input_embeddings(network, modules).path or "embed_tokens"


METHOD = register(
    Method(
        name=PeftType.TRAINABLE_TOKENS,
        summary="Trains the embeddings of a few tokens and leaves those of all others as they are.",
        config=TrainableTokensConfig,
        prefix="trainable_tokens_",
        tensor_names=frozenset({"trainable_tokens_delta"}),
        layers=MappingProxyType(dict.fromkeys((LayerKind.EMBEDDING, LayerKind.LINEAR), TrainedRows)),
        layer_views=MappingProxyType({"token_indices": lambda layer: layer.config.token_indices}),
        find_targets=_input_embeddings,
        follows_ties=True,
        check=_check,
        paper="none; the method is one of the reference's own",
    )
)
