"""The distribution called `peft`: its version, its paths and its names."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import pytest

import splice
from tests.ecosystem.both import reference, shim_version


def told(_: int = 0) -> dict[str, Any]:
    import peft

    return {"version": peft.__version__, "file": peft.__file__}


@pytest.mark.shows("transformers", "finds the distribution `peft`, new enough")
def test_the_version_is_one_and_new_enough_for_transformers() -> None:
    from transformers.utils import is_peft_available

    assert peft.__version__ == version("peft") == shim_version()
    assert is_peft_available()
    assert peft.PeftModel is splice.PeftModel


def test_the_reference_is_asked_in_a_process_of_its_own() -> None:
    there = reference(told)
    assert there["version"].startswith("0.21")
    assert Path(there["file"]) != Path(peft.__file__)
