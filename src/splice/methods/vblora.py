"""VB-LoRA: LoRA whose factors are put together of vectors from one bank that all layers share.

Li et al., "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", arXiv 2405.15179, section 3. Each piece of a
factor, of L numbers, is a mixture of k of the bank's n vectors: those with the largest of n trained logits, weighted by the
softmax of these k. A checkpoint holds the logits, or of each n of them which are the k largest, and their weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.layers import LayerKind, features, kind_of
from splice.checkpoint.types import PeftType
from splice.errors import AdapterMismatchError
from splice.kinds.additive import Additive
from splice.kinds.casting import cast_to
from splice.kinds.dropout import dropout_of
from splice.kinds.file_form import FileForm, Stored
from splice.kinds.registry import Method, register
from splice.kinds.shared import SHARED_PATH, SharedTensors
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held
from splice.methods.default_targets import ADALORA_TARGETS
from splice.methods.targeted import Targeted, check_positive


@dataclass
class VBLoRAConfig(Targeted):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.VBLORA
    rank_field = "r"
    # Beside a regular expression as `target_modules`, `layers_to_transform` is no error here; it has no effect.
    index_needs_names: ClassVar[bool] = False

    # Rank r of the factors, at least 1.
    r: int = 4
    # n, the number of vectors in the bank.
    num_vectors: int = 256
    # L, the number of elements of a vector; the sizes of every target must be multiples of it.
    vector_length: int = 256
    # k, how many vectors a piece is mixed of, at least 1 and at most n.
    topk: int = 2
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Targets to leave out: ends of paths, or a regular expression for whole paths; None for none.
    exclude_modules: list[str] | set[str] | str | None = None
    # Whether a checkpoint holds of the logits no more than inference needs: it is much smaller, and training cannot go on
    # from it.
    save_only_topk_weights: bool = False
    # Probability with which each input of A is set to zero in training, 0 to 1.
    vblora_dropout: float = 0.0
    # Whether the base stores weights as (in, out). No effect: the class of each layer decides, and sets this field.
    fan_in_fan_out: bool = False
    # Biases of the base to train with the adapter: "none", "all", or "vblora_only" for those of adapted layers.
    bias: str = "none"
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # The bank starts with numbers between this, negative, and this.
    init_vector_bank_bound: float = 0.02
    # The logits start with numbers drawn from a normal distribution around 0 with this standard deviation.
    init_logits_std: float = 0.1
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name, or names, of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list
    # on a layer's path, which must lie inside another module.
    layers_pattern: list[str] | str | None = None

    def computed(self) -> dict[str, object]:
        return {"topk": self.topk}


def _groups(targets: Sequence[tuple[str, nn.Module]], config: VBLoRAConfig) -> Mapping[str, Mapping[str, str]]:
    return {path: {"vblora_vector_bank": SHARED_PATH} for path, _ in targets}


def _check(config: VBLoRAConfig) -> None:
    fields = ("r", "num_vectors", "vector_length", "topk")
    check_positive(**{name: value for name, value in vars(config).items() if name in fields})
    if config.topk > config.num_vectors:
        raise ValueError(f"`topk` is {config.topk}, and the bank has `num_vectors` = {config.num_vectors}: lower it.")


class VBLoRABank(SharedTensors):
    """The bank, (n, L)."""

    vblora_vector_bank = Held()

    @classmethod
    def shared_slots(cls, targets: Sequence[tuple[str, nn.Module]], config: VBLoRAConfig) -> dict[str, Slot]:
        return {"vblora_vector_bank": Slot((config.num_vectors, config.vector_length))}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: VBLoRAConfig) -> None:
        bound = config.init_vector_bank_bound
        nn.init.uniform_(tensors["vblora_vector_bank"], -bound, bound)


def _index_dtype(count: int) -> torch.dtype:
    """The smallest dtype for indices below `count`, as the reference chooses it."""
    if count < 2**8:
        return torch.uint8
    return torch.int16 if count < 2**15 else torch.int32 if count < 2**31 else torch.int64


class Largest(FileForm):
    """Of the logits the k largest: which they are, and all of their weights but one, since weights add up to 1."""

    converts = True

    def slots(self, slots: Mapping[str, Slot], config: VBLoRAConfig) -> Mapping[str, Slot]:
        found = {}
        for suffix, slot in slots.items():
            if not slot.stored:
                found[suffix] = slot
                continue
            *pieces, count = slot.shape
            found[f"{suffix}_topk_indices"] = Slot((*pieces, config.topk), dtype=_index_dtype(count))
            found[f"{suffix}_topk_weights"] = Slot((*pieces, config.topk - 1))
        return found

    def to_file(self, layer: Stored, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        assert isinstance(layer, VBLoRA)
        for suffix, tensor in tensors.items():
            if not suffix.startswith("vblora_logits"):
                yield suffix, tensor
                continue
            largest, indices = tensor.detach().topk(layer.topk, dim=-1)
            yield f"{suffix}_topk_indices", indices.to(_index_dtype(tensor.shape[-1]))
            yield f"{suffix}_topk_weights", largest.softmax(dim=-1)[..., :-1].contiguous()

    def from_file(self, tensors: Mapping[str, torch.Tensor], slots: Mapping[str, Slot]) -> dict[str, torch.Tensor]:
        found = {suffix: tensor for suffix, tensor in tensors.items() if "_topk_" not in suffix}
        for suffix, slot in slots.items():
            indices, weights = (tensors.get(f"{suffix}_topk_{part}") for part in ("indices", "weights"))
            if indices is None or weights is None:
                continue
            count = slot.shape[-1]
            if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < count:
                raise AdapterMismatchError(
                    f"{suffix}_topk_indices holds indices up to {int(indices.max())}, and the bank has {count} vectors "
                    "(`num_vectors`): the config or the checkpoint is damaged. The model is unchanged."
                )
            # At least 0: rounded weights may add up to more than 1, and the logarithm of what is left would be no number.
            last = (1 - weights.sum(-1, keepdim=True)).clamp_min(0)
            logits = weights.new_full(slot.shape, -torch.inf)
            found[suffix] = logits.scatter_(-1, indices.long(), torch.cat((weights, last), dim=-1).log())
        return found


class VBLoRA(Additive):
    """VB-LoRA on a linear layer, stored either way round."""

    numbers = MappingProxyType({"r": "r", "topk": "topk"})
    vblora_logits_A, vblora_logits_B, vblora_vector_bank = Held(), Held(), Held()

    @classmethod
    def slots(cls, base: nn.Module, config: VBLoRAConfig, path: str) -> dict[str, Slot]:
        (size_in, size_out), length = features(base), config.vector_length
        for name, size in (("in", size_in), ("out", size_out)):
            if size % length:
                raise ValueError(
                    f"{path}: `{name}_features` {size} must be divisible by `vector_length` {length}. Leave the layer "
                    "out of the targets, or choose another length."
                )
        r, count = config.r, config.num_vectors
        return {
            "vblora_logits_A": Slot((r, size_in // length, count)),
            "vblora_logits_B": Slot((size_out // length, r, count)),
            # That of all layers: each has it among its own, so that flags and optimizers find it there, and none writes it.
            "vblora_vector_bank": Slot((count, length), stored=False),
        }

    @classmethod
    def resolved(cls, base: nn.Module, config: VBLoRAConfig) -> dict[str, object]:
        return {"fan_in_fan_out": kind_of(base) is LayerKind.TRANSPOSED_LINEAR}

    def prepare(self, base: nn.Module, config: VBLoRAConfig, path: str) -> None:
        self.r, self.topk = config.r, config.topk
        self.dropout = config.vblora_dropout

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: VBLoRAConfig) -> None:
        for suffix in ("vblora_logits_A", "vblora_logits_B"):
            nn.init.normal_(tensors[suffix], 0, config.init_logits_std)

    def _mixed(self, logits: torch.Tensor) -> torch.Tensor:
        """(..., L) for logits (..., n)."""
        largest, indices = logits.topk(self.topk, dim=-1)
        vectors = F.embedding(indices, self.vblora_vector_bank.to(logits))
        return (largest.softmax(dim=-1).unsqueeze(-1) * vectors).sum(-2)

    def factors_now(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and B (out, r)."""
        logits_a, logits_b = self.vblora_logits_A, self.vblora_logits_B
        if self.training and torch.is_grad_enabled() and bool(logits_a[0, 0].isinf().any()):
            raise RuntimeError(
                "The adapter was saved with `save_only_topk_weights`: of its logits only the largest are there, so training "
                "cannot go on from it. Train from a checkpoint that was saved without."
            )
        return self._mixed(logits_a).flatten(1), self._mixed(logits_b).transpose(1, 2).flatten(0, 1)

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return cast_to(x, self.vblora_logits_A)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.factors_now()
        return F.linear(F.linear(x, a), b)

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor:
        a, b = self.factors_now()
        return b @ a


