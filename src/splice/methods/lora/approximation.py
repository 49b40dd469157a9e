"""LoRA in the place of another adapter: the update of each weight, cut off after its largest singular values.

With the update D = U S V^T of a layer, B = U_k S_k and A = V_k^T come nearest to it of all products of rank k (Eckart and
Young, 1936); the error is the root of the sum of the squares of the other singular values. Of large matrices the largest
singular values are found by a random projection (Halko, Martinsson and Tropp, 2011, arXiv 0909.4061, algorithm 5.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from splice.base.layers import LayerKind, kind_of
from splice.checkpoint.keys import PREFIX
from splice.config import PeftConfig
from splice.errors import UnsupportedFeatureError
from splice.kinds.approximation import Approximated, Source, Update, Wanted
from splice.methods.lora.conversion import config_in_place_of

_LINEAR = (LayerKind.LINEAR, LayerKind.TRANSPOSED_LINEAR)
_CONVOLUTIONS = (LayerKind.CONV1D, LayerKind.CONV2D, LayerKind.CONV3D)
# The smaller side of a matrix up to which it is decomposed as a whole, and what a projection has more than it is asked for.
_WHOLE = 512
_MORE = 8
_ITERATIONS = 4


class AsLora:
    """Takes the place of every adapter that changes weights of linear layers, embeddings and convolutions."""

    def layers(self, source: Source, wanted: Wanted) -> Iterator[Approximated]:
        for path, update in source.updates.items():
            _check(path, update.base)
        return (_layer(path, update, wanted) for path, update in source.updates.items())

    def config(self, source: Source, layers: Mapping[str, Approximated]) -> PeftConfig:
        ranks = {path: layer.rank for path, layer in layers.items() if layer.rank}
        common = max(ranks.values(), default=1, key=list(ranks.values()).count)
        saved = _saved(source.config.target_rule().modules_to_save or [], list(source.copies))
        return config_in_place_of(source.config, source.network, ranks, common, False, saved)


def _saved(named: list[str], copies: list[str]) -> list[str] | None:
    """Modules that are saved whole, by the names that the config has for them where it has."""
    used = [name for name in named if any(path == name or path.endswith(f".{name}") for path in copies)]
    return used or copies or None


def _check(path: str, base: nn.Module) -> None:
    kind = kind_of(base)
    if kind in _CONVOLUTIONS and base._parameters["weight"] is not None and vars(base)["groups"] != 1:
        raise UnsupportedFeatureError(f"{path}: it is a convolution in groups, which LoRA has no update for")
    if kind not in (*_LINEAR, LayerKind.EMBEDDING, *_CONVOLUTIONS):
        what = type(base).__name__ if kind is None else kind.name
        raise UnsupportedFeatureError(
            f"{path}: the adapter changes a {what}, and LoRA is on linear layers, embeddings and convolutions"
        )


@torch.no_grad()
def _layer(path: str, update: Update, wanted: Wanted) -> Approximated:
    delta = update.work_out()
    kind = kind_of(update.base)
    # Of an embedding (rows, features): there the first factor looks rows up.
    flat = delta.T if kind is LayerKind.EMBEDDING else delta.flatten(1)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    norm = float(torch.linalg.matrix_norm(flat.double()) if flat.numel() < 1 << 20 else torch.linalg.matrix_norm(flat))
    if not math.isfinite(norm):
        raise UnsupportedFeatureError(f"{path}: the update has values that are not finite")
    if norm == 0:
        return Approximated(path, 0, 0.0, 0.0, {})
    b, a = _factors(flat, norm, wanted)
    rank, error = len(a), float(torch.linalg.matrix_norm(flat - b @ a)) / norm
    if kind is LayerKind.EMBEDDING:
        named = {"lora_embedding_A": a, "lora_embedding_B": b}
    else:
        ones = [1] * (delta.dim() - 2)
        named = {"lora_A.weight": a.reshape(rank, *delta.shape[1:]), "lora_B.weight": b.reshape(len(b), rank, *ones)}
    return Approximated(
        path, rank, norm, error, {f"{PREFIX}{path}.{name}": tensor.contiguous() for name, tensor in named.items()}
    )


def _factors(flat: torch.Tensor, norm: float, wanted: Wanted) -> tuple[torch.Tensor, torch.Tensor]:
    """B (out, k) and A (k, in)."""
    most = min(flat.shape)
    if most <= _WHOLE:
        u, s, vh = torch.linalg.svd(flat, full_matrices=False)
        # What is left behind each, from the smallest up: as the difference of two large sums it would be good to few digits.
        behind = s.double().square().flip(0).cumsum(0).flip(0)
        return _cut(u, s, vh, _rank(torch.cat([behind[1:], behind.new_zeros(1)]), norm, wanted) or most)
    asked = min(wanted.rank or 16, most)
    while True:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same file each time, and nobody's random numbers changed
            u, s, v = torch.svd_lowrank(flat, q=min(asked + _MORE, most), niter=_ITERATIONS)
        rank = _rank(norm**2 - s.double().square().cumsum(0), norm, wanted)
        if rank is not None and (wanted.rank is not None or rank <= asked or asked >= most):
            return _cut(u, s, v.T, rank)
        if asked >= most:
            return _cut(u, s, v.T, len(s))
        asked = min(asked * 2, most)


def _rank(left: torch.Tensor, norm: float, wanted: Wanted) -> int | None:
    """How many singular values are enough; None where all that are known are not.

    Args:
        left: for each, the sum of the squares of all behind it.
        norm: of them all.
        wanted: the rank or the error.
    """
    if wanted.rank is not None:
        return min(wanted.rank, len(left))
    assert wanted.error is not None
    enough = (left <= (wanted.error * norm) ** 2).nonzero()
    return int(enough[0]) + 1 if len(enough) else None


def _cut(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return u[:, :rank] * s[:rank], vh[:rank]
