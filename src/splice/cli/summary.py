"""What an adapter is: all that `splice inspect` says of one, for people and for programs."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import NamedTuple

from splice.checkpoint.card import CARD_NAME
from splice.checkpoint.format import METADATA_KEY
from splice.checkpoint.outline import Outline, outline_of
from splice.cli.known import Known, known
from splice.cli.layers import Layer, grouped, layers_of
from splice.cli.opened import Opened
from splice.cli.problems import Problem, problems_of

# Fields that are told apart from the options, or say nothing of what an adapter computes.
_TOLD = {
    "peft_type",
    "peft_version",
    "base_model_name_or_path",
    "task_type",
    "revision",
    "inference_mode",
    "auto_mapping",
}
_TARGETS = "target_modules"


class Summary(NamedTuple):
    """An adapter, looked into."""

    # The checkpoint.
    opened: Opened
    # Its method; None where nobody knows it here.
    method: Known | None
    # How its tensors are read without the method; None where nobody said.
    outline: Outline | None
    # Its layers.
    layers: tuple[Layer, ...]
    # What is wrong with it.
    problems: tuple[Problem, ...]

    @property
    def options(self) -> dict[str, object]:
        """Fields of the config that are not as they are without being set."""
        defaults = self.method.fields if self.method else {}
        return {
            name: value
            for name, value in self.opened.fields.items()
            if name not in _TOLD | {_TARGETS} and value not in (None, [], {}) and defaults.get(name) != value
        }

    @property
    def parameters(self) -> int:
        """How many numbers its tensors hold."""
        return sum(math.prod(entry.shape) for entry in self.opened.header.entries.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Dtype -> how many tensors have it."""
        return dict(Counter(entry.dtype for entry in self.opened.header.entries.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(entry.size for entry in self.opened.header.entries.values())

    @property
    def is_sound(self) -> bool:
        """Whether there is nothing serious."""
        return not any(problem.serious for problem in self.problems)

    def as_json(self) -> dict[str, object]:
        """The same for programs."""
        fields, opened = self.opened.fields, self.opened
        return {
            "adapter": opened.place,
            "method": fields["peft_type"],
            "task": fields.get("task_type"),
            "base": fields.get("base_model_name_or_path"),
            "base_revision": fields.get("revision"),
            "file": {"path": str(opened.weights), "pickle": opened.asks_for is not None, "commit": opened.commit},
            "tensors": len(opened.header.entries),
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "dtypes": self.dtypes,
            "options": self.options,
            "target_modules": fields.get(_TARGETS),
            "modules": [
                {
                    "path": group.path,
                    "layers": len(group.layers),
                    "rank": group.layers[0].rank,
                    "scale": group.layers[0].scale,
                    "parameters": sum(layer.parameters for layer in group.layers),
                    "shapes": group.layers[0].shapes,
                    "of_the_method": group.layers[0].own,
                }
                for group in grouped(self.layers)
            ],
            "written_by": written_by(opened),
            "base_fingerprint": fingerprint(opened),
            "problems": [problem.text for problem in self.problems if problem.serious],
            "notes": [problem.text for problem in self.problems if not problem.serious],
        }


def look_into(opened: Opened) -> Summary:
    """Everything that can be told of a checkpoint without reading a value."""
    method, outline = known(opened.fields["peft_type"]), outline_of(opened.fields["peft_type"])
    layers = layers_of(opened, method, outline)
    return Summary(opened, method, outline, tuple(layers), tuple(problems_of(opened, method, outline, layers)))


def written_by(opened: Opened) -> dict[str, str]:
    """Library -> its version, as far as the config and the card beside it say."""
    version = opened.fields.get("peft_version")
    found = {"peft format": str(version)} if version else {}
    card = opened.weights.parent / CARD_NAME
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        _, _, listed = text.partition("Framework versions")
        found.update(dict(re.findall(r"^- (\w+):? +(\d\S*)$", listed, re.MULTILINE)))
    return found


def fingerprint(opened: Opened) -> dict[str, object] | None:
    """Which base it was saved with, as the weights' file says; None where it does not."""
    try:
        fields = json.loads(opened.header.metadata.get(METADATA_KEY, "null"))
        return {name: fields[name] for name in ("architecture", "count", "quantization")} if fields else None
    except (ValueError, KeyError, TypeError):
        return None  # another tool's entry of that name
