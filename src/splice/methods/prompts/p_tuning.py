"""P-tuning: virtual tokens that a small network makes out of trained vectors. Liu et al., arXiv 2103.10385, section 3.2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from types import MappingProxyType
from typing import ClassVar, cast

import torch
from torch import nn

from splice.checkpoint.types import PeftType
from splice.config import PromptLearningConfig
from splice.errors import warn
from splice.kinds.registry import Method, register
from splice.methods.prompts.attributes import PROMPT_METHODS, PROMPT_VIEWS
from splice.methods.prompts.counts import check_prompt, token_count
from splice.methods.prompts.embedded import EmbeddedPrompt
from splice.methods.prompts.prompt import Encoder, PromptLayer
from splice.methods.prompts.reparameterised import Reparameterised
from splice.methods.prompts.sizes import sizes_of


class PromptEncoderReparameterizationType(str, Enum):
    """The network that makes the virtual tokens: linear layers alone, or an LSTM in front of them."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.P_TUNING

    # The network that makes the virtual tokens: "MLP" or "LSTM".
    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    # Width of its hidden layers; None for `token_dim`.
    encoder_hidden_size: int | None = None
    # Layers of the LSTM. An MLP has three in any case.
    encoder_num_layers: int = 2
    # Probability with which the LSTM drops what goes from one of its layers to the next in training, 0 to 1.
    encoder_dropout: float = 0.0


class PromptEncoder(Encoder):
    """The virtual tokens of P-tuning, in the tree, with the network that makes them while they are trained."""


class Encoded(EmbeddedPrompt):
    """Virtual tokens, however they come about."""

    encoder = PromptEncoder

    @classmethod
    def resolved(cls, base: nn.Module, config: PromptEncoderConfig) -> dict[str, object]:
        sizes = super().resolved(base, config)
        return {**sizes, "encoder_hidden_size": config.encoder_hidden_size or sizes["token_dim"]}


class PTuning(Encoded):
    """The virtual tokens themselves, (n * submodules, dim)."""

    @classmethod
    def for_training(cls, config: PromptEncoderConfig) -> type[PromptLayer]:
        return ReparameterisedPTuning

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: PromptEncoderConfig) -> None:
        nn.init.normal_(tensors["embedding.weight"])


class ReparameterisedPTuning(Reparameterised, Encoded):
    """The virtual tokens as the output of an MLP, or of an LSTM that reads them one after the other and an MLP."""

    @classmethod
    def width(cls, base: nn.Module, config: PromptEncoderConfig) -> tuple[int, int]:
        sizes = sizes_of(base, config)
        return token_count(config) * sizes["num_transformer_submodules"], sizes["token_dim"]

    @classmethod
    def behind(cls, base: nn.Module, config: PromptEncoderConfig) -> Mapping[str, nn.Module]:
        dim = sizes_of(base, config)["token_dim"]
        hidden, kind = config.encoder_hidden_size or dim, config.encoder_reparameterization_type
        if kind == PromptEncoderReparameterizationType.LSTM:
            layers = config.encoder_num_layers
            lstm = nn.LSTM(
                dim, hidden, layers, dropout=config.encoder_dropout, bidirectional=True, batch_first=True
            )  # fmt: skip
            return {"lstm_head": lstm, "mlp_head": _linears(2 * hidden, 2 * hidden, dim)}
        if kind == PromptEncoderReparameterizationType.MLP:
            return {"mlp_head": _linears(dim, hidden, hidden, dim)}
        known = [member.value for member in PromptEncoderReparameterizationType]
        raise ValueError(f"`encoder_reparameterization_type` must be one of {known}, got {kind!r}")

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: PromptEncoderConfig) -> None:
        if config.encoder_reparameterization_type != PromptEncoderReparameterizationType.LSTM:
            default = type(config).encoder_num_layers
            if config.encoder_num_layers != default:
                warn(
                    f"P-tuning with an MLP has three layers: `encoder_num_layers={config.encoder_num_layers}` is ignored."
                )
        super().initialise(tensors, base, config)

    def prepare(self, base: nn.Module, config: PromptEncoderConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.recurrent = config.encoder_reparameterization_type == PromptEncoderReparameterizationType.LSTM

    def table(self) -> torch.Tensor:
        hidden = self.table_tensor
        if self.recurrent:
            hidden = self._read(hidden)
        table: torch.Tensor = self.module("mlp_head")(hidden)
        return table

    def _read(self, tokens: torch.Tensor) -> torch.Tensor:
        lstm = cast(nn.LSTM, self.module("lstm_head"))
        # It keeps a list of its parameters beside those that are registered, and others may have come in their place since.
        lstm._flat_weights = [lstm._parameters[name] for name in lstm._flat_weights_names]
        lstm.flatten_parameters()
        read: torch.Tensor = lstm(tokens[None])[0][0]
        return read

    def table_to_save(self) -> torch.Tensor:
        if not self.recurrent:
            return super().table_to_save()
        lstm = self.module("lstm_head")
        training = lstm.training
        lstm.eval()  # dropout would leave a part of the virtual tokens out
        try:
            return super().table_to_save()
        finally:
            lstm.train(training)


def _linears(*sizes: int) -> nn.Sequential:
    """Linear layers of these sizes, one after the other, with ReLU between them."""
    layers: list[nn.Module] = []
    for size_in, size_out in pairwise(sizes):
        layers += [nn.Linear(size_in, size_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


METHOD = register(
    Method(
        name=PeftType.P_TUNING,
        summary="Puts vectors in front of the embedded input that a small trained network makes.",
        config=PromptEncoderConfig,
        prefix="prompt_encoder_",
        tensor_names=frozenset({"prompt_embeddings"}),
        network_layer=PTuning,
        check=check_prompt,
        tuner_methods=PROMPT_METHODS,
        tuner_views=PROMPT_VIEWS,
        names=MappingProxyType({"PromptEncoder": PromptEncoder}),
        paper="arXiv 2103.10385",
    )
)
