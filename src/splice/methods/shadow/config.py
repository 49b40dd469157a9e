"""The config of SHADOW adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from splice.checkpoint.types import PeftType
from splice.methods.targeted import Targeted, check_positive

# `shadow_model` of a shadow network that is built like the base.
MIRROR = "mirror"
_SIZES = (
    "shadow_num_hidden_layers",
    "shadow_hidden_size",
    "shadow_num_attention_heads",
    "shadow_intermediate_size",
)


@dataclass
class ShadowConfig(Targeted):
    """Fields and defaults of the reference, in its order.

    Raises:
        ValueError: fields contradict each other.
    """

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.SHADOW

    # Blocks to adapt, one behind the other: ends of paths, or a regular expression for whole paths. None for all blocks.
    target_modules: list[str] | str | None = None
    # Those of them to leave out.
    exclude_modules: list[str] | str | None = None
    # Rank of what is added to the input of a block.
    r: int = 8
    # What that is multiplied with; it is not divided by the rank.
    shadow_alpha: float = 0.1
    # Probability with which a feature of the difference between the two states is dropped in training, 0 to 1.
    shadow_dropout: float = 0.2
    # Whether a new adapter changes nothing; otherwise its up projections are drawn as torch draws linear layers.
    init_weights: bool = True
    # The shadow network: "mirror" for a small one of the base's own class, else a folder or Hub id of a pretrained one.
    shadow_model: str = MIRROR
    # Layers of a mirror; None for one.
    shadow_num_hidden_layers: int | None = None
    # Width of a mirror; None for the base's.
    shadow_hidden_size: int | None = None
    # Attention heads of a mirror; None for as many as the base has.
    shadow_num_attention_heads: int | None = None
    # Width of the feed-forward layers of a mirror; None for the base's.
    shadow_intermediate_size: int | None = None
    # Whether a mirror as wide as the base reads the base's embedded tokens; otherwise it has embeddings of its own.
    share_embeddings: bool = True
    # Width of the two small networks that update the state behind each block; None for `r`.
    update_hidden_size: int | None = None
    # How much of the shadow network's own loss is added to that of the model; nothing below or at 0.
    auxiliary_loss_weight: float = 0.05
    # Indices of blocks; of no use, as the paths of blocks end in theirs.
    layers_to_transform: list[int] | int | None = None
    # The lists of blocks that these count in.
    layers_pattern: list[str] | str | None = None
    # Modules to train whole.
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in _SIZES if vars(self)[name] is not None]
        if given and self.shadow_model != MIRROR:
            raise ValueError(
                f"{', '.join(f'`{name}`' for name in given)}: sizes of a shadow network can be chosen for a mirror alone, "
                f"and `shadow_model` is {self.shadow_model!r}. Leave them out, or set `shadow_model='{MIRROR}'`."
            )

    def computed(self) -> dict[str, object]:
        names = ("shadow_alpha", "shadow_model", "shadow_num_attention_heads", "share_embeddings")
        return {name: value for name, value in vars(self).items() if name in names}


def check(config: ShadowConfig) -> None:
    """Raise ValueError for a config that no block can be adapted with."""
    check_positive(r=config.r, **{name: size for name in _SIZES if (size := getattr(config, name)) is not None})
    if not 0 <= config.shadow_dropout <= 1:
        raise ValueError(f"`shadow_dropout` is a probability, 0 to 1, and got {config.shadow_dropout}")
