"""The networks that adapters in files are for, on the meta device: of transformers, or of a pipeline of diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from splice.base.bare import walk_bare
from splice.base_from_config import OF_A_CONFIG, check_place, empty_base, model_class
from splice.checkpoint.download import fetched_folder
from splice.checkpoint.unread import UnreadWeights
from splice.config import PeftConfig
from splice.errors import PeftError
from splice.kinds.reading import Checkpoint

_PIPELINE, _CONFIG = "model_index.json", "config.json"
# What says that a config is one of diffusers.
_CLASS = "_class_name"


class Bases:
    """A base as the caller named it: its networks are made when they are asked for."""

    def __init__(self, base: str | None, revision: str | None, class_name: str | None, trust_remote_code: bool) -> None:
        self._base, self._revision = base, revision
        self._class_name, self._trust = class_name, trust_remote_code
        self._paths: dict[str, frozenset[str]] = {}

    def paths_of(self, component: str) -> frozenset[str] | None:
        """The paths of a component's modules that have parameters; None where no base was named."""
        if self._base is None:
            return None
        if component not in self._paths:
            nothing = Checkpoint(PeftConfig(), UnreadWeights({}, ""), {})
            modules = walk_bare(self.network(component, nothing))
            self._paths[component] = frozenset(path for path, module in modules.items() if module._parameters)
        return self._paths[component]

    def network(self, component: str, checkpoint: Checkpoint) -> nn.Module:
        """The network of a component, without weights.

        Raises:
            OSError: its config cannot be found.
            ValueError: the library that makes it is not installed, or knows no such network.
            PeftError: the pipeline has no such component, or which one is meant is not said.
        """
        place = self._place(component)
        fields = self._fields(place)
        if _CLASS not in fields:
            return empty_base(place, checkpoint, None, self._class_name, self._trust)
        if find_spec("diffusers") is None:
            raise ValueError("the base is made from its config by diffusers, which is not installed")
        diffusers: Any = import_module("diffusers")
        found: Any = model_class(diffusers, str(fields[_CLASS]))
        if found is None:
            raise ValueError(f"{place}: diffusers has no class {fields[_CLASS]!r}")
        with torch.device("meta"):
            made: nn.Module = found.from_config(fields)
        return made.eval()

    def fields(self) -> Mapping[str, object]:
        """The fields of the config of a model of transformers, with those that its class gives; empty without a base."""
        if self._base is None:
            return {}
        transformers: Any = import_module("transformers")
        config = transformers.AutoConfig.from_pretrained(self._place(""), trust_remote_code=self._trust)
        found: Mapping[str, object] = config.to_dict()
        return found

    def _place(self, component: str) -> str:
        assert self._base is not None
        folder = self._folder
        if not (folder / _PIPELINE).exists():
            return str(folder)
        there = sorted(path.parent.name for path in folder.glob(f"*/{_CONFIG}"))
        if component not in there:
            said = f"has no component {component!r}" if component else "is a pipeline: say which component is meant"
            raise PeftError(f"{self._base} {said}; it has {', '.join(there)}")
        return str(folder / component)

    @cached_property
    def _folder(self) -> Path:
        base = str(self._base)
        if Path(base).exists():
            return Path(base)
        check_place(base, "base", OF_A_CONFIG)
        return fetched_folder(base, self._revision, (_PIPELINE, f"*{_CONFIG}", "*.py"))

    def _fields(self, place: str) -> dict[str, object]:
        path = Path(place)
        text = (path / _CONFIG if path.is_dir() else path).read_text(encoding="utf-8")
        found: dict[str, object] = json.loads(text)
        return found
