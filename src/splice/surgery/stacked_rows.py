"""Rows of a batch whose adapters lie at equal distances: two batched products for neighbours, and nothing is copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from splice.kinds.bundles import Stacked
from splice.kinds.scale import add_scaled
from splice.kinds.stack import Stack
from splice.selection import Group

# A group of rows, and the slot of its adapter.
Seated = tuple[Group, int]

# Up to so many slots that nobody uses are computed in vain between two that are used: it costs less than a further product,
# as long as reading the factors is what it costs, with up to so many vectors for each adapter.
_GAP, _FEW = 2, 4
# So much dearer is an adapter by itself than one slot among others, and a batched product than nothing, in slots. Measured
# with one token for each row, where all that counts is how often the factors are read and how many products there are.
_ALONE, _PRODUCT = 3, 4


@dataclass(frozen=True)
class Run:
    """Neighbouring slots, each with the same number of rows of the batch.

    Attributes:
        first: the first slot.
        end: the slot behind the last.
        groups: the groups that have these slots, as numbers in the whole list, slot by slot; -1 for a slot without one.
        rows: the rows of the batch, slot by slot, (slots * rows of each); of a slot without any the first ones, in vain. None
            where they are all rows of the batch in their order.
        used: which of these are not in vain, (n); None for all.
        target: the rows of the batch that they are; None where `rows` is.
        span: the first of these and the one behind the last, where they are neighbours in this order; None of others.
        seats: the slot of each row of the batch, where all of them are here in another order than that of the slots.
    """

    first: int
    end: int
    groups: tuple[int, ...]
    rows: torch.Tensor | None
    used: torch.Tensor | None
    target: torch.Tensor | None
    span: tuple[int, int] | None = None
    seats: torch.Tensor | None = None


@dataclass(frozen=True)
class Way:
    """How the rows of some seated groups are computed.

    Attributes:
        runs: those that are computed together.
        alone: which groups cost less one by one, as numbers in the list.
    """

    runs: tuple[Run, ...]
    alone: tuple[int, ...]


@torch.inference_mode(False)
def find_way(seated: Sequence[Seated], batch: int, tokens: int) -> Way:
    """The cheapest way for these groups.

    Args:
        seated: each in a slot of its own.
        batch: how many rows the batch has.
        tokens: how many vectors each row has.
    """
    order = sorted(range(len(seated)), key=lambda index: seated[index][1])
    alike: dict[int, list[int]] = {}
    for index in order:
        alike.setdefault(len(seated[index][0].rows), []).append(index)
    runs: list[Run] = []
    alone: list[int] = []
    for count, indices in alike.items():
        for part in _neighbours(indices, seated, _GAP if count * tokens <= _FEW else 0):
            slots = seated[part[-1]][1] - seated[part[0]][1] + 1
            if slots + _PRODUCT > _ALONE * len(part):
                alone += part
            else:
                runs.append(_run(part, seated, batch))
    return Way(tuple(runs), tuple(alone))


def _neighbours(indices: Sequence[int], seated: Sequence[Seated], gap: int) -> list[list[int]]:
    parts: list[list[int]] = []
    for index in indices:
        if parts and seated[index][1] - seated[parts[-1][-1]][1] <= gap + 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts


def _run(part: Sequence[int], seated: Sequence[Seated], batch: int) -> Run:
    first, end = seated[part[0]][1], seated[part[-1]][1] + 1
    count, device = len(seated[part[0]][0].rows), seated[part[0]][0].indices.device
    by_slot = {seated[index][1]: index for index in part}
    groups = tuple(by_slot.get(slot, -1) for slot in range(first, end))
    target = [row for index in part for row in seated[index][0].rows]
    if target == list(range(batch)) and -1 not in groups:
        return Run(first, end, groups, None, None, None)
    rows = [row for index in groups for row in (seated[index][0].rows if index >= 0 else range(count))]
    used = None
    if -1 in groups:
        taken = [n * count + k for n, index in enumerate(groups) if index >= 0 for k in range(count)]
        used = torch.tensor(taken, device=device)
    seats = None
    if len(target) == batch:
        slot_of = {row: seated[index][1] for index in part for row in seated[index][0].rows}
        seats = torch.tensor([slot_of[row] for row in range(batch)], device=device)
    span = (target[0], target[-1] + 1) if rows == list(range(target[0], target[-1] + 1)) else None
    target_rows = torch.tensor(target, device=device)
    return Run(first, end, groups, torch.tensor(rows, device=device), used, target_rows, span, seats)


def add_run(
    y: torch.Tensor, x: torch.Tensor, factors: Stacked, run: Run, scales: Sequence[float], is_own: bool
) -> torch.Tensor:
    """`y` with the updates of one run.

    Args:
        y: (rows, tokens, out); it is changed where it `is_own`.
        x: (rows, tokens, in).
        factors: of all slots.
        run: which slots and rows.
        scales: of the groups that the run's numbers mean.
        is_own: whether nobody else has `y`. It has to be so unless the run has all rows.
    """
    # (slots, r, in), (slots, out, r)
    a, b = factors
    if run.target is not None and run.span is None and x.shape[1] >= a.shape[1]:
        if run.seats is not None:
            return _add_row_by_row(y, x, factors, run, scales)
        if x.device.type == "cpu":  # on others many small products cost more than copies
            return _add_one_by_one(y, x, factors, run, scales)
    a, b = a[run.first : run.end], b[run.first : run.end]
    slots = run.end - run.first
    given, before = _rows_of(run, x), _rows_of(run, y)
    given = given if given.dtype is a.dtype else given.to(a.dtype)
    # (slots, rows of each * tokens, r)
    hidden = torch.bmm(given.reshape(slots, -1, given.shape[-1]), a.transpose(1, 2))
    alpha = scales[0]
    if scales.count(alpha) < len(scales):
        each = [scales[group] if group >= 0 else 0.0 for group in run.groups]
        hidden, alpha = hidden * torch.tensor(each, dtype=hidden.dtype, device=hidden.device).view(-1, 1, 1), 1.0
    flat = before.reshape(slots, -1, before.shape[-1])
    if hidden.dtype is not y.dtype:  # the sum in the wider dtype, rounded once
        after = add_scaled(flat, torch.bmm(hidden, b.transpose(1, 2)), alpha).to(y.dtype)
    elif run.span is not None or (run.rows is None and is_own):
        flat.baddbmm_(hidden, b.transpose(1, 2), alpha=alpha)
        return y
    else:
        after = torch.baddbmm(flat, hidden, b.transpose(1, 2), alpha=alpha)
    after = after.view(before.shape)
    if run.target is None:
        return after
    return y.index_copy_(0, run.target, after if run.used is None else after.index_select(0, run.used))


def _rows_of(run: Run, tensor: torch.Tensor) -> torch.Tensor:
    """The rows of a run, slot by slot; neighbours are no copy."""
    if run.span is not None:
        return tensor[run.span[0] : run.span[1]]
    return tensor if run.rows is None else tensor.index_select(0, run.rows)


def _add_row_by_row(
    y: torch.Tensor, x: torch.Tensor, factors: Stacked, run: Run, scales: Sequence[float]
) -> torch.Tensor:
    """The same for all rows of the batch, each with factors of its own: with many tokens these are less to copy than rows."""
    assert run.seats is not None
    # (rows, r, in), (rows, out, r)
    a, b = (stacked.index_select(0, run.seats) for stacked in factors)
    hidden = torch.bmm(x if x.dtype is a.dtype else x.to(a.dtype), a.transpose(1, 2))
    alpha = scales[max(run.groups)]
    if len(set(scales)) > 1:
        by_slot = torch.tensor([scales[group] if group >= 0 else 0.0 for group in run.groups], dtype=hidden.dtype)
        hidden, alpha = hidden * by_slot.to(x.device).index_select(0, run.seats - run.first).view(-1, 1, 1), 1.0
    if hidden.dtype is y.dtype:
        return torch.baddbmm(y, hidden, b.transpose(1, 2), alpha=alpha)
    return add_scaled(y, torch.bmm(hidden, b.transpose(1, 2)), alpha).to(y.dtype)


def _add_one_by_one(
    y: torch.Tensor, x: torch.Tensor, factors: Stacked, run: Run, scales: Sequence[float]
) -> torch.Tensor:
    """The same for some of the rows: with many tokens a product each costs less than copies of the rows."""
    assert run.rows is not None
    a, b = factors
    rows, each = run.rows.tolist(), len(run.rows) // len(run.groups)
    for number, group in enumerate(run.groups):
        if group < 0:
            continue
        own_a, own_b = a[run.first + number], b[run.first + number]
        for row in rows[number * each : (number + 1) * each]:
            hidden = torch.mm(x[row] if x.dtype is own_a.dtype else x[row].to(own_a.dtype), own_a.t())
            if hidden.dtype is y.dtype:
                y[row].addmm_(hidden, own_b.t(), alpha=scales[group])
            else:
                y[row] = add_scaled(y[row], torch.mm(hidden, own_b.t()), scales[group]).to(y.dtype)
    return y


def add_by_seats(y: torch.Tensor, x: torch.Tensor, seats: torch.Tensor, stack: Stack) -> torch.Tensor:
    """`y` with each row's update, where a tensor says which slot it uses: nothing here depends on what is in the tensor.

    Args:
        y: (rows * n, ..., out).
        x: (rows * n, ..., in).
        seats: (rows,), the slot of n neighbouring rows; -1 for none, which keep what the base gave.
        stack: with the factors.
    """
    # (rows, tokens, size)
    xs, ys = (tensor.reshape(seats.shape[0], -1, tensor.shape[-1]) for tensor in (x, y))
    seats = seats.to(x.device)
    used = (seats >= 0).view(-1, 1, 1)
    slots = seats.clamp(min=0)
    # (rows, r, in), (rows, out, r), (rows, 1, 1)
    a, b, scale = stack.a[slots], stack.b[slots], stack.scales[slots].view(-1, 1, 1)
    given = xs if xs.dtype is a.dtype else xs.to(a.dtype)
    if xs.shape[1] == 1 and torch.compiler.is_compiling():
        # Sums that a compiler makes one kernel of, which reads the factors where they lie. For a product it would copy them.
        hidden = (given * a).sum(-1).unsqueeze(1)
        update = (hidden * b).sum(-1).unsqueeze(1)
    else:
        update = torch.bmm(torch.bmm(given, a.transpose(1, 2)), b.transpose(1, 2))
    # The sum in the wider dtype, rounded once. Not the product of base rows with a scale of 0: what is in another adapter's
    # slot must not matter to them, be it no number.
    return torch.where(used, (ys + update * scale).to(y.dtype), ys).view(y.shape)
