"""How many registered adapters may be on the model, and in host memory."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class StoreLimits:
    """Limits of a store, on the model and in host memory; None for no limit. What is unused for the longest time goes first.

    Adapters that were loaded by name (`load_adapter`) do not count, and neither does the memory of slots.

    Raises:
        ValueError: a number is below 0, or there may be no adapter on the model at all.
    """

    # How many registered adapters may be on the model.
    device_count: int | None = None
    # How many bytes their tensors may take there, those in slots left out.
    device_bytes: int | None = None
    # How many adapters may be kept in host memory besides, as they are stored in their files. Where this and `host_bytes` are
    # None, none are, and files are read straight to where they are computed with: the best on the CPU, where both are the
    # same memory.
    host_count: int | None = None
    # How many bytes these may take.
    host_bytes: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f"{field.name} must be a number of at least 0, or None for no limit; got {value!r}")
        if self.device_count == 0:
            raise ValueError("device_count=0 leaves no room for any adapter: use 1 or more, or None for no limit")

    @property
    def keeps_in_host(self) -> bool:
        """Whether anything may be kept in host memory."""
        return (self.host_bytes or self.host_count or 0) > 0 and self.host_bytes != 0 and self.host_count != 0
