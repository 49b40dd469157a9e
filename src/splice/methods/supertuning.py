"""Super-Tuning: the largest entries of each weight are trained, or the smallest; Supra trains a LoRA beside them.

arXiv 2607.09287. With S (out, in) zero but for the k trained entries at the places of the weight's k largest:
`y = base(x) + S x`, and with a rank r `+ alpha / r * B A x`. A checkpoint holds the places, unless its config says otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.layers import LayerKind, features
from splice.base.weight_access import is_plain
from splice.checkpoint.types import PeftType
from splice.errors import UnsupportedLayerError, warn
from splice.kinds.casting import cast_to
from splice.kinds.dropout import dropout_of
from splice.kinds.effect import Forward
from splice.kinds.original import original_weight
from splice.kinds.registry import Method, register
from splice.kinds.scale import add_scaled
from splice.kinds.slot import Role, Slot
from splice.kinds.sparse import Entries, SparseUpdate
from splice.kinds.tensors import Held
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.targeted import Targeted


@dataclass
class SupertuningConfig(Targeted):
    """Fields and defaults of the reference, in its order.

    Raises:
        ValueError: a number is outside of its range, or `lora_alpha` is given without `r`.
    """

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.SUPERTUNING
    rank_field = "r"

    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # Which part of each weight's entries is not trained, from 0 to below 1.
    sparsity: float = 0.99
    # Whether the entries of the largest magnitude are trained; otherwise those of the smallest.
    select_top: bool = True
    # Rank r of the LoRA beside the entries, at least 1; None for no LoRA.
    r: int | None = None
    # alpha, the numerator of LoRA's scale alpha / r; None for 2 r.
    lora_alpha: float | None = None
    # Probability with which each input of LoRA is set to zero in training, from 0 to below 1.
    lora_dropout: float = 0.0
    # Whether entries and B start at zero, so that nothing changes at first; otherwise the entries are drawn from N(0, 1), and
    # B as A is.
    init_weights: bool = True
    # Whether a checkpoint holds the places of the entries; otherwise each load works them out again of the base's weight.
    save_precomputed_indices: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0.0, 1.0), got {self.sparsity}")
        if self.r is not None and (not isinstance(self.r, int) or self.r <= 0):
            raise ValueError(f"r must be a positive integer or None, got {self.r}")
        if self.r is None and self.lora_alpha is not None:
            raise ValueError("lora_alpha is set but r is None: it is the scale of LoRA, which needs a rank `r`.")
        if self.r is not None and self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0.0, 1.0), got {self.lora_dropout}")
        if not (self.save_precomputed_indices or self.inference_mode):
            warn(
                "save_precomputed_indices=False: which entries the adapter trains will be worked out of the base's weights "
                "again, at each load. That is right on the very base it was trained on alone, in the same precision."
            )

    def computed(self) -> dict[str, object]:
        return {"lora_alpha": self.lora_alpha, "select_top": None if self.save_precomputed_indices else self.select_top}


def _largest(weight: torch.Tensor, count: int, select_top: bool) -> torch.Tensor:
    """(k): flat places of the entries of `weight` with the largest magnitudes, the largest first; or the smallest."""
    # On the weight's device and in its dtype: among equal ones, of which there are many in bfloat16, these decide.
    return weight.abs().flatten().topk(count, largest=select_top).indices


class SupertuningLayer(SparseUpdate):
    """Super-Tuning on a linear layer."""

    supertuning_values, supertuning_indices = Held(), Held()
    numbers = MappingProxyType({"supertuning_rank": "r", "supertuning_lora_alpha": "alpha"})
    starts_from_weight = True

    @classmethod
    def slots(cls, base: nn.Module, config: SupertuningConfig, path: str) -> dict[str, Slot]:
        size_in, size_out = features(base)
        size = size_in * size_out
        count = int(size * (1 - config.sparsity))
        if count < 1 or size >= 2**31:
            reason = "leaves none to train" if count < 1 else "is one of too many: their places are stored as int32"
            raise ValueError(
                f"{path}: of the {size} entries of its weight sparsity={config.sparsity} {reason}. "
                f"{'Lower it, or leave' if count < 1 else 'Leave'} the layer out of the targets."
            )
        found = {"supertuning_values": Slot((count,))}
        if config.save_precomputed_indices:
            found["supertuning_indices"] = Slot((count,), Role.BUFFER, dtype=torch.int32, choices=(size,))
        elif not is_plain(base):
            raise UnsupportedLayerError(
                f"{path}: the weight is quantised, and the checkpoint does not say which entries the adapter trains: of "
                "another weight than it was trained on they are others. Load the base as it was, or train with "
                "`save_precomputed_indices=True`."
            )
        if config.r is not None:
            found["supertuning_lora_A.weight"] = Slot((config.r, size_in))
            found["supertuning_lora_B.weight"] = Slot((size_out, config.r))
        return found

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: SupertuningConfig) -> None:
        (nn.init.zeros_ if config.init_weights else nn.init.normal_)(tensors["supertuning_values"])
        if config.r is not None:
            a, b = tensors["supertuning_lora_A.weight"], tensors["supertuning_lora_B.weight"]
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            nn.init.zeros_(b) if config.init_weights else nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        weight, places = original_weight(base), tensors.get("supertuning_indices")
        if places is not None and not weight.is_meta:
            places.copy_(_largest(weight, len(places), config.select_top))

    def prepare(self, base: nn.Module, config: SupertuningConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.dropout = config.lora_dropout
        self.r, self.alpha = config.r or 0, config.lora_alpha or 0.0
        if "supertuning_indices" not in self.registered:
            self._choose()

    def _choose(self) -> torch.Tensor:
        """Work out which entries are trained, (k), and keep them; without values where the weight has none yet."""
        chosen = _largest(original_weight(self.base), len(self.supertuning_values), self.config.select_top).int()
        self.keep("supertuning_indices", chosen)
        return chosen

    def changes(self) -> Entries:
        values, places = self.supertuning_values, self.supertuning_indices
        if places.is_meta and not values.is_meta:
            places = self._choose()
        size_in = self.shape[1]
        return Entries(values, places // size_in, places % size_in)

    def factors_now(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A (r, in) and B (out, r) of the LoRA beside the entries; None where there is none."""
        a, b = self.find("supertuning_lora_A.weight"), self.find("supertuning_lora_B.weight")
        return None if a is None or b is None else (a, b)

    def around(self, x: torch.Tensor, inner: Forward) -> torch.Tensor:
        y: torch.Tensor = inner(x)
        out, factors = add_scaled(y, self.delta(self.cast_input(x)), self.scale), self.factors_now()
        if factors is not None:  # of whose input alone a part is dropped
            a, b = factors
            h = F.dropout(cast_to(x, a), self.dropout, self.training)
            out = add_scaled(out, F.linear(F.linear(h, a), b), self.alpha / self.r)
        return out if out.dtype is y.dtype else out.to(y.dtype)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor:
        update, factors = self.scale * self.update(), self.factors_now()
        return update if factors is None else update + self.alpha / self.r * (factors[1] @ factors[0])


def _dropout(layer: SupertuningLayer) -> nn.Module | None:
    return dropout_of(layer) if layer.r else None


METHOD = register(
    Method(
        name=PeftType.SUPERTUNING,
        summary="Trains the largest entries of each weight, one in a hundred by default, and a LoRA beside them if asked.",
        config=SupertuningConfig,
        prefix="supertuning_",
        tensor_names=frozenset(f"supertuning_{what}" for what in ("values", "indices", "lora_A", "lora_B")),
        layers=MappingProxyType({LayerKind.LINEAR: SupertuningLayer}),
        containers=tuple(f"supertuning_{what}" for what in ("values", "lora_A", "lora_B")),
        layer_views=MappingProxyType({"supertuning_lora_dropout": _dropout}),
        default_targets=LORA_TARGETS,
        paper="arXiv 2607.09287",
    )
)
