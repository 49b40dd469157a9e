"""What other libraries put on networks, layers, configs and outputs: one question to each function, asked nowhere else.

Models of transformers have most of it, accelerate and DeepSpeed add some, and any other network has never heard of it. So
each question has an answer for "there is no such thing", and callers never learn how a library spells it.

Objects of our own are never asked so: what they can do stands in their class or in their method's record.
"""

# One function per question, in place of one helper for any attribute: a helper hides what a caller relies on, gives every
# answer the type `Any`, and cannot say why the attribute may be missing.

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any, NamedTuple, TypeVar, cast

import torch
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

# Functions, by module and name, that bring the weight of a layer into another dtype for a call, and back after it.
CASTS_FOR_A_CALL = frozenset(
    ("diffusers.hooks.layerwise_casting", name) for name in ("initialize_hook", "pre_forward", "post_forward")
)

# Functions, by module and name, that put the base layers of a network back in the places of its adapted ones.
TAKES_ADAPTERS_OFF = frozenset({("diffusers.utils.peft_utils", "recurse_remove_peft_layers")})


def is_called_from(frame: FrameType, functions: frozenset[tuple[str, str]]) -> bool:
    """Whether `frame` runs one of these functions."""
    return (frame.f_globals.get("__name__"), frame.f_code.co_name) in functions


# -- networks

