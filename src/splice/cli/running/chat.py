"""A conversation at the terminal: what is typed is answered as it is made, and adapters are switched between two lines."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from splice.cli.adapters import Adapter
from splice.cli.output import shown
from splice.cli.running.answers import Teller
from splice.cli.running.listener import Listener
from splice.cli.running.stage import REFUSALS, Stage
from splice.cli.running.texts import Texts, Turn

# What stands at the end of text whose last character has not come whole.
_BROKEN = "\ufffd"


class _Command(NamedTuple):
    """What a line that begins with a slash does."""

    # What is typed behind it; "" for nothing.
    takes: str
    # In a few words.
    about: str
    # Called with what was typed behind it. What it gives back is whether the conversation goes on.
    run: Callable[[str], bool]


class Chat:
    """A conversation.

    Args:
        teller: answers.
        texts: the tokenizer.
        stage: the adapters.
        find: looks into one more adapter, given as `NAME=ADAPTER`.
    """

    def __init__(self, teller: Teller, texts: Texts, stage: Stage, find: Callable[[str], Adapter]) -> None:
        self._teller, self._texts, self._stage, self._find = teller, texts, stage, find
        # Who answers; None is the base.
        self._speaker: str | None = next(iter(stage.adapters), None)
        self._turns: list[Turn] = []
        # Answers so far. Each has draws of its own.
        self._told = 0
        self._commands = {
            "/adapter": _Command("NAME", "let this adapter answer", self._switch),
            "/base": _Command("", "let the base answer", self._to_base),
            "/adapters": _Command("", "list the adapters", self._list),
            "/load": _Command("NAME=ADAPTER", "load one more", self._load),
            "/new": _Command("", "begin a new conversation", self._begin),
            "/help": _Command("", "list these commands", self._help),
            "/quit": _Command("", "end", lambda _: False),
        }

    def run(self) -> None:
        """Read lines and answer them, until `/quit` or the end of the input."""
        if sys.stdin.isatty() and find_spec("readline") is not None:
            import_module("readline")  # from here on `input` knows arrow keys and earlier lines
        self._help("")
        going = True
        while going:
            try:
                line = input(f"{self._name()}> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if not line:
                continue
            going = self._obey(line) if line.startswith("/") else self._answer(line)

    def _name(self) -> str:
        return "base" if self._speaker is None else shown(self._speaker)

    def _obey(self, line: str) -> bool:
        word, _, rest = line.partition(" ")
        command = self._commands.get(word)
        if command is None:
            print(f"{shown(word)} is no command; /help lists them")
            return True
        rest = rest.strip()
        if bool(rest) != bool(command.takes):
            print(f"it is called as {word} {command.takes}".rstrip())
            return True
        return command.run(rest)

    def _switch(self, name: str) -> bool:
        if name in self._stage.adapters:
            self._speaker = name
        else:
            print(f"there is no adapter {shown(name)!r}; there are {shown(', '.join(self._stage.adapters)) or 'none'}")
        return True

    def _to_base(self, _: str) -> bool:
        self._speaker = None
        return True

    def _list(self, _: str) -> bool:
        for name, adapter in self._stage.adapters.items():
            print(f"{'*' if name == self._speaker else ' '} {shown(name)}  {adapter.method}  {shown(adapter.place)}")
        print(f"{'*' if self._speaker is None else ' '} the base")
        return True

    def _load(self, text: str) -> bool:
        try:
            adapter = self._find(text)
            if adapter.name in self._stage.adapters:
                raise ValueError(f"there is an adapter {adapter.name!r} already")
            report = self._stage.add(adapter)
        except REFUSALS as error:
            print(shown(str(error)))
            return True
        print(shown(str(report)))
        self._speaker = adapter.name
        return True

    def _begin(self, _: str) -> bool:
        self._turns = []
        return True

    def _help(self, _: str) -> bool:
        for word, command in self._commands.items():
            print(f"  {f'{word} {command.takes}':<20} {command.about}")
        return True

    def _text(self, listener: Listener) -> str:
        return self._teller.told(listener, 0, self._told, self._speaker).text

    def _answer(self, line: str) -> bool:
        turns = [*(self._turns if self._texts.in_template else []), Turn("user", line)]
        if self._speaker is not None:
            self._stage.bring(self._speaker)
        writer = _Writer(self._text)
        listener, stopped = Listener(writer.write), ""
        try:
            ids = self._texts.encode(turns)
            self._teller.generate([ids], [self._speaker], [self._told], listener)
        except KeyboardInterrupt:
            stopped = " (stopped)"
        except ValueError as error:
            print(f"{shown(str(error))}; /new begins a new conversation")
            return True
        writer.write(listener, to_the_end=True)
        print(stopped)
        answer = self._teller.told(listener, 0, self._told, self._speaker)
        self._told += 1
        self._turns = [*turns, Turn("assistant", answer.text)]
        if sys.stdout.isatty() and listener.first is not None and listener.last:
            rate = answer.tokens / listener.last
            print(f"  {answer.tokens} tokens, the first after {listener.first * 1000:.0f} ms, {rate:.1f} a second")
        return True


class _Writer:
    """Writes an answer as far as it has come."""

    def __init__(self, text_of: Callable[[Listener], str]) -> None:
        self._text_of = text_of
        # Characters that have been written.
        self._written = 0

    def write(self, listener: Listener, to_the_end: bool = False) -> None:
        """Write what is new. A character of several tokens is written when it is whole, or where no more can come."""
        text = self._text_of(listener)
        if to_the_end or not text.endswith(_BROKEN):
            print(shown(text[self._written :].replace("\t", "    ")), end="", flush=True)
            self._written = len(text)
