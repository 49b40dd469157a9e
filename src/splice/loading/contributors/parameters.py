"""Single parameters of the base that the config selects (`target_parameters`)."""

from __future__ import annotations

from splice.loading.contributors.draft import Draft
from splice.loading.targets import select_parameters


def parameters(draft: Draft) -> None:
    """Place one adapter layer on every module that owns such a parameter.

    Raises:
        NoMatchingPeftModuleError: neither a layer nor a parameter is selected.
        ValueError: a parameter cannot be adapted where it is.
    """
    # After the targets: a module that is one as a whole cannot be adapted in part as well.
    layer_class = draft.method.parameters_layer
    if draft.rule.target_parameters and layer_class is not None:
        for path in select_parameters(draft.rule, draft.modules, draft.by_path()):
            draft.place(path, draft.modules[path], layer_class)
