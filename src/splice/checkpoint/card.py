"""The model card: the README.md beside a checkpoint, by which the Hub knows what the repository holds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from splice.checkpoint.files import write_text
from splice.checkpoint.format import FORMAT_VERSION
from splice.errors import PeftWarning, warn

if TYPE_CHECKING:
    from huggingface_hub import CardData, ModelCard

CARD_NAME = "README.md"
_VERSIONS = "### Framework versions"
_VERSION_LINE = re.compile(r"^- PEFT .*$", re.MULTILINE)
_CODE = """```python
from splice import PeftModel

model = PeftModel.from_pretrained(base_model, "<folder or id>")
```"""


class CardFacts(NamedTuple):
    """What a card says of a model, as far as the model knows it."""

    # Names that the base goes by, the surest first: ids of the Hub, and folders of this machine.
    bases: tuple[str, ...] = ()
    # Tags that follow from the model and its adapters.
    tags: tuple[str, ...] = ()
    # What the Hub offers to do with the model, if the task says so.
    pipeline: str | None = None

    @property
    def base(self) -> str | None:
        """The Hub id of the base. The Hub refuses a card that names a folder, and nobody else has that folder."""
        # Imported when a card is written. A load writes none, and the import takes longer than reading a header.
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        for name in self.bases:
            try:
                validate_repo_id(name)
            except HFValidationError:
                continue
            if not Path(name).exists():
                return name
        return None


def write_card(folder: Path, facts: CardFacts) -> None:
    """Bring the card in `folder` up to date, or write a first one. What its author wrote, text and tags, stays.

    Adapters are worth more than their card: one that cannot be read is left as it is, with a warning.
    """
    from huggingface_hub import ModelCard

    place, base = folder / CARD_NAME, facts.base
    if place.exists():
        card = _read(place)
        if card is None:
            return
    else:
        card = ModelCard(_first_text(base))
    data: CardData = card.data
    data["library_name"] = "peft"
    add_tags(data, sorted({*facts.tags, *([f"base_model:adapter:{base}"] if base else ())}))
    if facts.pipeline and not data.get("pipeline_tag"):
        data["pipeline_tag"] = facts.pipeline
    if base and not data.get("base_model"):
        data["base_model"] = base
    card.text = _with_version(card.text)
    write_text(place, str(card))


@lru_cache(maxsize=8)
def _first_text(base: str | None) -> str:
    """The text of a first card, of an adapter for `base`."""
    # Kept: its template takes longer to compile than an adapter to write, and a trainer saves into many folders.
    from huggingface_hub import ModelCard, ModelCardData

    return str(ModelCard.from_template(ModelCardData(), get_started_code=_CODE, base_model=base))


def tag_card(folder: Path, tags: Iterable[str]) -> None:
    """Add tags to the card in `folder`, if there is one that can be read."""
    place, tags = folder / CARD_NAME, list(tags)
    card = _read(place) if place.exists() and tags else None
    if card is not None:
        add_tags(card.data, tags)
        write_text(place, str(card))


def _read(place: Path) -> ModelCard | None:
    """The card; None, with a warning, where it cannot be read."""
    from huggingface_hub import ModelCard

    try:
        card: ModelCard = ModelCard.load(place)
        return card
    except Exception as error:  # of whoever reads YAML
        text = f"{place} cannot be read, so it is left as it is: {error}"
        warn(text, PeftWarning)
        return None


def add_tags(data: CardData, tags: Iterable[str]) -> None:
    """Add what is missing among the tags of a card's data; those that are there stay where they are."""
    # The reference sorts all tags anew, and drops those that an author wrote.
    present = data.get("tags") or []
    present = [present] if isinstance(present, str) else list(present)
    data["tags"] = [*present, *(tag for tag in tags if tag not in present)]


def _with_version(text: str) -> str:
    # Replaced where one stands: saving again must not add a second line.
    line = f"- PEFT {FORMAT_VERSION}"
    if _VERSION_LINE.search(text):
        return _VERSION_LINE.sub(line, text, count=1)
    if _VERSIONS in text:
        return text.replace(_VERSIONS, f"{_VERSIONS}\n\n{line}", 1)
    return f"{text.rstrip()}\n\n{_VERSIONS}\n\n{line}\n"
