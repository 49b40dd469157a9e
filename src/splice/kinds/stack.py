"""The factors of many adapters on one layer, stacked: then a mixed batch takes two batched products for all of them.

An adapter whose factors lie in a stack has the same parameters as any other, under the same names: they are views of the
stack, each of its own adapter's rank. Behind a smaller rank than the stack's stand zeros, which add nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

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
        # By adapter name.
        self.tenants: dict[str, Tenant] = {}
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
        return self.a.nbytes + self.b.nbytes

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
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device != self.a.device:
            return False
        own = (self.a.untyped_storage().data_ptr(), self.b.untyped_storage().data_ptr())
        return tensor.untyped_storage().data_ptr() in own

    def vacate(self, name: str) -> None:
        """Give the parameters of an adapter memory of their own: whoever holds them goes on reading their values."""
        tenant = self.tenants.pop(name, None)
        if tenant is None:
            return
        with torch.inference_mode(False):
            for parameter, address in ((tenant.a, tenant.at_a), (tenant.b, tenant.at_b)):
                if parameter.data_ptr() == address:
                    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

    def clear(self, number: int) -> None:
        """Make the slot empty."""
        if number in self.written:
            for stacked in (self.a, self.b):
                stacked[number].zero_()
            self.written.discard(number)
