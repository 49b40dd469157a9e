"""The loss of a shadow network: what the base's head would say if it were given the first state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.foreign_models import loss_of, output_embedding_layer
from splice.checkpoint.types import TaskType
from splice.kinds.adapters import Adapters
from splice.kinds.call import Call
from splice.methods.shadow.config import ShadowConfig
from splice.methods.shadow.states import HEARD, Heard


class _HasLoss(Protocol):
    """The output of a network that was given labels."""

    # Of the base, and with that of the shadow network.
    loss: torch.Tensor
    # Of the shadow network, as it is.
    shadow_loss: torch.Tensor


class OwnLoss(Protocol):
    """An adapter with a shadow network, as far as its loss is concerned."""

    config: ShadowConfig
    # Its loss in the last call of the model, without a graph; None where that had none.
    last_loss: torch.Tensor | None

    @property
    def own_head(self) -> nn.Module | None:
        """Its own copy of a head that labels sequences; None where it has none."""
        ...


@contextmanager
def with_own_loss(adapters: Adapters, networks: Mapping[str, OwnLoss], call: Call) -> Iterator[None]:
    """Inside, the model is called; the loss in its output gets that of the shadow network that was in effect."""
    heard = Heard()
    with HEARD.during(None, heard):
        yield
    for network in networks.values():
        network.last_loss = None
    labels = call.options.get("labels")
    names = adapters.selection.current().names
    if call.generates or not isinstance(labels, torch.Tensor):
        return
    for name in (name for name in names if name in heard.begun):
        network = networks[name]
        own = _loss(adapters.model, network, heard.begun[name], labels, call.options.get("attention_mask"))
        if own is not None:
            network.last_loss = own.detach()
            _add(call.result, own, network.config.auxiliary_loss_weight)


def _add(output: object, own: torch.Tensor, weight: float) -> None:
    loss = loss_of(output)
    if loss is None:  # of a tuple, which has no names
        return
    named = cast(_HasLoss, output)
    named.shadow_loss = own.detach()
    if weight > 0:
        named.loss = loss + weight * own.to(loss.device)


def _loss(
    network: nn.Module, of: OwnLoss, state: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor | None:
    """The loss of the first state, (batch, T, d); None for tasks without one."""
    if of.config.task_type == TaskType.CAUSAL_LM:
        head = output_embedding_layer(network)
        if head is None:
            return None
        return loss_of_tokens(head(state), labels)
    if of.config.task_type == TaskType.SEQ_CLS and of.own_head is not None:
        return loss_of_label(of.own_head(state_of_last(state, mask)), labels)
    return None


def loss_of_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of logits (batch, T, vocabulary), each for the token behind it; -100 among the labels counts for nothing."""
    wanted = labels[:, 1:].flatten().to(logits.device)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted, ignore_index=-100)


def state_of_last(state: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(batch, d), the state at the last token that the mask (batch, T) shows."""
    if mask is None:
        return state[:, -1]
    positions = torch.arange(mask.shape[-1], device=state.device)
    last = (positions * mask.to(state.device)).argmax(-1)
    return state[torch.arange(len(state), device=state.device), last]


def loss_of_label(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of logits (batch, labels): of a number, of one of several labels, or of any of them."""
    labels = labels.to(logits.device)
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).view(-1))
    if not labels.is_floating_point():
        return F.cross_entropy(logits, labels.view(-1))
    return F.binary_cross_entropy_with_logits(logits, labels)
