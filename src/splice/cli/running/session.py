"""A base, its tokenizer and its adapters: everything that `splice run` answers with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from splice.cli.adapters import Adapter
from splice.cli.running.answers import Teller
from splice.cli.running.stage import REFUSALS, Stage
from splice.cli.running.text_base import TextBase, load_base, open_tokenizer
from splice.cli.running.texts import Texts
from splice.cli.settings import Manner, Wanted
from splice.discovery import find_methods


class Session(NamedTuple):
    """Everything that answers are made with."""

    # The base's folder, or its id on the Hub.
    place: str
    # The base.
    base: TextBase
    # The tokenizer.
    texts: Texts
    # The adapters.
    stage: Stage
    # Who answers.
    teller: Teller


def open_session(
    wanted: Wanted,
    adapters: Sequence[Adapter],
    options: Mapping[str, str],
    raw: bool,
    system: str | None,
    manner: Manner,
) -> Session:
    """Load a base and its adapters.

    Args:
        wanted: the base.
        adapters: the adapters.
        options: of their loads: `subfolder`, `revision`.
        raw: leave the chat template out.
        system: what conversations begin with; None for nothing.
        manner: how text is made.

    Raises:
        ValueError: there is no tokenizer, the base gives no text, or an adapter does not fit it.
        OSError: the base cannot be found.
    """
    # What costs the least comes first, so that most of what can be wrong is told before the base is read.
    texts = Texts(open_tokenizer(wanted), raw, system)
    base = load_base(wanted)
    # Importing the methods is no part of the first load.
    find_methods()
    stage = Stage(base.network, options)
    # Those of one kind one after another: they are the ones that can stand together.
    for adapter in sorted(adapters, key=lambda adapter: (adapter.whole_call, adapter.method)):
        try:
            stage.add(adapter)
        except REFUSALS as error:
            raise ValueError(_in_one_sentence(adapter, wanted.place, base, error)) from error
    return Session(wanted.place, base, texts, stage, Teller(base, texts, stage, manner))


def _in_one_sentence(adapter: Adapter, place: str, base: TextBase, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0].rstrip(".:")
    more = (
        ""
        if str(error).strip().rstrip(".:") == reason
        else f"; all of it says `splice verify {adapter.place} --base {place}`"
    )
    return f"adapter {adapter.name!r} cannot be put on {base.facts.class_name} ({place}): {reason}{more}"
