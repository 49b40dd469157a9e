"""What other libraries put on networks, layers, configs and outputs: one question to each function, asked nowhere else.

Models of transformers have most of it, accelerate and DeepSpeed add some, and any other network has never heard of it. So
each question has an answer for "there is no such thing", and callers never learn how a library spells it.

Objects of our own are never asked so: what they can do stands in their class or in their method's record.
"""

# One function per question, in place of one helper for any attribute: a helper hides what a caller relies on, gives every
# answer the type `Any`, and cannot say why the attribute may be missing.

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from torch import nn

# What the options of a function are.
T = TypeVar("T")

# Functions, by module and name, that read a tensor of a layer as an attribute and mean the one that is registered: they
# move it, divide it, put another one in its place, or were asked for it by its name in the tree.
READ_THE_REGISTERED = frozenset(
    {
        ("accelerate.utils.modeling", "set_module_tensor_to_device"),
        ("torch.distributed.fsdp._fully_shard._fsdp_param", "reset_sharded_param"),
        ("torch.nn.modules.module", "get_parameter"),
        ("torch.nn.modules.module", "register_parameter"),
        ("torch.nn.utils._named_member_accessor", "get_tensor"),
        ("transformers.modeling_utils", "get_parameter_or_buffer"),
    }
)

# Linear layers of other libraries for which programs have classes of their own, by name -> the library.
QUANTISED_LINEARS = {"Linear4bit": "bitsandbytes", "Linear8bitLt": "bitsandbytes"}

# -- networks


def is_pretrained(network: nn.Module) -> bool:
    """Whether `network` is a model of transformers."""
    # By name: `isinstance` would import transformers for everybody who has it installed.
    return any(cls.__name__ == "PreTrainedModel" for cls in type(network).__mro__)


def name_or_path(network: nn.Module) -> str | None:
    """The folder or Hub id that `network` was loaded from; None where nothing says so."""
    # Of the object alone. A name on its class would be the same for every network of this class.
    return network.__dict__.get("name_or_path") or None


def model_tags(network: nn.Module) -> tuple[str, ...]:
    """The tags that `network` wants to see on its model card."""
    # transformers has the attribute on the class, and it is None until somebody adds a tag.
    return tuple(getattr(network, "model_tags", None) or ())


def input_embedding_layer(network: nn.Module) -> nn.Module | None:
    """The layer that looks up the input's tokens; None where there is none or nobody can tell."""
    return _embedding_layer(network, "get_input_embeddings")


def output_embedding_layer(network: nn.Module) -> nn.Module | None:
    """The layer that gives the logits of the vocabulary; None where there is none or nobody can tell."""
    return _embedding_layer(network, "get_output_embeddings")


def _embedding_layer(network: nn.Module, getter: str) -> nn.Module | None:
    find: Callable[[], object] | None = getattr(network, getter, None)
    try:
        found = None if find is None else find()
    except NotImplementedError:  # models of transformers for audio and images have the method and no embeddings
        return None
    return found if isinstance(found, nn.Module) else None


def can_resize_vocabulary(network: nn.Module) -> bool:
    """Whether `network` can be given another number of tokens, by `network.resize_token_embeddings(count)`."""
    return callable(getattr(network, "resize_token_embeddings", None))


def uses_checkpointing(modules: Iterable[nn.Module]) -> bool:
    """Whether one of `modules` recomputes its forward during the backward (gradient checkpointing)."""
    # transformers sets a flag on each module that can, or on its class; the network's own `is_gradient_checkpointing` only
    # sums them up. Not asked of the module with a default: most have none, and torch takes long to find that out.
    flag = "gradient_checkpointing"
    return any(vars(module).get(flag, getattr(type(module), flag, False)) for module in modules)


def backbone_path(network: nn.Module) -> str:
    """The name of the child that holds all layers but the head's; "" where there is no such child."""
    return getattr(network, "base_model_prefix", "")


def device_map(network: nn.Module) -> Mapping[str, object]:
    """Path -> device, of a network that accelerate spread over several; empty of any other."""
    return getattr(network, "hf_device_map", None) or {}


def key_renaming(network: nn.Module) -> Mapping[str, str] | None:
    """The regular expressions by which transformers 4 renames the keys of older checkpoints; None where it has none."""
    # transformers 5 keeps them in a table of its own: see `conversions.py`.
    return getattr(network, "_checkpoint_conversion_mapping", None)


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
