"""A batch whose rows use different adapters, on one layer: the base once for all rows, every adapter for its own.

Updates that are a plain product `B A` (LoRA on linear layers) are worked out together: their factors are stacked, and two
batched products take the place of two products for every adapter. Everything else goes adapter by adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from splice.methods.layer import AdapterLayer, Factors


@dataclass(frozen=True)
class Group:
    """Rows of a batch that use the same adapter, on a layer that has it."""

    layer: AdapterLayer
    rows: torch.Tensor


def split(
    groups: Sequence[tuple[str, torch.Tensor]], layers: Mapping[str, AdapterLayer]
) -> tuple[list[tuple[Factors, torch.Tensor]], list[Group]]:
    """The groups whose layers can be worked out together, and those that go one by one."""
    together: list[tuple[Factors, torch.Tensor]] = []
    single: list[Group] = []
    for name, rows in groups:
        layer = layers.get(name)
        if layer is None:
            continue
        factors = layer.factors()
        if factors is None:
            single.append(Group(layer, rows))
        else:
            together.append((factors, rows))
    return together, single


def add_products(y: torch.Tensor, x: torch.Tensor, parts: Sequence[tuple[Factors, torch.Tensor]]) -> torch.Tensor:
    """`y` with `scale * B A x` added to the rows of each part. `y` is not changed.

    Args:
        y: (rows, ..., out).
        x: (rows, ..., in).
        parts: factors A (r, in), B (out, r), and the rows that use them.
    """
    if x.device.type == "cpu":
        return _add_in_turn(y, x, parts)
    alike: dict[tuple[int, int, torch.dtype], list[tuple[Factors, torch.Tensor]]] = {}
    for part in parts:
        alike.setdefault((part[0].a.shape[0], len(part[1]), part[0].a.dtype), []).append(part)
    for same in alike.values():
        y = _add_stacked(y, x, same)
    return y


def _add_in_turn(y: torch.Tensor, x: torch.Tensor, parts: Sequence[tuple[Factors, torch.Tensor]]) -> torch.Tensor:
    """Rows are sorted by adapter once; then each adapter's factors are read once, where they are.

    On a CPU stacking them would cost more than it saves: that writes, and reads again, all their bytes.
    """
    order = torch.cat([rows for _, rows in parts])
    xs, ys = x.index_select(0, order), y.index_select(0, order)
    inputs, outputs = xs.view(-1, xs.shape[-1]), ys.view(-1, ys.shape[-1])
    if len(inputs) == len(parts) and all(f.a.dtype is x.dtype is y.dtype is torch.float32 for f, _ in parts):
        # One token of one row each: products with vectors cost a fifth less than those with matrices of one row.
        vectors = zip(parts, inputs.unbind(), outputs.unbind())
        added = torch.stack([torch.addmv(out, f.b, torch.mv(f.a, row), alpha=f.scale) for (f, _), row, out in vectors])
    else:
        sizes = [len(rows) * (len(inputs) // len(xs)) for _, rows in parts]
        pieces = zip(parts, torch.split(inputs, sizes), torch.split(outputs, sizes))
        added = torch.cat([_added(out, piece, factors) for (factors, _), piece, out in pieces])
    return y.index_copy(0, order, added.view(ys.shape))


def _added(y: torch.Tensor, x: torch.Tensor, factors: Factors) -> torch.Tensor:
    a, b, scale = factors
    hidden = torch.mm(x if x.dtype is a.dtype else x.to(a.dtype), a.t())
    if hidden.dtype is y.dtype:
        return torch.addmm(y, hidden, b.t(), alpha=scale)
    return torch.add(y, torch.mm(hidden, b.t()), alpha=scale).to(y.dtype)


def _add_stacked(y: torch.Tensor, x: torch.Tensor, parts: Sequence[tuple[Factors, torch.Tensor]]) -> torch.Tensor:
    """Parts of one rank and one number of rows: two batched products for all of them."""
    count, (first, rows) = len(parts), parts[0]
    index = rows if count == 1 else torch.cat([rows for _, rows in parts])
    a, b = (torch.stack([getattr(factors, name) for factors, _ in parts]) for name in ("a", "b"))
    scales = [factors.scale for factors, _ in parts]
    chosen = x[index].to(a.dtype)
    hidden = torch.bmm(chosen.reshape(count, -1, a.shape[2]), a.transpose(1, 2))
    alpha = 1.0
    if all(scale == first.scale for scale in scales):
        alpha = first.scale
    else:
        hidden = hidden * torch.tensor(scales, dtype=hidden.dtype, device=hidden.device).view(-1, 1, 1)
    update = torch.bmm(hidden, b.transpose(1, 2)).reshape(*chosen.shape[:-1], b.shape[1])
    return torch.index_add(y, 0, index, update.to(y.dtype), alpha=alpha)
