"""Base tensors in a state dict: under the names of the tree, or as the reference spells them (`base_layer.weight`).

Either is understood. A state dict that has a tensor under both, with other values, is refused before the first module takes
anything: torch loads module by module, so the parents of adapted layers look ahead.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from splice.kinds.host import Host, host_of


def guard_parents(modules: Mapping[str, nn.Module], paths: Iterable[str], guarded: dict[str, RemovableHandle]) -> None:
    """Let every module above one of these paths look ahead, those in `guarded` excepted; they are entered there.

    Args:
        modules: of the network, by path.
        paths: of adapted layers.
        guarded: the hooks that are there, by path.
    """
    for path in paths:
        parent = path
        while parent:
            parent = parent.rpartition(".")[0]
            if parent in guarded:
                break
            # Not by `register_load_state_dict_pre_hook`, which wraps each hook: that was a twentieth of a whole load.
            hooks = modules[parent]._load_state_dict_pre_hooks
            guarded[parent] = handle = RemovableHandle(hooks)
            hooks[handle.id] = _LookAhead(modules[parent])


class _LookAhead:
    """The hook: it does not keep its module alive, and a copy of the module has one of its own."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __call__(self, state_dict: dict[str, object], prefix: str, *others: object) -> None:
        module = self._module()
        if module is not None:
            check_spellings(module, state_dict, prefix)

    def __reduce__(self) -> tuple[type[_LookAhead], tuple[nn.Module | None]]:
        return _LookAhead, (self._module(),)


def check_spellings(module: nn.Module, state_dict: Mapping[str, object], prefix: str) -> None:
    """Raise where `state_dict` has two values for a tensor of an adapted layer in `module`.

    Raises:
        RuntimeError: it does; nothing has been loaded.
    """
    for key in state_dict:
        # Only keys with such a part: a state dict may have a million others.
        if "base_layer." not in key and "original_module." not in key:
            continue
        for own in _plain_names(module, key.removeprefix(prefix)):
            name = prefix + own
            if name in state_dict and not _same(state_dict[key], state_dict[name]):
                raise RuntimeError(
                    f"Error(s) in loading state_dict: {key!r} and {name!r} are two spellings of one tensor of the base "
                    "model, and their values differ. Leave one of them out. Nothing has been loaded."
                )


def _plain_names(module: nn.Module, name: str) -> Iterator[str]:
    """The name in the tree of the base tensor that `name` spells in the reference's way; nothing where it does not."""
    front, rest, layer = "", name, module
    while True:
        host = host_of(layer)
        if host is not None:
            yield from (front + plain for plain in [plain_name(host, rest)] if plain)
        part, dot, rest = rest.partition(".")
        child = layer._modules.get(part)
        if child is None or not dot:
            return
        front, layer = f"{front}{part}.", child


def plain_name(host: Host, name: str) -> str:
    """The layer's own name of the tensor that `name` spells in the reference's way; empty where it is no such spelling."""
    for layer in host.layers.values():
        infix = layer.names.base
        if infix and name.startswith(infix):
            # An adapter's own tensors may stand there in the tree: a trained bias is `base_layer.bias`.
            return "" if _is_in_tree(host.base, name) else name[len(infix) :]
    return ""


def _is_in_tree(module: nn.Module, name: str) -> bool:
    parent, _, leaf = name.rpartition(".")
    for part in filter(None, parent.split(".")):
        child = module._modules.get(part)
        if child is None:
            return False
        module = child
    return leaf in module._parameters or leaf in module._buffers


def _same(one: object, two: object) -> bool:
    if one is two or not isinstance(one, torch.Tensor) or not isinstance(two, torch.Tensor):
        return True
    if one.shape != two.shape:
        return False
    if one.is_meta or two.is_meta:
        return True
    dtype = torch.promote_types(one.dtype, two.dtype)
    return torch.allclose(one.to(dtype), two.to(device=one.device, dtype=dtype), rtol=0.0, atol=0.0, equal_nan=True)
