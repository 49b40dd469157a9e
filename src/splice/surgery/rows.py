"""A batch whose rows use different adapters, on one layer: the base once for all rows, every adapter for its own.

Updates that are a plain product `B A` (LoRA on linear layers) are worked out together: two batched products take the place
of two products for every adapter, where their factors lie at equal distances or are stacked. Everything else goes adapter by
adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from splice.kinds.bundles import Bundle, Bundles
from splice.kinds.effect import Factors
from splice.kinds.row_plan import Parts
from splice.kinds.scale import add_scaled
from splice.selection import Group
from splice.surgery.stacked_rows import Way, add_by_seats, add_run, find_way

__all__ = ["add_alike", "add_by_seats", "add_products"]

# As `Groups.ways`.
Ways = dict[tuple[int, ...], object]


def add_products(
    y: torch.Tensor,
    x: torch.Tensor,
    parts: Parts,
    is_own: bool = False,
    bundles: Bundles | None = None,
    ways: Ways | None = None,
) -> torch.Tensor:
    """`y` with `scale * B A x` added to the rows of each part.

    Args:
        y: (rows, ..., out).
        x: (rows, ..., in).
        parts: what is added, and to which rows.
        is_own: whether nobody else has `y`, so that it may be changed where there are no gradients; else it is not.
        bundles: those of the parts that lie at equal distances; None where nobody may look at addresses.
        ways: what other layers of this call have found out about them.
    """
    if bundles is not None and bundles.found:
        y, is_own, alone = _add_bundles(y, x, parts, is_own, bundles, {} if ways is None else ways)
        if not alone:
            return y
        parts = parts.some(alone)
    if x.device.type == "cpu":
        # On a CPU stacking the factors would cost more than it saves: that writes, and reads again, all their bytes.
        # What maps functions cannot write what is mapped into what is not.
        pure = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        return _add_sorted(y, x, parts) if pure else _add_in_place(y, x, parts, is_own)
    return add_alike(y, x, parts)


def _add_bundles(
    y: torch.Tensor, x: torch.Tensor, parts: Parts, is_own: bool, bundles: Bundles, ways: Ways
) -> tuple[torch.Tensor, bool, Sequence[int]]:
    """`y` with the parts added that cost least where they lie, whether it `is_own` now, and which parts are left.

    Arguments are those of `add_products`.
    """
    alone = list(bundles.alone)
    # (rows, tokens, size)
    xs, ys = x.reshape(len(x), -1, x.shape[-1]), y.reshape(len(y), -1, y.shape[-1])
    tokens, is_own = xs.shape[1], is_own and ys.is_contiguous()
    for bundle in bundles.found:
        way = _way(bundle, parts, len(x), tokens, ways)
        alone += [bundle.numbers[index] for index in way.alone]
        if not way.runs:
            continue
        factors, scales = bundle.factors(), [parts.scales[number] for number in bundle.numbers]
        for run in way.runs:
            if run.rows is not None and not is_own:  # what the base gave may be its input, or kept by somebody
                ys = ys.clone(memory_format=torch.contiguous_format)
                is_own = True
            ys, is_own = add_run(ys, xs, factors, run, scales, is_own), True
    return ys.view(y.shape), is_own, alone


def _way(bundle: Bundle, parts: Parts, batch: int, tokens: int, ways: Ways) -> Way:
    """How the rows of a bundle are computed: as before, or as another layer of the call has found it out, or anew."""
    way = bundle.ways.get(tokens)
    if isinstance(way, Way):
        return way
    groups = [parts.groups[number] for number in bundle.numbers]
    # The groups live as long as what they are the keys of.
    key = (tokens, *map(id, groups), *bundle.places)
    way = ways.get(key)
    if not isinstance(way, Way):
        way = ways[key] = find_way(list(zip(groups, bundle.places)), batch, tokens)
    bundle.ways[tokens] = way
    return way


def add_alike(y: torch.Tensor, x: torch.Tensor, parts: Parts) -> torch.Tensor:
    """`add_products` as other devices do it, where each of many small products would wait for the one before it."""
    # Parts of one shape together. Padding ranks and rows to the largest would make one group of all, and work of zeros.
    alike: dict[tuple[int, int, torch.dtype], list[int]] = {}
    for number, (a, group) in enumerate(zip(parts.a, parts.groups)):
        alike.setdefault((a.shape[0], len(group.rows), a.dtype), []).append(number)
    for same in alike.values():
        y = _add_stacked(y, x, parts.some(same))
    return y


def _add_in_place(y: torch.Tensor, x: torch.Tensor, parts: Parts, is_own: bool) -> torch.Tensor:
    """Each adapter's factors are read once, where they are, and added to the rows where they are."""
    out = y if is_own and y.is_contiguous() else y.clone(memory_format=torch.contiguous_format)
    rows = [row for group in parts.groups for row in group.rows]
    if (
        len(rows) == len(parts.groups)
        and x.numel() == len(x) * x.shape[-1]
        and {x.dtype, y.dtype, *[a.dtype for a in parts.a]} == {torch.float32}
    ):
        # One vector for each adapter: products with vectors cost a fifth less than those with matrices of one row.
        x_rows, y_rows = x.reshape(len(x), -1), out.view(len(y), -1)
        if len(rows) == 1:
            y_rows[rows[0]].addmv_(parts.b[0], torch.mv(parts.a[0], x_rows[rows[0]]), alpha=parts.scales[0])
            return out
        # Taken apart at once each row costs half, and as much for one row as for all.
        few = 2 * len(rows) <= len(x)
        inputs = [x_rows[row] for row in rows] if few else [*map(x_rows.unbind().__getitem__, rows)]
        outputs = [y_rows[row] for row in rows] if few else [*map(y_rows.unbind().__getitem__, rows)]
        for own, out_row, a, b, scale in zip(inputs, outputs, parts.a, parts.b, parts.scales):
            out_row.addmv_(b, torch.mv(a, own), alpha=scale)
        return out
    # (rows, tokens, size)
    ys, xs = out.view(len(y), -1, y.shape[-1]), x.reshape(len(x), -1, x.shape[-1])
    for a, b, scale, group in zip(*parts):
        _add_rows(ys, xs, Factors(a, b, scale), group)
    return out


