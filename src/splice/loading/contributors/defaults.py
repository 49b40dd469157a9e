"""What a config selects once its defaults are filled in and the heads of the task are added."""

from __future__ import annotations

from splice.config import copy_config
from splice.loading.contributors.draft import Draft
from splice.loading.targets import among_targets, default_modules, resolved_rule


def defaults(draft: Draft) -> None:
    """Fill in the targets and the other names of modules that the config leaves open.

    Raises:
        ValueError: it names none and there is no default for this model.
    """
    rule = draft.config.target_rule()
    if draft.on_layers:
        rule = resolved_rule(draft.method, draft.config, draft.network, draft.modules)
        further = default_modules(draft.method, draft.config, draft.network)
        if rule.target_modules != draft.config.target_rule().target_modules:
            further = among_targets(draft.method, draft.config, further, rule.target_modules)
        if further:
            draft.config = copy_config(draft.config, **further)
            draft.resolved.update(further)
    # Into the rule and not the config: not every config has a field for them.
    if draft.heads:
        rule = rule._replace(modules_to_save=list(dict.fromkeys([*(rule.modules_to_save or ()), *draft.heads])))
    draft.rule = rule
