"""The configs of the adapters on a network, by name, as other libraries find them at `network.peft_config`."""

from __future__ import annotations

from splice.config import PeftConfig


class Configs(dict[str, PeftConfig]):
    """A dict that lets a name be taken out which is not there."""

    # Libraries take out the name of an adapter whose load has failed. Here nothing of such a load is left, and a KeyError
    # would hide why it failed.
    def pop(self, name: str, *default: object) -> PeftConfig | None:  # type: ignore[override]
        return super().pop(name, *(default or (None,)))  # type: ignore[arg-type]
