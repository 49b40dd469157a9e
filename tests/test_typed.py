"""What editors and type checkers know of splice: `mypy --strict` on a small program of a user's."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each line that mypy has something to say about ends in a comment with a part of that.
PROGRAM = """
from typing_extensions import reveal_type

import peft
from torch import nn

import splice
from splice import AdapterMismatchError, LoraConfig, PeftModel, get_peft_model

base = nn.Linear(2, 2)
model = PeftModel.from_pretrained(base, "folder", adapter_name="a")
reveal_type(model)  # "splice.model.PeftModel"
reveal_type(splice.PeftModel.from_pretrained(base, "folder"))  # "splice.model.PeftModel"
reveal_type(peft.PeftModel.from_pretrained(base, "folder"))  # "splice.model.PeftModel"
reveal_type(get_peft_model(base, LoraConfig(r=4)))  # "splice.model.PeftModel"
reveal_type(LoraConfig(r=4).lora_alpha)  # "int"
reveal_type(model.load_adapter("folder", adapter_name="b").missing_keys)  # "list[str]"
reveal_type(model.active_adapters)  # "list[str]"
reveal_type(model.peft_config["a"])  # "splice.config.PeftConfig"
reveal_type(model.merge_and_unload())  # "torch.nn.modules.module.Module"
reveal_type(model.unload())  # "torch.nn.modules.module.Module"
reveal_type(splice.get_peft_model_state_dict(model))  # "dict[str, torch._tensor.Tensor]"
if model.load_report is not None:
    reveal_type(model.load_report.notes)  # "tuple[str, ...]"
try:
    model.merge_adapter()
    model.unmerge_adapter()
except AdapterMismatchError as error:
    reveal_type(error.missing)  # "list[str]"

tuner: peft.LoraModel = model.base_model
peft.LoraConfig(rank=4)  # Unexpected keyword argument "rank" for "LoraConfig"
LoraConfig(rank=4)  # Unexpected keyword argument "rank" for "LoraConfig"
LoraConfig(r="4")  # Argument "r" to "LoraConfig" has incompatible type "str"; expected "int"
PeftModel.from_pretrained("folder", base)  # Argument 1 to "from_pretrained" of "PeftModel" has incompatible type "str"
PeftModel.from_pretrained(base, "folder", is_trainable="yes")  # "is_trainable" to "from_pretrained" of "PeftModel"
model.set_adapter(["a", "b"])  # incompatible type "list[str]"; expected "str"
model.merge_and_unload(safe="yes")  # Unexpected keyword argument "safe" for "merge_and_unload" of "PeftModel"
splice.PeftModelForEverything  # Module has no attribute "PeftModelForEverything"
"""


@pytest.fixture
def user(tmp_path: Path) -> Path:
    """The Python of somebody who has installed splice and the shim, and so sees what their `py.typed` let them see."""
    venv.create(tmp_path / "venv", symlinks=True, with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    # What is installed here is there as well, behind the sources of this checkout.
    places = [ROOT / "src", ROOT / "peft-shim" / "src", sysconfig.get_path("purelib")]
    Path(site, "here.pth").write_text("".join(f"{place}\n" for place in places), encoding="utf-8")
    return python


@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not among the oldest versions")
def test_what_a_type_checker_says_of_a_small_program(user: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.lstrip(), encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--no-pretty", "--no-color-output", "--no-error-summary"]
    # Beside the program, where no settings of this project are found; what it learnt of torch is kept for the next time.
    cache = ROOT / ".mypy_cache" / "program"
    options = ["--python-executable", str(user), "--cache-dir", str(cache), program.name]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path, check=False)
    said: dict[str, str] = {}
    for number, text in re.findall(r"^program\.py:(\d+): (?:note|error): (.*)", done.stdout, re.M):
        said[number] = f"{said.get(number, '')}{text}\n"
    lines = enumerate(program.read_text(encoding="utf-8").splitlines(), 1)
    expected = {str(number): line.partition("  # ")[2] for number, line in lines if "  # " in line}
    assert said.keys() == expected.keys(), done.stdout + done.stderr
    for number, part in expected.items():
        assert part in said[number]
