"""PVeRA: VeRA whose code is drawn from a normal distribution in training, and is its mean otherwise.

"Probabilistic VeRA", arXiv 2512.07703. With A (2r, max in) and B (max out, r) random, frozen and cut to the layer's size:
`(mean, log_var) = d * (A x)`, `z = mean + e * exp(log_var / 2)` with e ~ N(0, 1), `y = base(x) + b * (B z)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.layers import LayerKind
from splice.checkpoint.types import PeftType
from splice.kinds.dropout import dropout_of
from splice.kinds.registry import Method, register
from splice.kinds.tensors import Held
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.projected import Projected, Projections, check
from splice.methods.targeted import Targeted


@dataclass
class PveraConfig(Targeted):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.PVERA
    rank_field = "r"
    # Beside a regular expression as `target_modules`, `layers_to_transform` is no error here; it has no effect.
    index_needs_names: ClassVar[bool] = False

    # Size r of the code, at least 1: of its mean, and of its logarithmic variance.
    r: int = 256
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Seed of the random numbers in A and B.
    projection_prng_key: int = 0
    # Whether a checkpoint holds A and B; otherwise each load draws them again from the seed.
    save_projection: bool = True
    # Probability with which each input of A is set to zero in training, 0 to 1.
    pvera_dropout: float = 0.0
    # The value that every element of d starts at.
    d_initial: float = 0.1
    # Whether the base stores weights as (in, out). No effect: the class of each layer decides, and sets this field.
    fan_in_fan_out: bool = False
    # Biases of the base to train with the adapter: "none", "all", or "pvera_only" for those of adapted layers.
    bias: str = "none"
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # Whether b starts at zero, so that nothing changes at first; otherwise b starts at 1, and d is drawn from N(0, 1).
    init_weights: bool = True
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name, or names, of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list
    # on a layer's path, which must lie inside another module.
    layers_pattern: list[str] | str | None = None
    # Whether codes are drawn outside of training too.
    sample_at_inference: bool = False
    # Seed of the numbers that codes are drawn with, the same for every layer; None for those that torch draws.
    generator_seed: int | None = None

    def computed(self) -> dict[str, object]:
        # Projections that a file holds are read from it.
        seed = None if self.save_projection else self.projection_prng_key
        return {"projection_prng_key": seed, "sample_at_inference": self.sample_at_inference}


class PveraProjections(Projections):
    """A (2r, max in) and B (max out, r)."""

    A, B = Held("pvera_A"), Held("pvera_B")
    codes = 2


class PveraLayer(Projected):
    """PVeRA on a linear layer, stored either way round."""

    numbers = MappingProxyType({"r": "r", "sample_at_inference": "samples"})
    b, d = Held("pvera_lambda_b"), Held("pvera_lambda_d")
    projections = PveraProjections

    def prepare(self, base: nn.Module, config: PveraConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.dropout = config.pvera_dropout
        self.samples = config.sample_at_inference
        # What is merged is the mean.
        self.merges_exactly = not self.samples
        seed = config.generator_seed
        self.source = None if seed is None else torch.Generator().manual_seed(seed)
        # The state that the numbers of the last forward were drawn from.
        self.last_state: torch.Tensor | None = None

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.matrices()
        if not (self.training or self.samples):
            r = self.r
            return self.b * F.linear(self.d[:r] * F.linear(x, a[:r]), b)
        mean, log_var = (self.d * F.linear(x, a)).chunk(2, dim=-1)
        return self.b * F.linear(mean + self._noise(mean) * torch.exp(log_var / 2), b)

    def _noise(self, like: torch.Tensor) -> torch.Tensor:
        if self.source is None:
            return torch.randn_like(like)
        # A backward that computes a block again has to go through the very numbers of its forward. torch sees to those that
        # it draws itself.
        state, again = self.source.get_state(), torch._C._current_graph_task_id() != -1
        if not again or self.last_state is None:
            self.last_state = state
        self.source.set_state(self.last_state)
        noise = torch.randn(like.shape, generator=self.source, dtype=like.dtype).to(like.device)
        if again:
            self.source.set_state(state)
        return noise

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor:
        (a, b), r = self.matrices(), self.r
        return (self.b[:, None] * b) @ (self.d[:r, None] * a[:r])


METHOD = register(
    Method(
        name=PeftType.PVERA,
        summary="Adds to each layer VeRA's update, of a code that is drawn at random in training.",
        config=PveraConfig,
        prefix="pvera_lambda_",
        tensor_names=frozenset({"pvera_lambda_b", "pvera_lambda_d", "pvera_A", "pvera_B"}),
        layers=MappingProxyType({LayerKind.LINEAR: PveraLayer, LayerKind.TRANSPOSED_LINEAR: PveraLayer}),
        shared=PveraProjections,
        layer_views=MappingProxyType({"pvera_dropout": dropout_of}),
        default_targets=MappingProxyType({**LORA_TARGETS, "phi": ["q_proj", "v_proj"], "dinov2": ["query", "value"]}),
        check=check,
        paper="arXiv 2512.07703",
    )
)
