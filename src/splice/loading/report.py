"""What a load did, in one line, and what kept it from happening, in one error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from splice.errors import AdapterMismatchError, counted, sized
from splice.loading.fingerprint import Match
from splice.loading.plan import Plan

# Groups of names that one section of the error shows: it is read in a terminal.
_SHOWN = 6


class LoadReport(NamedTuple):
    """`str(report)`: "default: 448 of 448 tensors on 224 layers, 45.1 MB, 9 ms".

    Attributes:
        adapter_name: the adapter that was loaded.
        placed: tensors that were put in their place.
        expected: tensors that the adapter has.
        layers: layers of the base model that carry them.
        nbytes: bytes that the adapter's tensors take in memory.
        seconds: from the call to the finished load.
        notes: a line for each thing that was read in another way than it is written; empty for most loads.
        base: whether the base is the one that the adapter was saved with; UNKNOWN where the file does not tell.
    """

    adapter_name: str
    placed: int
    expected: int
    layers: int
    nbytes: int
    seconds: float
    notes: tuple[str, ...] = ()
    base: Match = Match.UNKNOWN

    def __str__(self) -> str:
        tensors, layers = counted(self.expected, "tensor"), counted(self.layers, "layer")
        size, milliseconds = sized(self.nbytes), self.seconds * 1000
        line = f"{self.adapter_name}: {self.placed} of {tensors} on {layers}, {size}, {milliseconds:.0f} ms"
        return "\n".join((line, *(f"  {note}" for note in self.notes)))


def grouped(names: Iterable[str]) -> list[str]:
    """Names that differ only in numbers, as one line: `layers.{0,1,2}.q_proj.lora_A.weight (3)`."""
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for name in names:
        parts = re.split(r"(\d+)", name)
        groups.setdefault(tuple(parts[::2]), []).append(parts[1::2])
    lines = []
    for texts, numbers in groups.items():
        columns = [sorted(set(column), key=lambda number: (int(number), number)) for column in zip(*numbers)]
        shown = [column[0] if len(column) == 1 else "{" + _ranges(column) + "}" for column in columns]
        line = "".join(a + b for a, b in zip(texts, [*shown, ""]))
        lines.append(line if len(numbers) == 1 else f"{line} ({len(numbers)})")
    return lines


def _ranges(numbers: Sequence[str]) -> str:
    values = [int(n) for n in numbers]
    if len(values) > 2 and values == list(range(values[0], values[-1] + 1)):
        return f"{numbers[0]}..{numbers[-1]}"
    shown = ",".join(numbers[:8])
    return shown if len(values) <= 8 else f"{shown},... {len(values)} numbers"


def _section(title: str, lines: Sequence[str], count: int) -> str:
    if not lines:
        return ""
    more = [f"... and {counted(len(lines) - _SHOWN, 'more group')}"] if len(lines) > _SHOWN else []
    return "\n".join([f"  {title} ({count}):", *(f"    {line}" for line in [*lines[:_SHOWN], *more])])


def mismatch_error(plan: Plan, place: str, bases: str, advice: Sequence[str]) -> AdapterMismatchError:
    """The one error for a checkpoint that does not fit: everything that is wrong, and the likely mend."""
    waived = ["strict=False"] if plan.missing or plan.unexpected else []
    waived += ["ignore_mismatched_sizes=True"] if plan.mismatched else []
    mismatched = grouped(f"{w.key}: {w.found} in the checkpoint, {w.needed} here" for w in plan.mismatched)
    total = len(plan.sources) + len(plan.missing) + len(plan.mismatched)
    sections = [
        f"the adapter at {place} does not fit this model; the model is unchanged. "
        f"{len(plan.sources)} of {counted(total, 'tensor would find its', 'tensors would find their')} place.",
        _section("missing in the checkpoint", grouped(plan.missing), len(plan.missing)),
        _section("unexpected, with no place in the model", grouped(plan.unexpected), len(plan.unexpected)),
        _section("of another shape or dtype", mismatched, len(plan.mismatched)),
        f"  {bases}",
        *(f"  Likely: {line}" for line in advice),
        f"  To load what fits and leave out the rest, pass {' and '.join(waived)}.",
    ]
    return AdapterMismatchError(
        "\n".join(filter(None, sections)),
        missing=plan.missing,
        unexpected=plan.unexpected,
        mismatched=[wrong.key for wrong in plan.mismatched],
    )
