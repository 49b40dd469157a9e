"""A thousand adapters on one model: what each costs the others, batches that mix them, and thousands over a few slots.

A full run keeps what it found in `fleet.json`; `write` draws it, and writes it into the page with the figures.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from benchmarks import among, batches, plots, replay
from benchmarks.among import STEPS, Among
from benchmarks.batches import WAYS, Batch
from benchmarks.measure import Settings
from benchmarks.models import LIBRARIES, REFERENCE, SPLICE
from benchmarks.replay import Replay
from benchmarks.report import Row, amount, machine, number

FOLDER = Path(__file__).parent
# What a full run found, for the pictures and the page.
FIGURES = "fleet.json"
PAGE = "README.md"
# What stands on the page around the tables.
BEGIN, END = "<!-- fleet: from here on written by `make fleet-plots` -->", "<!-- fleet: to here -->"


@dataclass(frozen=True)
class Found:
    """What one run found.

    Attributes:
        machine: what it ran on.
        day: when, as in 2026-11-30.
        load: how many processes wanted the machine's cores in the quarter of an hour to its end, on average; its own is one.
        among: what a step costs among so many adapters.
        batches: what a mixed batch costs.
        replay: how many adapters share a few slots.
    """

    machine: str
    day: str
    load: float
    among: list[Among]
    batches: list[Batch]
    replay: Replay


def rows(settings: Settings) -> Iterator[Row]:
    """All three parts. What they found is kept: of a full run beside this file, of a small one in its own folder."""
    found_among, found_batches = list[Among](), list[Batch]()
    for there in among.measured(settings):
        found_among += there
        yield from among.rows(there)
    for batch in batches.measured(settings):
        found_batches.append(batch)
        yield from batches.rows([batch])
    found_replay = replay.measured(settings)
    yield from replay.rows(found_replay)
    place = settings.folder if settings.small else FOLDER
    load = round(os.getloadavg()[2], 1)
    found = Found(machine(settings.device), date.today().isoformat(), load, found_among, found_batches, found_replay)
    (place / FIGURES).write_text(as_text(found), encoding="utf-8")


def read(folder: Path = FOLDER) -> Found:
    """What the last run found that was kept in this folder."""
    return from_text((folder / FIGURES).read_text(encoding="utf-8"))


def as_text(found: Found) -> str:
    """What is kept of a run."""
    return json.dumps(asdict(found), indent=1) + "\n"


def from_text(text: str) -> Found:
    """The inverse of `as_text`."""
    told = json.loads(text)
    return Found(
        told["machine"],
        told["day"],
        told["load"],
        [Among(**one) for one in told["among"]],
        [Batch(**one) for one in told["batches"]],
        Replay(**told["replay"]),
    )


def write(folder: Path = FOLDER) -> list[Path]:
    """Draw what is kept in this folder, and write it into its page; the files that were written."""
    found, page = read(folder), folder / PAGE
    text = with_tables(page.read_text(encoding="utf-8"), found)
    drawn = {
        "fleet-among.svg": plots.among(found.among),
        "fleet-batches.svg": plots.batches(found.batches),
        "fleet-replay.svg": plots.replay(found.replay),
    }
    for name, figure in drawn.items():
        plots.save(figure, folder / name)
    page.write_text(text, encoding="utf-8")
    return [*(folder / name for name in drawn), page]


def with_tables(page: str, found: Found) -> str:
    """The page with the figures of a run between its two marks.

    Raises:
        ValueError: they do not stand there.
    """
    text, count = re.subn(
        f"{re.escape(BEGIN)}.*?{re.escape(END)}",
        lambda _: f"{BEGIN}\n\n{_tables(found)}\n{END}",
        page,
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError(
            f"{PAGE} needs one place for the figures of fleets, between {BEGIN!r} and {END!r}; it has {count}"
        )
    return text


def _tables(found: Found) -> str:
    day = date.fromisoformat(found.day)
    return "\n".join((
        f"Measured on {day.day} {day:%B %Y}: {found.machine}; the machine's load was {found.load:g}. Medians.\n",
        "![What a step costs with ever more adapters on the model](fleet-among.svg)\n",
        *_table(_among_head(found.among), _among_lines(found.among)),
        "![What a batch costs whose rows share adapters](fleet-batches.svg)\n",
        *_table(("rows", "tokens each", "adapters", *WAYS.values()), _batch_lines(found.batches)),
        "![How long requests wait for their adapters](fleet-replay.svg)\n",
        *_table(("", ""), _replay_lines(found.replay)),
    ))  # fmt: skip


def _table(head: tuple[str, ...], lines: Iterator[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    yield from (f"| {' | '.join(line)} |" for line in lines)
    yield ""


def _among_head(found: list[Among]) -> tuple[str, ...]:
    told = {REFERENCE: "reference", SPLICE: "splice"}
    firsts = {library: next(one.count for one in found if one.library == library) for library in LIBRARIES}
    return (
        "",
        *(f"{told[library]} beside {n:,}" if n == firsts[library] else f"{n:,}" for library, n in _columns(found)),
    )


def _among_lines(found: list[Among]) -> Iterator[tuple[str, ...]]:
    times = {(one.library, one.count): one.seconds for one in found}
    for step, told in STEPS.items():
        yield (told, *(_time(times[column][step]) for column in _columns(found)))


def _columns(found: list[Among]) -> list[tuple[str, int]]:
    return [(one.library, one.count) for library in LIBRARIES for one in found if one.library == library]


def _batch_lines(found: list[Batch]) -> Iterator[tuple[str, ...]]:
    for batch in sorted(found, key=lambda batch: (batch.tokens, batch.adapters)):
        times = (_time(batch.seconds[way]) for way in WAYS)
        yield (str(batch.rows), str(batch.tokens), str(batch.adapters), *times)


def _replay_lines(found: Replay) -> Iterator[tuple[str, ...]]:
    yield f"{found.registered:,} adapters over {found.slots} slots, requests", f"{found.requests:,}"
    yield "whose adapter was there", amount(100 * found.hit_rate, "%")
    yield "time to adapter, half of all requests", _time(found.wait(0.5))
    yield "time to adapter, 99 % of all requests", _time(found.wait(0.99))
    yield "time to adapter, half of those that had to be loaded", _time(found.load)
    yield "tokens a second", number(found.tokens_per_second)
    yield "tokens a second with one adapter alone", number(found.single)


def _time(seconds: float) -> str:
    """In the unit that leaves the fewest digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return amount(seconds / size, unit)
    return amount(seconds * 1e6, "us")
