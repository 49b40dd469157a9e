"""FourierFT: the update of a weight is the inverse Fourier transform of a few trained coefficients.

Gao et al., "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", arXiv 2405.03003, section 3. With D (out, in)
zero but for n coefficients: `y = base(x) + s * Re(ifft2(D)) x`. Where the coefficients stand is no part of the checkpoint:
it follows from the seed in the config and the shape of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn

from splice.base.layers import LayerKind, kind_of
from splice.base.weight_access import weight_shape
from splice.checkpoint.types import PeftType
from splice.kinds.casting import cast_to
from splice.kinds.matching import value_behind_dot
from splice.kinds.registry import Method, register
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held
from splice.methods.coefficients import Coefficients, check_count, locations
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.targeted import Targeted, check_positive


@dataclass
class FourierFTConfig(Targeted):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.FOURIERFT
    scale_fields = ("scaling",)
    pattern_fields = MappingProxyType({"n_frequency_pattern": "n_frequency"})

    # n, the number of trained coefficients of each layer: at least 1, at most the number of values in its weight.
    n_frequency: int = 1000
    # alpha, the factor of the update.
    scaling: float = 150.0
    # Seed of the places at which the coefficients stand. None is refused: nobody could load the adapter.
    random_loc_seed: int | None = 777
    # Whether the base stores weights as (in, out). No effect: the class of each layer decides, and sets this field.
    fan_in_fan_out: bool = False
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Targets to leave out: ends of paths, or a regular expression for whole paths; None for none.
    exclude_modules: list[str] | set[str] | str | None = None
    # Biases of the base to train with the adapter: "none", "all", or "fourier_only" for those of adapted layers.
    bias: str = "none"
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name, or names, of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list
    # on a layer's path, which must lie inside another module.
    layers_pattern: list[str] | str | None = None
    # n of single layers: a whole path, or a regular expression for what stands behind one of its dots -> n.
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)
    # Whether the coefficients start at zero, so that nothing changes at first; by default they are drawn from N(0, 1).
    init_weights: bool = False

    def computed(self) -> dict[str, object]:
        return {"scaling": self.scaling, "random_loc_seed": self.random_loc_seed}


def _check(config: FourierFTConfig) -> None:
    check_positive(n_frequency=config.n_frequency, **config.n_frequency_pattern)
    if config.random_loc_seed is None:
        raise ValueError(
            "`random_loc_seed` is null: where the coefficients stand would be known to nobody who loads the adapter."
        )


class FourierFTLayer(Coefficients):
    """FourierFT on a linear layer, stored either way round."""

    fourierft_spectrum = Held()

    @classmethod
    def slots(cls, base: nn.Module, config: FourierFTConfig, path: str) -> dict[str, Slot]:
        count = value_behind_dot(config.n_frequency_pattern, path, config.n_frequency)
        check_count(count, "n_frequency", weight_shape(base), path)
        return {"fourierft_spectrum": Slot((count,))}

    @classmethod
    def resolved(cls, base: nn.Module, config: FourierFTConfig) -> dict[str, object]:
        return {"fan_in_fan_out": kind_of(base) is LayerKind.TRANSPOSED_LINEAR}

    def prepare(self, base: nn.Module, config: FourierFTConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.spectrum_scale = config.scaling
        assert config.random_loc_seed is not None
        rows, columns = self.shape
        self.fixed = (locations(rows * columns, len(self.fourierft_spectrum), config.random_loc_seed),)

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: FourierFTConfig) -> None:
        (nn.init.zeros_ if config.init_weights else nn.init.normal_)(tensors["fourierft_spectrum"])

    def applied(self, x: torch.Tensor) -> torch.Tensor | None:
        spectrum, (size_out, size_in) = self.fourierft_spectrum, self.shape
        # A transform of each row and of its output, and n products between them. For one row that is 50 times faster than
        # the transform of the whole matrix on a layer of 512 features, and 600 times on one of 2048; from about here on
        # that costs less. No rows are nothing that torch transforms.
        if not 0 < len(x) * len(spectrum) <= size_out * size_in:
            return None
        (places,) = self.fixed_on(spectrum.device)
        seen = torch.fft.ifft(cast_to(x, spectrum).float()).index_select(1, places % size_in) * spectrum.float()
        mixed = seen.new_zeros(len(x), size_out).index_add(1, places // size_in, seen)
        outputs: torch.Tensor = torch.fft.ifft(mixed).real * self.spectrum_scale
        return outputs.to(spectrum.dtype)

    def update(self) -> torch.Tensor:
        spectrum = self.fourierft_spectrum
        (places,) = self.fixed_on(spectrum.device)
        rows, columns = self.shape
        dense = spectrum.new_zeros(rows * columns, dtype=torch.float32)
        dense = dense.scatter(0, places, spectrum.float()).view(rows, columns)
        # Scaled before it is rounded: without the scale it would vanish in half precision.
        update: torch.Tensor = torch.fft.ifft2(dense).real * self.spectrum_scale
        return update.to(spectrum.dtype)


def _indices(layer: FourierFTLayer) -> torch.Tensor:
    """(2, n): row and column of each coefficient."""
    (places,), columns = layer.fixed, layer.shape[1]
    return torch.stack((places // columns, places % columns))


METHOD = register(
    Method(
        name=PeftType.FOURIERFT,
        summary="Adds to a weight the inverse Fourier transform of a few trained coefficients.",
        config=FourierFTConfig,
        prefix="fourierft_",
        tensor_names=frozenset({"fourierft_spectrum"}),
        layers=MappingProxyType({LayerKind.LINEAR: FourierFTLayer, LayerKind.TRANSPOSED_LINEAR: FourierFTLayer}),
        layer_views=MappingProxyType(
            {
                "fourierft_n_frequency": lambda layer: len(layer.fourierft_spectrum),
                "fourierft_scaling": lambda layer: layer.spectrum_scale,
                "fourierft_random_loc_seed": lambda layer: layer.config.random_loc_seed,
                "indices": _indices,
            }
        ),
        default_targets=MappingProxyType({**LORA_TARGETS, "gpt2": ["mlp.c_proj"], "gpt_bigcode": ["mlp.c_proj"]}),
        check=_check,
        names=MappingProxyType({"FourierFTLinear": FourierFTLayer}),
        paper="arXiv 2405.03003",
    )
)
