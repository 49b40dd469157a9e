"""Classes by which other libraries recognise layers that carry adapters: `isinstance(module, BaseTunerLayer)`.

Nothing is an instance of them by inheritance: an adapted layer is of its own class's subclass. They look at what it carries.
"""

from __future__ import annotations

from collections.abc import Callable

from splice.kinds.layer import AdapterLayer
from splice.kinds.module_copy import WholeModule
from splice.kinds.network import NetworkLayer
from splice.surgery.adapted_layer import Adapted, is_whole


class _Recognising(type):
    """The class of classes that decide by themselves what their instances are."""

    # Whether a layer is an instance; a static method of each class.
    recognises: Callable[[Adapted], bool]

    # Python looks this up on the class of the class, so no method of the classes themselves could take its place.
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Adapted) and cls.recognises(instance)


class BaseTunerLayer(metaclass=_Recognising):
    """A layer that carries adapter layers of a method; not the network as a whole, which has a `set_adapter` of its own."""

    @staticmethod
    def recognises(layer: Adapted) -> bool:
        on_call = any(isinstance(adapter, NetworkLayer) for adapter in layer.splice_host.layers.values())
        return not on_call and not is_whole(layer)


class ModulesToSaveWrapper(metaclass=_Recognising):
    """A module of which some adapter keeps a trained copy."""

    @staticmethod
    def recognises(layer: Adapted) -> bool:
        return any(isinstance(adapter, WholeModule) for adapter in layer.splice_host.layers.values())


class AuxiliaryTrainingWrapper(metaclass=_Recognising):
    """A module that carries nothing but what is kept whole."""

    @staticmethod
    def recognises(layer: Adapted) -> bool:
        return is_whole(layer)


def layer_of(name: str, carries: Callable[[AdapterLayer], bool]) -> type:
    """A class `name` whose instances are the layers with an adapter layer for which `carries` holds."""

    def recognises(layer: Adapted) -> bool:
        return any(carries(adapter) for adapter in layer.splice_host.layers.values())

    return _Recognising(name, (), {"recognises": staticmethod(recognises), "__doc__": f"A layer with a {name}."})
