"""What quantisers leave on networks and layers, for programs that ask by name."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn

# Linear layers of other libraries for which programs have classes of their own, by name -> the library.
QUANTISED_LINEARS = {"Linear4bit": "bitsandbytes", "Linear8bitLt": "bitsandbytes"}


def quantisation(network: nn.Module) -> tuple[str, object]:
    """How the weights of a model of transformers are quantised ("gptq"; empty for not at all), and with which settings."""
    # transformers sets it on the object when it loads such weights: the name, as a member of an enum of strings.
    own = vars(network)
    if "quantization_method" not in own:
        return "", None
    return str(own["quantization_method"].value), own["config"].quantization_config


# What quantisers leave on a network, beside the name of their method.
_FLAGS = ("is_loaded_in_8bit", "is_loaded_in_4bit", "hqq_quantized")
# Ways to quantise that need all else in half precision too, and by which alone a network is known to be quantised. Of
# bitsandbytes the flags count: the method stays when a model is dequantised.
_IN_HALF_PRECISION = frozenset({"gptq", "aqlm", "eetq", "hqq", "torchao", "hqq_quantized"})


def quantised_by(network: nn.Module) -> frozenset[str]:
    """The marks by which the weights of `network` are known to be stored in few bits; empty where they are not."""
    found = {name: getattr(network, name, None) for name in ("quantization_method", *_FLAGS)}
    return frozenset((*filter(found.get, _FLAGS), *(_IN_HALF_PRECISION & {found["quantization_method"]})))


def needs_half_precision(network: nn.Module) -> bool:
    """Whether the quantised layers of `network` want inputs, and all other parameters, in half precision."""
    return not _IN_HALF_PRECISION.isdisjoint(quantised_by(network))


def quantised_linear(layer: nn.Module) -> str:
    """The name of the class in `QUANTISED_LINEARS` that `layer` is of; empty for none."""
    for cls in type(layer).__mro__:
        if QUANTISED_LINEARS.get(cls.__name__) == cls.__module__.partition(".")[0]:
            return cls.__name__
    return ""


def forget(network: nn.Module) -> None:
    """Take from `network` what says that its weights are quantised: it is saved and loaded as any other then."""
    # As transformers does it after its own `dequantize`.
    own = vars(network)
    for name in ("hf_quantizer", "quantization_method", *_FLAGS, "is_quantized"):
        own.pop(name, None)
    config = own.get("config")
    if config is not None:
        for name in ("quantization_config", "_pre_quantization_dtype"):
            vars(config).pop(name, None)


def keep_full_states(optimizer_class: type, embeddings: Iterable[nn.Module]) -> None:
    """Let an 8-bit optimizer of bitsandbytes keep its state of these layers in 32 bits, as it is best for embeddings."""
    library, _, _ = optimizer_class.__module__.partition(".")
    if library == "bitsandbytes" and optimizer_class.__name__.endswith("8bit"):
        manager = sys.modules[library].optim.GlobalOptimManager.get_instance()
        for layer in embeddings:
            manager.register_module_override(layer, "weight", {"optim_bits": 32})
