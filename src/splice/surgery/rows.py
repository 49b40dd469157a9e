"""A batch whose rows use different adapters, on one layer: the base once for all rows, every adapter for its own.

Updates that are a plain product `B A` (LoRA on linear layers) are worked out together: their factors are stacked, and two
batched products take the place of two products for every adapter. Everything else goes adapter by adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from splice.kinds.effect import Factors
from splice.kinds.layer import AdapterLayer
from splice.kinds.stack import Stack
from splice.selection import Group, Groups
from splice.surgery.stacked_rows import Way, add_by_seats, add_run, find_way

__all__ = ["add_alike", "add_by_seats", "add_products", "add_seated", "split"]

# The factors of an adapter, and the rows of the batch that use it.
Part = tuple[Factors, Group]


def split(
    groups: Sequence[Group], layers: Mapping[str, AdapterLayer], one_by_one: bool
) -> tuple[list[Part], list[tuple[AdapterLayer, Group]]]:
    """The groups whose layers can be worked out together, and those that go one by one."""
    together: list[Part] = []
    single: list[tuple[AdapterLayer, Group]] = []
    for group in groups:
        layer = layers.get(group.name)
        if layer is None:
            continue
        factors = None if one_by_one else layer.factors()
        if factors is None:
            single.append((layer, group))
        else:
            together.append((factors, group))
    return together, single


def add_products(y: torch.Tensor, x: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    """`y` with `scale * B A x` added to the rows of each part. `y` is not changed.

    Args:
        y: (rows, ..., out).
        x: (rows, ..., in).
        parts: factors A (r, in), B (out, r), and the rows that use them.
    """
    if x.device.type == "cpu":
        # On a CPU stacking the factors would cost more than it saves: that writes, and reads again, all their bytes.
        return _add_sorted(y, x, parts) if torch.is_grad_enabled() else _add_in_place(y, x, parts)
    return add_alike(y, x, parts)


def add_seated(
    y: torch.Tensor, x: torch.Tensor, groups: Groups, layers: Mapping[str, AdapterLayer], stack: Stack
) -> tuple[torch.Tensor, Sequence[Group]]:
    """`y` with the updates added that cost least where they lie in the stack, and the groups that have none of these.

    `y` is not changed.

    Args:
        y: (rows, ..., out).
        x: (rows, ..., in).
        groups: all of the batch; they keep what is found out here for the next layer.
        layers: by adapter name.
        stack: where the factors of some lie.
    """
    others: list[Group] = []
    seated: list[Group] = []
    numbers: list[int] = []
    scales: list[float] = []
    for group in groups:
        layer = layers.get(group.name)
        number = -1 if layer is None else stack.find(group.name, layer)
        scale = None if number < 0 or layer is None else layer.product_scale()
        if scale is None:
            others.append(group)
        else:
            seated.append(group)
            numbers.append(number)
            scales.append(scale)
    # (rows, tokens, size)
    xs, ys = x.reshape(len(x), -1, x.shape[-1]), y.reshape(len(y), -1, y.shape[-1])
    tokens = xs.shape[1]
    key = (tokens, *numbers)
    way = groups.ways.get(key)
    if not isinstance(way, Way):
        way = groups.ways[key] = find_way(list(zip(seated, numbers)), len(x), tokens)
    if not way.runs:
        return y, groups
    if way.runs[0].rows is not None:  # what the base gave may be its input, or kept for a backward
        ys = ys.clone(memory_format=torch.contiguous_format)
    for run in way.runs:
        ys = add_run(ys, xs, stack, run, scales)
    return ys.view(y.shape), others + [seated[index] for index in way.alone]


def add_alike(y: torch.Tensor, x: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    """`add_products` as other devices do it, where each of many small products would wait for the one before it."""
    # Parts of one shape together. Padding ranks and rows to the largest would make one group of all, and work of zeros.
    alike: dict[tuple[int, int, torch.dtype], list[Part]] = {}
    for part in parts:
        alike.setdefault((part[0].a.shape[0], len(part[1].rows), part[0].a.dtype), []).append(part)
    for same in alike.values():
        y = _add_stacked(y, x, same)
    return y


def _add_in_place(y: torch.Tensor, x: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    """Each adapter's factors are read once, where they are, and added to the rows where they are."""
    out = y.clone(memory_format=torch.contiguous_format)
    # (rows, tokens, size)
    ys, xs = out.view(len(y), -1, y.shape[-1]), x.reshape(len(x), -1, x.shape[-1])
    if xs.shape[1] == 1 and x.dtype is y.dtype is torch.float32:
        # One token for each row: products with vectors cost a fifth less than those with matrices of one row.
        inputs, outputs = xs[:, 0].unbind(), ys[:, 0].unbind()
        for (a, b, scale), group in parts:
            if len(group.rows) == 1 and a.dtype is torch.float32:
                row = group.rows[0]
                outputs[row].addmv_(b, torch.mv(a, inputs[row]), alpha=scale)
            else:
                _add_rows(ys, xs, (Factors(a, b, scale), group))
        return out
    for part in parts:
        _add_rows(ys, xs, part)
    return out


