"""A base with the adapters that stand on it now. Those that cannot stand there together take turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from splice.cli.adapters import Adapter
from splice.config import PromptLearningConfig
from splice.loading.report import LoadReport
from splice.mixed import PeftMixedModel
from splice.selection import BASE
from splice.tasks import PeftModel

# What a load is refused with, of whichever library it is.
REFUSALS = (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError, ImportError, OSError)


class Stage:
    """A base, and the groups of adapters that can stand on it together.

    Args:
        base: the network.
        options: of every load: `subfolder`, `revision`.

    Attributes:
        adapters: those that have been loaded, by name.
        reports: what the first load of each did.
        groups: the names, group by group, in the order in which they came.
    """

    def __init__(self, base: nn.Module, options: Mapping[str, str] | None = None) -> None:
        self._base = base
        self._options = dict(options or {})
        # What carries the group that stands there; None where the base is bare.
        self._model: PeftModel | None = None
        self._group: list[str] = []
        self.adapters: dict[str, Adapter] = {}
        self.reports: dict[str, LoadReport] = {}
        self.groups: list[list[str]] = []

    def add(self, adapter: Adapter) -> LoadReport:
        """Load one more adapter: beside those that stand there or, where it cannot, in a group of its own.

        Raises:
            As `PeftModel.from_pretrained`: it does not fit the bare base either.
        """
        try:
            report = self._load(adapter)
        except REFUSALS:
            if self._model is None:
                raise
            # Whether it cannot stand beside these, or not on this base at all, is seen when they have left.
            self._clear()
            report = self._load(adapter)
        if not self._group:
            self.groups.append(self._group)
        self._group.append(adapter.name)
        self.adapters[adapter.name], self.reports[adapter.name] = adapter, report
        return report

    def bring(self, name: str) -> None:
        """Let the group of this adapter stand there."""
        group = next(group for group in self.groups if name in group)
        if group is not self._group:
            self._clear()
            for each in group:
                self._load(self.adapters[each])
            self._group = group

    def _load(self, adapter: Adapter) -> LoadReport:
        options: Any = self._options
        if self._model is not None:
            self._model.load_adapter(adapter.place, adapter.name, **options)
        else:
            # Adapters of layers may be of several methods. One that acts on the whole call needs the class of its task.
            cls = PeftModel if adapter.whole_call else PeftMixedModel
            self._model = cls.from_pretrained(self._base, adapter.place, adapter.name, **options)
        report = self._model.load_report
        assert report is not None
        return report

    def _clear(self) -> None:
        if self._model is not None:
            self._model.unload()
        self._model, self._group = None, []

    def in_front(self) -> int:
        """Tokens that the adapters which stand there put in front of an input, at most."""
        configs = () if self._model is None else self._model.peft_config.values()
        return max((c.num_virtual_tokens or 0 for c in configs if isinstance(c, PromptLearningConfig)), default=0)

    def knows_tasks(self, names: Sequence[str | None]) -> bool:
        """Whether any of these adapters has to be told which task a row is of."""
        return any(name is not None and self.adapters[name].tasks is not None for name in names)

    def generate(self, names: Sequence[str | None], inputs: Mapping[str, Any]) -> None:
        """Call `generate` with an adapter for each row.

        Args:
            names: of the adapters, which have to stand there; None is the base.
            inputs: arguments of `generate`.

        Raises:
            ValueError: rows of one batch cannot have these adapters.
        """
        with torch.inference_mode():
            network = cast(Any, self._base)
            if self._model is None:
                network.generate(**inputs)
            elif len(set(names)) > 1:
                self._model.generate(adapter_names=[BASE if name is None else name for name in names], **inputs)
            elif names[0] is None:
                with self._model.disable_adapter():
                    self._model.generate(**inputs)
            else:
                self._model.set_adapter(names[0], inference_mode=True)
                self._model.generate(**inputs)
