"""Options that several commands have, each said once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import click

F = TypeVar("F", bound=Callable[..., object])

json_option = click.option("--json", "as_json", is_flag=True, help="Write JSON in place of text.")


def of_the_hub(command: F) -> F:
    """Where in the place of an adapter it lies."""
    command = click.option("--revision", help="Branch, tag or commit of the repository on the Hub.")(command)
    return click.option("--subfolder", help="A folder inside of ADAPTER.")(command)


def of_the_base(command: F) -> F:
    """How transformers makes the base."""
    command = click.option("--trust-remote-code", is_flag=True, help="Run code that lies in the base's folder.")(
        command
    )
    command = click.option(
        "--class", "class_name", help="Class of transformers that makes the base; else as adapter and config say."
    )(command)
    return click.option("--base-revision", help="Branch, tag or commit of the base on the Hub.")(command)
