"""What a network's first adapter changes about it beside its layers, and how it is taken back with the last one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from splice.base.foreign_models import config_field, input_embedding_layer, set_config_field, uses_checkpointing
from splice.surgery.replication import replicate


@dataclass(eq=False, repr=False)
class BaseChanges:
    """The base's parameters are frozen, its input embeddings may be told to require grad, its config to use one slice.

    Attributes:
        unfrozen: parameters that were trainable before.
        hook: the hook on the input embeddings; None where there is none.
        slices: `config.pretraining_tp` as it was; None where it was 1 or is not there.
        ranges: those of the network's layers that it uses one after the other; None where it uses each layer once.
        unstack: puts the layers back as they were; None where they are.
        looking_ahead: the hooks on modules above adapted layers by which they check a state dict, by path.
    """

    unfrozen: list[nn.Parameter] = field(default_factory=list)
    hook: RemovableHandle | None = None
    slices: object = None
    ranges: list[list[int]] | None = None
    unstack: Callable[[], None] | None = None
    looking_ahead: dict[str, RemovableHandle] = field(default_factory=dict)

    def make(self, network: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        """Change `network`, whose modules are `modules`."""
        # Flags of single parameters are remembered, not one for all: a user may have frozen some before.
        for module in modules.values():
            for parameter in module._parameters.values():
                if parameter is not None and parameter.requires_grad:
                    self.unfrozen.append(parameter)
                    parameter.requires_grad = False
        if uses_checkpointing(modules.values()):
            self.hook = let_inputs_require_grad(network)
        slices = config_field(network, "pretraining_tp")
        if slices not in (None, 1):
            # With more, older models of transformers multiply with slices of `weight` and never call the layer. Both give
            # the same numbers but for rounding.
            self.slices = slices
            set_config_field(network, "pretraining_tp", 1)

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
        for handle in self.looking_ahead.values():
            handle.remove()
        self.looking_ahead.clear()
        if self.hook is not None:
            self.hook.remove()
            self.hook = None
        if self.slices is not None:
            set_config_field(network, "pretraining_tp", self.slices)
            self.slices = None


def let_inputs_require_grad(network: nn.Module) -> RemovableHandle | None:
    """Recomputed blocks pass gradients on only if their input requires them, and below it everything is frozen."""
    # A hook, since the embeddings' weight stays frozen: a trainable one would be trained.
    embeddings = input_embedding_layer(network)
    return None if embeddings is None else embeddings.register_forward_hook(_require_grad)


def _require_grad(module: nn.Module, args: object, output: torch.Tensor) -> None:
    # What is no leaf requires grad already, or is made where grad is off.
    if output.is_leaf:
        output.requires_grad_(True)
