"""KappaTune: which layers to adapt, by the condition number of their weights.

A well-conditioned weight (sigma_max / sigma_min is small) spreads what it has learned over all of its directions, and is the
one that a low-rank update changes with the least harm. The result is put into a config: `target_modules`,
`target_parameters`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, cast

import torch
from torch import nn

from splice.base.bare import walk_bare
from splice.base.layers import LayerKind, features, kind_of
from splice.base.weight_access import why_unreadable
from splice.kinds.original import original_weight

T = TypeVar("T")

# Ends of the names of parameters that hold a weight for each expert: (experts, ., .).
_EXPERTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


class KappaTuneSelector:
    """The condition numbers of a model's linear layers, and of its stacked experts, measured once.

    Args:
        model: the base model; it is not changed.
        max_dim_size_to_analyze: layers with more features than this, on either side, are left out.
        moe_param_suffixes: ends of the names of stacked experts; None for those that are usual.
        show_progress: show a bar.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model, self.max_dim_size_to_analyze = model, max_dim_size_to_analyze
        self.moe_param_suffixes = _EXPERTS if moe_param_suffixes is None else tuple(moe_param_suffixes)
        self.show_progress = show_progress
        self._measured: tuple[dict[str, float], dict[str, float]] | None = None

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Paths of the linear layers with the smallest condition numbers, the smallest first.

        Args:
            top_p: which share of them; at least one.
            num_modules: how many; then `top_p` is not asked.
            threshold: all up to this condition number, where neither is given. Without any of the three: all.
        """
        return _best(self._both()[0], top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """The same of parameters that hold stacked experts, by the mean of these."""
        return _best(self._both()[1], top_p, num_modules, threshold)

    def _both(self) -> tuple[dict[str, float], dict[str, float]]:
        if self._measured is None:
            linear = [(p, m) for p, m in walk_bare(self.model).items() if kind_of(m) is LayerKind.LINEAR]
            fits = [
                (p, m) for p, m in linear if max(features(m)) <= self.max_dim_size_to_analyze and not why_unreadable(m)
            ]
            stacked = [
                (name, parameter)
                for name, parameter in self.model.named_parameters()
                if parameter.dim() == 3
                and name.endswith(self.moe_param_suffixes)
                and max(parameter.shape[1:]) <= self.max_dim_size_to_analyze
            ]
            modules = self._each(fits, lambda module: _condition(original_weight(module)))
            parameters = self._each(stacked, lambda weight: sum(map(_condition, weight)) / len(weight))
            self._measured = modules, parameters
        return self._measured

    def _each(self, items: Sequence[tuple[str, T]], measure: Callable[[T], float]) -> dict[str, float]:
        each: Iterable[tuple[str, T]] = items
        if self.show_progress and items:
            from tqdm import tqdm

            each = cast("Iterable[tuple[str, T]]", tqdm(items, desc="Condition numbers", unit="weight"))
        return {path: measure(item) for path, item in each}


def _condition(weight: torch.Tensor) -> float:
    values = torch.linalg.svdvals(weight.detach().float())
    return float(values[0] / (values[-1] + 1e-8))


def _best(
    measured: dict[str, float], top_p: float | None, num_modules: int | None, threshold: float | None
) -> list[str]:
    ordered = sorted(measured, key=lambda path: measured[path])  # of equal ones the first in the model
    if num_modules is not None:
        return ordered[:num_modules]
    if top_p is not None:
        return ordered[: max(1, int(len(ordered) * top_p))]
    return ordered if threshold is None else [path for path in ordered if measured[path] <= threshold]


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """What to adapt, for a config: `LoraConfig(**find_kappa_target_modules(model))`.

    Args:
        model: the base model; it is not changed.
        top_p: which share of the linear layers, and of the stacked experts; at least one of each that there is.
        max_dim_size_to_analyze: as of `KappaTuneSelector`, as are the others.
        moe_param_suffixes: ends of the names of stacked experts.
        show_progress: show a bar.

    Returns:
        "target_modules" -> paths, none where nothing can be measured; "target_parameters" -> names, or None.
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p=top_p),
        "target_parameters": selector.get_best_target_parameters(top_p=top_p) or None,
    }
