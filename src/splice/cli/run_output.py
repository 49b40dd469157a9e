"""What `splice run` writes: what was loaded, the answers side by side, and how long it took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from splice.cli.adapters import Adapter
from splice.cli.output import BROKEN_AT, console, shown
from splice.errors import counted, sized

if TYPE_CHECKING:
    from rich.table import Table

    from splice.cli.running.answers import Answer, Answers, Batch
    from splice.cli.running.session import Session

# Columns that an answer has at least beside others. Where there is no room for that, answers stand below one another.
_NARROWEST = 24


def show_loaded(session: Session, adapters: Sequence[Adapter]) -> None:
    """The base and its adapters, and how long each took to load."""
    out, facts = console(), session.base.facts
    out.print(
        f"{shown(session.place)}: {facts.class_name}, {sized(facts.nbytes)} in {facts.dtype} on {session.base.device}, "
        f"loaded in {session.base.seconds:.2f} s"
    )
    if not adapters:
        return
    table = _table("adapter", "method", "tensors", "layers", "size", "loaded in")
    for name, method in ((adapter.name, adapter.method) for adapter in adapters):
        report = session.stage.reports[name]
        table.add_row(
            shown(name),
            method,
            f"{report.placed} of {report.expected}",
            str(report.layers),
            sized(report.nbytes),
            f"{report.seconds * 1000:.0f} ms",
        )
    out.print(table)
    for adapter in adapters:
        for note in session.stage.reports[adapter.name].notes:
            out.print(f"note: {shown(adapter.name)}: {shown(note)}")


def show_told(prompts: Sequence[str], names: Sequence[str | None], told: Answers) -> None:
    """The answers to each prompt, side by side where they are short, and how long it took.

    Args:
        prompts: the prompts.
        names: who was asked, in this order; None for the base.
        told: what came of it.
    """
    out = console()
    rows = [
        [_text(prompt), *(_text(by_name[name].text) for name in names)]
        for prompt, by_name in zip(prompts, _by_prompt(told.answers, len(prompts)))
    ]
    out.print()
    width = min(out.width, BROKEN_AT)
    longest = max(len(line) for row in rows for cell in row for line in cell.split("\n"))
    if min(longest, _NARROWEST) * (len(names) + 1) <= width:
        # Not as everything else is written: here long lines have to be broken.
        out.print(_side_by_side(rows, [_called(name) for name in names]), width=width, soft_wrap=False)
        out.print()
    else:
        for prompt, *texts in rows:
            out.print(f"> {prompt}", style="bold")
            for text in dict.fromkeys(texts):
                same = [_called(name) for name, other in zip(names, texts) if other == text]
                out.print(", ".join(same), style="cyan")
                out.print(text)
            out.print()
    out.print(_times(told.batches))


def _side_by_side(rows: Iterable[Sequence[str]], names: Sequence[str]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for title in ("prompt", *names):
        table.add_column(title, overflow="fold")
    for prompt, base, *others in rows:
        # Where it is not what the base answers, it is the adapter's doing.
        table.add_row(prompt, base, *(text if text == base else Text(text, "cyan") for text in others))
    return table


def _times(batches: Sequence[Batch]) -> Table:
    """A line for those who shared their batches."""
    shared: dict[tuple[str | None, ...], list[Batch]] = {}
    for batch in batches:
        shared.setdefault(tuple(dict.fromkeys(batch.adapters)), []).append(batch)
    table = _table("asked in one batch", "batches", "rows", "first token", "tokens", "time", "tokens/s")
    for names, of_them in shared.items():
        seconds, tokens = sum(batch.seconds for batch in of_them), sum(batch.tokens for batch in of_them)
        first = sum(batch.first for batch in of_them) / len(of_them)
        table.add_row(
            ", ".join(map(_called, names)),
            str(len(of_them)),
            str(sum(len(batch.adapters) for batch in of_them)),
            f"{first * 1000:.0f} ms",
            f"{tokens:,}",
            f"{seconds:.2f} s",
            f"{tokens / seconds:,.0f}" if seconds else "",
        )
    return table


def notes_on(names: Sequence[str | None], count: int, told: Answers) -> list[str]:
    """What a reader of the answers should know beside them.

    Args:
        names: who was asked; None for the base.
        count: of the prompts.
        told: what came of it.
    """
    by_prompt = _by_prompt(told.answers, count)
    same = [name for name in names if name and all(by[name].text == by[None].text for by in by_prompt)]
    cut = sum(not answer.ended for answer in told.answers)
    notes = list(told.notes)
    notes += [f"{name!r} answers every prompt as the base does" for name in same]
    notes += [f"{counted(cut, 'answer')} cut off; --max-new-tokens allows more"] if cut else []
    return notes


def as_json(
    session: Session,
    adapters: Sequence[Adapter],
    prompts: Sequence[str],
    told: Answers,
    seed: int | None,
    notes: Sequence[str],
) -> dict[str, object]:
    """All of it for programs."""
    facts, reports = session.base.facts, session.stage.reports
    return {
        "base": {
            "place": session.place,
            "class": facts.class_name,
            "dtype": facts.dtype,
            "bytes": facts.nbytes,
            "device": str(session.base.device),
            "seconds": session.base.seconds,
        },
        "adapters": [
            {
                "name": adapter.name,
                "place": adapter.place,
                "method": adapter.method,
                "tensors": reports[adapter.name].placed,
                "layers": reports[adapter.name].layers,
                "bytes": reports[adapter.name].nbytes,
                "seconds": reports[adapter.name].seconds,
                "notes": reports[adapter.name].notes,
            }
            for adapter in adapters
        ],
        "prompts": list(prompts),
        "chat_template": session.texts.in_template,
        "seed": seed,
        "answers": [answer._asdict() for answer in told.answers],
        "batches": [batch._asdict() for batch in told.batches],
        "notes": list(notes),
    }


def _by_prompt(answers: Iterable[Answer], count: int) -> list[dict[str | None, Answer]]:
    found: list[dict[str | None, Answer]] = [{} for _ in range(count)]
    for answer in answers:
        found[answer.prompt][answer.adapter] = answer
    return found


def _called(name: str | None) -> str:
    return "base" if name is None else shown(name)


def _text(text: str) -> str:
    return shown(text.replace("\t", "    ")).strip("\n")


def _table(*titles: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number > 1 or title == "batches" else "left", no_wrap=True)
    return table