def _add_rows(ys: torch.Tensor, xs: torch.Tensor, part: Part) -> None:
    """Add to the rows of one part; `ys` is changed."""
    factors, group = part
    # One row is a view, and several are copied out and in again: `ys[rows]` would be a copy that nothing is added to.
    if len(group.rows) == 1:
        row = group.rows[0]
        ys[row] = _added(ys[row], xs[row], factors)
    else:
        before = ys.index_select(0, group.indices)
        flat = _added(before.flatten(0, 1), xs.index_select(0, group.indices).flatten(0, 1), factors)
        ys.index_copy_(0, group.indices, flat.view(before.shape))


def _add_sorted(y: torch.Tensor, x: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    """The same in a way that can be differentiated: rows are sorted by adapter, and nothing is changed in place."""
    order = torch.cat([group.indices for _, group in parts])
    xs, ys = x.index_select(0, order), y.index_select(0, order)
    inputs, outputs = xs.view(-1, xs.shape[-1]), ys.view(-1, ys.shape[-1])
    sizes = [len(group.rows) * (len(inputs) // len(xs)) for _, group in parts]
    pieces = zip(parts, torch.split(inputs, sizes), torch.split(outputs, sizes))
    added = torch.cat([_added(out, piece, factors) for (factors, _), piece, out in pieces])
    return y.index_copy(0, order, added.view(ys.shape))


def _added(y: torch.Tensor, x: torch.Tensor, factors: Factors) -> torch.Tensor:
    a, b, scale = factors
    hidden = torch.mm(x if x.dtype is a.dtype else x.to(a.dtype), a.t())
    if hidden.dtype is y.dtype:
        return torch.addmm(y, hidden, b.t(), alpha=scale)
    return torch.add(y, torch.mm(hidden, b.t()), alpha=scale).to(y.dtype)


def _add_stacked(y: torch.Tensor, x: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    """Parts of one rank and one number of rows: two batched products for all of them."""
    count, (first, group) = len(parts), parts[0]
    index = group.indices if count == 1 else torch.cat([group.indices for _, group in parts])
    # a: (parts, r, in), b: (parts, out, r)
    a, b = torch.stack([factors.a for factors, _ in parts]), torch.stack([factors.b for factors, _ in parts])
    scales = [factors.scale for factors, _ in parts]
    chosen = x[index].to(a.dtype)
    hidden = torch.bmm(chosen.reshape(count, -1, a.shape[2]), a.transpose(1, 2))
    alpha = 1.0
    # One scale for all is free inside the sum, and most batches have one.
    if all(scale == first.scale for scale in scales):
        alpha = first.scale
    else:
        hidden = hidden * torch.tensor(scales, dtype=hidden.dtype, device=hidden.device).view(-1, 1, 1)
    update = torch.bmm(hidden, b.transpose(1, 2)).reshape(*chosen.shape[:-1], b.shape[1])
    return torch.index_add(y, 0, index, update.to(y.dtype), alpha=alpha)
