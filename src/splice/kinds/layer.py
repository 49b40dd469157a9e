"""An adapter layer: what one adapter puts on one target, and the kinds that methods build on.

A method supplies `slots` (which tensors, of which shape), `prepare` (numbers that follow from the config), `initialise`
and its mathematics. Everything else (attaching, selecting, merging, dtypes, devices, dropout, saving) is hosted once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from splice.base.dense import dtype_of
from splice.checkpoint.keys import format_key
from splice.config import PeftConfig
from splice.kinds.adapters import Adapters
from splice.kinds.light_module import LightModule, Slots

Forward = Callable[..., Any]
HALVES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)


class Factors(NamedTuple):
    """An update of a linear layer that is a plain product: `scale * b a`, with a (r, in) and b (out, r)."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


OFFLOADED = (
    "the adapter's tensors are on the meta device: they were left empty (low_cpu_mem_usage), or offloaded by hooks that came "
    "after the adapter. Dispatch or offload the base model first, then load the adapter."
)


def check_values(own: torch.Tensor, x: torch.Tensor) -> None:
    """Raise where `own`, a tensor of an adapter, has no values to compute with `x`.

    Raises:
        RuntimeError: it is on the meta device, and `x` is not.
    """
    if own.is_meta and not x.is_meta:
        raise RuntimeError(OFFLOADED)


