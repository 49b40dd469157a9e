"""The fields of FRoD's checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from splice.checkpoint.types import PeftType
from splice.methods.targeted import Targeted


@dataclass
class FrodConfig(Targeted):
    """Fields and defaults of the reference, in its order.

    Raises:
        ValueError: `sparse_rate` is not between 0 and 1.
    """

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.FROD
    # Beside a regular expression as `target_modules`, `layers_to_transform` is no error here; it has no effect.
    index_needs_names: ClassVar[bool] = False

    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Seed of the places off the diagonal of the core that are trained.
    projection_prng_key: int = 0
    # Whether a checkpoint holds bases and places; otherwise each load works them out of the base's weights again.
    save_projection: bool = True
    # Probability with which each input is set to zero in training, 0 to 1.
    frod_dropout: float = 0.0
    # Whether the base stores weights as (in, out). No effect: the class of each layer decides, and sets this field.
    fan_in_fan_out: bool = False
    # Biases of the base to train with the adapter: "none", "all", or "frod_only" for those of adapted layers.
    bias: str = "none"
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # Whether an adapter starts as the weights are, so that nothing changes at first; otherwise random numbers are added to
    # all that is trained.
    init_weights: bool = True
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name, or names, of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list
    # on a layer's path, which must lie inside another module.
    layers_pattern: list[str] | str | None = None
    # The share of the core's in^2 numbers that are trained off its diagonal, 0 to 1; at least one of them above 0.
    sparse_rate: float = 0.01
    # What is added to the diagonal of matrices that are inverted for a basis.
    regularization_alpha: float = 1e-3
    # No effect: there is no bar that shows how far a new adapter is.
    progressbar: bool = True
    # No effect: the base's weights stay where they are.
    runtime_offload_base_weight: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparse_rate <= 1:
            raise ValueError(f"`sparse_rate` should be between 0 and 1, got {self.sparse_rate}.")

    def computed(self) -> dict[str, object]:
        if self.save_projection:  # bases and places that a file holds are read from it
            return {"projection_prng_key": None, "regularization_alpha": None}
        return {
            "projection_prng_key": self.projection_prng_key,
            "regularization_alpha": self.regularization_alpha,
        }
