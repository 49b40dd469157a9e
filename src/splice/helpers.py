"""Small helps for scripts: another scale for a while, inputs that are not cast, signatures that say what a model takes."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn

from splice.config import PeftConfig
from splice.kinds.additive import Additive
from splice.kinds.host import Host, host_of
from splice.model import PeftModel

__all__ = [
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "rescale_adapter_scale",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]


def _hosts(model: nn.Module) -> list[Host]:
    """What the adapted layers of `model`, or `model` itself as one, carry."""
    return [host for module in model.modules() if (host := host_of(module)) is not None]


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Inside, the updates of all adapters of `model` count `multiplier` times as much.

    Args:
        model: a PeftModel, a network that carries adapters, or a part of it.
        multiplier: what their scales are multiplied with; between 0 and 1 it is WiSE-FT (arXiv 2109.01903).

    Raises:
        TypeError: `multiplier` is no number.
        ValueError: no adapter of `model` has a scale.
    """
    if not isinstance(multiplier, (int, float)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    scaled = [
        layer
        for host in _hosts(model)
        for layer in host.layers.values()
        if isinstance(layer, Additive) and layer.initial_scale is not None
    ]
    if not scaled:
        raise ValueError("scaling is only supported for models with adapters that have a scale, and this one has none")
    before = [float(layer.scale) for layer in scaled]
    try:
        for layer in scaled:
            layer.rescale(layer.scale * multiplier)
        yield
    finally:
        for layer, scale in zip(scaled, before):
            layer.rescale(scale)


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Inside, adapters get their inputs as they are, and not in the dtype of their own tensors.

    Args:
        model: a PeftModel, a network that carries adapters, or one of its layers.
        active: False changes nothing.
    """
    hosts = _hosts(model) if active else []
    before = [host.casts_input for host in hosts]
    try:
        for host in hosts:
            host.casts_input = False
        yield
    finally:
        for host, casts in zip(hosts, before):
            host.casts_input = casts


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Whether there is an adapter, with a config that can be read, in this folder or under this id on the Hub.

    Whatever goes wrong on the way there is a no.
    """
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:  # of the network, of the disk, of the file: the question is whether it can be read
        return False
    return True


def update_forward_signature(model: PeftModel) -> None:
    """Let `inspect.signature(model.forward)` tell the arguments of the base model's forward, if the class tells none."""
    _take_signature(model, "forward", model.get_base_model().forward)


def update_generate_signature(model: PeftModel) -> None:
    """Let `inspect.signature(model.generate)` tell the arguments of the base model's `generate`, if the class tells none.

    Raises:
        AttributeError: the base model cannot generate.
    """
    generate: Callable[..., Any] = model.get_base_model().generate  # type: ignore[assignment]
    _take_signature(model, "generate", generate)


def update_signature(model: PeftModel, method: str = "all") -> None:
    """As `update_forward_signature` ("forward"), `update_generate_signature` ("generate"), or both ("all").

    Raises:
        ValueError: `method` is none of the three.
    """
    if method not in ("forward", "generate", "all"):
        raise ValueError(f"method {method} is not supported please choose one of ['forward', 'generate', 'all']")
    if method in ("forward", "all"):
        update_forward_signature(model)
    if method in ("generate", "all"):
        update_generate_signature(model)


def _take_signature(model: PeftModel, name: str, of_base: Callable[..., Any]) -> None:
    """Put the method `name` on the object `model` once more, with the signature and the documentation of the base's."""
    own: Callable[..., Any] = getattr(type(model), name)
    parameters = inspect.signature(own).parameters.values()
    if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return  # a class for a task: it spells its arguments out

    @functools.wraps(own)
    def method(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    signature = inspect.signature(of_base)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[itself, *signature.parameters.values()]
    )
    method.__doc__ = of_base.__doc__
    vars(model)[name] = MethodType(method, model)
