"""Run pytest on this folder in a process where the distribution and the module called `peft` are the shim.

python -m tests.ecosystem [pytest's options]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.ecosystem.both import ROOT, shim_version

HERE = Path(__file__).parent


def install(site: Path) -> None:
    """The shim as pip would install it, but so that a change of its files is seen at once."""
    (site / "peft").symlink_to(ROOT / "peft-shim" / "src" / "peft")
    info = site / f"peft-{shim_version()}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.3\nName: peft\nVersion: {shim_version()}\n")


def main(options: list[str]) -> int:
    # Options may name files of their own: then these alone are run.
    named = any(Path(option.partition("::")[0]).exists() for option in options)
    with tempfile.TemporaryDirectory(prefix="shim-") as site:
        install(Path(site))
        paths = os.pathsep.join(map(str, (site, ROOT / "src", ROOT)))
        environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        # The fixtures of the other tests make adapters with the reference, which is not there.
        command = [sys.executable, "-m", "pytest", f"--confcutdir={HERE}", f"--rootdir={ROOT}", *options]
        return subprocess.run(command if named else [*command, str(HERE)], env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
