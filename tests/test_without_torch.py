"""What a checkpoint is can be asked without torch: `checkpoint/` does not import it, but for reading and writing tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import splice.checkpoint

FOLDER = Path(splice.checkpoint.__file__).parent
# Those that read or write tensors.
WITH_TORCH = {"parts", "reading", "tensors", "unread", "writing"}
FILES = sorted({path.stem for path in FOLDER.glob("*.py")} - {"__init__"} - WITH_TORCH)

# Runs in a process of its own, where any import of torch raises.
_START = """
import sys
sys.modules["torch"] = None
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", _START + code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return done.stdout.strip()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    key = "base_model.model.layers.0.q_proj.lora_A.weight"
    save_file({key: torch.zeros(2, 8, dtype=torch.bfloat16)}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2.0, "target_modules": ["q_proj"]})
    )
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_each_file_alone(name: str) -> None:
    run(f"import splice.checkpoint.{name}")


def test_splice_itself() -> None:
    run("import splice")


def test_a_config_and_a_header_are_read(checkpoint: Path) -> None:
    found = run(f"""
from splice.checkpoint.fields import read_fields
from splice.checkpoint.header import read_header
from splice.checkpoint.keys import parse_key
from splice.checkpoint.source import Source

source = Source.from_options({str(checkpoint)!r}, None, {{}})
fields = read_fields(source.config_text(), source.config_place)
(name, entry), = read_header(source.weights()).entries.items()
print(fields["peft_type"], parse_key(name, {{"lora_A"}}).path, entry.dtype, entry.shape)
""")
    assert found == "LORA layers.0.q_proj BF16 (2, 8)"


def test_a_damaged_header_is_refused_by_the_same_error(checkpoint: Path) -> None:
    path = checkpoint / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    run(f"""
from pathlib import Path
from splice.checkpoint.header import read_header
from splice.errors import CheckpointError

try:
    read_header(Path({str(path)!r}))
except CheckpointError as error:
    assert "damaged" in str(error), error
else:
    raise AssertionError
""")


def test_names_and_configs_of_other_libraries_are_known() -> None:
    """Also those that a method knows: its file about them is found, and the method itself is not imported."""
    assert run("""
from splice.checkpoint.foreign import foreign_names, what_config

print(foreign_names(["model.layers.0.self_attn.q_proj.lora_a"]).split(" names")[0], what_config({"r": 8, "lora_alpha": 16}))
""").startswith("the tensors are named as MLX  Its fields are those of LoRA")


def test_where_torch_is_imported_already_a_header_needs_no_numpy(checkpoint: Path) -> None:
    """numpy is no dependency of splice."""
    code = f"""
import sys, torch
sys.modules["numpy"] = None
from pathlib import Path
from splice.checkpoint.header import read_header

print(len(read_header(Path({str(checkpoint / "adapter_model.safetensors")!r})).entries))
"""
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "1"
    )
