"""The distribution that is called `peft`: transformers and people's scripts find splice under that name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import splice
from tests import bases
from tests.conftest import write_checkpoint

ROOT = Path(__file__).parent.parent
SHIM = ROOT / "peft-shim"
VERSION = "0.22.0+splice.1"
CONFIG = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shim as pip would install it, in a folder of its own."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(SHIM / "src" / "peft", site / "peft", ignore=shutil.ignore_patterns("__pycache__"))
    info = site / f"peft-{VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.3\nName: peft\nVersion: {VERSION}\n")
    return site


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, an adapter that the reference wrote, and the same adapter in a cache of the Hub."""
    place = tmp_path_factory.mktemp("work")
    bases.LLAMA.build().save_pretrained(place / "base")
    adapter = write_checkpoint(place / "adapter", bases.LLAMA, CONFIG)
    cached = place / "hub" / "models--someone--adapter"
    shutil.copytree(adapter, cached / "snapshots" / ("a" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    return place


def scenario(name: str, installed: Path, folder: Path) -> dict[str, Any]:
    paths = os.pathsep.join(map(str, (installed, ROOT / "src", ROOT)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "tests" / "by_name_peft.py"), name, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((folder / "result.json").read_text())
    assert result["version"] == VERSION
    assert result["from"].startswith("splice")
    return result


def test_the_version_is_one() -> None:
    assert f'version = "{VERSION}"' in (SHIM / "pyproject.toml").read_text()
    assert f'__version__ = "{VERSION}"' in (SHIM / "src" / "peft" / "__init__.py").read_text()


def test_transformers_finds_the_distribution(installed: Path) -> None:
    found = Distribution.discover(name="peft", path=[str(installed)])
    assert [distribution.version for distribution in found] == [VERSION]


def test_inference_from_a_path_and_from_the_hub(installed: Path, folder: Path) -> None:
    result = scenario("usage", installed, folder)
    assert result["hub"]
    assert result["tokens"] == [1, 9]
    reference = peft.PeftModel.from_pretrained(bases.LLAMA.build(), str(folder / "adapter")).eval()
    line = torch.randint(1, 40, (6,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(input_ids=line[None]).logits.flatten()
    torch.testing.assert_close(torch.tensor(result["logits"]), expected, rtol=1e-5, atol=1e-5)


def test_training_on_from_a_checkpoint(installed: Path, folder: Path) -> None:
    result = scenario("resume", installed, folder)
    assert result["identical"]
    assert result["trained"]
    assert result["flags"]
    assert result["files"] == ["adapter_config.json", "adapter_model.safetensors", "training_args.bin"]


def test_training_on_with_two_adapters_and_recomputed_blocks(installed: Path, folder: Path) -> None:
    result = scenario("resume_two", installed, folder)
    assert result["identical"]
    assert result["trained"]
    assert result["flags"]
    assert result["other"]
    assert "mine/adapter_model.safetensors" in result["files"]


def test_the_best_checkpoint_at_the_end(installed: Path, folder: Path) -> None:
    result = scenario("best", installed, folder)
    assert result["best"]
    assert result["equal"]
    # The trainer writes its own card, and has the model bring that one up to date.
    for line in ("license: mit", "library_name: peft", "- lora", "- mine", "## Training procedure", "- PEFT 0.21.2"):
        assert f"{line}\n" in result["card"], line


def test_a_network_that_carries_adapters_itself(installed: Path, folder: Path) -> None:
    result = scenario("layers", installed, folder)
    assert (result["tuned"], result["lora"], result["whole"]) == (2, 2, 1)
    assert result["active"] == [["a"], ["a"]]
    assert result["prompted"] == []
    assert result["second"] == ["b"]
    flags = ("bare_names", "changed", "disabled", "enabled", "back", "kept", "gone")
    assert all(result[name] for name in flags), result
    assert len(result["told"]) == 1
    assert "In the config alone: model.layers.0.self_attn.v_proj" in result["told"][0]


def test_adapters_of_several_methods(installed: Path, folder: Path) -> None:
    result = scenario("mixed", installed, folder)
    assert all(result[name] for name in ("type", "differ", "plain", "merged")), result


def test_what_is_not_there_is_missing_by_name() -> None:
    with pytest.raises(AttributeError, match="NoSuchConfig"):
        splice.NoSuchConfig  # noqa: B018
