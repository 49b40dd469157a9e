"""Classes by which other libraries recognise layers that carry adapters: `isinstance(module, BaseTunerLayer)`.

Nothing is an instance of them by inheritance: an adapted layer is of its own class's subclass. They look at what it carries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NoReturn, cast

from splice.errors import UnsupportedFeatureError
from splice.kinds.layer import AdapterLayer
from splice.kinds.module_copy import WholeModule
from splice.kinds.network import NetworkLayer
from splice.kinds.token_rows import TokenRowsBeside
from splice.surgery.adapted_layer import Adapted, is_whole


class _Recognising(type):
    """The class of classes that decide by themselves what their instances are."""

    # Whether a layer is an instance; a static method of each class.
    recognises: Callable[[Adapted], bool]

    # Python looks this up on the class of the class, so no method of the classes themselves could take its place.
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Adapted) and cls.recognises(instance)

    def __call__(cls, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError(
            f"{cls.__name__} recognises adapted layers and makes none: a layer keeps its own class and takes on the adapter. "
            "Put one on it with `inject_adapter_in_model(config, model)` or `get_peft_model(model, config)`."
        )

    def __setattr__(cls, name: str, value: object) -> None:
        refuse_patch(cls, name)
        super().__setattr__(name, value)


def refuse_patch(cls: type, name: str) -> None:
    """Raise where somebody sets an attribute on a class that only recognises: it would have no effect, in silence.

    Raises:
        UnsupportedFeatureError: it is not one of Python's own.
    """
    if not (name.startswith("__") and name.endswith("__")):
        raise UnsupportedFeatureError(
            f"`{cls.__name__}.{name} = ...` would have no effect: it recognises what carries adapters, and nothing "
            f"runs what it has. Set `{name}` on the objects themselves (`for layer in model.modules(): if isinstance(layer, "
            f"{cls.__name__}): layer.{name} = ...`), or register a forward hook on them."
        )


def _is_tuners(adapter: AdapterLayer) -> bool:
    # Not a copy beside the layers of a method. Trained rows and biases are: loops over a tuner's layers switch adapters, and
    # would otherwise leave them on. In the reference such rows are on a layer of a tuner, inside of what it wraps.
    return not (isinstance(adapter, WholeModule) and adapter.names.base != "base_layer.")


class BaseTunerLayer(metaclass=_Recognising):
    """A layer that carries adapter layers of a method; not the network as a whole, which has a `set_adapter` of its own."""

    # What the names of tensors of adapters begin with, of the classes for a method.
    adapter_layer_names: tuple[str, ...] = ()

    @staticmethod
    def recognises(layer: Adapted) -> bool:
        on_call = any(isinstance(adapter, NetworkLayer) for adapter in layer.splice_host.layers.values())
        return not on_call and any(_is_tuners(adapter) for adapter in layer.splice_host.layers.values())


class AuxiliaryTrainingWrapper(metaclass=_Recognising):
    """A module that carries nothing but what is kept whole."""

    @staticmethod
    def recognises(layer: Adapted) -> bool:
        return is_whole(layer)


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module of which some adapter keeps a trained copy."""

    @staticmethod
    def recognises(layer: Adapted) -> bool:
        return _carries(layer, lambda adapter: isinstance(adapter, WholeModule))


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """A layer of which some adapter of another method trains the rows of a few tokens."""

    @staticmethod
    def recognises(layer: Adapted) -> bool:
        return _carries(layer, lambda adapter: isinstance(adapter, TokenRowsBeside))


def _carries(layer: Adapted, wanted: Callable[[AdapterLayer], bool]) -> bool:
    return any(wanted(adapter) for adapter in layer.splice_host.layers.values())


def layer_of(
    name: str,
    carries: Callable[[AdapterLayer], bool],
    base: type[BaseTunerLayer] = BaseTunerLayer,
    tensor_names: Iterable[str] = (),
) -> type[BaseTunerLayer]:
    """A class `name` below `base` whose instances are the layers with an adapter layer for which `carries` holds.

    `tensor_names` are the first components of the names of the tensors of such adapter layers; those of `base`, if empty.
    """
    members: dict[str, object] = {
        "adapter_layer_names": tuple(sorted(tensor_names)) or base.adapter_layer_names,
        "recognises": staticmethod(lambda layer: _carries(layer, carries)),
        "__doc__": f"A layer with a {name}.",
        "__module__": __name__,
    }
    return cast("type[BaseTunerLayer]", _Recognising(name, (base,), members))
