"""The config of OFT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from splice.checkpoint.types import PeftType
from splice.errors import CheckpointError, PeftWarning, warn
from splice.methods.targeted import Targeted


@dataclass
class OFTConfig(Targeted):
    """Fields and defaults of the reference, in its order.

    Raises:
        ValueError: both `r` and `oft_block_size` are given (not 0), or neither is.
    """

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.OFT
    # Beside a regular expression as `target_modules`, `layers_to_transform` is no error here; it has no effect.
    index_needs_names: ClassVar[bool] = False

    # The number of blocks of R; the nearest divisor of the layer's input is taken. 0 where `oft_block_size` is given.
    r: int = 0
    # The side of a block of R; the nearest divisor of the layer's input is taken. 0 where `r` is given.
    oft_block_size: int = 32
    # Probability with which blocks are left out in training. No effect, in the reference as here.
    module_dropout: float = 0.0
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Whether the base stores its weights as (in, out). No effect: OFT cannot be put on such layers.
    fan_in_fan_out: bool = False
    # Biases of the base to train with the adapter: "none", "all", or "oft_only" for those of adapted layers.
    bias: str = "none"
    # Targets to leave out: ends of paths, or a regular expression for whole paths; None for none.
    exclude_modules: list[str] | set[str] | str | None = None
    # Whether R starts as the identity, so that nothing changes at first; otherwise Q is drawn from N(0, 0.01).
    init_weights: bool = True
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name, or names, of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list
    # on a layer's path, which must lie inside another module.
    layers_pattern: list[str] | str | None = None
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # Whether R is kept near the identity (COFT): a Q that is too large is shrunk in place at every call.
    coft: bool = False
    # eps of COFT: the norm of a block's Q is at most eps / sqrt(number of trained blocks).
    eps: float = 6e-5
    # Whether all blocks of a layer are the same one.
    block_share: bool = False
    # Whether R is worked out by a series that is cut off, instead of exactly. The two turn in opposite directions, so a
    # trained adapter belongs to one of them.
    use_cayley_neumann: bool = True
    # The number of terms of that series. 3 computes what 4 does, as every checkpoint with 3 was trained.
    num_cayley_neumann_terms: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r == 0 and self.oft_block_size == 0:
            raise ValueError("Either `r` or `oft_block_size` must be non-zero; both are 0.")
        if self.r != 0 and self.oft_block_size != 0:
            raise ValueError(
                f"You can only specify either r ({self.r}) or oft_block_size ({self.oft_block_size}), but not both: their "
                "product is the size of the input. Set the other one to 0."
            )

    @classmethod
    def check_file(cls, fields: Mapping[str, object], place: str) -> None:
        if "oft_block_size" not in fields:
            raise CheckpointError(
                f"{place} has no 'oft_block_size': the adapter was made before version 0.14, by another formula, and its "
                "tensors mean something else today. Train it again, or merge it with version 0.13 of the library it is from."
            )
        version = str(fields.get("peft_version"))
        found = re.match(r"(\d+)\.(\d+)", version)
        if fields.get("use_cayley_neumann") and (found is None or (int(found[1]), int(found[2])) < (0, 18)):
            warn(
                f"{place}: the adapter was made with version {version} and `use_cayley_neumann`; the series changed "
                "slightly in version 0.18, so the output is not quite what was trained.",
                PeftWarning,
            )

    def computed(self) -> dict[str, object]:
        terms = self.num_cayley_neumann_terms if self.use_cayley_neumann else None
        return {
            "use_cayley_neumann": self.use_cayley_neumann,
            "num_cayley_neumann_terms": terms,
            "coft": self.coft,
            "eps": self.eps if self.coft else None,
        }


def check(config: OFTConfig) -> None:
    """Raise on values that no adapter can be made with.

    Raises:
        ValueError: there is one.
    """
    for name, value in (("r", config.r), ("oft_block_size", config.oft_block_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"`{name}` should be a whole number of at least 0 but the value passed is {value!r}")
    if not isinstance(config.init_weights, bool):
        raise ValueError(f"Unknown initialization init_weights={config.init_weights!r}; it is true or false")
