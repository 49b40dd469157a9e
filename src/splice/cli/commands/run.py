"""`splice run`: what a base and its adapters answer, side by side or in a conversation."""

from __future__ import annotations

import secrets
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

import click

from splice.cli.adapters import adapter_from, base_of, check_names
from splice.cli.options import json_option, of_the_base, of_the_hub
from splice.cli.output import console, print_json, shown
from splice.cli.run_output import as_json as run_as_json
from splice.cli.run_output import notes_on, show_loaded, show_told
from splice.cli.settings import Manner, Wanted

if TYPE_CHECKING:
    from splice.cli.running.answers import Answers
    from splice.cli.running.session import Session

# Where the parts are that need torch.
_ROOM = "splice.cli.running"
_DTYPES = ("bfloat16", "float16", "float32", "float64")


@click.command(short_help="Ask a base and its adapters, side by side.")
@click.option("--base", help="Folder of the base model, or its id on the Hub; else the one that the adapters name.")
@click.option("--adapter", "adapters", multiple=True, help="NAME=ADAPTER, or a folder or id; may come again.")
@click.option("--prompt", "prompts", multiple=True, help="What is asked; may come again. `-` reads them, one a line.")
@click.option(
    "--interactive", "-i", is_flag=True, help="Talk: answers come as they are made, and adapters are switched."
)
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=128, show_default=True, help="Of one answer, at most."
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.0,
    help="Draw tokens at this temperature; 0, the default, takes the most probable one.",
)
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Draw among this much probability."
)
@click.option("--seed", type=click.IntRange(0), help="Of the draws; another one each time, if not given.")
@click.option("--task-id", type=click.IntRange(0), help="Of adapters that know several tasks, the one to ask for.")
@click.option("--raw", is_flag=True, help="Leave the tokenizer's chat template out.")
@click.option("--system", help="What a conversation begins with, where there is a chat template.")
@click.option("--dtype", type=click.Choice(_DTYPES), help="Of the base; that of its files otherwise.")
@click.option("--device", help="cpu, cuda, cuda:1, mps; `auto` spreads the base. A GPU if there is one, if not given.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Rows of a batch, at most.")
@click.option("--tokenizer", help="Folder or id of a tokenizer, if it is not the base's own.")
@of_the_base
@of_the_hub
@json_option
def command(
    base: str | None,
    adapters: tuple[str, ...],
    prompts: tuple[str, ...],
    interactive: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    task_id: int | None,
    raw: bool,
    system: str | None,
    dtype: str | None,
    device: str | None,
    batch_size: int,
    tokenizer: str | None,
    base_revision: str | None,
    class_name: str | None,
    trust_remote_code: bool,
    subfolder: str | None,
    revision: str | None,
    as_json: bool,
) -> int:
    """Ask a base and its adapters, and show their answers side by side.

    The rows of one batch have an adapter each; the base is one of them. Adapters that cannot share a batch are asked one
    after another, with the same result. An adapter that does not fit is an error before anything is asked. Without
    --temperature the same call gives the same answers, and with it the same --seed does.
    """
    _check_call(interactive, prompts, as_json, base is None and not adapters)
    find = partial(adapter_from, subfolder=subfolder, revision=revision, task=task_id)
    found = [find(text) for text in adapters]
    check_names([adapter.name for adapter in found])
    place = base_of(found) if base is None else base
    if find_spec("transformers") is None:
        raise ValueError("the base is loaded by transformers: pip install 'splice[transformers]'")
    asked = list(_read(prompts))
    if not asked and not interactive:
        raise ValueError("the input has no lines to ask")
    drawn = None if not temperature else secrets.randbelow(2**31) if seed is None else seed
    wanted = Wanted(place, base_revision, class_name, trust_remote_code, dtype, device, tokenizer)
    manner = Manner(max_new_tokens, temperature, top_p, drawn or 0, task_id or 0)
    options = {name: value for name, value in (("subfolder", subfolder), ("revision", revision)) if value is not None}
    notes: list[str] = []
    with _warnings_told(_tell if interactive else notes.append):
        # By name: torch takes a second or two, and whoever called it wrongly should not wait for it.
        session: Session = import_module(f"{_ROOM}.session").open_session(wanted, found, options, raw, system, manner)
        if not as_json:
            show_loaded(session, found)
        if interactive:
            import_module(f"{_ROOM}.chat").Chat(session.teller, session.texts, session.stage, find).run()
            return 0
        told = _ask(session, asked, batch_size, max_new_tokens, as_json or not sys.stderr.isatty())
    names = [None, *(adapter.name for adapter in found)]
    notes += notes_on(names, len(asked), told)
    if as_json:
        print_json(run_as_json(session, found, asked, told, drawn, notes))
        return 0
    show_told(asked, names, told)
    for note in notes if drawn is None else (f"drawn with --seed {drawn}", *notes):
        console().print(f"note: {shown(note)}")
    return 0


def _check_call(interactive: bool, prompts: Sequence[str], as_json: bool, nobody: bool) -> None:
    if nobody:
        raise click.UsageError("Say whom to ask: --base, --adapter, or both.")
    if interactive and (prompts or as_json):
        raise click.UsageError(f"--interactive is for what you type: leave out {'--prompt' if prompts else '--json'}.")
    if not interactive and not prompts:
        raise click.UsageError("Say what to ask: --prompt TEXT, --prompt - for lines of the input, or --interactive.")


def _read(prompts: Sequence[str]) -> Iterator[str]:
    """The prompts, with the lines of the input in the place of `-`."""
    for text in prompts:
        if text == "-":
            yield from (line for line in sys.stdin.read().splitlines() if line.strip())
        else:
            yield text


def _ask(session: Session, asked: Sequence[str], rows: int, steps: int, quiet: bool) -> Answers:
    """Put the prompts, with a bar that moves with each token."""
    turn = import_module(f"{_ROOM}.texts").Turn
    ids = [session.texts.encode([turn("user", text)]) for text in asked]
    if quiet:
        return session.teller.all_answers(ids, rows, lambda listener: None)
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("answering", total=steps)
        return session.teller.all_answers(ids, rows, lambda listener: bar.update(task, completed=len(listener.steps)))


@contextmanager
def _warnings_told(tell: Callable[[str], object]) -> Iterator[None]:
    """Inside, warnings that are for users are told without the line of code that they came from."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: tell(str(message))  # type: ignore[assignment]
        yield


def _tell(note: str) -> None:
    print(f"note: {shown(note)}", file=sys.stderr)
