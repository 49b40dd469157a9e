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
