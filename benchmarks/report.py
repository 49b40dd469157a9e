"""What a run says: its rows, as a table or as JSON, and the machine that they hold for."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

_WIDTHS = (56, 12, 12, 9, 18, 6)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: what was measured.
        reference: the reference's figure; nan where it was not measured.
        ours: splice's figure.
        unit: the unit of both.
        ratio: how many times the reference's figure is splice's; more is better in every row.
        budget: the limit, in words; empty for a row that only informs.
        ok: whether the limit is kept.
    """

    what: str
    reference: float
    ours: float
    unit: str
    ratio: float
    budget: str = ""
    ok: bool = True

    def at_least(self, ratio: float) -> Row:
        """The same row with a budget for the ratio."""
        return Row(self.what, self.reference, self.ours, self.unit, self.ratio, f">= {ratio:,g}x", self.ratio >= ratio)

    def at_most(self, ours: float) -> Row:
        """The same row with a budget for splice's own figure."""
        budget = f"splice <= {ours:g} {self.unit}"
        return Row(self.what, self.reference, self.ours, self.unit, self.ratio, budget, self.ours <= ours)


def row(what: str, reference: float, ours: float, unit: str) -> Row:
    """A row without a budget."""
    return Row(what, reference, ours, unit, reference / ours if ours > 0 else float("inf"))


def header() -> str:
    return _line(("what", "reference", "splice", "ratio", "budget", "ok"))


def line(row: Row) -> str:
    verdict = "" if not row.budget else "ok" if row.ok else "MISSED"
    amounts = (amount(value, row.unit) for value in (row.reference, row.ours))
    return _line((row.what, *amounts, "" if math.isnan(row.ratio) else f"{number(row.ratio)}x", row.budget, verdict))


def _line(cells: Sequence[str]) -> str:
    what, *others = (cell.ljust(width) for cell, width in zip(cells, _WIDTHS))
    return " ".join((what, *others)).rstrip()


def amount(value: float, unit: str) -> str:
    """A figure with its unit; empty where nothing was measured."""
    return "" if math.isnan(value) else f"{number(value)} {unit}"


def number(value: float) -> str:
    """Three digits, more where they stand before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def write_json(path: Path, rows: Sequence[Row], device: torch.device) -> None:
    """Write the rows and the machine to `path`."""
    path.write_text(json.dumps({"machine": machine(device), "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


def machine(device: torch.device) -> str:
    """Processor, memory, device and the versions that matter, in one line."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "peft"))
    return (
        f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB RAM, device {name}; "
        f"Python {platform.python_version()}, {versions}"
    )


def _processor() -> str:
    for entry in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = entry.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()
