"""PeftMixedModel: adapters of several methods on one base model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NoReturn

from splice.config import PeftConfig
from splice.loading.load import LoadResult
from splice.model import PeftModel
from splice.steps import set_additional_trainable_modules


class PeftMixedModel(PeftModel):
    """A base model with adapters that may be of several methods. Several may be active; on one layer they nest.

    What the reference leaves out here is left out: saving, reports, weighted adapters.
    """

    # Read by the base class: one record no longer answers for the whole model.
    mixes_methods = True

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Take these adapters off."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self.base_model.check_known(names, "does not exist")
        for name in names:
            self.base_model.delete_adapter(name)

    def load_adapter(  # type: ignore[override]
        self, model_id: str | os.PathLike[str] | None, adapter_name: str, *args: Any, **kwargs: Any
    ) -> LoadResult:
        """As of a PeftModel; the active adapters become trainable, as the reference has it here."""
        result = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        self.base_model.train_only(self.base_model.selection.active)
        return result

    def set_modules_to_save(self, peft_config: PeftConfig, adapter_name: str) -> None:
        """Nothing is left to do: what a config saves whole is copied when its adapter comes.

        Raises:
            ValueError: the config names a module that the adapter has no copy of.
        """
        set_additional_trainable_modules(self, peft_config, None, adapter_name)

    @property
    def active_adapter(self) -> list[str]:  # type: ignore[override]
        """The names of the active adapters: with several methods one of them says little."""
        return self.base_model.active_adapters

    # A report or a file would have to say for each layer which method it means; no format of the reference does. So these
    # raise, of the classes that the reference raises.

    def save_pretrained(self, *args: object, **kwargs: object) -> NoReturn:  # type: ignore[override]
        raise NotImplementedError("Saving is not supported for PeftMixedModel: its adapters are of several methods.")

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> NoReturn:
        raise NotImplementedError("Model cards are not supported for PeftMixedModel.")

    def add_weighted_adapter(self, *args: object, **kwargs: object) -> NoReturn:  # type: ignore[override]
        raise NotImplementedError("Weighted adapters are not supported for PeftMixedModel.")

    def get_layer_status(self) -> NoReturn:
        raise TypeError("get_layer_status is not supported for PeftMixedModel.")

    def get_model_status(self) -> NoReturn:
        raise TypeError("get_model_status is not supported for PeftMixedModel.")
