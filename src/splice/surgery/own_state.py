"""The state dict of a layer whose class writes it in a way of its own, and knows nothing of modules below."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from splice.kinds.host import host_of


def state_members(base: type[nn.Module]) -> dict[str, object]:
    """What the class of an adapted layer needs in front of `base`, so that adapters are in its state dict."""
    # By the class that says it first: torch's own walks the tree, and adapters are in that.
    return {} if base.state_dict is nn.Module.state_dict else {"state_dict": _state_dict_of(base)}


def _state_dict_of(base: type[nn.Module]) -> object:
    def state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> object:
        written = base.state_dict(self, *args, **kwargs)
        host, given = host_of(self), kwargs.get("destination")
        found = written if given is None else cast("dict[str, torch.Tensor]", given)
        front, keep = (kwargs.get("prefix") if given is not None else None) or "", bool(kwargs.get("keep_vars"))
        for name, module in () if host is None else host.added.items():
            found.update(module.state_dict(prefix=f"{front}{name}.", keep_vars=keep))
        return written

    return state_dict
