"""Which libraries are installed that quantise layers or run them elsewhere: programs ask before they use one.

Nothing is imported to tell.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

import torch
from packaging.version import Version

__all__ = [
    "is_aqlm_available",
    "is_bnb_4bit_available",
    "is_bnb_available",
    "is_diffusers_available",
    "is_eetq_available",
    "is_gptqmodel_available",
    "is_hqq_available",
    "is_inc_available",
    "is_optimum_available",
    "is_te_available",
    "is_te_pytorch_available",
    "is_torchao_available",
    "is_xpu_available",
]


@cache
def _is_there(module: str) -> bool:
    return find_spec(module) is not None


def _is_new_enough(module: str, oldest: str) -> bool:
    if not _is_there(module):
        return False
    if Version(version(module)) < Version(oldest):
        raise ImportError(f"{module} {version(module)} is installed, and at least {oldest} is needed")
    return True


def is_bnb_available() -> bool:
    """bitsandbytes."""
    return _is_there("bitsandbytes")


def is_bnb_4bit_available() -> bool:
    """bitsandbytes; every version that is still in use has layers of 4 bits."""
    return _is_there("bitsandbytes")


def is_gptqmodel_available() -> bool:
    """gptqmodel.

    Raises:
        ImportError: it is too old.
    """
    return _is_new_enough("gptqmodel", "7.0.0")


def is_optimum_available() -> bool:
    """optimum."""
    return _is_there("optimum")


def is_aqlm_available() -> bool:
    """aqlm."""
    return _is_there("aqlm")


def is_eetq_available() -> bool:
    """eetq."""
    return _is_there("eetq")


def is_hqq_available() -> bool:
    """hqq."""
    return _is_there("hqq")


def is_inc_available() -> bool:
    """neural_compressor."""
    return _is_there("neural_compressor")


def is_torchao_available() -> bool:
    """torchao.

    Raises:
        ImportError: it is too old.
    """
    return _is_new_enough("torchao", "0.16.0")


def is_te_available() -> bool:
    """transformer_engine."""
    return _is_there("transformer_engine")


def is_te_pytorch_available() -> bool:
    """transformer_engine, with its part for torch."""
    return _is_there("transformer_engine") and _is_there("transformer_engine.pytorch")


def is_diffusers_available() -> bool:
    """diffusers."""
    return _is_there("diffusers")


def is_xpu_available(check_device: bool = False) -> bool:
    """Intel's accelerators; with `check_device`, whether one can be used."""
    return torch.xpu.is_available() and (not check_device or torch.xpu.device_count() > 0)