class VBLoRALayer(VBLoRA):
    """The same, with all logits in a checkpoint."""


class VBLoRALargest(VBLoRA):
    """The same, with the largest logits alone in a checkpoint."""

    file_form = Largest()


def _variant(config: VBLoRAConfig, kind: LayerKind, base: nn.Module | None) -> type[VBLoRALargest] | None:
    return VARIANTS[True] if config.save_only_topk_weights else None


# Whether a checkpoint holds the largest logits alone -> the layer.
VARIANTS = {True: VBLoRALargest}

METHOD = register(
    Method(
        name=PeftType.VBLORA,
        summary="Adds LoRA's update, with factors that are put together of vectors from one bank for all layers.",
        config=VBLoRAConfig,
        prefix="vblora_",
        tensor_names=frozenset(
            {
                *("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank"),
                *(f"vblora_logits_{x}_topk_{part}" for x in "AB" for part in ("indices", "weights")),
            }
        ),
        layers=MappingProxyType({LayerKind.LINEAR: VBLoRALayer, LayerKind.TRANSPOSED_LINEAR: VBLoRALayer}),
        variant=_variant,
        shared=VBLoRABank,
        groups=_groups,
        layer_views=MappingProxyType({"vblora_dropout": dropout_of}),
        default_targets=MappingProxyType({**ADALORA_TARGETS, "roberta": ["query", "value"]}),
        check=_check,
        paper="arXiv 2405.15179",
    )
)
