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
from splice.kinds.token_rows import TokenRows, check_indices
from splice.methods.targeted import TargetedConfig


@dataclass
class TrainableTokensConfig(TargetedConfig):
    """Fields and defaults of the reference, in its order."""

    token_indices: list[int] = field(default_factory=list)
    target_modules: list[str] | str | None = None
    init_weights: bool = True

    method = PeftType.TRAINABLE_TOKENS

    def __post_init__(self) -> None:
        targets = self.target_modules
        super().__post_init__()
        self.target_modules = targets  # a list stays a list here


def _check(config: TrainableTokensConfig) -> None:
    known = [i for i in config.token_indices or () if isinstance(i, int)]
    check_indices(config.token_indices, max(known, default=0) + 1, "the config")


def _input_embeddings(network: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    return input_embeddings(network, modules).path or "embed_tokens"


METHOD = register(
    Method(
        name=PeftType.TRAINABLE_TOKENS,
        config=TrainableTokensConfig,
        prefix="trainable_tokens_",
        tensor_names=frozenset({"trainable_tokens_delta"}),
        layers=MappingProxyType(dict.fromkeys((LayerKind.EMBEDDING, LayerKind.LINEAR), TokenRows)),
        find_targets=_input_embeddings,
        follows_ties=True,
        check=_check,
        paper="none; the method is one of the reference's own",
    )
)
