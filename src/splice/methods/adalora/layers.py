"""AdaLoRA: LoRA in the form of a singular value decomposition, whose ranks shrink in training where they matter least.

Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512, section 3. With
c = alpha / (r + 1e-5): `y = base(x) + c * B (E * A) x`, E a column of r values. A training loop calls
`update_and_allocate` after every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.layers import LayerKind, features, kind_of, pads_with_zeros
from splice.base.weight_access import weight_shape
from splice.checkpoint.types import PeftType
from splice.config import PeftConfig
from splice.errors import warn
from splice.kinds.adapters import Adapters, layers_of
from splice.kinds.additive import Additive
from splice.kinds.casting import cast_to
from splice.kinds.convolution import as_convolution
from splice.kinds.file_form import FileForm, Stored
from splice.kinds.slot import Role, Slot
from splice.kinds.tensors import Held
from splice.kinds.weight_delta import operation_of
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.layers import product


@dataclass
class AdaLoraConfig(LoraConfig):
    """Fields and defaults of the reference, in its order.

    Of LoRA's fields `r`, `alpha_pattern`, `use_rslora`, `lora_bias` and those that ask for a variant have no effect;
    `init_lora_weights` only counts as true or false.

    Raises:
        ValueError: `total_step` is missing, or fields contradict each other.
    """

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.ADALORA

    # `<path>.lora_E` -> for each rank of that layer whether it is kept; None until ranks have been taken away.
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]
    # The mean rank of a layer at the end of training: b(T) is this times the number of layers.
    target_r: int = 8
    # The rank of every layer at the start, at least 1; the scale stays alpha / `init_r` whatever is left.
    init_r: int = 12
    # t_i, the number of steps at the start in which all ranks stay.
    tinit: int = 0
    # t_f, the number of steps at the end in which the ranks stay as they have become.
    tfinal: int = 0
    # ΔT, the number of steps from one allocation of the ranks to the next.
    deltaT: int = 1
    # beta1, between 0 and 1: how much of the running mean of an importance each step keeps.
    beta1: float = 0.85
    # beta2, between 0 and 1: the same for the mean of how much that importance varies.
    beta2: float = 0.85
    # gamma, at least 0: weight in the loss of how far A and B are from having orthonormal rows and columns.
    orth_reg_weight: float = 0.5
    # T, the number of training steps that the schedule is made for. It must be given, and be at least 1.
    total_step: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_dora:
            raise ValueError("ADALORA does not support DoRA.")
        if self.loftq_config:
            raise ValueError("ADALORA does not support LOFTQ.")
        if self.r != 8:
            text = (
                "Note that `r` is not used in AdaLora and will be ignored. If you intended to set the initial rank, use"
            )
            warn(f"{text} `init_r` instead.")
        if self.total_step is None or self.total_step <= 0:
            raise ValueError(
                f"AdaLoRA's ranks follow a schedule: `total_step` should be a positive integer, got {self.total_step!r}"
            )
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"The schedule leaves no step to shrink the ranks in: `tinit` ({self.tinit}) should be less than "
                f"`total_step` - `tfinal` ({self.total_step} - {self.tfinal} = {self.total_step - self.tfinal})"
            )
        if self.orth_reg_weight < 0:
            raise ValueError(f"`orth_reg_weight` should not be negative, got {self.orth_reg_weight}")

    def computed(self) -> dict[str, object]:
        return {"lora_alpha": self.lora_alpha, "init_r": self.init_r}


def check(config: AdaLoraConfig) -> None:
    for name, beta in (("beta1", config.beta1), ("beta2", config.beta2)):
        if not 0 < beta < 1:
            raise ValueError(f"`{name}` should lie between 0 and 1, got {beta}")


def check_beside(config: AdaLoraConfig, others: Mapping[str, PeftConfig]) -> None:
    """One budget is shared out over all layers, so only one adapter of a model can be in training."""
    trained = [name for name, other in others.items() if not other.inference_mode]
    if trained and not config.inference_mode:
        raise ValueError(
            f"AdaLoRA supports only 1 trainable adapter, and {trained[0]!r} is one. When using multiple adapters, set "
            "`inference_mode` to True for all adapters except the one you want to train."
        )


class WithoutPruned(FileForm):
    """A checkpoint holds the ranks that are left, once the budget has been allocated."""

    def to_file(self, layer: Stored, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        assert isinstance(layer, AdaLora)
        for name, tensor in tensors.items():
            if layer.kept is None or not name.startswith("lora_"):
                yield name, tensor
            else:
                kept = torch.tensor(layer.kept, device=tensor.device)
                yield name, tensor.detach()[:, kept] if name == "lora_B" else tensor.detach()[kept]


class AdaLora(Additive):
    """What AdaLoRA on every kind of layer shares: A (r, in), E (r, 1) and B (out, r), and their importance in training."""

    lora_A, lora_E, lora_B = Held("lora_A"), Held("lora_E"), Held("lora_B")
    numbers = MappingProxyType({**Additive.numbers, "lora_alpha": "lora_alpha"})
    file_form = WithoutPruned()
    # Which of the ranks are kept, once the budget has been allocated; the others are left out of a checkpoint.
    kept: tuple[bool, ...] | None = None
    # Of each tensor while it is trained: the running mean of its importance, and of how much that varies.
    importance: dict[str, tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def slots(cls, base: nn.Module, config: AdaLoraConfig, path: str) -> dict[str, Slot]:
        (size_in, size_out), r = features(base), config.init_r
        # What was pruned is not in the checkpoint.
        pattern = (config.rank_pattern or {}).get(f"{path}.lora_E")
        if pattern is not None:
            r = sum(map(bool, pattern))
        return {"lora_A": Slot((r, size_in)), "lora_E": Slot((r, 1)), "lora_B": Slot((size_out, r))}

    def prepare(self, base: nn.Module, config: AdaLoraConfig, path: str) -> None:
        # The scale stays that of the initial rank, whatever is left of it.
        self.r, self.lora_alpha = config.init_r, config.lora_alpha
        # The reference keeps the rank beside the tensors, and divides by it.
        ranknum = self.lora_E.detach().new_full((1,), float(self.r))
        self.hold("ranknum", ranknum, Slot((1,), Role.FIXED, stored=False))
        self.initial_scale = self.lora_alpha if self.lora_alpha > 0 else float(self.r)
        self.share = 1 / (self.r + 1e-5)
        self.scale = self.initial_scale
        self.dropout = config.lora_dropout
        self.importance = {}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: AdaLoraConfig) -> None:
        for name, tensor in tensors.items():
            if not config.init_lora_weights:
                nn.init.normal_(tensor)
            elif name == "lora_E":
                nn.init.zeros_(tensor)
            else:
                nn.init.normal_(tensor, std=0.02)

    def scaled_A(self) -> torch.Tensor:
        """E * A / r, (r, in): what the scale, alpha, is multiplied with."""
        return self.lora_A * (self.lora_E * self.share)

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return cast_to(x, self.lora_A)

    def orthogonality(self) -> Iterator[torch.Tensor]:
        """How far A and B are from having orthonormal rows and columns."""
        for matrix in (self.lora_A, self.lora_B.T):
            yield torch.linalg.matrix_norm(matrix @ matrix.T - torch.eye(len(matrix)).to(matrix))


class AdaLoraLayer(AdaLora):
    """AdaLoRA on a linear layer, stored either way round."""

    @classmethod
    def resolved(cls, base: nn.Module, config: AdaLoraConfig) -> dict[str, object]:
        return {"fan_in_fan_out": kind_of(base) is LayerKind.TRANSPOSED_LINEAR}

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.scaled_A()), self.lora_B)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor | None:
        return self.scale * product(self.lora_B, self.scaled_A())


class AdaLoraConv(AdaLora):
    """AdaLoRA on a two-dimensional convolution, as an update of its weight: A is (r, in * height * width)."""

    @classmethod
    def slots(cls, base: nn.Module, config: AdaLoraConfig, path: str) -> dict[str, Slot]:
        conv = as_convolution(base)
        if conv.groups != 1:
            raise ValueError(
                f"{path}: AdaLoRA is not defined on a Conv2d with groups (here {conv.groups}). Leave it out of the targets."
            )
        found = super().slots(base, config, path)
        r, size_in = found["lora_A"].shape
        return {**found, "lora_A": Slot((r, size_in * math.prod(conv.kernel_size)))}

    def prepare(self, base: nn.Module, config: AdaLoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.operation, self.shape = operation_of(base), weight_shape(base)
        # The operation pads with zeros; where the base does not, the update is no change of its weight.
        self.mergeable = pads_with_zeros(base)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        return self.operation(x, (self.lora_B @ self.scaled_A()).view(self.shape))

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor | None:
        return self.scale * product(self.lora_B, self.scaled_A()).view(self.shape)


def orthogonality_loss(adapters: Adapters, name: str) -> torch.Tensor:
    """What keeps A and B close to being orthogonal, so that E holds what counts."""
    layers = list(layers_of(adapters, [name], AdaLora).values())
    config = adapters.peft_config[name]
    assert isinstance(config, AdaLoraConfig)
    # On one device: the layers of a network that is spread over several are on as many.
    found = torch.stack([value.to(layers[0].lora_A.device) for layer in layers for value in layer.orthogonality()])
    return config.orth_reg_weight * found.mean()
