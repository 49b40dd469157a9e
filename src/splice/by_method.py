"""Names that follow from the records of the methods, as programs know them from the reference.

For a method whose config is `LoraConfig`: the class `LoraModel`, by which its tuner is recognised; a class for each kind of
adapted layer; its rows in the tables `PEFT_TYPE_TO_...`; and a package of modules in which all of these are looked for.
Whoever adds a method adds none of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import cast

import torch
from torch import nn

from splice.checkpoint.types import PeftType
from splice.config import PeftConfig
from splice.default_tables import POSTPROCESS_TABLE, default_tables, table_prefix
from splice.discovery import public_names
from splice.injecting import injected
from splice.kinds.registry import Method, all_methods
from splice.lazy import lazy_names
from splice.model import classes_by_task
from splice.surgery.layer_classes import layer_classes, stem
from splice.surgery.tuner import Tuner


class TunerClass(type):
    """The class of the classes of tuners by method: what is an instance is the business of its adapters.

    Calling one puts an adapter on a network, which is changed in place, and gives its tuner.
    """

    # The method's record.
    method: Method

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Tuner) and any(
            isinstance(config, cls.method.config) for config in instance.peft_config.values()
        )

    def __call__(  # type: ignore[override]
        cls,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, torch.Tensor] | None = None,
    ) -> Tuner:
        config = peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config
        if not isinstance(config, cls.method.config):
            raise TypeError(
                f"{cls.__name__} is for a {cls.method.config.__name__}, got a {type(config).__name__}; "
                "`get_peft_model(model, config)` takes any."
            )
        return injected(config, model, adapter_name, low_cpu_mem_usage, state_dict)


@cache
def tuner_class(name: PeftType) -> type[Tuner]:
    """The class by which tuners with an adapter of this method are recognised: `LoraModel`."""
    method = all_methods()[name]
    members = {
        "__doc__": f"A network with adapters of the method {name.value}. {method.summary}",
        "__module__": __name__,
        "method": method,
    }
    return cast("type[Tuner]", TunerClass(f"{stem(method)}Model", (Tuner,), members))


def _shown_as(method: Method) -> type:
    """What a PeftModel of this method has for it: the encoder of its virtual tokens, or a tuner where it has none."""
    modules = [what for what in method.names.values() if isinstance(what, type) and issubclass(what, nn.Module)]
    return modules[0] if modules and not method.on_layers else tuner_class(method.name)


# -- tables


def _configs() -> dict[PeftType, type[PeftConfig]]:
    return {name: method.config for name, method in all_methods().items()}


def _tuners() -> dict[PeftType, type]:
    return {name: _shown_as(method) for name, method in all_methods().items()}


def _mixable() -> dict[PeftType, type]:
    return {name: tuner_class(name) for name, method in all_methods().items() if method.layers}


def _prefixes() -> dict[PeftType, str]:
    return {name: method.prefix for name, method in all_methods().items()}


# Made once each: programs write into them.
_TABLES: Mapping[str, Callable[[], object]] = {
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING": classes_by_task,
    "PEFT_TYPE_TO_CONFIG_MAPPING": _configs,
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": _mixable,
    "PEFT_TYPE_TO_PREFIX_MAPPING": _prefixes,
    "PEFT_TYPE_TO_TUNER_MAPPING": _tuners,
    POSTPROCESS_TABLE: lambda: default_tables()[POSTPROCESS_TABLE],
}


@cache
def _table(name: str) -> object:
    return _TABLES[name]()


# -- the names as those of this module, and of one for each method


def __getattr__(name: str) -> object:
    if name == "__all__":
        return sorted({*_TABLES, *(cls.__name__ for cls in _tuners().values())})
    if name in _TABLES:
        return _table(name)
    found = {} if name.startswith("_") else {cls.__name__: cls for cls in _tuners().values()}
    if name in found:
        return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})  # type: ignore[misc]


def names_of_method(name: PeftType) -> dict[str, object]:
    """Everything that programs import of one method, by name."""
    method = all_methods()[name]
    own = {n: getattr(import_module(m), n) for n, m in public_names().items() if m.startswith(method.home)}
    front = table_prefix(name)
    tables = {n: table for n, table in default_tables().items() if n.startswith(front)}
    tuner = {_shown_as(method).__name__: _shown_as(method)}
    return {**own, **tables, **method.names, **tuner, **layer_classes(name)}


# What the reference divides the package of a method into. Each of ours has all of its names.
PARTS = ("config", "layer", "model", "bnb")
# One more, of methods with functions of their own; others are called as ours are that have such functions.
TOOLS = "utils"


def parts_of(name: PeftType) -> tuple[str, ...]:
    """What the package of a method is divided into."""
    home = all_methods()[name].home
    with_tools = {module for tool, module in public_names().items() if tool.islower() and module.startswith(home)}
    named = sorted(module.rpartition(".")[2] for module in with_tools)
    return tuple(dict.fromkeys((*PARTS, TOOLS, *named))) if with_tools else PARTS


class MethodModules(MetaPathFinder, Loader):
    """Finds `<package>.<method>` and its parts for every method there is, where no file of that name comes first."""

    def __init__(self, package: str) -> None:
        self.package = package

    def method_in(self, fullname: str) -> PeftType | None:
        """The method that a module is for; None where it is for none."""
        front = f"{self.package}."
        called, _, part = fullname.removeprefix(front).partition(".")
        if not fullname.startswith(front) or called != called.lower():
            return None
        found = next((name for name in all_methods() if name.value.lower() == called), None)
        return None if found is None or (part and part not in parts_of(found)) else found

    def find_spec(self, fullname: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        if self.method_in(fullname) is None:
            return None
        return ModuleSpec(fullname, self, is_package=fullname.count(".") == self.package.count(".") + 1)

    def exec_module(self, module: ModuleType) -> None:
        name = self.method_in(module.__name__)
        assert name is not None
        module.__doc__ = f"`{module.__name__}`: the names of the method {name.value}."
        vars(module).update(names_of_method(name))
        if module.__spec__ is not None and module.__spec__.submodule_search_locations is not None:
            get, tell = lazy_names(module.__name__, submodules=lambda: parts_of(name))
            vars(module).update(__getattr__=get, __dir__=tell)


def method_packages(package: str) -> Callable[[], Iterable[str]]:
    """Make `<package>.<method>` importable for every method; the result names them."""
    sys.meta_path.append(MethodModules(package))
    return lambda: [name.value.lower() for name in all_methods()]
