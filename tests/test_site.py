"""The site of the documentation: it builds without a warning, and a reader without a network sees all of it."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import splice
from splice.discovery import public_names

ROOT = Path(__file__).parent.parent


def test_every_public_name_is_in_the_reference() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    shown = set(re.findall(r"^::: [\w.]*\.(\w+)$", pages, re.M))
    for members in re.findall(r"members: \[(.*)\]", pages):
        shown.update(members.split(", "))
    assert sorted({*splice.__all__, *public_names()} - shown) == []


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra `docs`: run `make site` once")
def test_the_site_builds_and_needs_no_network(tmp_path: Path) -> None:
    """Strictly: a link or an anchor that leads nowhere and a docstring that cannot be read are errors."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        fetched = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?https?:[^>]*", page.read_text("utf-8"))
        assert fetched == [], page.name
    # The comment above a field is what the reference says of it.
    assert "Rank r, at least 1" in (tmp_path / "api" / "configs.html").read_text("utf-8")
