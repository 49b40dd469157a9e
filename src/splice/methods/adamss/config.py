"""The config of AdaMSS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from splice.checkpoint.types import PeftType
from splice.methods.targeted import Targeted, check_positive


@dataclass
class AdamssConfig(Targeted):
    """Fields and defaults of the reference, in its order.

    Raises:
        ValueError: a field has none of its values, or the schedule is empty.
    """

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.ADAMSS
    # Beside a regular expression as `target_modules`, `layers_to_transform` is no error here; it has no effect.
    index_needs_names: ClassVar[bool] = False

    # R, the number of singular directions of a weight that updates are made in; at most the weight has.
    r: int = 100
    # K, the number of groups of similar rows that a weight is split into; at most its number of rows.
    num_subspaces: int = 5
    # The rank of the update of each group of rows; at most its number of rows.
    subspace_rank: int = 1
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # "orthogonal": B starts at zero, so that nothing changes at first. None or false: it is drawn from N(0, 1e-4).
    init_weights: Literal["orthogonal"] | None = "orthogonal"
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name, or names, of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list
    # on a layer's path, which must lie inside another module.
    layers_pattern: list[str] | str | None = None
    # Whether groups of rows are given up while training where they matter least; a training loop calls
    # `update_and_allocate` after each step.
    use_asa: bool = False
    # The number of groups in the whole model that are trained at the end.
    asa_target_subspaces: int = 50
    # The step from which groups are given up.
    init_warmup: int = 50
    # The last step at which they are.
    final_warmup: int = 1000
    # The number of steps from one time to the next.
    mask_interval: int = 100
    # How much of the running mean of an importance each step keeps.
    asa_importance_beta: float = 0.85
    # The same for the mean of how much that importance varies.
    asa_uncertainty_beta: float = 0.85
    # The power by which the number of groups falls.
    asa_schedule_exponent: float = 3.0
    # Whether the rank of a group's update is less where its rows have fewer directions that count.
    use_dynamic_rank: bool = False
    # Which directions count then: those whose share of the largest is more than this.
    svd_threshold: float = 0.1
    # Seed of the decomposition that the groups follow from.
    random_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights is False:  # type: ignore[comparison-overlap]
            self.init_weights = None
        if self.init_weights not in ("orthogonal", None):
            raise ValueError(f"init_weights must be 'orthogonal' or None, got {self.init_weights}")
        if not self.use_asa:
            return
        check_positive(mask_interval=self.mask_interval, asa_target_subspaces=self.asa_target_subspaces)
        if self.init_warmup >= self.final_warmup:
            raise ValueError(
                f"`init_warmup` ({self.init_warmup}) must be smaller than `final_warmup` ({self.final_warmup}) with "
                "`use_asa`: between them groups are given up"
            )
        if self.asa_schedule_exponent <= 0:
            raise ValueError(
                f"`asa_schedule_exponent` must be positive with `use_asa`, got {self.asa_schedule_exponent}"
            )

    def computed(self) -> dict[str, object]:
        return {"random_seed": self.random_seed}


def check(config: AdamssConfig) -> None:
    """Raise ValueError for numbers below 1."""
    check_positive(r=config.r, num_subspaces=config.num_subspaces, subspace_rank=config.subspace_rank)
