"""A hook of mkdocs: links of a page to files of the repository that are no pages become plain text.

On the site there is nothing to link to. In the repository, where the same pages are read, the links stay.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

_LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]+)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """What mkdocs calls with the text of each page."""
    docs = Path(config.docs_dir).resolve()
    here = docs / PurePosixPath(page.file.src_uri).parent

    def plain(link: re.Match[str]) -> str:
        return link[0] if (here / link[2]).resolve().is_relative_to(docs) else link[1]

    return _LINK.sub(plain, markdown)
