"""The config of LoRA and its relatives, and what is refused of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Literal

from splice.checkpoint.types import PeftType, TaskType
from splice.errors import UnsupportedFeatureError, warn
from splice.methods.lora.inits import LOFTQ, check_init, takes_from_base
from splice.methods.lora.subconfigs import (
    SUBCONFIGS,
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
    parsed,
)
from splice.methods.targeted import Targeted, check_positive

# First components of the names of tensors in its checkpoints.
TENSOR_NAMES = frozenset(
    {
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
        "lora_diag",
        "lora_velora_embed",
        "lora_monteclora_sampler",
    }
)


@dataclass
class LoraRuntimeConfig:
    """Options of a run, which live in memory only and are never saved."""

    # Whether tensors in CPU memory should visit the GPU for expensive steps. Recorded only: splice never moves them.
    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(Targeted):
    """Fields and defaults of the reference, in its order.

    Raises:
        ValueError: fields contradict each other.
        TypeError: `target_parameters` is a string, or a config inside this one is neither a config nor a dict.
    """

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.LORA
    # Of the merged-linear LoRA of 2023; the first says nothing about the adapter.
    legacy_fields = frozenset({"merge_weights", "enable_lora"})
    pattern_fields = MappingProxyType({"rank_pattern": "r", "alpha_pattern": "lora_alpha"})

    # Rank r, at least 1: A is (r, in), B is (out, r), and the update of a weight is ΔW = s B A.
    r: int = 8
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Targets to leave out: ends of paths, or a regular expression for whole paths; None for none.
    exclude_modules: list[str] | set[str] | str | None = None
    # alpha, the numerator of the scale: s = alpha / r. Files may hold a fraction.
    lora_alpha: int = 8
    # Probability with which an input of A is set to zero in training, 0 to 1; none on embeddings and attention.
    lora_dropout: float = 0.0
    # Whether the base stores weights as (in, out). No effect: the class of each layer decides, and sets this field. Beside
    # `target_parameters` it is refused.
    fan_in_fan_out: bool = False
    # Biases of the base to train with the adapter: "none", "all", or "lora_only" for those of adapted layers.
    bias: Literal["none", "all", "lora_only"] = "none"
    # Whether the scale is s = alpha / sqrt(r) (rsLoRA) instead of alpha / r.
    use_rslora: bool = False
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # What a new adapter starts from. True: A random and B zero, so that nothing changes at first; False: both random.
    # "gaussian", "orthogonal", "mica": other values whose product is zero. "pissa", "pissa_niter_<n>", "olora": a part of
    # the base's weight, which counts as taken out of it. "loftq": what the weight loses by rounding, beside the rounded
    # weight. "eva": as True, until `initialize_lora_eva_weights` is called. "lora_ga",
    # "corda": a part that follows from data: `preprocess_loraga`, `preprocess_corda` come first.
    init_lora_weights: bool | str = True
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name, or names, of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list
    # on a layer's path, which must lie inside another module.
    layers_pattern: list[str] | str | None = None
    # Ranks of single layers: a regular expression for the end of a path -> its r. The first that matches counts.
    rank_pattern: dict[str, int] = field(default_factory=dict)
    # The same for alpha.
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    # Options of Megatron's parallel layers, which splice cannot adapt. No effect; beside `use_dora` it is refused.
    megatron_config: dict[str, object] | None = None
    # The module that Megatron's layers are imported from. No effect.
    megatron_core: str | None = "megatron.core"
    # Tokens whose embedding rows are trained too: ids, or a dict from the end of a layer's path to ids; None for none.
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    # Options of `init_lora_weights="loftq"`, the fields of `LoftQConfig`. With any other initialisation it is emptied.
    loftq_config: LoftQConfig | dict[str, int] = field(default_factory=dict)
    # EVA's options: an `EvaConfig`, or a dict of its fields; None for none.
    eva_config: EvaConfig | dict[str, object] | None = None
    # CorDA's options: a `CordaConfig`, or a dict of its fields; None for none.
    corda_config: CordaConfig | dict[str, object] | None = None
    # LoRA-GA's options: a `LoraGAConfig`, or a dict of its fields; None for none.
    lora_ga_config: LoraGAConfig | dict[str, object] | None = None
    # Whether to train DoRA: LoRA for the directions of the weight's rows, and a magnitude m for each row.
    use_dora: bool = False
    # VeLoRA, which keeps less of A's input for the backward: a `VeloraConfig`, or a dict of its fields; None for none.
    velora_config: VeloraConfig | dict[str, object] | None = None
    # aLoRA: ids of the tokens that switch the adapter on, from their last occurrence in a row; None: it is always on.
    alora_invocation_tokens: list[int] | None = None
    # Whether to train QA-LoRA on layers that are quantised with zero points for groups; on others no effect.
    use_qalora: bool = False
    # How many inputs QA-LoRA averages: it divides those of each layer, and should be the size of their groups.
    qalora_group_size: int = 16
    # MonteCLoRA, which adds learned noise to A in training: a `MontecloraConfig`, or a dict of its fields; None for none.
    monteclora_config: MontecloraConfig | dict[str, object] | None = None
    # Ranges [start, end) of the base's blocks to call one after the other, some more than once; None: as they are.
    layer_replication: list[list[int]] | None = None
    # Options that live in memory only: no checkpoint holds them.
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    # Whether B has a trained bias (out); it is scaled by s like the rest of the update.
    lora_bias: bool = False
    # Bare parameters to adapt, of 2 or 3 dimensions (stacked experts), by the ends of their paths; None for none.
    target_parameters: list[str] | None = None
    # BD-LoRA, whose A or B is block-diagonal: a `BdLoraConfig`, or a dict of its fields; None for none.
    use_bdlora: BdLoraConfig | dict[str, object] | None = None
    # Arrow, which chooses among other adapters for each token: an `ArrowConfig`, or a dict of its fields; None for none.
    arrow_config: ArrowConfig | dict[str, object] | None = None
    # KaSA, which trains r singular values anew, the smallest: a `KasaConfig`, or a dict of its fields; None for none.
    kasa_config: KasaConfig | dict[str, object] | None = None
    # Whether layers that share the weight of the input embeddings share their adapter's tensors as well.
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_parameters, str):
            raise TypeError("`target_parameters` is a list of names, got a string")
        for name in SUBCONFIGS:
            setattr(self, name, parsed(name, getattr(self, name)))
        if isinstance(self.loftq_config, LoftQConfig):
            self.loftq_config = dataclasses.asdict(self.loftq_config)
        _check_fields_agree(self)
        _complete_init(self)

    def _register_custom_module(self, mapping: dict[type, type]) -> None:
        """Refused: a layer of one's own that wraps others has no place where layers keep their class.

        Raises:
            UnsupportedFeatureError: always, with the way to adapt such layers.
        """
        names = ", ".join(cls.__name__ for cls in mapping)
        raise UnsupportedFeatureError(
            f"layers of {names} cannot be given to an adapter layer of your own: such layers wrap others, and here layers "
            "keep their class. Subclasses of the supported layers are adapted as they are; for other layers add a method "
            "(CONTRIBUTING.md)."
        )

    def layer_ranges(self) -> list[list[int]] | None:
        return self.layer_replication or None

    def computed(self) -> dict[str, object]:
        changes_base = takes_from_base(self.init_lora_weights) or self.init_lora_weights == LOFTQ
        return {
            "lora_alpha": self.lora_alpha,
            "use_rslora": self.use_rslora,
            # Where it leaves the base alone nothing is left of it once the adapter is trained.
            "init_lora_weights": self.init_lora_weights if changes_base else True,
            "loftq_config": loftq_options(self) if self.init_lora_weights == LOFTQ else None,
            "alora_invocation_tokens": self.alora_invocation_tokens,
            "use_bdlora": self.use_bdlora,
            "trainable_token_indices": self.trainable_token_indices,
            "layer_replication": self.layer_ranges(),
        }


def _check_fields_agree(config: LoraConfig) -> None:
    if config.use_dora and config.megatron_config:
        raise ValueError("`use_dora` does not work with `megatron_config`; drop one of the two.")
    if config.lora_bias and config.use_dora:
        raise ValueError("`lora_bias=True` is not supported together with `use_dora=True`.")
    if config.lora_bias and not isinstance(config.init_lora_weights, bool):
        raise ValueError(f"`lora_bias=True` needs init_lora_weights True or False, not {config.init_lora_weights!r}.")
    if config.init_lora_weights == "loftq" and not config.loftq_config:
        raise ValueError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
    if config.loftq_config and config.init_lora_weights != "loftq":
        warn("`loftq_config` is given but `init_lora_weights` is not 'loftq'; it is ignored.")
        config.loftq_config = {}


def _complete_init(config: LoraConfig) -> None:
    """Give an initialisation its default options where it has none, and warn of options that are ignored."""
    for init, name, default in (("eva", "eva_config", EvaConfig), ("corda", "corda_config", CordaConfig)):
        given, asked = getattr(config, name) is not None, config.init_lora_weights == init
        if asked and not given:
            text = f"`init_lora_weights` is {init!r} but `{name}` is not specified. Using the default config."
            warn(text)
            setattr(config, name, default())
        elif given and not asked:
            text = f"`{name}` specified but will be ignored when `init_lora_weights` is not {init!r}."
            warn(text)
    if config.alora_invocation_tokens is not None and config.task_type != TaskType.CAUSAL_LM:
        warn("aLoRA is currently only supported for CAUSAL_LM task.")


# Relatives of LoRA, by the fields that ask for them. At most one can be asked for.
VARIANTS = (
    "use_dora",
    "alora_invocation_tokens",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)


def active_variants(config: LoraConfig) -> list[str]:
    """The fields of `VARIANTS` that are set."""
    return [name for name in VARIANTS if getattr(config, name) not in (None, False, [])]


def check(config: LoraConfig) -> None:
    """Refuse configs with which the adapter would compute something other than what was trained."""
    check_positive(r=config.r, **{f"rank_pattern[{key!r}]": rank for key, rank in config.rank_pattern.items()})
    for name, value in [("lora_alpha", config.lora_alpha), *config.alpha_pattern.items()]:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"the alpha of {name!r} should be a number but the value passed is {value!r}")
    if config.bias not in ("none", "all", "lora_only"):
        raise NotImplementedError(f"bias={config.bias!r} is not one of 'none', 'all', 'lora_only'")
    if config.target_parameters and (config.lora_dropout or config.fan_in_fan_out or config.lora_bias):
        raise ValueError("`target_parameters` does not work with lora_dropout, fan_in_fan_out or lora_bias.")
    variants = active_variants(config)
    if len(variants) > 1:
        raise ValueError(f"Invalid or unsupported variant combination: {variants}; at most one of them can be used.")
    _check_loftq(config, variants)
    if takes_from_base(config.init_lora_weights) and variants not in ([], ["use_dora"]):
        raise UnsupportedFeatureError(
            f"init_lora_weights={config.init_lora_weights!r} with `{variants[0]}` is not supported."
        )
    if config.target_parameters and variants:
        raise ValueError(f"`target_parameters` does not work with `{variants[0]}`.")
    check_init(config.init_lora_weights)


def loftq_options(config: LoraConfig) -> tuple[int, int]:
    """(bits, rounds) of LoftQ; the config keeps them as they were given."""
    given = config.loftq_config
    options = {**vars(LoftQConfig()), **(given if isinstance(given, dict) else vars(given))}
    return options["loftq_bits"], options["loftq_iter"]


def _check_loftq(config: LoraConfig, variants: list[str]) -> None:
    if config.init_lora_weights != LOFTQ:
        return
    bits, rounds = loftq_options(config)
    if bits not in (4, 8):
        raise ValueError(f"`loftq_config` has loftq_bits={bits!r}: weights are rounded to 4 or to 8 bits")
    if type(rounds) is not int or rounds < 1:
        raise ValueError(f"`loftq_config` has loftq_iter={rounds!r}: it is a number of rounds, at least 1")
    if variants:
        raise UnsupportedFeatureError(f"init_lora_weights='loftq' with `{variants[0]}` is not supported.")


def with_rank(config: LoraConfig, rank: int) -> LoraConfig:
    """A copy of `config` with one rank everywhere and scale 1."""
    return dataclasses.replace(config, r=rank, lora_alpha=rank, rank_pattern={}, alpha_pattern={}, use_rslora=False)
