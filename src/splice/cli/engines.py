"""Whether an engine serves an adapter: its limits against what the adapter is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from splice.checkpoint.engines import Limits, engines, is_on
from splice.cli.problems import listed
from splice.cli.summary import Summary
from splice.errors import counted


class Answer(NamedTuple):
    """What one engine makes of one adapter."""

    # Why it does not serve it as it was trained; empty where it does.
    reasons: tuple[str, ...]
    # What it has to be told for it.
    notes: tuple[str, ...]


def asked(engine: str, summary: Summary) -> Answer:
    """Whether `engine`, one of `engines()`, serves an adapter."""
    methods = engines()[engine]
    named = summary.opened.fields["peft_type"]
    limits = methods.get(str(named))
    if limits is None:
        return Answer((f"{engine} serves adapters of {', '.join(methods)}, and this is one of {named}",), ())
    return Answer(tuple(_reasons(engine, limits, summary)), tuple(_notes(limits, summary)))


def _reasons(engine: str, limits: Limits, summary: Summary) -> Iterator[str]:
    fields = summary.opened.fields
    for name, why in limits.refused.items():
        value = fields.get(name)
        if is_on(value):
            yield f"{name}={value!r}: {why}"
    largest, top = _largest(summary), max(limits.ranks, default=None)
    if largest is not None and top is not None and largest > top:
        yield f"rank {largest}: the largest that it can be set to is {top}"
    own = [layer for layer in summary.layers if layer.own]
    others = sorted({suffix for layer in own for suffix in layer.names} - limits.suffixes)
    if others:
        yield f"tensors that it does not read: {listed(others)}"
    whole = [layer.path for layer in summary.layers if not layer.own]
    if whole and not limits.saved_modules:
        yield f"modules that are saved whole, and that it leaves out: {listed(whole)}"
    unknown = sorted({layer.path.rpartition(".")[2] for layer in own} - limits.modules) if limits.modules else []
    if unknown:
        yield f"{counted(len(unknown), 'module')} that it puts no adapter on: {listed(unknown)}"
    if not summary.opened.weights.name.endswith(limits.formats):
        yield f"it does not read {summary.opened.weights.name}"


def _notes(limits: Limits, summary: Summary) -> Iterator[str]:
    for name, what in limits.noted.items():
        if is_on(summary.opened.fields.get(name)):
            yield f"{name}: {what}"
    largest = _largest(summary)
    if largest is None or limits.default_rank is None or largest <= limits.default_rank:
        return
    rank = next((rank for rank in limits.ranks if rank >= largest), None)
    if rank is not None:
        yield f"start it with {limits.rank_option.format(rank=rank)}: it takes ranks up to {limits.default_rank} without"


def _largest(summary: Summary) -> int | None:
    return max((layer.rank for layer in summary.layers if layer.rank is not None), default=None)


def as_json(answer: Answer) -> Mapping[str, object]:
    """The same for programs."""
    return {"serves": not answer.reasons, "reasons": answer.reasons, "notes": answer.notes}
