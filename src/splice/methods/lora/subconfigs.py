"""Configs inside the config of LoRA, one for each relative or initialisation that has options of its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"`{name}` must be greater than 0, got {value!r}")


@dataclass
class LoftQConfig:
    """LoftQ: how many bits and how many rounds."""

    loftq_bits: int = 4
    loftq_iter: int = 1


@dataclass
class EvaConfig:
    """EVA: how A is found from data.

    Raises:
        ValueError: `rho` is below 1, or `tau` not within 0 and 1.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1:
            raise ValueError(f"`rho` must be at least 1, got {self.rho!r}")
        if not 0 <= self.tau <= 1:
            raise ValueError(f"`tau` must be between 0 and 1, got {self.tau!r}")


@dataclass
class CordaConfig:
    """CorDA: where the covariances are, and which directions of the weight are taken."""

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True


@dataclass
class LoraGAConfig:
    """LoRA-GA: which directions of the gradient are taken, and how they are scaled."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16


@dataclass
class BdLoraConfig:
    """BD-LoRA: which layers have a block-diagonal A, which a block-diagonal B. Names are parts of paths.

    Raises:
        ValueError: a name stands in both lists, or there is no block.
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        both = set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ())
        if both:
            raise ValueError(f"{sorted(both)} stand in both target_modules_bd_a and target_modules_bd_b")
        _positive(nblocks=self.nblocks)


@dataclass
class KasaConfig:
    """KaSA: the weights of its two terms in the loss.

    Raises:
        ValueError: one is negative.
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("beta", "gamma"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)!r}")


@dataclass
class MontecloraConfig:
    """MonteCLoRA: how its noise is drawn, and what it adds to the loss.

    Raises:
        ValueError: a number that must be positive is not.
    """

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self) -> None:
        _positive(num_samples=self.num_samples, dirichlet_prior=self.dirichlet_prior, buffer_size=self.buffer_size)


@dataclass
class VeloraConfig:
    """VeLoRA: how A's input is kept for the backward.

    Raises:
        ValueError: a number is not positive, or `init_type` is not known.
    """

    num_groups: int = 64
    scale: float = 1.0
    init_type: str = "batch_average"

    def __post_init__(self) -> None:
        _positive(num_groups=self.num_groups, scale=self.scale)
        if self.init_type not in ("batch_average", "batch_average_once", "random"):
            raise ValueError(
                f"`init_type` must be 'batch_average', 'batch_average_once' or 'random', got {self.init_type!r}"
            )


SUBCONFIGS: dict[str, type[Any]] = {
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
    "use_bdlora": BdLoraConfig,
    "kasa_config": KasaConfig,
    "monteclora_config": MontecloraConfig,
    "velora_config": VeloraConfig,
}


def parsed(name: str, value: Any) -> Any:
    """The value of a field of `SUBCONFIGS`, made from a dict where it is one; options that are not known are left out.

    Raises:
        TypeError: it is something else.
    """
    cls = SUBCONFIGS[name]
    if value is None or isinstance(value, cls):
        return value
    if not isinstance(value, dict):
        raise TypeError(f"`{name}` must be None, a {cls.__name__} or a dict, got {type(value).__name__}")
    known = {f.name for f in dataclasses.fields(cls)}
    return cls(**{key: option for key, option in value.items() if key in known})
