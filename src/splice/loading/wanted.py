"""What a checkpoint is loaded as: a new adapter, or new weights for one that is there.

The two differ in what is laid down beforehand. Of a new adapter nothing is but its config, and where file and config
disagree the config may be made to say what the file holds. Of an adapter that is there everything is: its plan was kept when
it was put on the model, and only the names of the checkpoint are still open. All else is one road for both.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import nn

from splice.config import PeftConfig
from splice.kinds.names import BIAS
from splice.kinds.registry import Method
from splice.kinds.slot import fit
from splice.loading.laying_out import lay_out
from splice.loading.plan import Plan

# Suffix -> shape, of the tensors of one layer.
Shapes = Mapping[str, tuple[int, ...]]


# A protocol with two small classes, in place of a flag: the road asks what it needs to know and never which of the two it is.
class Wanted(Protocol):
    """The adapter that a checkpoint is to become."""

    @property
    def network(self) -> nn.Module:
        """The base model."""
        ...

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """All modules of the network, by path."""
        ...

    @property
    def method(self) -> Method:
        """The adapter's method."""
        ...

    @property
    def heads(self) -> Sequence[str]:
        """Names of task heads, which are saved whole beside what a config names."""
        ...

    @property
    def follows_config(self) -> bool:
        """Whether another config gives another plan."""
        ...

    def plan(self, config: PeftConfig, held: Collection[str]) -> Plan:
        """The plan with this config, for a checkpoint that holds these names; fitted to nothing yet.

        Raises:
            ValueError: there is none.
        """
        ...

    def takes(self, shapes: Shapes, path: str, module: str, config: PeftConfig) -> bool:
        """Whether tensors of these shapes, of a layer that the checkpoint has at `path`, are all that `module` needs."""
        ...

    def is_served_by(self, plan: Plan) -> bool:
        """Whether a fitted plan can be followed as it is; if not, another meaning of the checkpoint is looked for."""
        ...


class NewAdapter(NamedTuple):
    """An adapter that is made by the load; the fields are those of `Wanted`."""

    # The base model.
    network: nn.Module
    # All modules of the network, by path.
    modules: Mapping[str, nn.Module]
    # The adapter's method.
    method: Method
    # Names of task heads, which are saved whole beside what a config names.
    heads: Sequence[str]

    @property
    def follows_config(self) -> bool:
        return True

    def plan(self, config: PeftConfig, held: Collection[str]) -> Plan:
        return lay_out(self.network, config, self.method, self.heads, self.modules, held=held)

    def takes(self, shapes: Shapes, path: str, module: str, config: PeftConfig) -> bool:
        base = self.modules[module]
        try:
            cls = self.method.layer_for(base, path, config)
            needed = cls.file_form.slots(cls.slots(base, config, path), config)
        except (ValueError, TypeError):
            # No layer of the method can be put on it; its parameters may be targets one by one.
            owned = self.method.parameters_layer
            if owned is None or not config.target_rule().target_parameters:
                return False
            try:
                needed = owned.slots(base, config, path)
            except (ValueError, TypeError):
                return False
        return fit(needed, shapes)

    def is_served_by(self, plan: Plan) -> bool:
        return plan.fits


class PresentAdapter(NamedTuple):
    """An adapter that is on the model and keeps its config, its layers and its tensors as objects."""

    # The base model.
    network: nn.Module
    # All modules of the network, by path.
    modules: Mapping[str, nn.Module]
    # The adapter's method.
    method: Method
    # The plan that the adapter was made by.
    kept: Plan
    # Whether some of its tensors may stay as they are: the checkpoint need not hold all.
    partly: bool
    # None here: what is saved whole stands in the plan.
    heads: Sequence[str] = ()

    @property
    def follows_config(self) -> bool:
        return False

    def plan(self, config: PeftConfig, held: Collection[str]) -> Plan:
        return self.kept

    def takes(self, shapes: Shapes, path: str, module: str, config: PeftConfig) -> bool:
        # By the plan and not by a config: of two modules that such tensors fit, the adapter may be on one alone.
        # A bias of the base is no tensor of the method's, and has another name.
        return any(
            p.path == module and fit({suffix: slot for suffix, slot in p.stored.items() if suffix != BIAS}, shapes)
            for p in self.kept.placements
        )

    def is_served_by(self, plan: Plan) -> bool:
        # A trainer that sends some of the tensors means no others; a name without a place is wrong all the same.
        return plan.fits or (self.partly and not plan.unexpected and not plan.mismatched)
