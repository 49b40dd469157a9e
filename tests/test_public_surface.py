"""The public table: every name is there, documented and imported only when it is asked for."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest

import splice
from splice.discovery import public_names
from splice.kinds.registry import all_methods

CONFIGS = [method.config.__name__ for method in all_methods().values()]


@pytest.mark.parametrize("name", [*splice.__all__, *CONFIGS])
def test_every_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(splice, name)
    assert value.__name__ == name
    assert inspect.getdoc(value), f"{name} has no docstring"
    assert value.__module__.startswith("splice.")


@pytest.mark.parametrize("name", [n for n in (*splice.__all__, *CONFIGS) if inspect.isclass(getattr(splice, n))])
def test_every_method_says_what_it_does_and_what_it_takes(name: str) -> None:
    """Public methods have docstrings and annotations; what is inherited is its own class's business."""
    cls = getattr(splice, name)
    for member, value in vars(cls).items():
        function: Any = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if member.startswith("_") or not inspect.isfunction(function):
            continue
        for parameter in list(inspect.signature(function).parameters.values())[1:]:
            assert parameter.annotation is not parameter.empty, f"{name}.{member}({parameter.name})"
        own = inspect.getdoc(function) or any(getattr(base, member, None) for base in cls.__mro__[1:])
        assert own or len(inspect.getsource(function).splitlines()) <= 3, f"{name}.{member} has no docstring"


def test_names_that_are_not_there() -> None:
    for name in ("PeftModelForEverything", "NoSuchConfig"):
        with pytest.raises(AttributeError, match=f"module 'splice' has no attribute '{name}'"):
            getattr(splice, name)
    assert set(splice.__all__) <= set(dir(splice))


def test_the_methods_own_names_are_found_without_importing_the_methods() -> None:
    """`from splice import LoraConfig` reads which file has it, and `dir` tells every config and what belongs to one."""
    assert set(CONFIGS) <= set(public_names()) <= set(dir(splice))
    for name, module in public_names().items():
        assert getattr(splice, name).__module__ == module
    program = (
        "import sys, splice\n"
        "splice.LoraConfig\n"
        "print(*[name for name in sys.modules if name.startswith('splice.methods') and name.count('.') == 2])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"splice.methods.lora", "splice.methods.targeted"}


def test_importing_costs_nothing_that_is_not_used() -> None:
    """Neither torch nor transformers with `import splice`; no library of the base's with everything in it."""
    program = (
        "import sys, splice\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "[getattr(splice, name) for name in splice.__all__]\n"
        "print(*({'transformers', 'accelerate', 'bitsandbytes', 'huggingface_hub', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
