"""Here `peft` is splice: anything else would test the reference against itself."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch

from tests.ecosystem.both import shim_version

torch.set_num_threads(1)
assert peft.__version__ == shim_version(), "run these by `python -m tests.ecosystem`"


@pytest.fixture(autouse=True)
def _quiet() -> object:
    """What libraries say of their own deprecations is not what is tested."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
