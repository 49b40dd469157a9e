"""What programs read on a tuner (`model.base_model`) beyond what it does, in the reference's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn

from splice.base.foreign_models import config_as_dict
from splice.config import PeftConfig
from splice.errors import UnsupportedFeatureError
from splice.kinds.host import Host
from splice.kinds.layer import AdapterLayer
from splice.kinds.matching import TargetMatcher, matching_parameters
from splice.kinds.registry import Method, method_of
from splice.selection import Selection
from splice.surgery.adapted_layer import Adapted, is_whole
from splice.surgery.layer_classes import layer_classes
from splice.surgery.loss import MergeReport


class TunerViews:
    """Attributes that the reference's tuners have, on ours; those of a method are those of the first adapter's."""

    peft_config: dict[str, PeftConfig]
    placed: dict[str, dict[str, AdapterLayer]]
    adapted: dict[str, Adapted]
    selection: Selection
    # What the last merge did; None before the first.
    merge_report: MergeReport | None = None

    @property
    def is_bare(self) -> bool:
        """Whether the network is as it was before the first adapter came."""
        return not self.peft_config and not self.adapted

    @property
    def hosts(self) -> dict[str, Host]:
        """What the adapted layers carry, by path."""
        return {path: layer.splice_host for path, layer in self.adapted.items()}

    @property
    def merged(self) -> list[str]:
        """Adapters that are in the base weights now."""
        return list(self.selection.merged)

    @property
    def active_adapters(self) -> list[str]:
        return list(self.selection.active)

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.selection.active
        return names[0] if len(names) == 1 else list(names)

    @property
    def prefix(self) -> str:
        """What the names of the active adapter's tensors begin with."""
        return method_of(self.peft_config[next(iter(self.selection.active or self.peft_config))]).prefix

    @property
    def targeted_module_names(self) -> list[str]:
        return [path for path, layer in self.adapted.items() if not is_whole(layer)]

    def unused_layers(self) -> list[str]:
        """Paths of layers that carry an active adapter and that no call has reached since it was put there."""
        return [path for path in self.active_paths() if not self.adapted[path].splice_host.reached]

    def active_paths(self) -> list[str]:
        """Paths of all layers that carry an active adapter."""
        active = self.selection.active
        return [p for p, layer in self.adapted.items() if any(name in layer.splice_host.layers for name in active)]

    @property
    def _first_method(self) -> Method:
        return method_of(next(iter(self.peft_config.values())))

    @property
    def target_module_mapping(self) -> Mapping[str, list[str] | str]:
        """The modules that the method adapts where a config names none, by `model_type`."""
        return self._first_method.default_targets

    @property
    def tuner_layer_cls(self) -> type:
        """The class by which layers with an adapter of the method are recognised."""
        return next(iter(layer_classes(self._first_method.name).values()))

    @property
    def uses_shared_state(self) -> bool:
        """Whether all layers of an adapter share tensors."""
        return self._first_method.shared is not None

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Paths of parameters that some adapter changes without a layer of their own."""
        found: dict[str, None] = {}
        for name, config in self.peft_config.items():
            entries, method = config.target_rule().target_parameters or (), method_of(config)
            for path, layer in self.placed[name].items():
                if type(layer) is method.parameters_layer:
                    found.update((f"{path}.{p}", None) for p in matching_parameters(layer.base, path, entries))
        return list(found)

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The config of a network as a dict."""
        return config_as_dict(model) or {"model_type": "custom"}

    @staticmethod
    def _create_new_module(*args: object, **kwargs: object) -> NoReturn:
        """Refuse to make a wrapper for a layer: there are none.

        Raises:
            UnsupportedFeatureError: always.
        """
        raise UnsupportedFeatureError(
            "`_create_new_module` makes a layer that wraps another one, and here layers keep their place: put an adapter on "
            "them with `inject_adapter_in_model(config, model)`, whose `target_modules` may be whole paths."
        )

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool:
        """Whether a config selects the module at the path `key`."""
        return TargetMatcher(peft_config.target_rule())(key)
