"""How several adapters of a method become one new adapter, layer by layer. A method's record has one way or none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import nn

from splice.config import PeftConfig
from splice.kinds.layer import AdapterLayer, Config
from splice.kinds.slot import Slot

# The adapter layers that the adapters have on one base layer, each with its adapter's weight in the sum.
Weighted: TypeAlias = "Sequence[tuple[AdapterLayer, float]]"


class Combination(NamedTuple):
    """How to combine; the fields are the arguments of `PeftModel.add_weighted_adapter`."""

    # The way, by the name that the caller gives it (`combination_type`).
    kind: str
    # Rank of the result, for ways that end in a decomposition; the largest of the adapters', if None.
    svd_rank: int | None = None
    # Quantile at which the factors are cut off after a decomposition; None for no cut.
    svd_clamp: float | None = None
    # Accepted for compatibility: only the leading vectors are used, so the others are never worked out.
    svd_full_matrices: bool = True
    # torch's method for the decomposition on CUDA; its own choice, if None.
    svd_driver: str | None = None
    # Share of the values that is kept, of ways that prune.
    density: float | None = None
    # How TIES elects a sign: "total" by the sum of the values, "frequency" by their number.
    majority_sign_method: str = "total"


class Combine(ABC):
    """One way to combine adapters."""

    @abstractmethod
    def check(self, how: Combination, peft_type: str) -> None:
        """Raise for a combination that this way does not know.

        Raises:
            ValueError: the message lists what it does know.
        """

    def copies(self, config: Config) -> bool:
        """Whether one such adapter alone, with weight 1, is copied as it stands: a combination would lose what it is."""
        return False

    def layer_class(self, first: AdapterLayer) -> type[AdapterLayer]:
        """The class of the new adapter's layer where the first of the adapters has `first`."""
        return type(first)

    @abstractmethod
    def config(self, united: Config, configs: Mapping[str, Config], how: Combination) -> PeftConfig:
        """The config of the new adapter.

        Args:
            united: the first adapter's config, on the layers of all of them.
            configs: of the adapters, by their names.
            how: the combination.

        Raises:
            ValueError: adapters with such configs cannot be combined that way.
        """

    @abstractmethod
    def tensors(
        self, base: nn.Module, path: str, config: Config, layers: Weighted, how: Combination
    ) -> dict[str, torch.Tensor]:
        """The tensors of the new adapter's layer on `base`, by their suffixes, of the shapes of its slots.

        Raises:
            ValueError: tensors of the layers differ in shape.
            UnsupportedFeatureError: one of the layers has no sum with others.
        """


class Summed(Combine):
    """Of methods whose tensors add up: each is the weighted sum of those that the adapters have."""

    def check(self, how: Combination, peft_type: str) -> None:
        if how not in (Combination("svd"), Combination("linear")):
            raise ValueError(
                f"{how} is a way to combine low-rank factors; {peft_type} has none, and its adapters are combined by the "
                "weighted sum of their tensors. Leave these arguments out."
            )

    def config(self, united: PeftConfig, configs: Mapping[str, PeftConfig], how: Combination) -> PeftConfig:
        return united

    def tensors(
        self, base: nn.Module, path: str, config: PeftConfig, layers: Weighted, how: Combination
    ) -> dict[str, torch.Tensor]:
        slots: Mapping[str, Slot] = type(layers[0][0]).slots(base, config, path)
        result: dict[str, torch.Tensor] = {}
        for layer, weight in layers:
            for name, tensor in layer.named_slots():
                if tuple(tensor.shape) != slots[name].shape:
                    raise ValueError(
                        f"{path}: {name} is {tuple(tensor.shape)} in one of the adapters, and would be "
                        f"{slots[name].shape}: they act on this layer in different ways, so their sum has no meaning."
                    )
                # Each adapter's own scale is in its tensors here: such methods have no number beside them.
                part = weight * tensor.detach()
                result[name] = result[name] + part if name in result else part
        return result
