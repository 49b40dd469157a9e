"""Run the benchmarks and print what they found."""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import fleet, forward, importing, loading, memory, merging, methods, quantised, switching
from benchmarks.measure import Settings
from benchmarks.report import Row, header, line, machine, write_json

BENCHMARKS: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "loading": loading.rows,
    "methods": methods.rows,
    "switching": switching.rows,
    "memory": memory.rows,
    "merging": merging.rows,
    "quantised": quantised.rows,
    "decode": forward.decode_rows,
    "mixed": forward.mixed_rows,
    "importing": importing.rows,
    "fleet": fleet.rows,
}


def main() -> None:
    """Parse the command line, run what it asks for, print each row as soon as it is known."""
    parser = _parser()
    options = parser.parse_args()
    if options.plots and options.small:
        parser.error("the figures of a small run mean nothing: no pictures are drawn of them")
    if options.plots and find_spec("matplotlib") is None:
        parser.error("pictures are drawn by matplotlib: pip install 'splice[plots]'")
    device = torch.device(options.device)
    # The reference's notes about deprecated names would stand between the rows.
    warnings.simplefilter("ignore")
    print(machine(device))
    if options.small:
        print("A small run shows that everything works; its figures mean nothing.")
    print(header(), flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="splice-benchmarks-") as folder:
        settings = Settings(Path(folder), device, options.small)
        for name in options.only:
            for row in BENCHMARKS[name](settings):
                rows.append(row)
                print(line(row), flush=True)
    if options.json:
        write_json(options.json, rows, device)
    for path in fleet.write() if options.plots else ():
        print(f"wrote {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="splice against the reference")
    names = list(BENCHMARKS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--small", action="store_true", help="a quick run, only to see that everything works")
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    parser.add_argument(
        "--device", choices=devices, default="cpu", help="where models are; memory is always on the CPU"
    )
    parser.add_argument("--plots", action="store_true", help="draw what `fleet` found, and write it into README.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file as well")
    return parser


if __name__ == "__main__":
    main()
