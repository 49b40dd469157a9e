"""Which modules of a model with adapters become units of FSDP, for trainers that ask for a policy."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch import nn

from splice.base.foreign_models import unsplit_classes


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """The policy for `auto_wrap_policy` of FSDP's plugin: trained leaves are units of their own, and the model's blocks are.

    FSDP wants all tensors of a unit to be trained, or none; and those of adapters are, beside a frozen base. The names of
    the blocks' classes stand in FSDP_TRANSFORMER_CLS_TO_WRAP, with commas between them, or else in the model's
    `_no_split_modules`.

    Raises:
        TypeError: the model has no module of such a class.
    """
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    wanted = unsplit_classes(model) if named is None else [name.strip() for name in named.split(",")]
    blocks = tuple(_class_named(name, model) for name in wanted if name)

    def policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        """Whether to look below `module` (`recurse`: always), or whether it becomes a unit."""
        return recurse or isinstance(module, blocks) or _is_trained_leaf(module)

    return policy


def _class_named(name: str, model: nn.Module) -> type[nn.Module]:
    # Of adapted modules and of those that hooks were put on the classes are made at run time, below their own name.
    for module in model.modules():
        for cls in type(module).__mro__:
            if cls.__name__ == name:
                return cls
    raise TypeError(
        f"Could not find the transformer layer class {name!r} in the model, whose blocks are to be FSDP units."
    )


def _is_trained_leaf(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return not module._modules and weight is not None and weight.requires_grad
