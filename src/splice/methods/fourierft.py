"""FourierFT: the update of a weight is the inverse Fourier transform of a few trained coefficients.

Gao et al., "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", arXiv 2405.03003, section 3. With D (out, in)
zero but for n coefficients: `y = base(x) + s * Re(ifft2(D)) x`. Where the coefficients stand is no part of the checkpoint:
it follows from the seed in the config and the shape of the weight.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn

from splice.base.layers import LayerKind, features, kind_of
from splice.checkpoint.types import PeftType
from splice.kinds.registry import Method, register
from splice.kinds.weight_delta import WeightDelta
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.targeted import TargetedConfig, check_positive


@dataclass
class FourierFTConfig(TargetedConfig):
    """Fields and defaults of the reference, in its order."""

    method: ClassVar[PeftType] = PeftType.FOURIERFT
    pattern_fields = MappingProxyType({"n_frequency_pattern": "n_frequency"})

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int | None = 777
    fan_in_fan_out: bool = False
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool = False


def _check(config: FourierFTConfig) -> None:
    check_positive(n_frequency=config.n_frequency, **config.n_frequency_pattern)
    if config.random_loc_seed is None:
        raise ValueError(
            "`random_loc_seed` is null: where the coefficients stand would be known to nobody who loads the adapter."
        )


@lru_cache(maxsize=256)
def _locations(size: int, count: int, seed: int) -> torch.Tensor:
    """Flat indices of the coefficients, in their order. A draw goes through all of the weight: it is made once."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].clone()


class FourierFTLayer(WeightDelta):
    """FourierFT on a linear layer, stored either way round."""

    fourierft_spectrum: nn.Parameter

    @classmethod
    def slots(cls, base: nn.Module, config: FourierFTConfig, path: str) -> dict[str, tuple[int, ...]]:
        # Not `value_for`: here the reference takes a key that matches the whole path as it stands.
        patterns = config.n_frequency_pattern
        key = next((k for k in patterns if re.match(rf".*\.{k}$", path)), path)
        count, (size_in, size_out) = patterns.get(key, config.n_frequency), features(base)
        if count > size_in * size_out:
            raise ValueError(
                f"{path}: `n_frequency` is {count}, and the weight has {size_out} x {size_in} = {size_out * size_in} places. "
                "Lower it, or give this layer its own with `n_frequency_pattern`."
            )
        return {"fourierft_spectrum": (count,)}

    @classmethod
    def resolved(cls, base: nn.Module, config: FourierFTConfig) -> dict[str, Any]:
        return {"fan_in_fan_out": kind_of(base) is LayerKind.TRANSPOSED_LINEAR}

    def prepare(self, base: nn.Module, config: FourierFTConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.spectrum_scale = config.scaling
        assert config.random_loc_seed is not None
        size = self.shape[0] * self.shape[1]
        # In a tuple, and so no buffer: it is the same object for all layers of one shape.
        self.locations = (_locations(size, len(self.fourierft_spectrum), config.random_loc_seed),)

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: FourierFTConfig) -> None:
        (nn.init.zeros_ if config.init_weights else nn.init.normal_)(tensors["fourierft_spectrum"])

    def update(self) -> torch.Tensor:
        spectrum, locations = self.fourierft_spectrum, self.locations[0]
        if locations.device != spectrum.device:
            locations = locations.to(spectrum.device)
            if not spectrum.is_meta:  # offloaded for a while: where they stand must not be forgotten
                self.locations = (locations,)
        rows, columns = self.shape
        dense = spectrum.new_zeros(rows * columns, dtype=torch.float32)
        dense = dense.scatter(0, locations, spectrum.float()).view(rows, columns)
        # Scaled before it is rounded: without the scale it would vanish in half precision.
        update: torch.Tensor = torch.fft.ifft2(dense).real * self.spectrum_scale
        return update.to(spectrum.dtype)


METHOD = register(
    Method(
        name=PeftType.FOURIERFT,
        config=FourierFTConfig,
        prefix="fourierft_",
        tensor_names=frozenset({"fourierft_spectrum"}),
        layers=MappingProxyType({LayerKind.LINEAR: FourierFTLayer, LayerKind.TRANSPOSED_LINEAR: FourierFTLayer}),
        default_targets=MappingProxyType({**LORA_TARGETS, "gpt2": ["mlp.c_proj"], "gpt_bigcode": ["mlp.c_proj"]}),
        check=_check,
        paper="arXiv 2405.03003",
    )
)
