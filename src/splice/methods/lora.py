"""LoRA: a low-rank update beside a frozen weight.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1; the rank-stabilised scale
is Kalajdzievski, arXiv 2312.03732, section 3. With A (r, in), B (out, r): `y = base(x) + s * B A x`, where
s = alpha / r, or alpha / sqrt(r).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from splice.config import PeftConfig, PeftType, TargetRule
from splice.errors import UnsupportedFeatureError
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.layer import Additive, Factors, Slots
from splice.methods.lora_parameters import LoraParameters
from splice.methods.registry import Method, register
from splice.surgery.targets import value_for
from splice.weights.layers import LayerKind, features, kind_of


@dataclass
class LoraRuntimeConfig:
    """Options that live in memory only."""

    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(PeftConfig):
    """Fields and defaults of the reference, in its order.

    Raises:
        ValueError: fields contradict each other.
        TypeError: `target_parameters` is a string.
    """

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict[str, Any] = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[list[int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.target_parameters, str):
            raise TypeError("`target_parameters` is a list of names, got a string")
        _check_fields_agree(self)

    def target_rule(self) -> TargetRule:
        return TargetRule(
            self.target_modules,
            self.exclude_modules,
            self.layers_to_transform,
            self.layers_pattern,
            self.modules_to_save,
            self.target_parameters,
        )

    def trained_biases(self) -> str:
        return self.bias


def _check_fields_agree(config: LoraConfig) -> None:
    if isinstance(config.target_modules, str):
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(config, name) is not None:
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
    if config.layers_pattern and config.layers_to_transform is None:
        raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
    if config.use_dora and config.megatron_config:
        raise ValueError("`use_dora` does not work with `megatron_config`; drop one of the two.")
    if config.lora_bias and config.use_dora:
        raise ValueError("`lora_bias=True` is not supported together with `use_dora=True`.")
    if config.lora_bias and not isinstance(config.init_lora_weights, bool):
        raise ValueError(f"`lora_bias=True` needs init_lora_weights True or False, not {config.init_lora_weights!r}.")
    if config.init_lora_weights == "loftq" and not config.loftq_config:
        raise ValueError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
    if config.loftq_config and config.init_lora_weights != "loftq":
        warnings.warn("`loftq_config` is given but `init_lora_weights` is not 'loftq'; it is ignored.", stacklevel=4)
        config.loftq_config = {}


# Initialisations that leave the base weights alone: an adapter made with one of them loads as plain LoRA.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
# Fields that change the output when they are set, and that nothing here honours yet.
_NOT_HONOURED = (
    "megatron_config",
    "trainable_token_indices",
    "use_dora",
    "velora_config",
    "alora_invocation_tokens",
    "monteclora_config",
    "layer_replication",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "ensure_weight_tying",
)


def _check(config: LoraConfig) -> None:
    """Refuse what would compute something else than what was trained."""
    for name, value in [("r", config.r), *((f"rank_pattern[{k!r}]", v) for k, v in config.rank_pattern.items())]:
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"`{name}` should be a positive integer value but the value passed is {value!r}")
    for name, value in [("lora_alpha", config.lora_alpha), *config.alpha_pattern.items()]:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"the alpha of {name!r} should be a number but the value passed is {value!r}")
    if config.bias not in ("none", "all", "lora_only"):
        raise NotImplementedError(f"bias={config.bias!r} is not one of 'none', 'all', 'lora_only'")
    if config.target_parameters and (config.lora_dropout or config.fan_in_fan_out or config.lora_bias):
        raise ValueError("`target_parameters` does not work with lora_dropout, fan_in_fan_out or lora_bias.")
    asked = {name: getattr(config, name) for name in _NOT_HONOURED if getattr(config, name) not in (None, False, [])}
    if config.init_lora_weights not in _PLAIN_INITS:
        asked["init_lora_weights"] = config.init_lora_weights
    if asked:
        raise UnsupportedFeatureError(
            f"this LoRA asks for {asked}, which changes what the adapter computes and is not supported yet. "
            "It is refused rather than loaded as plain LoRA."
        )


OFFLOADED = (
    "the adapter's tensors are on the meta device: they were left empty (low_cpu_mem_usage), or offloaded by hooks that came "
    "after the adapter. Dispatch or offload the base model first, then load the adapter."
)


class LoraLayer(Additive):
    """What LoRA on every kind of layer shares."""

    names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")

    @staticmethod
    def rank(config: LoraConfig, path: str) -> int:
        return int(value_for(config.rank_pattern, path, config.r))

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        rank, alpha = self.rank(config, path), value_for(config.alpha_pattern, path, config.lora_alpha)
        self.r, self.lora_alpha = rank, alpha
        self.initial_scale = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
        self.scale = self.initial_scale
        self.dropout = config.lora_dropout

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: LoraConfig) -> None:
        a, b = (tensors[name] for name in cls.names)
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(a, std=1 / a.shape[0])
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if config.init_lora_weights is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        else:
            nn.init.zeros_(b)
        if "lora_B.bias" in tensors:
            nn.init.zeros_(tensors["lora_B.bias"])


class LoraLinear(LoraLayer):
    """LoRA on a linear layer, stored either way round."""

    lora_A: Slots
    lora_B: Slots

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, tuple[int, ...]]:
        (size_in, size_out), r = features(base), cls.rank(config, path)
        bias: dict[str, tuple[int, ...]] = {"lora_B.bias": (size_out,)} if config.lora_bias else {}
        return {"lora_A.weight": (r, size_in), "lora_B.weight": (size_out, r), **bias}

    @classmethod
    def resolved(cls, base: nn.Module, config: LoraConfig) -> dict[str, Any]:
        # The layout follows from the layer; the field is kept as the reference writes it.
        return {"fan_in_fan_out": kind_of(base) is LayerKind.TRANSPOSED_LINEAR}

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        # Kept as a tuple: each look-up of a child module by name would cost as much as a tenth of a small product.
        self._factors: tuple[Any, Any] = (self.lora_A, self.lora_B)

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._factors[0].weight
        if weight.is_meta:
            raise RuntimeError(OFFLOADED)
        return x if x.dtype is weight.dtype else x.to(weight.dtype)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self._factors
        return F.linear(F.linear(x, a.weight), b.weight, b.bias)

    def factors(self) -> Factors | None:
        a, b = self._factors
        plain = b.bias is None and self.trained_bias is None and not (self.dropout and self.training)
        return Factors(a.weight, b.weight, self.scale) if plain and type(self) is LoraLinear else None

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor | None:
        a, b = self._factors
        return self.scale * _product(b.weight, a.weight)

    def delta_bias(self) -> torch.Tensor | None:
        bias: torch.Tensor | None = self._factors[1].bias
        return None if bias is None else self.scale * bias


class LoraEmbedding(LoraLayer):
    """LoRA on an embedding, where the first product is a look-up: `y = base(ids) + s * A^T[ids] B^T`."""

    names = ("lora_embedding_A", "lora_embedding_B")
    lora_embedding_A: nn.Parameter
    lora_embedding_B: nn.Parameter

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, tuple[int, ...]]:
        (vocabulary, dim), r = features(base), cls.rank(config, path)
        return {"lora_embedding_A": (r, vocabulary), "lora_embedding_B": (dim, r)}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: LoraConfig) -> None:
        a, b = (tensors[name] for name in cls.names)
        nn.init.normal_(b)
        if config.init_lora_weights is False:
            nn.init.normal_(a)
        else:
            nn.init.zeros_(a)

    def prepare(self, base: Any, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.dropout = 0.0  # the input is token ids
        self.look_up = (base.padding_idx, base.max_norm, base.norm_type, base.scale_grad_by_freq, base.sparse)
        # Some models multiply what they look up (Gemma, BART); the update is multiplied alike.
        embed_scale = getattr(base, "embed_scale", None)
        self.embed_scale = 1.0 if embed_scale is None else float(embed_scale)

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        found = F.embedding(x, self.lora_embedding_A.T, *self.look_up) @ self.lora_embedding_B.T
        return found if self.embed_scale == 1.0 else found * self.embed_scale

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor:
        return self.scale * _product(self.lora_embedding_B, self.lora_embedding_A).T


_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LoraConv(LoraLinear):
    """LoRA on a convolution: a convolution to r channels, then a pointwise one with the groups of the base.

    The first one takes kernel, stride, padding and dilation of the base, and never its groups.
    """

    @classmethod
    def resolved(cls, base: nn.Module, config: LoraConfig) -> dict[str, Any]:
        return {}

    @classmethod
    def slots(cls, base: Any, config: LoraConfig, path: str) -> dict[str, tuple[int, ...]]:
        (size_in, size_out), r = features(base), cls.rank(config, path)
        if r % base.groups:
            raise ValueError(f"{path}: rank {r} must be a multiple of the convolution's groups ({base.groups})")
        ones = (1,) * len(base.kernel_size)
        bias: dict[str, tuple[int, ...]] = {"lora_B.bias": (size_out,)} if config.lora_bias else {}
        return {
            "lora_A.weight": (r, size_in, *base.kernel_size),
            "lora_B.weight": (size_out, r // base.groups, *ones),
            **bias,
        }

    def prepare(self, base: Any, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.convolve = _CONVOLUTIONS[len(base.kernel_size)]
        self.stride, self.padding, self.dilation, self.groups = base.stride, base.padding, base.dilation, base.groups
        self.mergeable = base.groups == 1 and base.padding_mode == "zeros"

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self._factors
        hidden = self.convolve(x, a.weight, None, self.stride, self.padding, self.dilation)
        return self.convolve(hidden, b.weight, b.bias, 1, 0, 1, self.groups)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor | None:
        if not self.mergeable:  # the update mixes groups, or pads with zeros where the base does not
            return None
        a, b = self._factors
        return self.scale * _product(b.weight.flatten(1), a.weight.flatten(1)).reshape(weight.shape)


def _product(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """`B @ A`; half-precision factors on the CPU are multiplied in float32, and rounded by whoever adds the product."""
    if a.device.type == "cpu" and a.dtype in (torch.float16, torch.bfloat16):
        a, b = a.float(), b.float()
    return b @ a


def with_rank(config: LoraConfig, rank: int, **changes: Any) -> LoraConfig:
    """A copy of `config` with one rank everywhere and scale 1."""
    return dataclasses.replace(
        config, r=rank, lora_alpha=rank, rank_pattern={}, alpha_pattern={}, use_rslora=False, **changes
    )


METHOD = register(
    Method(
        name=PeftType.LORA,
        config=LoraConfig,
        prefix="lora_",
        tensor_names=frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}),
        layers=MappingProxyType(
            {
                LayerKind.LINEAR: LoraLinear,
                LayerKind.TRANSPOSED_LINEAR: LoraLinear,
                LayerKind.EMBEDDING: LoraEmbedding,
                LayerKind.CONV1D: LoraConv,
                LayerKind.CONV2D: LoraConv,
                LayerKind.CONV3D: LoraConv,
            }
        ),
        parameters_layer=LoraParameters,
        default_targets=LORA_TARGETS,
        check=_check,
        paper="arXiv 2106.09685",
    )
)
