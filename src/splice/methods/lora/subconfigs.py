"""Configs inside the config of LoRA, one for each relative or initialisation that has options of its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

# A config of one of the classes here.
S = TypeVar("S")


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"`{name}` must be greater than 0, got {value!r}")


@dataclass
class LoftQConfig:
    """LoftQ: how the base weight is rounded, and how often A and B are fitted to what rounding lost."""

    # Bits for each value of the rounded weight: 4 (NF4) or 8.
    loftq_bits: int = 4
    # T, how often the weight is rounded and B A fitted to what rounding lost; at least 1.
    loftq_iter: int = 1


@dataclass
class EvaConfig:
    """EVA, which starts A at directions of the inputs of a layer, and divides the ranks among the layers.

    Raises:
        ValueError: `rho` is below 1, or `tau` is not between 0 and 1.
    """

    # At least 1: how many times r directions of a layer's inputs compete for ranks.
    rho: float = 2.0
    # From 0 to 1: the cosine similarity between two batches at which a direction has settled.
    tau: float = 0.99
    # Whether tokens with the label `label_mask_value` are left out of the data.
    use_label_mask: bool = True
    # The label of tokens that do not count; -100 is the one that torch's losses ignore.
    label_mask_value: int = -100
    # Whether each direction is divided by its singular value.
    whiten: bool = False
    # Whether alpha changes with the rank that a layer ends up with, so that the scale alpha / r stays.
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1:
            raise ValueError(f"`rho` must be at least 1, got {self.rho!r}")
        if not 0 <= self.tau <= 1:
            raise ValueError(f"`tau` must be between 0 and 1, got {self.tau!r}")


@dataclass
class CordaConfig:
    """CorDA, which splits the weight by covariances of inputs."""

    # File that keeps the finished decomposition; None for none.
    cache_file: str | None = None
    # File that keeps the covariances of the layers' inputs; None for none.
    covariance_file: str | None = None
    # Which directions A and B start from: "ipm" the r largest, "kpm" the r smallest.
    corda_method: Literal["ipm", "kpm"] = "ipm"
    # Whether the preparation tells of its progress.
    verbose: bool = False
    # Whether covariances are held in float16 instead of float32, to save memory.
    use_float16_for_covariance: bool = False
    # Whether what the preparation leaves on the layers is taken away afterwards.
    prune_temporary_fields: bool = True


@dataclass
class LoraGAConfig:
    """LoRA-GA, which starts A and B from gradients."""

    # Which of the gradient's first 2 r singular directions A and B take. "ArB2r": A the first r, B the others; "A2rBr":
    # the reverse; "ArBr": every other one; "random": the same r for both, chosen at random.
    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    # How they are scaled: "stable" by the size of the output and gamma, "weight_svd" by the weight's largest singular
    # value, "gd_scale" by 1 / s, "unit" not at all.
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    # gamma of the scale "stable": B is divided by its square root.
    stable_gamma: int = 16


@dataclass
class BdLoraConfig:
    """BD-LoRA: which layers have a block-diagonal A, and which a block-diagonal B.

    Raises:
        ValueError: a name stands in both lists, or `nblocks` is not positive.
    """

    # Parts of the paths of layers whose A is block-diagonal: those whose input is cut over devices. None for none.
    target_modules_bd_a: list[str] | None = None
    # Parts of the paths of layers whose B is block-diagonal: those whose output is cut over devices. None for none.
    target_modules_bd_b: list[str] | None = None
    # The number of blocks; the rank and the side that is cut must be multiples of it.
    nblocks: int = 1
    # Whether a target that neither list names is refused; otherwise it has plain LoRA.
    match_strict: bool = True

    def __post_init__(self) -> None:
        both = set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ())
        if both:
            raise ValueError(f"{sorted(both)} stand in both target_modules_bd_a and target_modules_bd_b")
        _positive(nblocks=self.nblocks)


@dataclass
class KasaConfig:
    """KaSA: the weights of the two terms that a training loop adds to its loss.

    Raises:
        ValueError: a weight is negative.
    """

    # beta, the weight of the squares of the trained singular values.
    beta: float = 1e-4
    # gamma, the weight of how far A and B are from having orthonormal rows and columns.
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("beta", "gamma"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)!r}")


@dataclass
class MontecloraConfig:
    """MonteCLoRA: how its noise is drawn, and what it adds to the loss.

    Raises:
        ValueError: `num_samples`, `dirichlet_prior` or `buffer_size` is not positive.
    """

    # N, the number of experts whose noise is mixed.
    num_samples: int = 8
    # Whether the sum of the squares of the mixture's weights is added to the loss.
    use_entropy: bool = False
    # Concentration of the Dirichlet prior of the mixture's weights, the same for all N.
    dirichlet_prior: float = 0.1
    # Factor of the noise that is added to A.
    sample_scaler: float = 1e-4
    # Weight in the loss of how far noise and mixture are from their priors (Kullback-Leibler divergence).
    kl_loss_weight: float = 1e-5
    # How many draws of noise are made ahead. No effect: splice draws at every call.
    buffer_size: int = 150

    def __post_init__(self) -> None:
        _positive(num_samples=self.num_samples, dirichlet_prior=self.dirichlet_prior, buffer_size=self.buffer_size)


@dataclass
class VeloraConfig:
    """VeLoRA: how A's input is kept for the backward.

    Raises:
        ValueError: `num_groups` or `scale` is not positive, or `init_type` is unknown.
    """

    # The number of groups that A's inputs are cut into; of each group one number is kept.
    num_groups: int = 64
    # Factor of the gradient of A.
    scale: float = 1.0
    # Where the unit vector comes from that groups are projected on: the mean group of each training batch
    # ("batch_average"), that of the first one ("batch_average_once"), or chance ("random").
    init_type: str = "batch_average"

    def __post_init__(self) -> None:
        _positive(num_groups=self.num_groups, scale=self.scale)
        if self.init_type not in ("batch_average", "batch_average_once", "random"):
            raise ValueError(
                f"`init_type` must be 'batch_average', 'batch_average_once' or 'random', got {self.init_type!r}"
            )


@dataclass
class ArrowConfig:
    """Arrow: how many adapters each token is given, and how they are weighed.

    Raises:
        ValueError: `top_k` or `router_temperature` is not positive.
    """

    # How many experts each token is given: those whose strongest direction is most like it.
    top_k: int = 3
    # What the likenesses are divided by before the softmax over them; the larger, the more equal are the weights.
    router_temperature: float = 1.0
    # Whether what general adapters know is taken out of the experts (GenKnowSub).
    use_gks: bool = False
    # Names of the experts; `create_arrow_model` fills it in.
    task_adapter_names: list[str] | None = field(init=False, default=None)
    # Names of the general adapters; `create_arrow_model` fills it in.
    gks_adapter_names: list[str] | None = field(init=False, default=None)
    # Seed of the vectors from which the search for the strongest directions starts; None for torch's own state.
    rng_seed: int | None = None

    def __post_init__(self) -> None:
        _positive(top_k=self.top_k, router_temperature=self.router_temperature)


# By the field of `LoraConfig`. They have nothing in common but that they are dataclasses, for which Python has no type.
SUBCONFIGS: dict[str, type[Any]] = {
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
    "use_bdlora": BdLoraConfig,
    "arrow_config": ArrowConfig,
    "kasa_config": KasaConfig,
    "monteclora_config": MontecloraConfig,
    "velora_config": VeloraConfig,
}


def options_of(given: object, cls: type[S]) -> S:
    """The options `given` in a field of `LoraConfig`, where it asks for the relative that has them: then it has made a `cls`.

    A field may also hold a dict, but only until the constructor is done.
    """
    assert isinstance(given, cls)
    return given


def parsed(name: str, value: object) -> object:
    """The value of the field `name`: a dict becomes the config class that `SUBCONFIGS` has for it, unknown options left out.

    Raises:
        TypeError: the value is not None, not of that class and not a dict.
    """
    cls = SUBCONFIGS[name]
    if value is None or isinstance(value, cls):
        return value
    # Of the class of this name from another import of the package: it has the same fields.
    if type(value).__name__ == cls.__name__ and dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if not isinstance(value, dict):
        raise TypeError(f"`{name}` must be None, a {cls.__name__} or a dict, got {type(value).__name__}")
    known = {f.name: f.init for f in dataclasses.fields(cls)}
    made: object = cls(**{key: option for key, option in value.items() if known.get(key)})
    for key, option in value.items():
        if known.get(key) is False:  # no argument: it is filled in later, and stands in files
            setattr(made, key, option)
    return made
