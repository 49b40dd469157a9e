"""What the caller of a load asked for."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple


class LoadOptions(NamedTuple):
    """The arguments of `PeftModel.from_pretrained` and `load_adapter` that a load looks at.

    Attributes:
        adapter_name: the adapter's name in memory.
        is_trainable: whether it is loaded for further training; otherwise it is frozen.
        autocast: whether adapters of half-precision bases are held in float32; otherwise in the base's dtype.
        ephemeral_gpu_offload: whether the config's `runtime_config` is to say so.
        key_mapping: regular expression -> replacement for the checkpoint's names, behind the prefix; None for no mapping.
        strict: whether a checkpoint that does not fit to the last tensor is refused; otherwise it is loaded with a warning.
        extra: all other named arguments: ours by name, the rest for the download.
        started: when the load began, in seconds of `time.perf_counter`.
    """

    adapter_name: str
    is_trainable: bool
    autocast: bool
    ephemeral_gpu_offload: bool
    key_mapping: Mapping[str, str] | None
    strict: bool
    # Of any type: most of them are passed on to the download as they came.
    extra: Mapping[str, Any]
    started: float

    @classmethod
    def plain(cls, extra: Mapping[str, Any]) -> LoadOptions:
        """Those of a load that asks for nothing but what is in `extra`, beginning now."""
        return cls("default", False, True, False, None, True, extra, time.perf_counter())

    @property
    def ignores_sizes(self) -> bool:
        """Whether tensors of another shape are left out, with a warning."""
        return bool(self.extra.get("ignore_mismatched_sizes"))

    @property
    def resizes_vocabulary(self) -> bool:
        """Whether the base gets the number of tokens that the adapter was trained with."""
        return bool(self.extra.get("resize_vocabulary"))
