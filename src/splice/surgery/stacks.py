"""Slots: which adapters have one, and the stacks in which their factors lie, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from heapq import heappop, heappush
from operator import is_
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import nn

from splice.base.dense import device_of
from splice.errors import counted
from splice.kinds.layer import AdapterLayer
from splice.kinds.stack import Left, Stack, give_memory
from splice.kinds.tensors import Registry
from splice.surgery.placement import Placement
from splice.surgery.slot_rows import SlotRows

# Of a checkpoint's tensors: the path of the layer, and the suffix.
Where = tuple[str, str]


class Seated(NamedTuple):
    """Where all tensors of an adapter were found. Asked again at every call by names, of thousands of tensors."""

    # Its layers.
    layers: tuple[AdapterLayer, ...]
    # Where its tensors are registered, and under which names.
    places: tuple[tuple[Registry, str], ...]
    # The tensors that were there.
    tensors: tuple[torch.Tensor, ...]
    # Their addresses.
    addresses: tuple[int, ...]

    @classmethod
    def of(cls, layers: Mapping[str, AdapterLayer]) -> Seated:
        found = [layer.registered[suffix] for layer in layers.values() for suffix in layer.stacked_names]
        tensors = tuple(registry[name] for registry, name, _ in found)
        places = tuple((registry, name) for registry, name, _ in found)
        return cls(tuple(layers.values()), places, tensors, tuple(map(torch.Tensor.data_ptr, tensors)))

    def holds(self, layers: Mapping[str, AdapterLayer]) -> bool:
        """Whether all is where it was, and no layer is in training, where features may be dropped."""
        # Without a call for each layer: this is what keeps a question to a tensor under a fifth of a microsecond.
        return (
            len(layers) == len(self.layers)
            and all(map(is_, layers.values(), self.layers))
            and all(map(is_, [registry[name] for registry, name in self.places], self.tensors))
            and tuple(map(torch.Tensor.data_ptr, self.tensors)) == self.addresses
            and not any(layer.base.training for layer in self.layers)
        )


class Stacks:
    """Numbered slots, the same on every layer. A stack is made when the first adapter with a slot comes to its layer.

    Factors that do not fit into a slot are in memory of their own, and compute the same.
    """

    def __init__(self, count: int, rank: int) -> None:
        """With all slots free.

        Args:
            count: how many there are, at least 1.
            rank: the largest rank that has room in one, at least 1.
        """
        self.count, self.rank = count, rank
        # Adapter name -> its slot.
        self.numbers: dict[str, int] = {}
        # Adapter name -> why it, or a part of it, is in no slot.
        self.outside: dict[str, str] = {}
        # By the layer's path.
        self.of_layer: dict[str, Stack] = {}
        # Adapters that were found to lie in their slots with all of their tensors, by name.
        self._seated: dict[str, Seated] = {}
        # Parameters that are on their way out of a slot, by adapter name.
        self._left: dict[str, list[Left]] = {}
        # What names slots by their numbers, and has to hear when an adapter leaves one.
        self.readers: WeakSet[SlotRows] = WeakSet()
        # Of a copy: the adapters that moved in when it was made, in the order of their slots.
        self.awaited: tuple[str, ...] = ()
        # The lowest first, so that those in use are neighbours.
        self._free = list(range(count))

    def __reduce__(self) -> tuple[type[Stacks], tuple[int, int], dict[str, object]]:
        # A copy has slots of its own, empty at first: parameters of a copied network have memory of their own.
        return Stacks, (self.count, self.rank), {"awaited": tuple(sorted(self.numbers, key=self.numbers.__getitem__))}

    @property
    def free(self) -> int:
        """How many slots are free."""
        return len(self._free)

    def seats(self, placement: Placement, shared: Container[str]) -> bool:
        """Whether a layer to be is of the kind and rank that a slot has room for; `shared` as in `room_for`."""
        if not placement.is_product or placement.path in shared:
            return False
        return placement.slots[placement.layer_class.stacked_names[0]].shape[0] <= self.rank

    @property
    def nbytes(self) -> int:
        """Bytes of all stacks."""
        return sum(stack.nbytes for stack in self.of_layer.values())

    def room_for(
        self, name: str, placements: Sequence[Placement], shared: Iterable[str], autocast: bool
    ) -> dict[Where, torch.Tensor]:
        """Memory in a free slot for the factors of an adapter that is about to be read; nothing where none has room.

        Args:
            name: of the adapter.
            placements: its layers to be.
            shared: paths of those whose tensors other layers share.
            autocast: as in `Placement.dtype`.
        """
        number, shared, found = self._number(name), set(shared), dict[Where, torch.Tensor]()
        if number is None:
            return found
        for p in placements:
            if not self.seats(p, shared):
                continue
            names = suffix_a, suffix_b = p.layer_class.stacked_names
            like = torch.empty(0, dtype=p.dtype(suffix_a, autocast), device=device_of(p.base))
            shapes = torch.Size(p.slots[suffix_a].shape), torch.Size(p.slots[suffix_b].shape)
            stack = self._stack(p.path, *shapes, like)
            if isinstance(stack, Stack):
                found.update(zip(((p.path, suffix) for suffix in names), stack.views(number, shapes[0][0])))
        return found

    def admit(self, name: str, layers: Mapping[str, AdapterLayer]) -> dict[str, Stack]:
        """Let the factors of these layers of an adapter, by path, be in its slot; the stacks they are in, by path.

        The parameters stay the objects they are. What does not fit stays where it is, and `outside` says why.
        """
        shared = {leader.path for layer in layers.values() for leader in layer.leaders.values()}
        number, found, why = self._number(name), dict[str, Stack](), dict[str, str]()
        self.outside.pop(name, None)
        if number is None:
            self.outside[name] = f"all {counted(self.count, 'slot')} are taken"
            return found
        for path, layer in layers.items():
            stack = self._stack_of(path, layer, path in shared)
            if isinstance(stack, Stack):
                stack.settle(name, number, layer)
                found[path] = stack
            else:
                why[path] = stack
        if not found:
            self._give_back(name)
        if why:
            path, reason = next(iter(why.items()))
            of = f"{len(why)} of its {counted(len(layers), 'layer')}, for " if found else ""
            self.outside[name] = f"{of}{path}: {reason}"
        return found

    def release(self, name: str, forget: Callable[[], object] = lambda: None) -> None:
        """Free the slot of an adapter, if it has one. Its parameters get memory of their own where somebody holds them.

        `forget` is called first: it lets go of what the network itself has of the adapter. Most deletions copy nothing then.
        The backward of a call that was made before raises torch's RuntimeError: values it needs are overwritten.
        """
        self.outside.pop(name, None)
        self._give_back(name, forget)

    def give_up(self) -> None:
        """Let every adapter have memory of its own again. Nothing comes to these slots any more."""
        for name in list(self.numbers):
            for reader in list(self.readers):
                reader.leave(name)
            for stack in self.of_layer.values():
                stack.vacate(name)  # and not cleared: graphs may need the values
            self._seated.pop(name, None)
            del self.numbers[name]

    def seat(self, name: str, layers: Mapping[str, AdapterLayer]) -> tuple[int, str]:
        """The adapter's slot, and why not all of its layers, by path, lie there now; empty where they do."""
        number, known = self.numbers.get(name, -1), self._seated.get(name)
        if name in self.outside or number < 0:
            return -1, self.outside.get(name, "it never came to one")
        if known is not None and known.holds(layers) and not any(stack.unscaled for stack in self.of_layer.values()):
            return number, ""
        for path, layer in layers.items():
            stack = self.of_layer.get(path)
            if stack is None or stack.find(name, layer) != number:
                return -1, f"{path}: its tensors were moved out of it"
            if not stack.knows_scale(number, layer):
                return -1, f"{path}: its scale is a tensor, or features of its input are dropped"
        self._seated[name] = Seated.of(layers)
        return number, ""

    def _give_back(self, name: str, forget: Callable[[], object] = lambda: None) -> None:
        number = self.numbers.get(name)
        if number is None:
            forget()
            return
        self._seated.pop(name, None)
        for reader in list(self.readers):
            reader.leave(name)
        # In this order, so that what an interrupt cuts short can be done again.
        left = self._left.setdefault(name, [])
        for stack in self.of_layer.values():
            tenant = stack.tenants.get(name)
            if tenant is not None:
                left += Left.of(tenant)
                del tenant
                stack.let_go(name)
        forget()
        give_memory(left, gone=True)
        with torch.inference_mode(False):
            for stack in self.of_layer.values():
                stack.clear(number)
        del self._left[name]
        if number not in self._free:
            heappush(self._free, number)
        del self.numbers[name]

    def _number(self, name: str) -> int | None:
        """The adapter's slot, a free one where it has none yet; None where none is free."""
        if name not in self.numbers and self._free:
            self.numbers[name] = heappop(self._free)
        return self.numbers.get(name)

    def _stack_of(self, path: str, layer: AdapterLayer, shared: bool) -> Stack | str:
        """The stack that the layer's factors fit into, or why they fit into none."""
        if not layer.stacked_names or set(layer.registered) != set(layer.stacked_names):
            return f"a {type(layer).__name__} with {sorted(layer.registered)} is no plain product of two factors"
        if shared or layer.leaders:
            return "it shares its tensors with a layer that is tied to it"
        a, b = (layer.tensor(suffix) for suffix in layer.stacked_names)
        if type(a) is not nn.Parameter or type(b) is not nn.Parameter or a.is_meta:
            return "its tensors are sharded, offloaded or without values"
        return self._stack(path, a.shape, b.shape, a)

    def _stack(self, path: str, shape_a: torch.Size, shape_b: torch.Size, like: torch.Tensor) -> Stack | str:
        """The layer's stack, made where there is none that is in use, or why such factors do not fit into it."""
        rank, size_in = shape_a
        if rank > self.rank:
            return f"its rank {rank} is above that of the slots, {self.rank}"
        if like.is_meta:
            return "its layer has no memory"
        stack = self.of_layer.get(path)
        if stack is not None and _fits(stack, shape_a, shape_b, like):
            return stack
        if stack is not None and stack.tenants:
            return f"its tensors are {_told(like, size_in, shape_b[0])}, and the slots {_told(stack.a, *stack.sizes)}"
        slot = torch.Size((self.rank, size_in)), torch.Size((shape_b[0], self.rank))
        self.of_layer[path] = stack = Stack(self.count, *slot, like)
        return stack


def _fits(stack: Stack, shape_a: torch.Size, shape_b: torch.Size, like: torch.Tensor) -> bool:
    same = stack.a.dtype is like.dtype and stack.a.device == like.device
    return same and stack.sizes == (shape_a[1], shape_b[0])


def _told(like: torch.Tensor, size_in: int, size_out: int) -> str:
    return f"{str(like.dtype).removeprefix('torch.')} on {like.device}, from {size_in} to {size_out} features"
