"""Initialisations of LoRA (`init_lora_weights`), and what some of them take out of the base weight.

PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) start A and B at a part of the weight itself, and what was trained
is the sum of `W - s B0 A0` and `s B A`. The checkpoint holds A and B alone, so a load works B0 and A0 out again. Those that
follow from data (CorDA, LoRA-GA, EVA) have files of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import nn

from splice.base.layers import LayerKind
from splice.errors import PeftWarning, UnsupportedLayerError, warn

_LINEAR = (LayerKind.LINEAR, LayerKind.TRANSPOSED_LINEAR)
_NITER = "pissa_niter_"
# The randomised decomposition is drawn anew at every use elsewhere; here it is the same for the same weight.
_SEED = 0
# They leave the base alone, and start at values that no load needs.
_PLAIN = (True, False, "gaussian", "orthogonal", "eva", "mica", "lora_ga")
_LINEAR_ONLY = ("orthogonal", "mica", "olora", "pissa", "corda")
# It puts a rounded weight in the place of the base's.
LOFTQ = "loftq"
# It starts B at directions of the base's weight, and never trains it.
MICA = "mica"
# They take something out of the base that follows from data, and that no checkpoint holds.
CORDA = "corda"
LORA_GA = "lora_ga"
# It starts A at directions of data, once the adapter is there.
EVA = "eva"


class Taken(NamedTuple):
    """What is taken out of a weight: `scale * b a`, with a (r, in) and b (out, r)."""

    # A, the inner factor, (r, in).
    a: torch.Tensor
    # B, the outer factor, (out, r).
    b: torch.Tensor
    # What their product is multiplied with, as the adapter's own is.
    scale: float


def check_init(init: object) -> None:
    """Refuse an initialisation that is not known.

    Raises:
        ValueError: the name is unknown.
    """
    if init not in (*_PLAIN, LOFTQ) and not takes_from_base(init):
        raise ValueError(f"Unknown initialization init_lora_weights={init!r}")


def takes_from_base(init: object) -> bool:
    """Whether this initialisation takes something out of the base weight."""
    return isinstance(init, str) and (
        init in (*_TAKEN, CORDA) or (init.startswith(_NITER) and init[len(_NITER) :].isdigit())
    )


def check_init_on(init: object, kind: LayerKind) -> None:
    """Refuse an initialisation on a kind of layer that it is not defined for; embeddings start as with `True` instead.

    Raises:
        UnsupportedLayerError: (a ValueError) it is not defined for this kind.
    """
    if init == LOFTQ and kind is not LayerKind.LINEAR:
        raise UnsupportedLayerError(
            f"init_lora_weights='loftq' can be used on linear layers alone, not on the kind {kind.name}. Leave it out of the "
            "targets."
        )
    named = isinstance(init, str) and (init in _LINEAR_ONLY or init.startswith(_NITER))
    if named and kind not in (*_LINEAR, LayerKind.EMBEDDING):
        raise UnsupportedLayerError(
            f"init_lora_weights={init!r} cannot be used on a layer of the kind {kind.name}. Leave it out of the targets."
        )
    if init == "olora" and kind is LayerKind.TRANSPOSED_LINEAR:
        raise UnsupportedLayerError("init_lora_weights='olora' cannot be used on weights that are stored transposed.")


def notes_about(init: object) -> list[str]:
    """Warnings for whoever loads an adapter that was initialised in this way."""
    if isinstance(init, str) and init.startswith(_NITER):
        return [
            f"it was initialised with {init!r}, from random numbers that its checkpoint does not hold; unless splice made "
            "it, the part that was taken out of the base weight is another one now, and so is the output. Save it with "
            "`path_initial_model_for_weight_conversion` where it was trained"
        ]
    if init == LORA_GA:
        return [
            "it was initialised with 'lora_ga', which changes the base weight. The output is what was trained if the given "
            "base model is the changed one, saved after the initialisation"
        ]
    return []


def taken(init: object, weight: torch.Tensor, rank: int, scale: float) -> Taken:
    """What an initialisation takes out of a weight.

    Args:
        init: one that `takes_from_base`.
        weight: (out, in), float32 or float64.
        rank: at most its smaller side.
        scale: of the adapter.
    """
    assert isinstance(init, str)
    if init in _TAKEN:
        return _TAKEN[init](weight, rank, scale)
    with torch.random.fork_rng(devices=[weight.device] if weight.device.type == "cuda" else []):
        torch.manual_seed(_SEED)
        u, s, v = torch.svd_lowrank(weight, q=rank, niter=int(init[len(_NITER) :]))
    return _split(u, s, v.T, scale)


def _pissa(weight: torch.Tensor, rank: int, scale: float) -> Taken:
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return _split(u[:, :rank], s[:rank], vh[:rank], scale)


def _olora(weight: torch.Tensor, rank: int, scale: float) -> Taken:
    q, r = torch.linalg.qr(weight)
    return Taken(r[:rank], q[:, :rank], scale)


def _split(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, scale: float) -> Taken:
    root = torch.sqrt(s / scale)
    return Taken(root[:, None] * vh, u * root, scale)


_TAKEN: Mapping[str, Callable[[torch.Tensor, int, float], Taken]] = MappingProxyType({"pissa": _pissa, "olora": _olora})


def initialise_linear(a: torch.Tensor, b: torch.Tensor, init: object) -> None:
    """Fill A (r, in, ...) and B (out, r, ...) where no base weight is needed for it; else what follows overwrites them.

    Raises:
        ValueError: "orthogonal" with an odd rank.
    """
    if init == "orthogonal":
        _orthogonal(a, b)
        return
    if init == EVA:
        text = (
            "EVA starts A from data: until `initialize_lora_eva_weights(model, dataloader)` is called, A is what "
            "init_lora_weights=True makes it."
        )
        warn(text, PeftWarning)
    if init == "gaussian":
        nn.init.normal_(a, std=1 / a.shape[0])
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    if init is False:
        nn.init.kaiming_uniform_(b, a=math.sqrt(5))
    else:
        nn.init.zeros_(b)


def _orthogonal(a: torch.Tensor, b: torch.Tensor) -> None:
    """B A is zero, and neither is: their inner rows are the two halves of one orthogonal matrix."""
    rank = a.shape[0]
    if rank % 2:
        raise ValueError(f"init_lora_weights='orthogonal' needs an even rank, got {rank}")
    q, _ = torch.linalg.qr(torch.randn(rank, rank))
    a.copy_((torch.randn(a.shape[1], rank // 2) @ q[0::2]).T / 10)
    b.copy_(torch.randn(b.shape[0], rank // 2) @ q[1::2] / 10)
