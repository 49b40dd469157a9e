"""The pages that are made from the code are up to date, and what they say of the code is true."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from splice import get_peft_config
from splice.config import PeftConfig
from splice.kinds.registry import Method, all_methods, register
from tests.samples import SAMPLES

ROOT = Path(__file__).parent.parent


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WRITTEN: dict[Path, str] = generator().written()


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_made_from_the_code_is_what_the_code_says(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == WRITTEN[path], "run `make docs`"


def test_links_between_the_documents_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("*/*/README.md")]
    for page in (p for p in pages if ".venv" not in p.parts):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_a_name_is_registered_once() -> None:
    taken = next(iter(all_methods().values()))
    with pytest.raises(KeyError, match=f"{taken.name.value} is registered already, by splice"):
        register(Method(taken.name, PeftConfig, "x_", frozenset()))


@pytest.mark.parametrize("method", list(all_methods().values()), ids=lambda m: m.name.value)
def test_a_record_is_complete(method: Method) -> None:
    assert method.paper
    assert re.fullmatch(r"[A-Z].+\.", method.summary), "one sentence that says what the method does"
    assert get_peft_config({"peft_type": method.name.value, **SAMPLES[method.name].config}).peft_type == method.name
    assert method.tensor_names or method.other_layer is not None
    ways = (method.layers, method.other_layer, method.network_layer)
    assert any(way for way in ways)


def test_every_test_that_holds_a_promise_is_there() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"(tests/[a-z0-9_]+\.py)::(\w+)", page)
    assert len(named) > 50
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), re.M), f"{file}::{test}"


def test_no_promise_is_without_a_test() -> None:
    promises = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").partition("# Lines that were changed")[0]
    rows = [line for line in promises.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert rows and all("`tests/" in row.rpartition(" | ")[2] for row in rows)


def test_the_oldest_versions_that_are_promised_are_those_that_are_tested() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    tested = dict(re.findall(r"^(\w+)==([\d.]+)$", (ROOT / "tests" / "oldest.txt").read_text(encoding="utf-8"), re.M))
    lines = re.findall(r"^(?:dependencies|cli|transformers) = \[.*\]$", project, re.M)
    promised = dict(re.findall(r'"(\w+)>=([\d.]+)"', "".join(lines)))
    assert len(lines) == 3 and len(promised) == 10

    def numbers(version: str) -> list[int]:
        found = [int(part) for part in version.split(".")]
        return found[: max(i for i, n in enumerate(found, 1) if n)]

    assert {name: numbers(tested[name]) for name in promised} == {name: numbers(v) for name, v in promised.items()}
