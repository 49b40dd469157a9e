"""An adapter that is being laid out, and what a contributor to it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from splice.config import PeftConfig, TargetRule
from splice.kinds.layer import AdapterLayer
from splice.kinds.layout import LaidOut, Layout
from splice.kinds.registry import Method
from splice.loading.plan import Plan, Repeated
from splice.loading.tying import Tying
from splice.surgery.placement import Placement


@dataclass(eq=False, repr=False)
class Draft:
    """What is asked for, and what has been found so far. The plan that comes of it is frozen, so this one need not be.

    Attributes:
        network: the base model; it may carry adapters.
        config: the adapter's, with the defaults that have been found.
        method: the method of the config.
        modules: all modules of `network`, by path.
        heads: names of task heads, which are saved whole beside what the config names.
        is_new: whether the adapter is made and not loaded.
        held: the keys of a checkpoint that it is loaded from.
        rule: what the config selects, as far as it has been worked out.
        tied: what follows the input embeddings.
        layout: all targets, of methods whose adapter layers ask for them; None of all others.
        placements: the adapter layers so far, in their final order.
        followers: those that share the tensors of others.
        resolved: values for fields that the config leaves open.
        base_copies: keys under which a checkpoint may repeat a weight of the base -> the layer that owns it.
        repeated: keys under which a checkpoint may repeat tensors of the adapter -> those tensors.
        redundant: keys that a checkpoint may have and that nothing has to be done with.
    """

    network: nn.Module
    config: PeftConfig
    method: Method
    modules: Mapping[str, nn.Module]
    heads: Sequence[str] = ()
    is_new: bool = False
    held: Collection[str] = ()
    rule: TargetRule = field(default_factory=TargetRule)
    tied: Tying = field(default_factory=Tying)
    layout: Layout | None = None
    placements: list[Placement] = field(default_factory=list)
    followers: list[Placement] = field(default_factory=list)
    resolved: dict[str, object] = field(default_factory=dict)
    base_copies: dict[str, nn.Module] = field(default_factory=dict)
    repeated: dict[str, Repeated] = field(default_factory=dict)
    redundant: frozenset[str] = frozenset()

    @property
    def on_layers(self) -> bool:
        """Whether the method is put on layers, and not on the call of the network alone."""
        return self.method.on_layers

    def place(self, path: str, base: nn.Module, layer_class: type[AdapterLayer]) -> None:
        """Add an adapter layer of `layer_class` on `base`, and what it says about fields that the config leaves open."""
        layout = self.layout if self.layout is None or issubclass(layer_class, LaidOut) else None
        self.placements.append(Placement.of(path, base, layer_class, self.config, layout=layout, new=self.is_new))
        self.resolved.update(layer_class.resolved(base, self.config))

    def by_path(self) -> dict[str, Placement]:
        """The adapter layers so far, by the path of their base layer."""
        return {placement.path: placement for placement in self.placements}

    def plan(self) -> Plan:
        """What has been found, as the plan of an adapter that is still empty."""
        return Plan(
            tuple(self.placements),
            tuple(self.followers),
            self.resolved,
            self.base_copies,
            self.repeated,
            self.redundant,
            {},
        )


# Each adds to a draft what it knows about, or leaves it as it is. A function and not a class: there is nothing to keep.
Contributor = Callable[[Draft], None]
