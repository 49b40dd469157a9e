"""Here `peft` is splice: anything else would test the reference against itself."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch

from tests.ecosystem import table
from tests.ecosystem.both import shim_version

torch.set_num_threads(1)
assert peft.__version__ == shim_version(), "run these by `python -m tests.ecosystem`"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help="write docs/ecosystem.md for the files that are run")


def pytest_configure(config: pytest.Config) -> None:
    table.begin(config)


@pytest.fixture(autouse=True)
def _quiet() -> object:
    """What libraries say of their own deprecations is not what is tested."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
