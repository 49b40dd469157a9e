"""`splice verify`: whether an adapter fits a base, of which no weight is read, and whether an engine serves it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import click

from splice.checkpoint.engines import engines
from splice.cli.engines import Answer, asked
from splice.cli.engines import as_json as engine_as_json
from splice.cli.opened import open_adapter
from splice.cli.options import json_option, of_the_hub
from splice.cli.output import console, print_json, shown
from splice.cli.problems import Problem
from splice.cli.summary import look_into
from splice.cli.values import problems_of_values

if TYPE_CHECKING:
    from splice.cli.verifying import Verdict


@click.command
@click.argument("adapter")
@of_the_hub
@click.option(
    "--base", help="The base: a folder, the file of its config, or an id of the Hub. Its weights are not read."
)
@click.option(
    "--labels", type=int, help="How many labels a classifier has; as many as the adapter's head, if not given."
)
@click.option("--engine", type=click.Choice(sorted(engines())), help="Ask whether this engine serves the adapter.")
@click.option("--values", is_flag=True, help="Read all values of the adapter, and look for those that are wrong.")
@json_option
def command(
    adapter: str,
    subfolder: str | None,
    revision: str | None,
    base: str | None,
    labels: int | None,
    engine: str | None,
    values: bool,
    as_json: bool,
) -> int:
    """Try whether an adapter fits a base, without the base's weights.

    ADAPTER is a folder, the file of its weights, or an id of the Hub. Ends with 1 where it does not fit, the engine does not
    serve it, or its values are wrong.
    """
    if base is None and engine is None:
        raise click.UsageError("Say what it is to fit: --base, --engine, or both.")
    summary = look_into(open_adapter(adapter, subfolder, revision))
    answer = None if engine is None else asked(engine, summary)
    problems = [problem for problem in problems_of_values(summary) if problem.serious] if values else []
    verdict = None if base is None else _verify(adapter, subfolder, revision, base, labels)
    if as_json:
        print_json(_as_json(verdict, engine, answer, problems))
    else:
        _show(adapter, base, verdict, engine, answer, problems)
    return 0 if not ((verdict and verdict.refusal) or (answer and answer.reasons) or problems) else 1


def _verify(adapter: str, subfolder: str | None, revision: str | None, base: str, labels: int | None) -> Verdict:
    # By name: it imports torch and transformers, and whoever asks for help or for an engine should not wait for them.
    verdict: Verdict = import_module("splice.cli.verifying").verify(adapter, subfolder, revision, base, labels)
    return verdict


def _as_json(verdict: Verdict | None, engine: str | None, answer: Answer | None, problems: list[Problem]) -> object:
    told: dict[str, object] = {}
    if verdict is not None:
        told |= {"fits": not verdict.refusal, **verdict._asdict()}
    if answer is not None:
        told["engine"] = {"name": engine, **engine_as_json(answer)}
    return {**told, "problems": [problem.text for problem in problems]}


def _show(
    adapter: str,
    base: str | None,
    verdict: Verdict | None,
    engine: str | None,
    answer: Answer | None,
    problems: list[Problem],
) -> None:
    out = console()
    if verdict is not None and verdict.refusal:
        out.print(f"{shown(adapter)} does not fit {verdict.base} ({shown(str(base))})", style="red")
        out.print(shown(verdict.refusal))
    elif verdict is not None:
        out.print(
            f"{shown(adapter)} fits {verdict.base} ({shown(str(base))}): {verdict.placed} of {verdict.tensors} tensors on "
            f"{verdict.layers} layers",
            style="green",
        )
    for note in verdict.notes if verdict is not None else ():
        out.print(f"note: {shown(note)}")
    if answer is not None:
        out.print(
            f"{engine} {'does not serve it' if answer.reasons else 'serves it'}",
            style="red" if answer.reasons else "green",
        )
        for reason in answer.reasons:
            out.print(f"  {shown(reason)}")
        for note in answer.notes:
            out.print(f"  note: {shown(note)}")
    for problem in problems:
        out.print(f"problem: {shown(problem.text)}", style="red")
