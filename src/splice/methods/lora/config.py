"""The config of LoRA and its relatives, and what is refused of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from splice.checkpoint.types import PeftType, TaskType
from splice.config import PeftConfig, TargetRule
from splice.errors import UnsupportedFeatureError, warn
from splice.methods.lora.inits import LOFTQ, check_init, takes_from_base
from splice.methods.lora.subconfigs import SUBCONFIGS, CordaConfig, EvaConfig, LoftQConfig, parsed

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
    """Options that live in memory only."""

    ephemeral_gpu_offload: bool = False


@dataclass
class LoraConfig(PeftConfig):
    """Fields and defaults of the reference, in its order.

    Raises:
        ValueError: fields contradict each other.
        TypeError: `target_parameters` is a string, or a config inside this one is neither a config nor a dict.
    """

    method: ClassVar[PeftType] = PeftType.LORA
    # Of the merged-linear LoRA of 2023; the first says nothing about the adapter.
    legacy_fields = frozenset({"merge_weights", "enable_lora"})
    pattern_fields = MappingProxyType({"rank_pattern": "r", "alpha_pattern": "lora_alpha"})

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
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.target_parameters, str):
            raise TypeError("`target_parameters` is a list of names, got a string")
        for name in SUBCONFIGS:
            setattr(self, name, parsed(name, getattr(self, name)))
        if isinstance(self.loftq_config, LoftQConfig):
            self.loftq_config = dataclasses.asdict(self.loftq_config)
        _check_fields_agree(self)
        _complete_init(self)

    def layer_ranges(self) -> list[list[int]] | None:
        return self.layer_replication or None

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
        warn("`loftq_config` is given but `init_lora_weights` is not 'loftq'; it is ignored.")
        config.loftq_config = {}


def _complete_init(config: LoraConfig) -> None:
    """Give an initialisation the config it lacks, and say what is ignored."""
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
VARIANTS = ("use_dora", "alora_invocation_tokens", "use_bdlora", "kasa_config", "velora_config", "monteclora_config")
# Fields that change the output when they are set, and that nothing here honours yet. Not among them are those about layers
# that no base can have here: Megatron's own (`megatron_config`) and GPTQ's (`use_qalora`) are refused as layers.
NOT_HONOURED = ("arrow_config",)


def active_variants(config: LoraConfig) -> list[str]:
    """The fields of `VARIANTS` that are set."""
    return [name for name in VARIANTS if getattr(config, name) not in (None, False, [])]


def check(config: LoraConfig) -> None:
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
    asked = {name: getattr(config, name) for name in NOT_HONOURED if getattr(config, name) not in (None, False, [])}
    check_init(config.init_lora_weights)
    if asked:
        raise UnsupportedFeatureError(
            f"this LoRA asks for {asked}, which changes what the adapter computes and is not supported yet. "
            "It is refused rather than loaded as plain LoRA."
        )


def loftq_options(config: LoraConfig) -> tuple[Any, Any]:
    """(bits, rounds) of LoftQ; the config keeps them as they were given."""
    bits, rounds = (config.loftq_config.get(f.name, f.default) for f in dataclasses.fields(LoftQConfig))
    return bits, rounds


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


def with_rank(config: LoraConfig, rank: int, **changes: Any) -> LoraConfig:
    """A copy of `config` with one rank everywhere and scale 1."""
    return dataclasses.replace(
        config, r=rank, lora_alpha=rank, rank_pattern={}, alpha_pattern={}, use_rslora=False, **changes
    )