# What `torch.compile` puts before the names of the model that it was given.
COMPILED = "_orig_mod."


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` was given, of what it gave back; any other model itself."""
    # By the name of the child: the class is in a module that takes long to import.
    found = model._modules.get(COMPILED[:-1])
    return model if found is None else found


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


# Under which name a module keeps the function by which blocks that it is, or that it calls, compute themselves again.
_CHECKPOINTING = "_gradient_checkpointing_func"


def checkpointing_places(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, ForwardPlace]]:
    """Those of `modules` with a function that computes blocks again in the backward, and where it is."""
    return [(m, ForwardPlace(vars(m), _CHECKPOINTING)) for m in modules if _CHECKPOINTING in vars(m)]


def records_as(cls: type[nn.Module], base: type[nn.Module]) -> None:
    """Let networks of the class `cls`, made from `base`, record the hidden states that they are asked for."""
    # transformers looks up by the name of a network's class which outputs of layers it records, and gives none of any other.
    recorded = getattr(base, "_can_record_outputs", None)
    modeling = sys.modules.get("transformers.modeling_utils")
    registry = {} if modeling is None else vars(modeling).get("_CAN_RECORD_REGISTRY", {})
    if recorded is not None:
        dict.__setitem__(registry, str(cls), recorded)


def backbone_path(network: nn.Module) -> str:
    """The name of the child that holds all layers but the head's; "" where there is no such child."""
    return getattr(network, "base_model_prefix", "")


def device_map(network: nn.Module) -> Mapping[str, object]:
    """Path -> device, of a network that accelerate spread over several; empty of any other."""
    return getattr(network, "hf_device_map", None) or {}


def dtype_said(network: nn.Module) -> torch.dtype | None:
    """The dtype that a model of transformers says it is in; None of any other network."""
    return cast(torch.dtype, network.dtype) if is_pretrained(network) else None


def key_renaming(network: nn.Module) -> Mapping[str, str] | None:
    """The regular expressions by which transformers 4 renames the keys of older checkpoints; None where it has none."""
    # transformers 5 keeps them in a table of its own: see `conversions.py`.
    return getattr(network, "_checkpoint_conversion_mapping", None)


def unsplit_classes(network: nn.Module) -> list[str]:
    """Names of the classes of blocks that a model of transformers keeps together; empty of any other model."""
    return list(getattr(network, "_no_split_modules", None) or ())


# -- configs of networks


def config_of(network: nn.Module) -> object | None:
    """The config that stands on the object `network`: one of transformers, a dict, or None."""
    # Not `network.config`. That may be a child of this name, and in diffusers it is a property with other fields.
    return network.__dict__.get("config")


def diffusion_config(network: nn.Module) -> object | None:
    """The config of a model of diffusers; None of any other network."""
    # Under a name of its own: `config` is a property there.
    return network.__dict__.get("_internal_dict")


def config_as_dict(network: nn.Module) -> dict[str, object]:
    """The fields of the network's config; empty where it has none."""
    config = config_of(network)
    if config is None or isinstance(config, dict):
        return dict(config or {})
    return dict(cast(Callable[[], Mapping[str, object]], getattr(config, "to_dict", lambda: vars(config)))())


def config_field(network: nn.Module, name: str) -> object:
    """The field `name` of `config_of(network)`; None where the config, or its field, is not there."""
    return field_of(config_of(network), name)


def field_of(config: object, name: str) -> object:
    """The field `name` of a config, which may be a dict; None where it has none."""
    # Every kind of model has fields of its own. Some stand on the class of the config, as `model_type` does.
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def has_field(config: object, name: str) -> bool:
    """Whether a config, which may be a dict, has the field `name`, under this name or as another one's."""
    # Configs of transformers know some fields by several names, so their dict does not tell.
    return name in config if isinstance(config, dict) else hasattr(config, name)


def set_config_field(network: nn.Module, name: str, value: object) -> None:
    """Set a field of `config_of(network)`, which has to be there."""
    set_field(config_of(network), name, value)


def set_field(config: object, name: str, value: object) -> None:
    """Set a field of a config, which may be a dict."""
    if isinstance(config, dict):
        config[name] = value
    else:
        setattr(config, name, value)


def model_type(network: nn.Module) -> str:
    """`config.model_type` of a model of transformers, "custom" of any other."""
    return str(config_field(network, "model_type") or "custom")


def text_config(network: nn.Module) -> object | None:
    """The config of `network`; of a model that sees or hears as well, the part of it that is about text."""
    return config_field(network, "text_config") or config_of(network)


# -- layers and parameters


def embed_scale(layer: nn.Module) -> float | torch.Tensor | None:
    """The factor by which embeddings multiply what they look up (Gemma, BART); None of those that do not."""
    return getattr(layer, "embed_scale", None)


def is_transposed(experts: nn.Module) -> bool:
    """Whether a module of stacked experts stores (experts, in, out); all others store (experts, out, in)."""
    # Some classes of transformers say so. The shapes alone cannot: they may be square.
    return bool(getattr(experts, "is_transposed", False))


class ForwardPlace(NamedTuple):
    """Where a forward is kept that is called in the place of the class's own."""

    # The dict of the object that keeps it: the module, or a hook.
    holder: dict[str, Any]
    # Its name there.
    name: str

    @property
    def forward(self) -> Callable[..., object]:
        """What stands there now."""
        found: Callable[..., object] = self.holder[self.name]
        return found

    def put(self, forward: Callable[..., object]) -> None:
        """Let `forward` stand there."""
        self.holder[self.name] = forward


def forward_places(module: nn.Module) -> list[ForwardPlace]:
    """Where forwards of the object `module` are kept; the innermost comes first."""
    # A hook of accelerate keeps what it found as `_old_forward` and puts its own in front of it, as `forward`.
    own = [ForwardPlace(module.__dict__, name) for name in ("_old_forward", "forward") if name in module.__dict__]
    # A hook of diffusers keeps it in an object; one that calls it in a way of its own keeps it there a second time.
    registry = module.__dict__.get("_diffusers_hook")
    kept = [vars(reference) for reference in registry._fn_refs] if registry is not None else []
    names = ("original_forward", "forward")
    return [*(ForwardPlace(each, name) for each in kept for name in names if each[name] is not None), *own]


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook of accelerate or of diffusers stands in front of the forward of `module`."""
    return any(place.holder is not module.__dict__ or place.name != "forward" for place in forward_places(module))


def has_cache_place(module: nn.Module) -> bool:
    """Whether `module` knows its place among the layers (`layer_idx`), under which it finds its keys in a cache."""
    return "layer_idx" in module.__dict__


def full_numel(parameter: torch.Tensor) -> int:
    """The number of elements of `parameter`; of one that DeepSpeed's ZeRO has divided, those of all its parts."""
    return getattr(parameter, "ds_numel", parameter.numel())


# -- calls


def loss_of(output: object) -> torch.Tensor | None:
    """The loss in what a network returned; None without labels, and of a network that gives a plain tensor."""
    return getattr(output, "loss", None)


def accepted_by(function: Callable[..., object], options: Mapping[str, T]) -> dict[str, T]:
    """Those of `options` that `function` has parameters for."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in parameters}
