"""The factors of many adapters on one layer, stacked: then a mixed batch takes two batched products for all of them.

An adapter whose factors lie in a stack has the same parameters as any other, under the same names: they are views of the
stack, each of its own adapter's rank. Behind a smaller rank than the stack's stand zeros, which add nothing.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from splice.kinds.effect import Effect
from splice.kinds.layer import AdapterLayer
from splice.kinds.tensors import Registry


class Tenant(NamedTuple):
    """An adapter's factors in a stack."""

    # The number of the slot.
    number: int
    # The layer that they are of.
    layer: AdapterLayer
    # Where the first factor is registered.
    home_a: Registry
    # Its name there.
    name_a: str
    # The parameter, (r, in).
    a: torch.Tensor
    # The address at which its values lie in the stack.
    at_a: int
    # Where the second factor is registered.
    home_b: Registry
    # Its name there.
    name_b: str
    # The parameter, (out, r).
    b: torch.Tensor
    # The address at which its values lie in the stack.
    at_b: int


class Left(NamedTuple):
    """A parameter that is about to leave its slot."""

    # The parameter; nobody is kept from forgetting it.
    parameter: weakref.ref[torch.Tensor]
    # The address at which its values lie in the stack.
    address: int

    @classmethod
    def of(cls, tenant: Tenant) -> list[Left]:
        """Those of an adapter on one layer."""
        return [cls(weakref.ref(tenant.a), tenant.at_a), cls(weakref.ref(tenant.b), tenant.at_b)]


@torch.inference_mode(False)
def give_memory(left: Iterable[Left], gone: bool = False) -> None:
    """Give those of these parameters memory of their own that are still in their slots, and that somebody still holds.

    Args:
        left: the parameters.
        gone: whether their slots are cleared. A graph reads the slot itself, and its backward is refused from then on.
    """
    for reference, address in left:
        parameter = reference()
        if parameter is not None and parameter.data_ptr() == address:
            if gone and not parameter.is_inference():
                torch.autograd.graph.increment_version(parameter)
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


