"""The program: which commands there are, and what it ends with.

It ends with 0 where all is well, 1 where a problem was found, and 2 where it was called wrongly.
"""

from __future__ import annotations

import json
import logging
import pkgutil
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from splice import __version__
from splice.cli import commands
from splice.cli.output import shown
from splice.errors import PeftError

if TYPE_CHECKING:
    import click

# What the program is made with. They are an extra: a library does not need them.
_NEEDED = ("click", "rich", "numpy")
# Errors that say something of what the program was given. Others are mistakes of its own, and show where they were made.
GIVEN = (PeftError, OSError, ValueError, NotImplementedError)


def main() -> None:
    """Run the command that the arguments of the process name, and end the process."""
    lacking = [name for name in _NEEDED if find_spec(name) is None]
    if lacking:
        print(f"splice: the command line needs {' and '.join(lacking)}: pip install 'splice[cli]'", file=sys.stderr)
        sys.exit(2)
    _quieten()
    try:
        _program()(prog_name="splice")
    except GIVEN as error:
        sys.exit(_told(error, "--json" in sys.argv))


def names() -> list[str]:
    """The commands: the files in `commands/`."""
    return sorted(module.name for module in pkgutil.iter_modules(commands.__path__))


def _program() -> click.Group:
    # Imported when it is known to be there. Not typer, which would say the same in less: it imports pydantic, and that takes
    # as long as all that `splice inspect` does.
    import click

    class Program(click.Group):
        """Imports a command when it is asked for: most calls are for one of them."""

        def list_commands(self, ctx: click.Context) -> list[str]:
            return names()

        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
            if cmd_name not in names():
                return None
            found: click.Command = import_module(f"{commands.__name__}.{cmd_name}").command
            return found

    def finished(code: int) -> None:
        raise click.exceptions.Exit(code)

    program = Program(
        name="splice",
        help="Look into adapters, compare them, and try whether they fit. Ends with 0 where all is well, 1 where a "
        "problem was found, and 2 where it was called wrongly.",
        context_settings={"help_option_names": ["-h", "--help"]},
        result_callback=finished,
    )
    return click.version_option(__version__, message="%(version)s")(program)


def _quieten() -> None:
    """Leave out what libraries log to nobody in particular as they are imported: users of the program cannot change it."""
    if logging.lastResort is not None:
        logging.lastResort.setLevel(logging.ERROR)
    # It has a handler of its own.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def _told(error: Exception, as_json: bool) -> int:
    """Say what went wrong, and give back what the process ends with."""
    text = shown(str(error)) or type(error).__name__
    if as_json:
        print(json.dumps({"error": text}))
    else:
        print(f"splice: {text}", file=sys.stderr)
    return 1