def _add_rows(ys: torch.Tensor, xs: torch.Tensor, factors: Factors, group: Group) -> None:
    """Add to the rows of one part; `ys` is changed."""
    # One row is a view, and several are copied out and in again: `ys[rows]` would be a copy that nothing is added to. Long
    # rows cost more to copy than further products do.
    if len(group.rows) == 1 or xs.shape[1] >= factors.a.shape[0]:
        for row in group.rows:
            ys[row] = _added(ys[row], xs[row], factors)
    else:
        before = ys.index_select(0, group.indices)
        flat = _added(before.flatten(0, 1), xs.index_select(0, group.indices).flatten(0, 1), factors)
        ys.index_copy_(0, group.indices, flat.view(before.shape))


def _add_sorted(y: torch.Tensor, x: torch.Tensor, parts: Parts) -> torch.Tensor:
    """The same in a way that can be differentiated: rows are sorted by adapter, and nothing is changed in place."""
    order = torch.cat([group.indices for group in parts.groups])
    xs, ys = x.index_select(0, order), y.index_select(0, order)
    inputs, outputs = xs.view(-1, xs.shape[-1]), ys.view(-1, ys.shape[-1])
    sizes = [len(group.rows) * (len(inputs) // len(xs)) for group in parts.groups]
    pieces = zip(parts.a, parts.b, parts.scales, torch.split(inputs, sizes), torch.split(outputs, sizes))
    added = torch.cat([_added(out, piece, Factors(a, b, scale)) for a, b, scale, piece, out in pieces])
    return y.index_copy(0, order, added.view(ys.shape))


def _added(y: torch.Tensor, x: torch.Tensor, factors: Factors) -> torch.Tensor:
    a, b, scale = factors
    hidden = torch.mm(x if x.dtype is a.dtype else x.to(a.dtype), a.t())
    if hidden.dtype is y.dtype:
        return torch.addmm(y, hidden, b.t(), alpha=scale)
    return add_scaled(y, torch.mm(hidden, b.t()), scale).to(y.dtype)


def _add_stacked(y: torch.Tensor, x: torch.Tensor, parts: Parts) -> torch.Tensor:
    """Parts of one rank and one number of rows: two batched products for all of them."""
    count, scales = len(parts.groups), parts.scales
    index = parts.groups[0].indices if count == 1 else torch.cat([group.indices for group in parts.groups])
    # a: (parts, r, in), b: (parts, out, r)
    a, b = torch.stack([*parts.a]), torch.stack([*parts.b])
    chosen = x[index].to(a.dtype)
    hidden = torch.bmm(chosen.reshape(count, -1, a.shape[2]), a.transpose(1, 2))
    alpha = 1.0
    # One scale for all is free inside the sum, and most batches have one.
    if all(scale == scales[0] for scale in scales):
        alpha = scales[0]
    else:
        hidden = hidden * torch.tensor(scales, dtype=hidden.dtype, device=hidden.device).view(-1, 1, 1)
    update = torch.bmm(hidden, b.transpose(1, 2)).reshape(*chosen.shape[:-1], b.shape[1])
    return torch.index_add(y, 0, index, update.to(y.dtype), alpha=alpha)
