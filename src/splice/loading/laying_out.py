"""The plan of an adapter that is still empty, from its config: what it consists of on a given model.

Each special case is a contributor in a file of its own. They are asked in the order in which they stand here, and add to
one draft; a case that depends on another one finds in it what that one has added.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from splice.base.bare import walk_bare
from splice.config import PeftConfig
from splice.kinds.registry import Method
from splice.loading.contributors.base_copies import base_copies
from splice.loading.contributors.biases import biases
from splice.loading.contributors.defaults import defaults
from splice.loading.contributors.draft import Contributor, Draft
from splice.loading.contributors.followers import followers
from splice.loading.contributors.groups import groups
from splice.loading.contributors.network_layer import network_layer
from splice.loading.contributors.parameters import parameters
from splice.loading.contributors.shared_tensors import shared_tensors
from splice.loading.contributors.targets import targets
from splice.loading.contributors.ties import ties
from splice.loading.contributors.token_rows import token_rows
from splice.loading.contributors.whole_modules import whole_modules
from splice.loading.contributors.written_twice import written_twice
from splice.loading.plan import Plan
from splice.surgery.placement import Placement

# The adapter layers. The config's fields are asked in the order in which the reference looks at them, as errors and
# warnings come in that order too.
_LAYERS: tuple[Contributor, ...] = (
    defaults,
    network_layer,
    ties,
    targets,
    shared_tensors,
    groups,
    parameters,
    whole_modules,
    token_rows,
    followers,
    biases,
)
# Further names that a checkpoint with these layers may hold.
_NAMES: tuple[Contributor, ...] = (base_copies, written_twice)


def lay_out(
    network: nn.Module,
    config: PeftConfig,
    method: Method,
    heads: Sequence[str] = (),
    modules: Mapping[str, nn.Module] | None = None,
    new: bool = False,
    held: Collection[str] = (),
) -> Plan:
    """The adapter layers that `config` asks for on `network`: the plan of a new, still empty adapter.

    Args:
        network: the base model; it may carry adapters.
        config: the adapter's config.
        method: the method of the config.
        heads: names of task heads, which are saved whole beside what the config names.
        modules: all modules of `network` by path, where the caller has them already.
        new: the adapter is made and not loaded; some methods train more tensors than are needed to use it.
        held: the keys of the checkpoint that it is loaded from.

    Raises:
        NoMatchingPeftModuleError: the config selects nothing.
        ValueError: the config cannot be applied to a layer that it selects.
    """
    # Before the model is looked at: what a config must not say is wrong on any model.
    method.check(config)
    draft = Draft(network, config, method, walk_bare(network) if modules is None else modules, heads, new, held)
    for contribute in (*_LAYERS, *_NAMES):
        contribute(draft)
    named = {"target_modules": draft.rule.target_modules, "modules_to_save": draft.rule.modules_to_save}
    draft.resolved = {**named, **draft.resolved}
    return draft.plan()


def plan_of_layers(network: nn.Module, config: PeftConfig, method: Method, placements: Sequence[Placement]) -> Plan:
    """The plan of an adapter whose layers are known: `placements`, of an adapter that was made from others."""
    draft = Draft(network, config, method, {}, placements=list(placements))
    for contribute in _NAMES:
        contribute(draft)
    return draft.plan()
