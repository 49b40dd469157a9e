"""What people call where a model serves many adapters: slots, and the store."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import nn

from splice.fleet.registering import Registered
from splice.fleet.slots import SlotsReport, slots
from splice.fleet.store import AdapterStore
from splice.loading.options import LoadOptions
from splice.surgery.seating import slot_rows
from splice.surgery.slot_rows import SlotRows
from splice.surgery.tuner import Tuner


class ManyAdapters(nn.Module):
    """The part of a PeftModel that is about many adapters."""

    base_model: Tuner
    # Modules that are always saved whole, for a task.
    heads: ClassVar[tuple[str, ...]] = ()

    def slots(self, count: int | None = None, rank: int | None = None) -> SlotsReport:
        """Reserve slots: memory in which factors of many adapters lie side by side, for mixed batches (`adapter_names`).

        Adapters that are there move in, and those loaded from now on are read straight into a free slot; parameters, names
        and files are the same as without. The method of an adapter says whether it can: plain LoRA on linear layers.

        Args:
            count: of slots, each of (rank, in) and (out, rank) on every adapted layer; 0 to give them up, None to ask.
            rank: the largest with room in one; behind a smaller one there are zeros.

        Returns:
            Which adapter is in which slot, and why others, which work as they do without slots, are in none.

        Raises:
            ValueError: `count` or `rank` is too small, or one of them is missing.
        """
        tuner = self.base_model
        with tuner.changing:
            report = slots(tuner, count, rank)
            if tuner.store is not None:
                tuner.store.moved()
            return report

    def slot_rows(self, adapter_names: Sequence[str]) -> SlotRows:
        """Adapters for the rows of batches, by their slots: for `adapter_names` of a call that is compiled or captured.

        Args:
            adapter_names: one for each row, "__base__" for none; all of them in slots.

        Returns:
            What such calls take in the place of names. `assign` gives the rows other adapters, and nothing is compiled again.

        Raises:
            ValueError: an adapter is unknown, or a part of it is in no slot.
        """
        return slot_rows(self.base_model, adapter_names)

    def register_adapters(
        self,
        adapters: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
        autocast_adapter_dtype: bool = True,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: object,
    ) -> Registered:
        """Register adapters, to be loaded where they are first used: by `adapter_names` of a call, or by `set_adapter`.

        Their configs and the headers of their files are read, and nothing is loaded. From the Hub the config comes now, and
        the weights of the same commit when they are used. How many may be on the model: `adapter_store.limits`.

        Args:
            adapters: a folder, below which every folder with an `adapter_config.json` is an adapter, named by its path from
                there; or a dict from names to folders and Hub ids. A name that is registered already gets the new one.
            autocast_adapter_dtype: as in `from_pretrained`, of all of them.
            key_mapping: likewise.
            **kwargs: `subfolder`, and options of `huggingface_hub.hf_hub_download`, likewise.

        Returns:
            Which are registered; of the others, why not.

        Raises:
            CheckpointError: (a ValueError) there is no such folder, or no adapter in it.
        """
        options = LoadOptions("", False, autocast_adapter_dtype, False, key_mapping, True, kwargs, time.perf_counter())
        return self.adapter_store.register(adapters, options)

    @property
    def adapter_store(self) -> AdapterStore:
        """The registered adapters: limits, pinning, prefetching and counters."""
        tuner = self.base_model
        if isinstance(tuner.store, AdapterStore):  # asked first: who changes the model may be waiting for a long call
            return tuner.store
        with tuner.changing:
            if not isinstance(tuner.store, AdapterStore):
                tuner.store = AdapterStore(tuner, self.heads)
            return tuner.store