class Stack:
    """Stacked factors of one layer, in numbered slots. A copy of a layer, or a pickle of it, has none."""

    def __init__(self, count: int, shape_a: torch.Size, shape_b: torch.Size, like: torch.Tensor) -> None:
        """With all slots empty.

        Args:
            count: how many slots.
            shape_a: of one slot, (r, in).
            shape_b: of one slot, (out, r).
            like: a tensor of the dtype and on the device that the factors have.
        """
        # Loads and calls may come inside and outside of `inference_mode`, whose tensors cannot be changed outside of it.
        with torch.inference_mode(False):
            # (slots, r, in) and (slots, out, r), zero where nothing is.
            self.a = torch.zeros((count, *shape_a), dtype=like.dtype, device=like.device)
            self.b = torch.zeros((count, *shape_b), dtype=like.dtype, device=like.device)
            # (slots), what the products are multiplied with. In a compiled graph it stands beside half-precision factors.
            wide = torch.promote_types(like.dtype, torch.float32)
            self.scales = torch.zeros(count, dtype=wide, device=like.device)
        # Whether compiled graphs have been told that these tensors keep their addresses.
        self.stays_in_place = False
        # By adapter name.
        self.tenants: dict[str, Tenant] = {}
        # Slots whose updates were no plain products when they were last looked at.
        self.unscaled: set[int] = set()
        # Slots that may hold something else than zeros.
        self.written: set[int] = set()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # Parameters of a copy have memory of their own, outside of any stack.
        return type(None), ()

    @property
    def sizes(self) -> tuple[int, int]:
        """Features that go in, and that come out."""
        return self.a.shape[2], self.b.shape[1]

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes + self.scales.nbytes

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All memory of the stack: the factors A, those B, and the scales."""
        return self.a, self.b, self.scales

    def views(self, number: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What factors of this rank are in the slot: (rank, in) and (out, rank)."""
        self.written.add(number)
        # `.data`: with a version counter of its own, so that training one adapter is no change of another one's factors.
        with torch.inference_mode(False):
            return self.a[number, :rank].data, self.b[number, :, :rank].data

    def settle(self, name: str, number: int, layer: AdapterLayer) -> None:
        """Have the values of a layer's factors in the slot from now on; the parameters stay the objects they are."""
        (home_a, name_a, _), (home_b, name_b, _) = (layer.registered[suffix] for suffix in layer.stacked_names)
        a, b = home_a[name_a], home_b[name_b]
        for parameter, view in zip((a, b), self.views(number, a.shape[0])):
            if parameter.data_ptr() != view.data_ptr():
                parameter.data = view.copy_(parameter.data)
        self.tenants[name] = Tenant(number, layer, home_a, name_a, a, a.data_ptr(), home_b, name_b, b, b.data_ptr())
        layer.stack = self
        self._write_scale(number, layer)

    def rescaled(self, layer: Effect) -> None:
        """Take the scale that the layer has now."""
        for tenant in self.tenants.values():
            if tenant.layer is layer:
                self._write_scale(tenant.number, layer)

    def knows_scale(self, number: int, layer: Effect) -> bool:
        """Whether the scale in this slot is the layer's, which is brought there; it has none while features are dropped."""
        if layer.product_scale() is None:
            return False
        if number in self.unscaled:
            self._write_scale(number, layer)
        return True

    def _write_scale(self, number: int, layer: Effect) -> None:
        # Where the update is no plain product now, nobody may read the slot: a graph that does gives no number.
        scale = layer.product_scale()
        with torch.inference_mode(False):
            self.scales[number] = math.nan if scale is None else scale
        (self.unscaled.discard if scale is not None else self.unscaled.add)(number)

    def inside(self) -> list[str]:
        """The adapters whose factors lie here now."""
        return [name for name, tenant in self.tenants.items() if self.find(name, tenant.layer) >= 0]

    def follow(self, names: Iterable[str]) -> None:
        """Be where the factors of these adapters are now, and in their dtype, after all of a layer was moved (`.to`)."""
        moved = {name: self.tenants[name] for name in names if self.find(name, self.tenants[name].layer) < 0}
        if not moved:
            return
        # With all of the stack (`share_memory`): then they lie in it still.
        if all(self.owns(tenant.home_a[tenant.name_a]) for tenant in moved.values()):
            for name, tenant in moved.items():
                self.settle(name, tenant.number, tenant.layer)
            return
        first = next(iter(moved.values()))
        like = first.home_a[first.name_a]
        for name in [name for name, tenant in self.tenants.items() if name not in moved]:
            self.vacate(name)
        for numbers in (self.tenants, self.unscaled, self.written):
            numbers.clear()
        if like.is_meta:
            return
        empty = Stack(len(self.a), self.a.shape[1:], self.b.shape[1:], like)
        (self.a, self.b, self.scales), self.stays_in_place = empty.tensors, False
        for name, tenant in moved.items():
            a, b = tenant.home_a[tenant.name_a], tenant.home_b[tenant.name_b]
            if all(type(t) is nn.Parameter and t.dtype is like.dtype and t.device == like.device for t in (a, b)):
                self.settle(name, tenant.number, tenant.layer)

    def find(self, name: str, layer: AdapterLayer) -> int:
        """The slot in which the factors of an adapter's layer lie now; -1 where they are elsewhere.

        It is asked at every call: `.to`, FSDP, `load_state_dict` and whoever sets `.data` take parameters out, and tell
        nobody.
        """
        tenant = self.tenants.get(name)
        if tenant is None:
            return -1
        number, of, home_a, name_a, a, at_a, home_b, name_b, b, at_b = tenant
        inside = of is layer and home_a[name_a] is a and home_b[name_b] is b
        return number if inside and a.data_ptr() == at_a and b.data_ptr() == at_b else -1

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether the values of a tensor lie in the stack: kept or pickled as it is, it would bring all of the stack."""
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.device != self.a.device:
            return False
        own = [stacked.untyped_storage().data_ptr() for stacked in (self.a, self.b)]
        return tensor.untyped_storage().data_ptr() in own

    def vacate(self, name: str) -> None:
        """Give the parameters of an adapter memory of their own: whoever holds them goes on reading their values."""
        tenant = self.tenants.get(name)
        left = [] if tenant is None else Left.of(tenant)
        self.let_go(name)
        give_memory(left)

    def let_go(self, name: str) -> None:
        """Have nothing of an adapter any more but its values, in a slot that is to be cleared."""
        tenant = self.tenants.pop(name, None)
        if tenant is not None:
            tenant.layer.stack = None

    def clear(self, number: int) -> None:
        """Make the slot empty."""
        if number in self.written:
            for stacked in self.tensors:
                stacked[number].zero_()
            self.written.discard(number)
            self.unscaled.discard(number)
