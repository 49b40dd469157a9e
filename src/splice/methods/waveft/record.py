"""WaveFT: the update of a weight is put together from a few trained wavelet coefficients.

Bilican et al., "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets", arXiv 2505.12532, section 3. With D
zero but for n coefficients, and W one level of the inverse discrete wavelet transform: `y = base(x) + s * W(D) x`. Where the
coefficients stand is no part of the checkpoint: it follows from the seed in the config and the shape of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import nn

from splice.base.layers import LayerKind, features, kind_of
from splice.base.weight_access import weight_shape
from splice.checkpoint.types import PeftType
from splice.kinds.casting import cast_to
from splice.kinds.layout import LaidOut, Layout
from splice.kinds.matching import value_for
from splice.kinds.registry import Method, register
from splice.kinds.slot import Slot
from splice.kinds.tensors import Held
from splice.methods.coefficients import Coefficients, check_count, locations
from splice.methods.default_targets import LORA_TARGETS
from splice.methods.targeted import Targeted, check_positive
from splice.methods.waveft.filters import LOW_PASS, high_pass


@dataclass
class WaveFTConfig(Targeted):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.WAVEFT
    scale_fields = ("scaling",)
    pattern_fields = MappingProxyType({"n_frequency_pattern": "n_frequency"})

    # n, the number of trained coefficients of each layer: at least 1, at most the number of values in its weight.
    n_frequency: int = 2592
    # s, the factor of the update.
    scaling: float = 25.0
    # The wavelet: "db1" to "db10", "sym2" to "sym10", "coif1" to "coif4".
    wavelet_family: str = "db1"
    # Whether the coefficients are transformed; otherwise they are entries of the update itself.
    use_idwt: bool = True
    # Seed of the places at which the coefficients stand.
    random_loc_seed: int = 777
    # Whether the base stores weights as (in, out). No effect: the class of each layer decides, and sets this field.
    fan_in_fan_out: bool = False
    # Layers to adapt: ends of paths, a regular expression for whole paths, or "all-linear"; None for those that are usual
    # for the base's `model_type`.
    target_modules: list[str] | set[str] | str | None = None
    # Targets to leave out: ends of paths, or a regular expression for whole paths; None for none.
    exclude_modules: list[str] | set[str] | str | None = None
    # Biases of the base to train with the adapter: "none", "all", or "waveft_only" for those of adapted layers.
    bias: str = "none"
    # Modules to train whole and to store beside the adapter, by the ends of their paths; None for none.
    modules_to_save: list[str] | None = None
    # Index, or indices, of the blocks whose layers are adapted; None for all blocks. Layers that `target_modules` names by
    # their whole paths are adapted in any case.
    layers_to_transform: list[int] | int | None = None
    # Name, or names, of the list of blocks that `layers_to_transform` counts in ("layers", "h"); None for the first list
    # on a layer's path, which must lie inside another module.
    layers_pattern: list[str] | str | None = None
    # n of single layers: a regular expression for the end of a path -> n. The first that matches counts.
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)
    # Whether n coefficients for each layer are dealt out by the layers' sizes; then `n_frequency_pattern` has no effect.
    proportional_parameters: bool = False
    # Whether the coefficients start at zero, so that nothing changes at first; otherwise they are drawn from N(0, 0.01²).
    init_weights: bool = True

    def computed(self) -> dict[str, object]:
        names = ("scaling", "wavelet_family", "use_idwt", "random_loc_seed")
        return {name: getattr(self, name) for name in names}


def _check(config: WaveFTConfig) -> None:
    check_positive(n_frequency=config.n_frequency, **(config.n_frequency_pattern or {}))
    if config.use_idwt and config.wavelet_family not in LOW_PASS:
        raise ValueError(
            f"`wavelet_family` is {config.wavelet_family!r}, for which there is no filter. There are {', '.join(LOW_PASS)}."
        )


def _count(layout: Layout, base: nn.Module, config: WaveFTConfig, path: str) -> int:
    """How many coefficients a layer has."""
    if not config.proportional_parameters:
        return value_for(config.n_frequency_pattern or {}, path, config.n_frequency)
    size_in, size_out = features(base)
    sizes = [features(target) for target in layout.targets.values()]
    # In this order, as the product with the share is rounded: half a coefficient up or down is another adapter.
    share = size_in * size_out / sum(rows * columns for rows, columns in sizes)
    return max(1, round(share * (config.n_frequency * len(sizes))))


@lru_cache(maxsize=256)
def _patches(shape: tuple[int, int], count: int, seed: int, family: str) -> tuple[torch.Tensor, ...]:
    """What each coefficient becomes: a patch of K x K values of the update, the product of a column and a row.

    K is 2 for the simplest wavelet: the whole transform of a large matrix, most of it zeros, would be far more work.

    Args:
        shape: (out, in).
        count: n, how many coefficients there are.
        seed: of their places.
        family: of the wavelet; empty where each coefficient is a value of the update itself.

    Returns:
        rows of the update, the values of the column there, columns of the update, and the values of the row; (n, K) each.
    """
    low = LOW_PASS[family] if family else (1.0,)
    filters, taps = torch.tensor([low, high_pass(low)]), len(low)
    places = locations(shape[0] * shape[1], count, seed)
    starts, upper = [], []
    for size, place in zip(shape, (places // shape[1], places % shape[1])):
        # Without a transform the coefficients' own matrix is the update; else it may be larger, and they stand in its middle.
        half = (size + taps - 1) // 2 if family else size
        moved = place + (2 * half - size) // 2 if family else place
        upper.append((moved >= half).long())
        starts.append(2 * (moved % half) - (taps - 2) if family else place)
    # The right half of that matrix is high-pass from row to row, its lower half from column to column.
    rows, column = _inside(starts[0], filters[upper[1]], shape[0])
    columns, row = _inside(starts[1], filters[upper[0]], shape[1])
    return rows, column, columns, row


def _inside(start: torch.Tensor, taps: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The places from `start` (n) on that these `taps` (n, K) stand at; of those outside of `size` the tap is zero."""
    places = start[:, None] + torch.arange(taps.shape[1])
    outside = (places < 0) | (places >= size)
    return places.masked_fill(outside, 0), taps.masked_fill(outside, 0.0)


