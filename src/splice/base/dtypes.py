"""Floating dtypes: those of the format by their names there, and those in which adapters are not trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def _scales() -> dict[str, torch.dtype]:
    try:
        return {"F8_E8M0": torch.float8_e8m0fnu}
    except AttributeError:  # torch 2.6 has no such dtype; files that use it are refused by name then
        return {}


# The small floats of the format that this torch knows.
FLOAT8: Mapping[str, torch.dtype] = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, **_scales()}
# Dtypes whose adapters are held in float32, unless the caller wants the base's.
HALVES: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, *FLOAT8.values())
