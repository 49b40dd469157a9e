"""Makes the pictures of the documentation from real runs of the program: `python docs/pictures.py` (`make pictures`).

They are docs/terminal.svg, what two commands write on a terminal, and docs/guide/heat-map.svg, what an adapter changes where.
A test notices where the program says something else than they do; the times in the first are those of the machine.
"""

from __future__ import annotations

import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from html import unescape
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

ROOT = Path(__file__).parent.parent
TERMINAL, HEAT_MAP = ROOT / "docs" / "terminal.svg", ROOT / "docs" / "guide" / "heat-map.svg"
_WIDTH = 100
# Of rich's pictures: how high letters are, from one line to the next, and from one letter to the next.
_HIGH, _LINE, _WIDE = 20, 24.4, 12.2
_ADAPTERS = "examples/skills/adapters"
# What is typed. Lines that are too long for the picture are broken as one breaks them in a shell.
COMMANDS = (
    f"splice inspect {_ADAPTERS}/reverse",
    f"splice run --adapter {_ADAPTERS}/reverse --adapter {_ADAPTERS}/sort \\\n"
    f"    --adapter up={_ADAPTERS}/upper --prompt hello --prompt banana",
)
# Dark, so that it stands out on a light page and sits well on a dark one: background, foreground, the eight colours twice.
_PLAIN = [
    (69, 76, 89), (240, 113, 120), (152, 195, 121), (229, 192, 123),
    (97, 175, 239), (198, 120, 221), (86, 182, 194), (220, 223, 228),
]  # fmt: skip
_THEME = TerminalTheme((30, 34, 42), (220, 223, 228), _PLAIN, _PLAIN)


def written(command: str) -> str:
    """What `splice ...` writes on a terminal, with its colours."""
    parent, child = pty.openpty()
    ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 60, _WIDTH, 0, 0))
    arguments = shlex.split(command.replace("\\\n", " "))[1:]
    process = subprocess.Popen(
        [sys.executable, "-m", "splice", *arguments],
        stdout=child,
        stderr=subprocess.DEVNULL,  # a bar, which would leave with the last token
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": str(_WIDTH)},
    )
    os.close(child)
    found = b""
    while True:
        try:
            piece = os.read(parent, 1 << 16)
        except OSError:  # so Linux says that the other end is closed
            break
        if not piece:
            break
        found += piece
    os.close(parent)
    if process.wait():
        raise SystemExit(f"{command!r} ended with {process.returncode}")
    return found.decode().replace("\r\n", "\n")


def terminal() -> str:
    """The picture of a terminal in which the `COMMANDS` were run."""
    console = Console(record=True, width=_WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for number, command in enumerate(COMMANDS):
        if number:
            console.print()
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        console.print(Text.from_ansi(written(command).rstrip("\n")))
    # With a name of its own, and not one that is made from the text: then a line that changes is a line that changes. The
    # letters are the reader's own: those that rich names would be fetched from elsewhere.
    drawn = console.export_svg(title="splice", theme=_THEME, unique_id="terminal")
    return re.sub(r"\s*@font-face \{.*?\}\n", "\n", drawn, flags=re.DOTALL)


def text_of(picture: str) -> list[str]:
    """The lines of text in a picture of a terminal, without the spaces at their ends."""
    lines: list[str] = []
    found = re.findall(r'<text class="terminal-r\d+" x="([\d.]+)" y="([\d.]+)"[^>]*>(.*?)</text>', picture)
    # From left to right, line by line. Spaces alone are not drawn, so the place says how many there are.
    for x, y, text in sorted(found, key=lambda part: (float(part[1]), float(part[0]))):
        row, column = round((float(y) - _HIGH) / _LINE), round(float(x) / _WIDE)
        lines.extend([""] * (row + 1 - len(lines)))
        lines[row] = lines[row].ljust(column) + unescape(text).replace("\xa0", " ")
    return [line.rstrip() for line in lines]


if __name__ == "__main__":
    TERMINAL.write_text(terminal(), encoding="utf-8")
    plot = [sys.executable, "-m", "splice", "inspect", f"{_ADAPTERS}/reverse", "--plot", str(HEAT_MAP)]
    subprocess.run(plot, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
