"""PEANuT: the update of a weight is what a small trained network makes of the weight.

Zhong et al., "PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers", arXiv 2410.01870, section 3. Each
column of the weight W (out, in) is an input of the network, with phi an activation and s a number: without inner layers
`ΔW = s * B phi(A W)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, cast

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.layers import LayerKind, features
from splice.checkpoint.types import PeftType
from splice.kinds.casting import cast_to
from splice.kinds.container import Several
from splice.kinds.original import original_weight
from splice.kinds.registry import Method, register
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held
from splice.kinds.weight_delta import WeightUpdate
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.targeted import Targeted, check_positive


@dataclass
class PeanutConfig(Targeted):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.PEANUT
    rank_field = "r"
    scale_fields = ("scaling",)

    # The width r of the network, at least 1.
    r: int = 32
    # The number of pairs of inner layers, at least 0: each has one on the way in, whose input is added behind its other one.
    depth: int = 0
    # The activation, by the name that transformers has for it.
    act_fn: str = "relu"
    # The factor of the update.
    scaling: float = 1.0
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Targets to leave out: ends of paths, or a regular expression for whole paths; None for none.
    exclude_modules: list[str] | set[str] | str | None = None
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name, or names, of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list
    # on a layer's path, which must lie inside another module.
    layers_pattern: list[str] | str | None = None
    # Whether B starts at zero, so that nothing changes at first; otherwise it is drawn as the others are.
    init_weights: bool = True

    def computed(self) -> dict[str, object]:
        return {"act_fn": self.act_fn, "scaling": self.scaling}


# Those that torch has are taken from there: for them nobody needs transformers.
_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = MappingProxyType(
    {
        "gelu": F.gelu,
        "leaky_relu": F.leaky_relu,
        "linear": nn.Identity(),
        "mish": F.mish,
        "relu": F.relu,
        "relu6": F.relu6,
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "swish": F.silu,
        "tanh": torch.tanh,
    }
)


def _activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The activation of this name.

    Raises:
        ValueError: there is none.
    """
    if name in _ACTIVATIONS:
        return _ACTIVATIONS[name]
    try:
        from transformers.activations import ACT2FN

        return cast("Callable[[torch.Tensor], torch.Tensor]", ACT2FN[name])
    except ImportError:
        raise ValueError(
            f"`act_fn` {name!r} is none of torch's ({', '.join(_ACTIVATIONS)}): install transformers"
        ) from None
    except KeyError:
        raise ValueError(
            f"Unknown `act_fn` {name!r}: it is the name of an activation in transformers, such as 'relu'"
        ) from None


def _check(config: PeanutConfig) -> None:
    check_positive(r=config.r)
    if not isinstance(config.depth, int) or isinstance(config.depth, bool) or config.depth < 0:
        raise ValueError(f"`depth` should be a whole number of at least 0 but the value passed is {config.depth!r}")
    _activation(config.act_fn)


class PeanutLayer(WeightUpdate):
    """PEANuT on a linear layer. The network is as wide as it is, whatever the number of tokens: it reads the weight."""

    a, b = Held("peanut_A.weight"), Held("peanut_B.weight")
    numbers = MappingProxyType({**WeightUpdate.numbers, "depth": "depth", "res_num": "depth"})

    @classmethod
    def slots(cls, base: nn.Module, config: PeanutConfig, path: str) -> dict[str, Slot]:
        (_, size_out), r = features(base), config.r
        inner = {
            f"peanut_{side}.{index}.weight": Slot((r, r))
            for side in ("encoders", "decoders")
            for index in range(config.depth)
        }
        return {"peanut_A.weight": Slot((r, size_out)), "peanut_B.weight": Slot((size_out, r)), **inner}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: PeanutConfig) -> None:
        for name, tensor in tensors.items():
            if name == "peanut_B.weight" and config.init_weights:
                nn.init.zeros_(tensor)
            else:
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))

    def new_entry(self, container: str) -> nn.Module:
        return Several() if container in ("peanut_encoders", "peanut_decoders") else super().new_entry(container)

    def prepare(self, base: nn.Module, config: PeanutConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.r, self.depth = config.r, config.depth
        self.scale = self.initial_scale = config.scaling
        self.activation = _activation(config.act_fn)

    def _inner(self, side: str) -> Iterator[torch.Tensor]:
        return (self.tensor(f"peanut_{side}.{index}.weight") for index in range(self.depth))

    def network(self, weight: torch.Tensor) -> torch.Tensor:
        """What the network makes of `weight` (out, in) before its last layer, B: (in, r)."""
        hidden = self.activation(F.linear(weight.T.to(self.a.dtype), self.a))  # (in, r)
        before = []
        for matrix in self._inner("encoders"):
            before.append(hidden)
            hidden = self.activation(F.linear(hidden, matrix))
        for matrix in self._inner("decoders"):
            hidden = self.activation(F.linear(hidden, matrix)) + before.pop()
        return hidden

    def update_of(self, weight: torch.Tensor) -> torch.Tensor:
        return self.b @ self.network(weight).T

    def applied(self, x: torch.Tensor) -> torch.Tensor | None:
        # Half of the work for one row, and at any number of rows less, since r is far below the sizes of a layer: the
        # network reads all of the weight, but its output need not be made as large as that.
        hidden = self.network(original_weight(self.base))
        return F.linear(torch.mm(cast_to(x, hidden), hidden), self.b)


METHOD = register(
    Method(
        name=PeftType.PEANUT,
        summary="Adds to a weight what a small trained network makes of that weight.",
        config=PeanutConfig,
        prefix="peanut_",
        tensor_names=frozenset({"peanut_A", "peanut_B", "peanut_encoders", "peanut_decoders"}),
        layers=MappingProxyType({LayerKind.LINEAR: PeanutLayer}),
        containers=("peanut_A", "peanut_B", "peanut_encoders", "peanut_decoders"),
        layer_views=MappingProxyType({"act_fn": lambda layer: layer.config.act_fn}),
        default_targets=LORA_TARGETS,
        check=_check,
        paper="arXiv 2410.01870",
    )
)
