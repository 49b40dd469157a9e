"""GLoRA: a weight and a bias are scaled, shifted, and seen through the weight, all by trained numbers of chosen shapes.

Chavan et al., "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", arXiv 2306.07967, section 3. With A and B
of the shape of the weight, D and E of that of the bias, and C for the inputs, products being elementwise:
`W' = W + W A + B` and `b' = b + b D + E + W C`. Each is a low-rank product, a vector, one number, or nothing. W and b are the
base's own, so several adapters add up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.dense import dtype_of
from splice.base.layers import LayerKind, features
from splice.base.weight_access import bias_of
from splice.checkpoint.types import PeftType
from splice.kinds.casting import check_values
from splice.kinds.original import original_weight, tensor_in_use
from splice.kinds.registry import Method, register
from splice.kinds.slot import Role, Slot
from splice.kinds.weight_delta import WeightUpdate
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.elementwise import MOST_ROWS, product_with
from splice.methods.targeted import Targeted, check_positive

_OF_WEIGHT = ("lora", "vector", "constant", "none")
_OF_INPUTS = ("lora", "vector", "none")
_OF_BIAS = ("vector", "constant", "none")


@dataclass
class GloraConfig(Targeted):
    """Fields and defaults of the reference, in its order.

    Raises:
        ValueError: a path is of no known kind; the message lists those that are.
    """

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.GLORA
    rank_field = "r"

    # Rank of every low-rank product.
    r: int = 8
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Biases of the base to train with the adapter: "none", "all", or "glora_only" for those of adapted layers.
    bias: str = "none"
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # What A and B are: "lora", "vector" (a number for each output), "constant" (one number) or "none".
    config_A_B: str = "lora"
    # What C is: "lora", "vector" (a number for each input) or "none". On layers without bias there is none.
    config_C: str = "lora"
    # What D and E are: "vector" (a number for each output), "constant" (one number) or "none". On layers without bias there
    # are none.
    config_D_E: str = "constant"
    # Whether nothing changes at first; otherwise everything starts at random.
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, known in (
            ("config_A_B", self.config_A_B, _OF_WEIGHT),
            ("config_C", self.config_C, _OF_INPUTS),
            ("config_D_E", self.config_D_E, _OF_BIAS),
        ):
            if value not in known:
                raise ValueError(f"Invalid {name} value: {value!r}. Valid values are: {', '.join(known)}.")


def _check(config: GloraConfig) -> None:
    check_positive(r=config.r)


class GloraLayer(WeightUpdate):
    """GLoRA on a linear layer; a path that is nothing has a tensor of zeros, which checkpoints of the reference hold."""

    numbers = MappingProxyType({"r": "r"})

    @classmethod
    def slots(cls, base: nn.Module, config: GloraConfig, path: str) -> dict[str, Slot]:
        (size_in, size_out), r = features(base), config.r
        has_bias = bias_of(base) is not None
        of_inputs, of_bias = (config.config_C, config.config_D_E) if has_bias else ("none", "none")
        # The kind of each path, the shape of what it stands for, and of a vector in its place.
        paths = {
            "A": (config.config_A_B, (size_out, size_in), (size_out, 1)),
            "B": (config.config_A_B, (size_out, size_in), (size_out, 1)),
            "C": (of_inputs, (size_in, 1), (size_in, 1)),
            "D": (of_bias, (size_out,), (size_out,)),
            "E": (of_bias, (size_out,), (size_out,)),
        }
        found = {}
        for letter, (kind, shape, vector) in paths.items():
            front = f"glora_{letter}"
            if kind == "lora":
                found[f"{front}.Xd"], found[f"{front}.Xu"] = Slot((shape[0], r)), Slot((r, shape[1]))
            elif kind == "none":
                found[f"{front}.zeros"] = Slot(shape, Role.BUFFER, dtype=dtype_of(base))
            else:
                found[f"{front}.X"] = Slot(vector if kind == "vector" else (1,))
        return found

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: GloraConfig) -> None:
        for suffix, tensor in tensors.items():
            name = suffix.rpartition(".")[2]
            is_number = name == "X" and tensor.shape == (1,)
            if name == "zeros" or (config.init_weights and name != "Xu"):
                nn.init.zeros_(tensor)
            elif is_number:
                nn.init.normal_(tensor, std=0.02)
            else:
                nn.init.kaiming_uniform_(tensor if tensor.dim() > 1 else tensor.unsqueeze(0), a=math.sqrt(5))

    def prepare(self, base: nn.Module, config: GloraConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.r = config.r
        self.has_bias = bias_of(base) is not None

    def path(self, letter: str, like: torch.Tensor) -> torch.Tensor | None:
        """A, B, C, D or E in the dtype of `like`, of its own shape or one that is broadcast to it; None where it is zero."""
        front = f"glora_{letter}"
        value, pair = self.find(f"{front}.X"), self.pair(letter, like)
        if value is not None:
            return value.to(like.dtype)
        return None if pair is None else pair[0] @ pair[1]

    def pair(self, letter: str, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The two factors of A, B or C in the dtype of `like`; None where it is no low-rank product."""
        down, up = self.find(f"glora_{letter}.Xd"), self.find(f"glora_{letter}.Xu")
        return None if down is None or up is None else (down.to(like.dtype), up.to(like.dtype))

    def update_of(self, weight: torch.Tensor) -> torch.Tensor:
        scale, shift = self.path("A", weight), self.path("B", weight)
        found = torch.zeros_like(weight) if scale is None else weight * scale
        return found if shift is None else found + shift

    def update_of_bias(self) -> torch.Tensor | None:
        """What is added to the base's bias, (out); None where it has none."""
        bias = tensor_in_use(self.base, "bias", self) if self.has_bias else None
        if bias is None:
            return None
        weight, found = original_weight(self.base), torch.zeros_like(bias)
        through, scale, shift = self.path("C", weight), self.path("D", weight), self.path("E", weight)
        if scale is not None:
            found = found + bias * scale
        if shift is not None:
            found = found + shift
        return found if through is None else found + (weight @ through)[:, 0]

    def applied(self, x: torch.Tensor) -> torch.Tensor | None:
        if len(x) > MOST_ROWS:
            return None
        weight = original_weight(self.base)
        pairs = self.pair("A", weight), self.pair("B", weight)
        if pairs[0] is not None and pairs[1] is not None:
            check_values(pairs[0][0], x)
            return product_with(weight, *pairs[0], x) + F.linear(F.linear(x, pairs[1][1]), pairs[1][0])
        scale, shift = self.path("A", weight), self.path("B", weight)
        if scale is None or shift is None:  # both are of one kind
            return x.new_zeros(len(x), len(weight))
        check_values(scale, x)
        return F.linear(x, weight) * scale.t() + x.sum(-1, keepdim=True) * shift.t()

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        found, bias = self.directly(x), self.update_of_bias()
        if found is not None:
            return found if bias is None else found + bias
        update = self.update()
        check_values(update, x)
        return F.linear(x, update, bias)

    @property
    def changed_names(self) -> tuple[str, ...]:
        return ("weight", "bias") if self.has_bias else ("weight",)

    def delta_bias(self) -> torch.Tensor | None:
        return self.update_of_bias()


METHOD = register(
    Method(
        name=PeftType.GLORA,
        summary="Scales and shifts a weight and a bias by trained numbers: low-rank products, vectors or single ones.",
        config=GloraConfig,
        prefix="glora_",
        tensor_names=frozenset({f"glora_{letter}" for letter in "ABCDE"}),
        layers=MappingProxyType({LayerKind.LINEAR: GloraLayer}),
        containers=tuple(f"glora_{letter}" for letter in "ABCDE"),
        default_targets=LORA_TARGETS,
        check=_check,
        names=MappingProxyType({"GloraLinear": GloraLayer}),
        paper="arXiv 2306.07967",
    )
)
