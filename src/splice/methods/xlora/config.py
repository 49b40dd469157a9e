"""The config of X-LoRA, and where its experts are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from splice.checkpoint.types import PeftType
from splice.config import PeftConfig
from splice.errors import warn


@dataclass
class XLoraConfig(PeftConfig):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.XLORA

    # Features of the base's hidden states; None for 4096, with a warning.
    hidden_size: int | None = None
    # The experts: any names -> folders or Hub ids of LoRA adapters. On the model they are called "0", "1"... in their order.
    adapters: dict[str, str] | None = None
    # Whether the weights of a token are a softmax over its experts; otherwise they are what the classifier gives.
    enable_softmax: bool = True
    # Whether there is a softmax over those weights that `top_k_lora` leaves.
    enable_softmax_topk: bool = False
    # Whether each layer has weights of its own; otherwise all have the same.
    layerwise_scalings: bool = False
    # How many linear layers the classifier has, at least 1.
    xlora_depth: int = 1
    # Features between them.
    xlora_size: int = 2048
    # Probability with which one of these is dropped in training.
    xlora_dropout_p: float = 0.2
    # Whether the experts are trained too.
    use_trainable_adapters: bool = False
    # What the classifier's output is divided by before the softmax.
    softmax_temperature: float = 1.0
    # How many experts a token is given, those of the largest weights; None for all.
    top_k_lora: int | None = None
    # Weight of the experts in the first call of the network. No effect: they are switched off in it.
    scaling_pass_value: float = 0.0
    # g, what the sum over the experts is multiplied with.
    global_scaling_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size is None:
            warn(
                "No value was provided for `hidden_size`. This will be set to 4096 by default, please ensure that this is"
            )
            self.hidden_size = 4096
        if self.adapters is None:
            warn("No value was provided for `adapters`. This will be set to empty, please provide the adapters.")
            self.adapters = {}
        if self.enable_softmax_topk and self.top_k_lora is None:
            warn("`enable_softmax_topk` enabled `top_k_lora` is not set")
        if self.enable_softmax_topk and self.enable_softmax:
            warn("`enable_softmax_topk` and `enable_softmax` are both enabled. This will result in worse performance.")
        if self.top_k_lora is not None and self.top_k_lora < 1:
            warn("`top_k_lora` value must be at least 1.")

    def computed(self) -> dict[str, object]:
        names = ("enable_softmax", "enable_softmax_topk", "softmax_temperature", "top_k_lora", "global_scaling_weight")
        return {name: value for name, value in vars(self).items() if name in names}


def check(config: XLoraConfig) -> None:
    if config.xlora_depth <= 0:
        raise ValueError(f"`xlora_depth` must be at least 1, got {config.xlora_depth}")
    if not config.adapters:
        raise ValueError(
            "X-LoRA weighs LoRA adapters, and `adapters` names none: give a dict from any names to folders or Hub ids, "
            "in the config or as `from_pretrained(..., adapters=...)`."
        )
    if config.top_k_lora is not None and not 0 < config.top_k_lora <= len(config.adapters):
        raise ValueError(f"`top_k_lora` is {config.top_k_lora}, of {len(config.adapters)} experts")


def places(config: XLoraConfig, options: Mapping[str, Any]) -> Mapping[str, str]:
    given = options.get("adapters")
    if given is not None:
        config.adapters = dict(given)
    return {str(number): place for number, place in enumerate((config.adapters or {}).values())}


def names_of_experts(config: XLoraConfig) -> tuple[str, ...]:
    """What the experts are called on the model."""
    return tuple(map(str, range(len(config.adapters or ()))))
