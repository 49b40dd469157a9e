"""What programs read and call on AdaLoRA's `rankallocator` (`model.base_model.rankallocator`), by the reference's names."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from splice.kinds.adapters import Adapters, layers_of
from splice.methods.adalora.budget import allocate, budget_at, prune, update_importance
from splice.methods.adalora.layers import AdaLora, AdaLoraConfig


class RankAllocator:
    """The ranks of one AdaLoRA adapter and their schedule; a view, so what the adapter has become since is what it tells.

    Args:
        model: what knows the adapters.
        peft_config: the adapter's config.
        adapter_name: the adapter.
    """

    def __init__(self, model: Adapters, peft_config: AdaLoraConfig, adapter_name: str) -> None:
        self.model, self.peft_config, self.adapter_name = model, peft_config, adapter_name

    @property
    def beta1(self) -> float:
        """How much of the running mean of an importance each step keeps."""
        return self.peft_config.beta1

    @property
    def beta2(self) -> float:
        """The same for the mean of how much that varies."""
        return self.peft_config.beta2

    @property
    def init_bgt(self) -> int:
        """How many ranks the model starts with."""
        return sum(len(layer.lora_A) for layer in self._layers().values())

    @property
    def target_bgt(self) -> int:
        """How many are left at the end."""
        return self.peft_config.target_r * len(self._layers())

    @property
    def exp_avg_ipt(self) -> dict[str, torch.Tensor]:
        """By the names of the tensors, the running means of their importance."""
        return self._means(0)

    @property
    def exp_avg_unc(self) -> dict[str, torch.Tensor]:
        """The same of how much it varies."""
        return self._means(1)

    def budget_schedule(self, step: int) -> tuple[int, bool]:
        """How many ranks there are at this step, and whether they are allocated anew."""
        return budget_at(self._layers(), self.peft_config, step)

    def set_total_step(self, total_step: int) -> None:
        """Make the schedule one for so many steps."""
        self.peft_config.total_step = total_step

    def reset_ipt(self) -> None:
        """Forget what importance the ranks had so far."""
        for layer in self._layers().values():
            layer.importance = {}

    @torch.no_grad()
    def update_ipt(self, model: object = None) -> None:
        """Follow the importance of every tensor by one step.

        Raises:
            RuntimeError: there are no gradients.
        """
        update_importance(self._layers(), self.peft_config)

    @torch.no_grad()
    def update_and_allocate(
        self, model: object, global_step: int, force_mask: bool = False
    ) -> tuple[int, dict[str, list[bool]] | None]:
        """Follow the schedule by one step: (how many ranks there are now, which are left where they were allocated anew).

        Raises:
            RuntimeError: there are no gradients.
        """
        config, layers = self.peft_config, self._layers()
        assert config.total_step is not None
        if global_step < config.total_step - config.tfinal:
            update_importance(layers, config)
        count, masks = budget_at(layers, config, global_step)
        return count, self.mask_to_budget(model, count) if masks or force_mask else None

    @torch.no_grad()
    def mask_to_budget(self, model: object, budget: int) -> dict[str, list[bool]]:
        """Set all but the `budget` most important ranks to zero; by the names of E, which are left."""
        layers = self._layers()
        allocate(layers, self.peft_config, budget)
        return {self._name(path, "lora_E"): list(layer.kept or ()) for path, layer in layers.items()}

    @torch.no_grad()
    def mask_using_rank_pattern(self, model: object, rank_pattern: Mapping[str, list[bool]]) -> None:
        """Set ranks to zero: `rank_pattern` has, by the name or the path of each E, which are left.

        Raises:
            KeyError: it has nothing for a layer.
        """
        for path, layer in self._layers().items():
            names = (self._name(path, "lora_E"), self._name(path, "lora_E").removesuffix(f".{self.adapter_name}"))
            name = next((n for n in (*names, f"{path}.lora_E") if n in rank_pattern), names[0])
            prune(layer, tuple(map(bool, rank_pattern[name])))

    def _layers(self) -> dict[str, AdaLora]:
        return layers_of(self.model, [self.adapter_name], AdaLora)

    def _name(self, path: str, part: str) -> str:
        return f"model.{path}.{part}.{self.adapter_name}"

    def _means(self, which: int) -> dict[str, torch.Tensor]:
        return {
            self._name(path, part): both[which]
            for path, layer in self._layers().items()
            for part, both in layer.importance.items()
        }
