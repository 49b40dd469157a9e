"""OFT: the input of a layer is rotated, block by block, by trained orthogonal matrices.

Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv 2306.07280; on the input's side and with
the truncated series as in "Orthogonal Finetuning Made Scalable", arXiv 2506.19847. `y = base(x R)`, R block-diagonal with
blocks worked out from skew-symmetric Q by the Cayley transform `(I - Q)(I + Q)^-1`, or by a series for its inverse: a
checkpoint belongs to one of the two, as its config says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from splice.base.layers import LayerKind
from splice.config import PeftType
from splice.errors import CheckpointError, PeftWarning, warn
from splice.kinds.layer import AdapterLayer
from splice.kinds.registry import Method, register
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.oft_layers import OFTConv, OFTEmbedding, OFTLayer
from splice.methods.targeted import TargetedConfig


@dataclass
class OFTConfig(TargetedConfig):
    """Fields and defaults of the reference, in its order. `module_dropout` has no effect, there as here.

    Raises:
        ValueError: not exactly one of `r`, the number of blocks, and `oft_block_size` is given.
    """

    method: ClassVar[PeftType] = PeftType.OFT
    index_needs_names: ClassVar[bool] = False

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    target_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    bias: str = "none"
    exclude_modules: list[str] | set[str] | str | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
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
    def check_file(cls, fields: Mapping[str, Any], place: str) -> None:
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


def _check(config: OFTConfig) -> None:
    for name in ("r", "oft_block_size"):
        value = vars(config)[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"`{name}` should be a whole number of at least 0 but the value passed is {value!r}")
    if not isinstance(config.init_weights, bool):
        raise ValueError(f"Unknown initialization init_weights={config.init_weights!r}; it is true or false")


_LAYERS: Mapping[LayerKind, type[AdapterLayer]] = MappingProxyType(
    {LayerKind.LINEAR: OFTLayer, LayerKind.CONV2D: OFTConv, LayerKind.EMBEDDING: OFTEmbedding}
)

METHOD = register(
    Method(
        name=PeftType.OFT,
        config=OFTConfig,
        prefix="oft_",
        tensor_names=frozenset({"oft_R", "oft_embedding_R"}),
        layers=_LAYERS,
        default_targets=LORA_TARGETS,
        outdated_names=MappingProxyType(
            {
                "oft_r": "those of OFT before version 0.16, which turned what comes out of a layer. Train the "
                "adapter again, or merge it with version 0.15 of the library it is from."
            }
        ),
        check=_check,
        paper="arXiv 2306.07280",
    )
)