def cast_to(x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The input `x` in the dtype of `own`, a tensor of an adapter; indices stay as they are.

    Raises:
        RuntimeError: `own` has no values.
    """
    check_values(own, x)
    return x if x.dtype is own.dtype or not x.is_floating_point() else x.to(own.dtype)


@dataclass
class Call:
    """What a PeftModel was called with.

    Attributes:
        input_ids: the tokens, if it was given any.
        options: all named arguments, as they are passed on.
        generates: whether it is a call of `generate`.
    """

    input_ids: torch.Tensor | None
    options: dict[str, Any]
    generates: bool


class AdapterLayer(LightModule):
    """Tensors and mathematics of one adapter on one target.

    Its state-dict names are the suffixes that stand in the checkpoint (`lora_A.weight`).

    Args:
        base: the target. It is read, never kept: a reference would put the base under the adapter's name.
        config: the adapter's config.
        path: dotted path of the target in the base model.
        tensors: one tensor for every name in `slots(base, config, path)`, made for this layer alone.
    """

    # How the reference spells the tensors of the base layer once this is on it (`base_layer.weight`).
    base_infix: str = "base_layer."
    # True where `inner` is called with the very input `x`: then its output may be computed once for several adapters.
    keeps_input: bool = True
    # Of several active adapters the first is the innermost; the first that the input meets where this is True.
    first_outside: ClassVar[bool] = False
    # Suffixes of tensors that are never trained: they are held as buffers.
    frozen: ClassVar[frozenset[str]] = frozenset()
    # Parameters that are none to train: the reference registers a number or two so.
    never_trained: ClassVar[frozenset[str]] = frozenset()
    # Whether `deltas` gives the whole update, and whether its `weight` is (out, in) however the base stores it.
    mergeable: bool = False
    linear_layout: ClassVar[bool] = True
    # Whether the base with the merged tensors computes what the adapter does; where not, merging says so.
    merges_exactly: bool = True
    # Whether it goes on computing while it is merged: the base's own tensors cannot hold what it is.
    stays_merged: bool = False
    trained_bias: nn.Parameter | None
    # Whether it has to know what the PeftModel was called with.
    reads_call: ClassVar[bool] = False
    # Whether `shown` gives anything: asked at every call.
    shows: bool = False
    # Names that the reference gives its tensors as a whole -> the attribute of this layer.
    aliases: ClassVar[Mapping[str, str]] = MappingProxyType({})
    # The path of the layer of the same adapter whose tensors this one shares, where two base layers are tied.
    leader: str = ""
    # Own suffix -> suffix of the tensor it is the transpose of, where it shares those of a layer of another class.
    transposes: ClassVar[Mapping[str, str]] = MappingProxyType({})
    # What all layers of its adapter share, in a tuple: it is no child, and the same object for all of them.
    shared: tuple[AdapterLayer, ...] = ()
    uses_shared: ClassVar[bool] = False
    # The config it was made from, where that is not the adapter's.
    own_config: PeftConfig | None = None

    def __init__(self, base: nn.Module, config: PeftConfig, path: str, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._parameters["trained_bias"] = None
        for name, tensor in tensors.items():
            self._hold(name, tensor)
        if self.trained_bias is not None:
            self.shows = True
        self.prepare(base, config, path)

    @classmethod
    def slots(cls, base: nn.Module, config: Any, path: str) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that this adapter has on `base`; nothing is allocated.

        Raises:
            ValueError: the config cannot be applied to this layer.
        """
        raise NotImplementedError

    @classmethod
    def companions(cls, base: nn.Module, path: str) -> dict[str, type[AdapterLayer]]:
        """Further layers, by path below `base`, that get an adapter layer of their own wherever `base` gets this one."""
        return {}

    @classmethod
    def resolved(cls, base: nn.Module, config: Any) -> dict[str, Any]:
        """Fields that the config leaves open and this base decides."""
        return {}

    @classmethod
    def key(cls, path: str, suffix: str) -> str:
        """The name of a tensor in the checkpoint."""
        return format_key(path, suffix)

    @classmethod
    def held_dtype(cls, base: nn.Module, suffix: str, autocast: bool) -> torch.dtype:
        """The dtype of a tensor in memory: the base's, or float32 for half-precision bases with `autocast`."""
        own = dtype_of(base)
        if suffix in ("bias", "base_layer.bias"):
            return own
        return torch.float32 if own in HALVES and (autocast or own.itemsize == 1) else own

    def prepare(self, base: nn.Module, config: Any, path: str) -> None:
        """Work out what does not change between calls."""

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: Any) -> None:
        """Fill the empty `tensors` of a new adapter in place."""
        raise NotImplementedError

    def begin(self) -> None:
        """Bring a new adapter's tensors where they start, if that takes more than `initialise` knows of."""

    def around(self, x: torch.Tensor, inner: Forward) -> Any:
        """The adapted output for `x`. `inner` is the base layer, or the next adapter layer in."""
        return inner(x)

    @classmethod
    def call_context(cls, adapters: Adapters, names: Sequence[str], call: Call) -> AbstractContextManager[None]:
        """What holds while the PeftModel is called; asked of methods whose layers set `reads_call`.

        Args:
            adapters: those of the model.
            names: its adapters with such layers.
            call: what it was called with; options that are not the base model's are taken out.
        """
        raise NotImplementedError

    def wrapped(self, inner: Forward) -> Forward:
        """`around` as a function of the base layer's own arguments."""
        around = self.around
        return lambda x: around(x, inner)

    def wrapped_for(self, inner: Forward, rows: torch.Tensor) -> Forward:
        """`wrapped` for these rows of a batch alone, which are all that it is called with."""
        return self.wrapped(inner)

    @classmethod
    def wrapped_rows(cls, layers: Mapping[str, AdapterLayer], rows: Any, inner: Forward) -> Forward | None:
        """`wrapped` for a batch with an adapter for each row, of methods for which rows cannot be taken one by one.

        Args:
            layers: the adapter layers of the base layer, by adapter name.
            rows: which adapter each row has, a `Rows`.
            inner: the base layer.
        """
        return None

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor | None:
        """What merging adds to the dense `weight`, (out, in) for linear layers; None where it cannot be merged."""
        return None

    def delta_bias(self) -> torch.Tensor | None:
        """What merging adds to the base bias; None for nothing."""
        return None

    @property
    def changed_names(self) -> tuple[str, ...]:
        """The base tensors that merging changes."""
        return ("weight",) if self.delta_bias() is None else ("weight", "bias")

    def deltas(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What merging adds to each of `changed_names`, given these tensors of the base."""
        weight, bias = self.delta_weight(tensors["weight"]), self.delta_bias()
        found = {"weight": weight, "bias": bias}
        return {name: delta for name, delta in found.items() if delta is not None}

    def replaced(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What merging puts in the place of these tensors of the base, before anything is added."""
        return {}

    def conflict(self, other: AdapterLayer) -> str:
        """Why this one and that of another adapter on the same layer cannot take effect together; empty if they can."""
        return ""

    def factors(self) -> Factors | None:
        """The update as a plain product of the layer's input, where it is one now: then rows are worked out together."""
        return None

    def shown(self, base: nn.Module) -> dict[str, torch.Tensor]:
        """Tensors that take the place of the base's own of the same name while `base` computes."""
        return {} if self.trained_bias is None else {"bias": self.trained_bias}

    def named_slots(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor under its suffix in the checkpoint."""
        for name, parameter in self._parameters.items():
            if parameter is not None:
                yield ("base_layer.bias" if name == "trained_bias" else name), parameter
        for name, buffer in self._buffers.items():
            if buffer is not None and name not in self._non_persistent_buffers_set:
                yield name, buffer
        for name, child in self._modules.items():
            assert isinstance(child, Slots)
            yield from child.named_slots(f"{name}.")

    def stored_slots(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What a checkpoint holds of this layer; other than `named_slots` where it is worked out from those."""
        yield from self.named_slots()

    def join(self, shared: AdapterLayer) -> None:
        """Take what all layers of this adapter share; called once, of methods whose record has `shared`."""
        if type(self).uses_shared:
            self.shared = (shared,)

    def attribute_of(self, suffix: str) -> str:
        """The dotted attribute of this layer that holds the tensor with this suffix."""
        return "trained_bias" if suffix == "base_layer.bias" else suffix

    @classmethod
    def memory_name(cls, suffix: str, adapter_name: str) -> str:
        """How the reference names the tensor in memory: the adapter's name stands behind the first component."""
        if suffix == "base_layer.bias":
            return suffix
        first, dot, rest = suffix.partition(".")
        return f"{first}.{adapter_name}{dot}{rest}"

    @classmethod
    def full_memory_name(cls, path: str, suffix: str, adapter_name: str) -> str:
        """How the reference names the tensor in memory, seen from the PeftModel."""
        return format_key(path, cls.memory_name(suffix, adapter_name))

    def base_front(self, path: str) -> str:
        """What the reference puts before the names of the base's own tensors, once this is on it."""
        return format_key(path, self.base_infix)

    def set_trained(self, trained: bool) -> None:
        """Whether the tensors of this layer are trained."""
        for parameter in self.trained_parameters():
            if parameter.is_leaf:  # under FSDP there are others
                parameter.requires_grad = trained

    def trained_parameters(self) -> list[nn.Parameter]:
        """Those that are trained where the adapter is."""
        return [parameter for name, parameter in self.named_parameters() if name not in self.never_trained]

    def train(self, mode: bool = True) -> AdapterLayer:
        """Only this layer has a mode; its holders of tensors have none."""
        self.__dict__["training"] = mode
        return self

    def _hold(self, name: str, tensor: torch.Tensor) -> None:
        *parents, leaf = self.attribute_of(name).split(".")
        holder: nn.Module = self
        for parent in parents:
            child = holder._modules.get(parent)
            if child is None:
                child = holder._modules[parent] = Slots()
            holder = child
        if name in self.frozen:
            holder._buffers[leaf] = tensor
            return
        parameter = tensor if type(tensor) is nn.Parameter else nn.Parameter(tensor, requires_grad=False)
        holder._parameters[leaf] = parameter
