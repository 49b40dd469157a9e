"""The base model's own state dict, of a model that carries adapters: read and written by the names it has without them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from splice.base.weight_access import as_if_stored
from splice.kinds.original import original_tensor
from splice.loading.load import LoadResult
from splice.surgery.tuner import tuner_of


@torch.no_grad()
def get_base_model_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict that the base model would have without adapters. They are the live tensors, detached.

    While adapters are merged it has the values from before.

    Args:
        model: a PeftModel, or a network that carries adapters.
    """
    tuner, _ = tuner_of(model)
    added = tuple(f"{_front(path)}{name}." for path, host in tuner.hosts.items() for name in host.added)
    held = {_front(path) + name for path, host in tuner.hosts.items() for name in host.held}
    found: dict[str, torch.Tensor] = {
        name: tensor
        for name, tensor in tuner.model.state_dict().items()
        if not name.startswith(added) and name not in held
    }
    for path, host in tuner.hosts.items():
        if host.stored is not None:
            before = as_if_stored(host.base, host.stored).state_dict()
            found.update({_front(path) + name: tensor for name, tensor in before.items()})
        for name in (*host.displaced, *host.originals):
            own = original_tensor(host.base, name)
            if own is not None:
                found[_front(path) + name] = own.detach()
    return found


@torch.no_grad()
def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], strict: bool = True
) -> LoadResult:
    """Give the base model these tensors, by the names that it has without adapters. Adapters stay as they are.

    Args:
        model: a PeftModel, or a network that carries adapters.
        state_dict: the tensors.
        strict: refuse a state dict that lacks a tensor of the base, or has one more.

    Returns:
        `missing_keys` and `unexpected_keys`, as `load_state_dict` of torch does.

    Raises:
        RuntimeError: with `strict`, names differ; or a tensor has another shape. Nothing has changed then.
        ValueError: adapters are merged into the tensors.
    """
    tuner, _ = tuner_of(model)
    if tuner.merged:
        raise ValueError(
            f"adapters {tuner.merged} are merged into the base's tensors; call `unmerge_adapter()` before giving it others"
        )
    own = get_base_model_state_dict(model)
    missing = [name for name in own if name not in state_dict]
    unexpected = [name for name in state_dict if name not in own]
    problems = [f"Missing key(s) in state_dict: {missing}"] if missing and strict else []
    problems += [f"Unexpected key(s) in state_dict: {unexpected}"] if unexpected and strict else []
    given = {name: tensor for name, tensor in state_dict.items() if name in own}
    problems += list(_other_shapes(given, own))
    if problems:
        raise RuntimeError("\n\t".join(["Error(s) in loading state_dict of the base model:", *problems]))
    # An adapter's trained bias stands in the place of such a one: by its name torch would overwrite that.
    for path, host in tuner.hosts.items():
        for name, parameter in host.displaced.items():
            tensor = given.pop(_front(path) + name, None)
            if tensor is not None:
                parameter.copy_(tensor)
    tuner.model.load_state_dict(given, strict=False)
    return LoadResult(missing, unexpected)


def _front(path: str) -> str:
    return f"{path}." if path else ""


def _other_shapes(given: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> Iterator[str]:
    # What layers of other libraries keep in a state dict beside tensors has no shape.
    for name, tensor in given.items():
        now = own[name]
        if isinstance(tensor, torch.Tensor) and isinstance(now, torch.Tensor) and tensor.shape != now.shape:
            yield f"size mismatch for {name}: {tuple(tensor.shape)} in state_dict, {tuple(now.shape)} in the base model"
