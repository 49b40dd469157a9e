"""Ways to quantise a tiny base with the real libraries, and the same base with the dense weights that came of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from splice.base.layers import LayerKind
from tests.bases import Base, Net, _floats

# Sizes that the blocks of all libraries divide.
WIDE = Base(
    "wide",
    lambda: Net(nn.Linear(64, 256), nn.Linear(256, 64, bias=False), 64),
    _floats(5, 64),
    frozenset({LayerKind.LINEAR}),
)


@dataclass(frozen=True)
class Way:
    """One way to quantise.

    Attributes:
        name: for the ids of tests.
        backend: what a report of a model says.
        library: the distribution that does it.
        quantised: a quantised layer in the place of a linear one.
        dense: the dense weight of such a layer, by the library's own function.
        step: how far a weight is from what is stored of it at most, by their norms.
        tolerance: how far outputs are from those of the dense base: more than rounding where inputs are quantised too.
    """

    name: str
    backend: str
    library: str
    quantised: Callable[[nn.Linear], nn.Module]
    dense: Callable[[Any], torch.Tensor]
    step: float
    tolerance: float = 2e-5

    def base(
        self,
        base: Base = WIDE,
        but: tuple[str, ...] = ("head", "lm_head", "score"),
        dtype: torch.dtype = torch.float32,
    ) -> Any:
        """`base` with all linear layers quantised but those of these names."""
        network = base.build(dtype)
        for parent, name, layer in _linear(network, but):
            setattr(parent, name, self.quantised(layer))
        return network.eval()

    def dense_base(self, base: Base = WIDE, but: tuple[str, ...] = ("head", "lm_head", "score")) -> Any:
        """The same with the dense weights that the quantised layers stand for."""
        network = base.build()
        for parent, name, layer in _linear(network, but):
            weight = self.dense(self.quantised(copy.deepcopy(layer)))
            getattr(parent, name).weight.data = weight.to(layer.weight.dtype)
        return network.eval()

    @staticmethod
    def stored(layer: nn.Module) -> list[torch.Tensor]:
        """Copies of all that a layer keeps: the bytes, in the layer's own state dict."""
        return [tensor.clone() for tensor in layer.state_dict().values() if isinstance(tensor, torch.Tensor)]

    @property
    def version(self) -> str:
        return version(self.library)

    def __str__(self) -> str:
        return self.name


def _linear(network: nn.Module, but: tuple[str, ...]) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    found = [
        (parent, name, child)
        for parent in network.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and name not in but
    ]
    yield from found


def _bnb_4bit(layer: nn.Linear, packed: bool = False, **options: Any) -> nn.Module:
    # Some processors compute in bfloat16, with weights in another order.
    import bitsandbytes as bnb

    new = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=layer.weight.dtype, **options
    )
    new.load_state_dict(layer.state_dict(), strict=False)
    new = new.to(layer.weight.dtype)
    new.weight = new.weight.to("cpu")  # which quantises
    new.support_avx512bf16_for_cpu &= packed
    return new.requires_grad_(False)


def _dense_4bit(layer: Any) -> torch.Tensor:
    import bitsandbytes as bnb

    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def _bnb_8bit(layer: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    new = bnb.nn.Linear8bitLt(
        layer.in_features, layer.out_features, bias=layer.bias is not None, has_fp16_weights=False, threshold=6.0
    )
    new.load_state_dict(layer.state_dict(), strict=False)
    return new.to("cpu").requires_grad_(False)


def _dense_8bit(layer: Any) -> torch.Tensor:
    import bitsandbytes as bnb

    return bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)


def _torchao(make: str, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def quantised(layer: nn.Linear) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torchao.quantization as library

            holder = nn.Sequential(copy.deepcopy(layer)).requires_grad_(False)
            library.quantize_(holder, getattr(library, make)(**options))
        return holder[0]

    return quantised


def _intx(layer: nn.Linear) -> nn.Module:
    from torchao.quantization import PerGroup

    return _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=PerGroup(16))(layer)


def _ao_nf4(layer: nn.Linear) -> nn.Module:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    new = copy.deepcopy(layer)
    new.weight = nn.Parameter(to_nf4(layer.weight.detach()), requires_grad=False)
    return new.requires_grad_(False)


def _dense_ao_nf4(layer: Any) -> torch.Tensor:
    return layer.weight.get_original_weight()


def _hqq(layer: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=4, group_size=16)
    own = copy.deepcopy(layer).requires_grad_(False)
    return HQQLinear(own, settings, compute_dtype=layer.weight.dtype, device="cpu").requires_grad_(False)


def _dequantized(layer: Any) -> torch.Tensor:
    return layer.weight.dequantize()


def _dense_hqq(layer: Any) -> torch.Tensor:
    return layer.dequantize()


_SINGLE = {"quant_type": "fp4", "compress_statistics": False, "packed": True}
_ALL = (
    Way("nf4", "bnb 4bit", "bitsandbytes", partial(_bnb_4bit, quant_type="nf4"), _dense_4bit, 0.12),
    Way("fp4_single", "bnb 4bit", "bitsandbytes", partial(_bnb_4bit, **_SINGLE), _dense_4bit, 0.15, tolerance=1e-2),
    Way("int8", "bnb 8bit", "bitsandbytes", _bnb_8bit, _dense_8bit, 0.01, tolerance=5e-2),
    Way("ao_int8", "torchao", "torchao", _torchao("Int8WeightOnlyConfig"), _dequantized, 0.01),
    Way("ao_int4", "torchao", "torchao", _intx, _dequantized, 0.12),
    Way("ao_fp8", "torchao", "torchao", _torchao("Float8WeightOnlyConfig"), _dequantized, 0.04),
    Way("hqq", "hqq", "hqq", _hqq, _dense_hqq, 0.12),
)
WAYS = tuple(way for way in _ALL if find_spec(way.library) is not None)
_NF4 = Way("ao_nf4", "torchao", "torchao", _ao_nf4, _dense_ao_nf4, 0.12)
# What a merge cannot be written into.
UNWRITABLE = tuple(way for way in (_NF4,) if find_spec(way.library) is not None)
# One for each backend, where a test of each would take too long.
BACKENDS = tuple({way.backend: way for way in reversed(WAYS)}.values())[::-1]
