"""Here `peft` is splice: anything else would test the reference against itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.ecosystem import table
from tests.ecosystem.both import reference, shim_version
from tests.temporary import put_into_memory

torch.set_num_threads(1)
assert peft.__version__ == shim_version(), "run these by `python -m tests.ecosystem`"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help="write docs/ecosystem.md for the files that are run")


def pytest_configure(config: pytest.Config) -> None:
    put_into_memory(config)
    table.begin(config)


@pytest.fixture(autouse=True)
def _quiet() -> object:
    """What libraries say of their own deprecations is not what is tested."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what the scenarios of a module write, here into `here` and under the reference into `reference`."""
    return tmp_path_factory.mktemp("scenarios")


@pytest.fixture(scope="module")
def there(request: pytest.FixtureRequest, place: Path) -> dict[str, Any]:
    """What the module's `all_of_it` returns under the reference."""
    found: dict[str, Any] = reference(request.module.all_of_it, str(place / "reference"))
    return found


@pytest.fixture(scope="module")
def here(request: pytest.FixtureRequest, place: Path) -> dict[str, Any]:
    """What it returns with splice."""
    found: dict[str, Any] = request.module.all_of_it(str(place / "here"))
    return found
