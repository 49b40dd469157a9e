"""The basis that all weights of a kind share, and the places of what is trained in it.

"Full-Rank Efficient Fine-Tuning with Rotational Degrees", doi 10.1609/aaai.v40i31.39813: a joint decomposition of several
matrices, as higher-order generalised singular value decompositions have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import torch


def kind_at(path: str) -> str:
    """The kind of the layer at `path`: the name of its basis."""
    parts = path.split(".")
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return parts[-1] if len(parts) < 2 or parts[-2].isdigit() else "_".join(parts[-2:])


def _block_of(path: str, position: int) -> int:
    """The number of the block that the layer at `path` is in; its position among the targets where it is in none."""
    parts = path.split(".")
    for name, number in pairwise(parts):
        if name == "layers" and number.isdigit():
            return int(number)
    return next((int(part) for part in parts if part.isdigit()), position)


def layers_by_kind(paths: Iterable[str]) -> dict[str, list[str]]:
    """Kind -> the layers whose weights its basis is made of, in the order of their blocks; the kinds sorted.

    Of two layers of a kind in blocks of one number (those of an encoder and of a decoder) only the last one counts, as in
    the reference: checkpoints without bases were trained with what comes of that. All the same the basis is one for both.
    """
    found: dict[str, dict[int, str]] = {}
    for position, path in enumerate(paths):
        found.setdefault(kind_at(path), {})[_block_of(path, position)] = path
    return {kind: [blocks[number] for number in sorted(blocks)] for kind, blocks in sorted(found.items())}


def basis_of(weights: Sequence[torch.Tensor], alpha: float) -> torch.Tensor:
    """V (in, in), of these weights (out, in) in float32; `alpha` keeps what is inverted from being singular."""
    together = torch.cat(list(weights))
    basis: torch.Tensor
    if len(together) < together.shape[1]:
        basis = torch.linalg.svd(together, full_matrices=True).Vh.T.contiguous()
        return basis
    q, r = torch.linalg.qr(together)
    ridge = alpha * torch.eye(r.shape[1])
    parts = q.split([len(weight) for weight in weights])
    mean = torch.stack([torch.linalg.inv(part.T @ part + ridge) for part in parts]).mean(0)
    basis = r.T @ torch.linalg.eigh(mean).eigenvectors
    return basis


def place_count(size: int, rate: float) -> int:
    """How many numbers of a core (size, size) are trained off its diagonal."""
    most = size * size - size
    return min(max(int(size * size * rate), 1 if rate > 0 else 0), most)


def places(sizes: Mapping[str, int], rate: float, seed: int) -> dict[str, torch.Tensor]:
    """Kind -> where these numbers stand, (2, count) int64: rows, then columns. `sizes` are those of the cores, by kind."""
    source, found = torch.Generator().manual_seed(seed), {}
    for kind, size in sizes.items():
        free = (~torch.eye(size, dtype=torch.bool)).nonzero()
        chosen = torch.randperm(len(free), generator=source)[: place_count(size, rate)]
        found[kind] = free[chosen].T.contiguous()
    return found


def in_basis(weight: torch.Tensor, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """U (out, in), with columns of length 1 or 0, and their lengths (in): `weight = U diag(lengths) V^T`, in float64."""
    weight, basis = weight.double(), basis.double()
    try:
        found = torch.linalg.solve(basis, weight.T).T
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined] # a singular one
        found = weight @ torch.linalg.pinv(basis, rtol=1e-6).T
    lengths = torch.linalg.vector_norm(found, dim=0)
    return torch.where(lengths > 1e-12, found / lengths.clamp_min(1e-12), 0.0), lengths
