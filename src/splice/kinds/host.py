"""The host: the data that an adapted layer carries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from splice.base.bare import HOST
from splice.kinds.layer import AdapterLayer, Forward
from splice.kinds.light_module import LightModule
from splice.selection import LayerSelection, OwnLock, Selection


class AdapterDict(LightModule):
    """The adapter layers of one adapted layer, by adapter name.

    Any string is a name here (`nn.ModuleDict` refuses dots and the names of its own methods). The train/eval mode is
    passed on only when it changes: `model.eval()` costs the same for one adapter and for a thousand.
    """

    _modules: dict[str, AdapterLayer]  # type: ignore[assignment]

    def train(self, mode: bool = True) -> AdapterDict:
        if mode is not self.training:
            super().train(mode)
        return self

    def __getitem__(self, name: str) -> AdapterLayer:
        return self._modules[name]

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def _load_from_state_dict(  # type: ignore[override]
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: list[str],
        *rest: Any,
    ) -> None:
        # torch takes what stands before the first dot for a child's name; here a name may have dots itself.
        known = tuple(f"{prefix}{name}." for name in self._modules)
        unexpected.extend(key for key in state_dict if key.startswith(prefix) and not key.startswith(known))

    def put(self, name: str, layer: AdapterLayer) -> None:
        if layer.training is not self.training:
            layer.train(self.training)
        self._modules[name] = layer

    def drop(self, name: str) -> AdapterLayer | None:
        return self._modules.pop(name, None)


@dataclass
class Host:
    """What an adapted layer knows about itself, beside what it was.

    Attributes:
        base: the layer itself.
        path: where it is in the base model.
        original: the class that the layer had before it was adapted.
        selection: shared by all adapted layers of the model.
        layers: its adapter layers by name (the very dict inside its `AdapterDict`).
        shows: whether some adapter layer shows tensors in place of the base's.
        reached: whether a call has come by since it was adapted.
        merged: adapters that are in its weights now, in the order they were merged.
        originals: the base parameters as they were before the first merge, by name.
        own_forward: a forward that stood on the object itself (accelerate's hooks, patches); it goes on being the base's.
        readers: parents that read the layer's weights and are guarded while it is adapted.
        lock: held while the layer's tensors read as others than its own: another thread may call it with another selection.
    """

    base: nn.Module
    path: str
    original: type[nn.Module]
    selection: Selection | LayerSelection
    layers: dict[str, AdapterLayer]
    shows: bool = False
    reached: bool = False
    merged: list[str] = field(default_factory=list)
    originals: dict[str, nn.Parameter] = field(default_factory=dict)
    own_forward: Forward | None = None
    readers: list[nn.Module] = field(default_factory=list)
    lock: OwnLock = field(default_factory=OwnLock, repr=False)


def host_of(layer: nn.Module) -> Host | None:
    """The host of an adapted layer; None of any other."""
    found: Host | None = layer.__dict__.get(HOST)
    return found


def in_order(layers: Mapping[str, AdapterLayer], names: Sequence[str]) -> list[str]:
    """Those of the active adapters that are on a layer, the innermost first."""
    present = [name for name in names if name in layers]
    flags = {layers[name].first_outside for name in present}
    if len(flags) > 1:  # of several methods: as they were added
        return sorted(present, key=list(layers).index)
    return present[::-1] if True in flags else present


def first_conflict(layers: Mapping[str, AdapterLayer], names: Sequence[str]) -> tuple[str, str, str] | None:
    """Two of these adapters that cannot take effect together on a layer, and why; None if all can."""
    present = [name for name in dict.fromkeys(names) if name in layers]
    for index, two in enumerate(present):
        for one in present[:index]:
            why = layers[two].conflict(layers[one])
            if why:
                return one, two, why
    return None