class WaveFTLayer(LaidOut, Coefficients):
    """WaveFT on a linear layer, stored either way round."""

    waveft_spectrum = Held()

    @classmethod
    def slots_in(cls, layout: Layout, base: nn.Module, config: WaveFTConfig, path: str) -> dict[str, Slot]:
        count = _count(layout, base, config, path)
        check_count(count, "n_frequency", weight_shape(base), path)
        return {"waveft_spectrum": Slot((count,))}

    @classmethod
    def resolved(cls, base: nn.Module, config: WaveFTConfig) -> dict[str, object]:
        return {"fan_in_fan_out": kind_of(base) is LayerKind.TRANSPOSED_LINEAR}

    def prepare(self, base: nn.Module, config: WaveFTConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.spectrum_scale = config.scaling
        rows, columns = self.shape
        family = config.wavelet_family if config.use_idwt else ""
        self.fixed = _patches((rows, columns), len(self.waveft_spectrum), config.random_loc_seed, family)

    @classmethod
    def initialise_in(
        cls, layout: Layout, path: str, tensors: dict[str, torch.Tensor], base: nn.Module, config: WaveFTConfig
    ) -> None:
        if config.init_weights:
            nn.init.zeros_(tensors["waveft_spectrum"])
        else:
            nn.init.normal_(tensors["waveft_spectrum"], std=0.01)

    def applied(self, x: torch.Tensor) -> torch.Tensor | None:
        spectrum, (size_out, size_in) = self.waveft_spectrum, self.shape
        rows, column, columns, row = self.fixed_on(spectrum.device)
        # What a patch takes of a row, and what it gives to the outputs. Picking single values costs about four times what
        # going through the whole update does: from about here on that is faster. For one row this is 8 times faster on a
        # layer of 512 features, and 100 times on one of 2048.
        if 4 * len(x) * row.numel() > size_out * size_in:
            return None
        picked = cast_to(x, spectrum).float().index_select(1, columns.flatten()).view(len(x), *columns.shape)
        seen = (picked * row).sum(-1) * (spectrum.float() * self.spectrum_scale)
        given = (seen[:, :, None] * column).flatten(1)
        return given.new_zeros(len(x), size_out).index_add(1, rows.flatten(), given).to(spectrum.dtype)

    def update(self) -> torch.Tensor:
        spectrum = self.waveft_spectrum
        rows, column, columns, row = self.fixed_on(spectrum.device)
        # Scaled before it is rounded: without the scale it would vanish in half precision.
        values = (spectrum.float() * self.spectrum_scale)[:, None, None] * (column[:, :, None] * row[:, None, :])
        flat = rows[:, :, None] * self.shape[1] + columns[:, None, :]
        dense = values.new_zeros(self.shape[0] * self.shape[1]).index_add(0, flat.flatten(), values.flatten())
        return dense.view(self.shape).to(spectrum.dtype)


def _indices(layer: WaveFTLayer) -> torch.Tensor:
    """(2, n): row and column of each coefficient."""
    rows, columns = layer.shape
    places = locations(rows * columns, len(layer.waveft_spectrum), layer.config.random_loc_seed)
    return torch.stack((places // columns, places % columns))


# Networks that the other methods know layers of.
_WITHOUT = ("btlm", "rwkv", "rwkv7")

METHOD = register(
    Method(
        name=PeftType.WAVEFT,
        summary="Adds to a weight the inverse wavelet transform of a few trained coefficients.",
        config=WaveFTConfig,
        prefix="waveft_",
        tensor_names=frozenset({"waveft_spectrum"}),
        layers=MappingProxyType({LayerKind.LINEAR: WaveFTLayer, LayerKind.TRANSPOSED_LINEAR: WaveFTLayer}),
        layer_views=MappingProxyType(
            {
                "waveft_n_frequency": lambda layer: len(layer.waveft_spectrum),
                "waveft_scaling": lambda layer: layer.spectrum_scale,
                "waveft_wavelet_family": lambda layer: layer.config.wavelet_family,
                "waveft_use_idwt": lambda layer: layer.config.use_idwt,
                "waveft_random_loc_seed": lambda layer: layer.config.random_loc_seed,
                "waveft_indices": _indices,
            }
        ),
        default_targets=MappingProxyType(
            {
                **{model_type: names for model_type, names in LORA_TARGETS.items() if model_type not in _WITHOUT},
                "gpt2": ["mlp.c_proj"],
                "gpt_bigcode": ["mlp.c_proj"],
            }
        ),
        check=_check,
        names=MappingProxyType({"WaveFTLinear": WaveFTLayer}),
        paper="arXiv 2505.12532",
    )
)
