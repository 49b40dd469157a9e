"""What a network's first adapter changes about it beside its layers, and how it is taken back with the last one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from splice.base.asking import asked
from splice.surgery.replication import replicate


@dataclass
class BaseChanges:
    """The base's parameters are frozen, its input embeddings may be told to require grad, its config to use one slice.

    Attributes:
        unfrozen: parameters that were trainable before.
        hook: the hook on the input embeddings, where there is one.
        slices: `config.pretraining_tp` as it was, where it was not 1.
        ranges: of its layers, where they are used several times.
        unstack: puts the layers back as they were.
    """

    unfrozen: list[nn.Parameter] = field(default_factory=list)
    hook: Any = None
    slices: int | None = None
    ranges: list[list[int]] | None = None
    unstack: Callable[[], None] | None = None

    def make(self, network: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        """Change `network`, whose modules are `modules`."""
        for module in modules.values():
            for parameter in module._parameters.values():
                if parameter is not None and parameter.requires_grad:
                    self.unfrozen.append(parameter)
                    parameter.requires_grad = False
        if any(module.__dict__.get("gradient_checkpointing") for module in modules.values()):
            self._let_inputs_require_grad(network)
        config: Any = network.__dict__.get("config")
        slices = asked(config, "pretraining_tp", 1)  # few configs have it
        if slices not in (None, 1):
            # With more, older models of transformers multiply with slices of `weight` and never call the layer.
            self.slices, config.pretraining_tp = slices, 1

    def _let_inputs_require_grad(self, network: Any) -> None:
        """Recomputed blocks pass gradients on only if their input requires them, and below it everything is frozen."""
        find = asked(network, "get_input_embeddings")  # models outside of transformers have none
        embeddings = find() if find is not None and self.hook is None else None
        if embeddings is not None:
            self.hook = embeddings.register_forward_hook(_require_grad)

    def stack(self, network: nn.Module, ranges: Sequence[Sequence[int]], adapted: bool) -> bool:
        """Use layers of `network` several times, unless it does already; whether that changed it.

        Raises:
            ValueError: it carries adapters, or uses other layers several times.
        """
        wanted = [list(pair) for pair in ranges]
        if self.ranges == wanted:
            return False
        if adapted:
            was = "uses each layer once" if self.ranges is None else f"has layer_replication={self.ranges}"
            raise ValueError(
                f"this adapter needs layer_replication={wanted}, and the model carries adapters for which it {was}. Load the "
                "adapter onto a base model of its own."
            )
        self.unstack = replicate(network, wanted)
        self.ranges = wanted
        return True

    def take_back(self, network: nn.Module, keep_layers: bool = False) -> None:
        """Make `network` what it was; with `keep_layers` but for the layers that it uses several times."""
        if self.unstack is not None and not keep_layers:
            self.unstack()
        self.ranges = self.unstack = None
        for parameter in self.unfrozen:
            parameter.requires_grad = True
        self.unfrozen.clear()
        if self.hook is not None:
            self.hook.remove()
            self.hook = None
        if self.slices is not None:
            network.__dict__["config"].pretraining_tp = self.slices
            self.slices = None


def _require_grad(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    if output.is_leaf:
        output.requires_grad_(True)
