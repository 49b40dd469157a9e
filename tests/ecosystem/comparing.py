"""Whether two libraries did the same: what a scenario returned here, and what it returned under the reference."""

from __future__ import annotations

from typing import Any

import torch


def same(here: Any, there: Any, tolerance: float = 1e-5, place: str = "") -> None:
    """Compare nested dicts and lists: tensors and floats within `tolerance`, all else exactly.

    Raises:
        AssertionError: the first difference, and where in the results it is.
    """
    if isinstance(there, dict):
        assert list(here) == list(there), f"{place}: {list(here)} here, {list(there)} there"
        for key, value in there.items():
            same(here[key], value, tolerance, f"{place}/{key}")
    elif isinstance(there, (list, tuple)) and not all(isinstance(value, str) for value in there):
        assert len(here) == len(there), place
        for index, value in enumerate(there):
            same(here[index], value, tolerance, f"{place}/{index}")
    elif isinstance(there, (float, torch.Tensor)):
        where = place
        torch.testing.assert_close(
            here, there, rtol=tolerance, atol=tolerance, msg=lambda message: f"{where}: {message}"
        )
    else:
        assert here == there, f"{place}: {here!r} here, {there!r} there"
