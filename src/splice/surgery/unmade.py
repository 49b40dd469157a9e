"""A tensor that is worked out when somebody computes with it, and not when somebody asks for its dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch.utils._pytree import tree_map_only

# What is answered without working anything out: models ask for these of the weights of layers that they then call.
_ASKED = (
    *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "is_meta", "is_cuda", "is_cpu"),
    *("is_sparse", "is_quantized", "itemsize", "nbytes"),
)
_CALLED = ("size", "dim", "numel", "nelement", "is_floating_point", "is_complex", "element_size", "get_device")
_KNOWN = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in _ASKED]
    + [getattr(torch.Tensor, name) for name in _CALLED]
    + [torch.is_floating_point, torch.is_complex, torch.numel]
)


class Unmade(torch.Tensor):
    """Stands for a tensor of the shape, dtype and device of `like`, until somebody computes with it.

    It has no memory of its own: code that takes no torch function at all (a kernel that wants a pointer) fails, and cannot
    read something else.
    """

    _make: Callable[[], torch.Tensor]
    _made: torch.Tensor | None

    @staticmethod
    def __new__(cls, like: torch.Tensor, make: Callable[[], torch.Tensor]) -> Unmade:
        self: Unmade = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        self._make, self._made = make, None
        return self

    def __init__(self, like: torch.Tensor, make: Callable[[], torch.Tensor]) -> None:
        pass

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: Iterable[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(Unmade, made, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., object],
        types: Iterable[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        # Code in C++ comes here at once.
        args, kwargs = tree_map_only(Unmade, made, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)


def made(tensor: Unmade) -> torch.Tensor:
    """The tensor that it stands for, worked out once."""
    with torch._C.DisableTorchFunctionSubclass():
        if tensor._made is None:
            tensor._made = tensor._make()
        return tensor._made
