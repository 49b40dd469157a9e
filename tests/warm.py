"""Programs in a process that has already imported what takes seconds: a server that forks for each of them.

`python -m tests.warm` is the server. For every line that it reads, a child of it becomes the program: with arguments, folder,
environment and files of its own, and modules that are imported and not yet used. What is read from the environment at import
is the server's; a program that needs it otherwise has to be started anew.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import traceback
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent


class Ended(NamedTuple):
    """What a program ended with: as `subprocess` tells it, a signal as a negative number."""

    returncode: int
    stdout: str
    stderr: str


def warm(*arguments: str | Path, input: str = "", cwd: Path = ROOT) -> Ended:
    """As `python ARGUMENTS`, which begin with `-m` and a module, or are a script and what it is given."""
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("in", "out", "err")]
        for file, text in zip(files, (input, "", "")):
            file.write_text(text, encoding="utf-8")
        request = {"arguments": arguments, "cwd": cwd, "environment": dict(os.environ), "files": files}
        server.stdin.write(json.dumps(request, default=str) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return Ended(code, *(file.read_text(encoding="utf-8") for file in files[1:]))


@cache
def _server() -> Any:
    """One for each process of tests; it ends when nobody is there to write to it."""
    command = [sys.executable, "-m", "tests.warm"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)


def _serve() -> Any:
    """Returns in children alone, with what they are to be."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, flush=True)
    sys.exit()


def _become(request: Any) -> int:
    """Run it to its end; returns its exit code."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, file in enumerate(request["files"]):
        os.dup2(os.open(file, os.O_RDWR), number)
    sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115
    first, *others = request["arguments"]
    try:
        if first == "-m":
            sys.argv = others
            runpy.run_module(others[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *others]
            runpy.run_path(first, run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return int(ended.code is not None) if not isinstance(ended.code, int) else ended.code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end(code: int) -> None:
    """As the interpreter ends, but without taking all modules apart, which takes a second."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _import() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import splice.merging_files  # noqa: F401


if __name__ == "__main__":
    _import()
    _end(_become(_serve()))
