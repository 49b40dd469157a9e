"""`python -m tests.endurance --checkpoints 100000 --jobs 2`, or `--kills 1000`: takes long, and prints what was found.

Each thousand is a process of its own, so that a crash or a hang of it is told from an answer.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.endurance.killing import kill_often
from tests.endurance.mutating import answers, change, sources

# Checkpoints that one process tries.
AT_ONCE = 1000


class Tried(NamedTuple):
    """What became of many changed checkpoints."""

    # "inspect verify load", each in a word -> how many.
    answers: Counter[str]
    # What was wrong, in words; a fault that was met before is told once.
    faults: list[str]


def tried(count: int, seed: int, folder: Path, methods: Sequence[str] = ()) -> Tried:
    """The answers to so many changed checkpoints, of all methods or of these."""
    found, draw, faults = Counter[str](), random.Random(seed), dict[str, str]()
    sound = sources(folder / "sound", methods)
    built = {id(source): source.build() for source in sound}
    for index in range(count):
        source = draw.choice(sound)
        place = folder / "changed"
        what = change(source, place, draw)
        try:
            found[" ".join(answers(place, source, built[id(source)]))] += 1
        except BaseException as error:
            found["fault"] += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            about = f"seed {seed}, checkpoint {index} ({source.folder.name}, {what})"
            line = f"{type(error).__name__}: {error}"[:300]
            faults.setdefault(f"{where.filename}:{where.lineno}", f"{about}: {line} [{where.filename}:{where.lineno}]")
            built[id(source)] = source.build()
    return Tried(found, list(faults.values()))


def _in_a_process(count: int, seed: int) -> Tried:
    """`tried` in a process of its own; that it crashes or does not end is a fault as well."""
    command = [sys.executable, "-m", "tests.endurance", "--checkpoints", str(count), "--seed", str(seed), "--here"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    except subprocess.TimeoutExpired:
        return Tried(Counter(), [f"seed {seed} does not end"])
    if ended.returncode:
        return Tried(Counter(), [f"seed {seed} ended with {ended.returncode}: {ended.stderr.strip()[-1500:]}"])
    told = json.loads(ended.stdout.splitlines()[-1])
    return Tried(Counter(told["answers"]), told["faults"])


def _all(count: int, seed: int, jobs: int) -> int:
    found, faults = Counter[str](), 0
    with ThreadPoolExecutor(jobs) as pool:
        seeds = range(seed, seed + -(-count // AT_ONCE))
        for answer in pool.map(lambda each: _in_a_process(min(AT_ONCE, count), each), seeds):
            found += answer.answers
            faults += len(answer.faults)
            for fault in answer.faults:
                print(fault, flush=True)
    print(f"{found.total():,} checkpoints; inspect, verify, load:")
    for answer, times in found.most_common():
        print(f"{times:>9,}  {answer}")
    print(f"{faults} faults")
    return bool(faults)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.endurance")
    parser.add_argument("--checkpoints", type=int, default=0, help="how many changed checkpoints are tried")
    parser.add_argument("--kills", type=int, default=0, help="how many saves and merges are killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="endurance-") as folder:
        if options.here:
            print(json.dumps(tried(options.checkpoints, options.seed, Path(folder))._asdict()))
            return 0
        failed = options.checkpoints and _all(options.checkpoints, options.seed, options.jobs)
        if options.kills:
            print(kill_often(options.kills, options.seed, Path(folder)))
        return int(failed)


if __name__ == "__main__":
    sys.exit(main())
