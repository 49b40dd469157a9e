"""The main directions of what layers see, batch by batch, until they settle, and the ranks that they earn (see `eva.py`)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from splice.base.evaluating import evaluating
from splice.base.layers import features
from splice.kinds.matching import value_for
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.pca import IncrementalPCA
from splice.methods.lora.subconfigs import EvaConfig

# How near to 1 a cosine can be asked to be: rounding keeps it from being 1.
_ALIKE = 1 - 1e-6

# (model, inputs) -> anything; (inputs, config) -> what the third gets; (layer's input, that, path) -> (n, in).
Forward = Callable[[Any, Any], object]
PrepareModelInputs = Callable[[Any, LoraConfig], Any]
PrepareLayerInputs = Callable[[Any, Any, str], torch.Tensor]


def options_of(config: LoraConfig) -> EvaConfig:
    """EVA's options; the default ones, where the config has none."""
    return config.eva_config if isinstance(config.eva_config, EvaConfig) else EvaConfig()


@dataclass(eq=False)
class Seen:
    """Layers that always see the same input, and what is known of it."""

    # Their paths; the first is the one that is looked at.
    paths: list[str]
    # The components of their inputs.
    pca: IncrementalPCA
    # Rows that were too few to be decomposed, until there are more.
    waiting: list[torch.Tensor] = field(default_factory=list)
    # How many components were alike in two updates running.
    settled: int = -1


class Collector:
    """Runs the model on batches and collects what layers see."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        layer_fns: Mapping[str, PrepareLayerInputs],
        forward: Forward,
        gathers: bool,
    ) -> None:
        self.model, self.layers, self.layer_fns, self.forward = model, layers, layer_fns, forward
        self.gathers = gathers and torch.distributed.is_available() and torch.distributed.is_initialized()
        # Makes of a batch what a layer's function needs.
        self.prepare: PrepareModelInputs | None = None

    def __call__(self, batch: Any, config: LoraConfig, paths: Iterable[str]) -> dict[str, torch.Tensor]:
        """What the layers at `paths` see, (n, in) each; those that the batch does not reach have nothing."""
        device = next(iter(self.layers.values())).weight.device if self.layers else torch.device("cpu")
        batch = _moved(batch, cast(torch.device, device))
        given = batch if self.prepare is None else self.prepare(batch, config)
        rows: dict[str, list[torch.Tensor]] = {}

        def hook(path: str) -> Callable[[nn.Module, Any], None]:
            def see(layer: nn.Module, inputs: Any) -> None:
                rows.setdefault(path, []).append(self.layer_fns[path](inputs, given, path).detach())

            return see

        handles = [self.layers[path].register_forward_pre_hook(hook(path)) for path in paths]
        try:
            with evaluating(self.model):
                self.forward(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return {path: self._gathered(torch.cat(parts)) for path, parts in rows.items()}

    def _gathered(self, rows: torch.Tensor) -> torch.Tensor:
        if not self.gathers:
            return rows
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, rows.cpu())
        return torch.cat(parts).to(rows.device)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(_moved(value, device) for value in batch)
    return batch.to(device) if isinstance(batch, torch.Tensor) else batch


def decomposed(collect: Collector, batches: Iterable[Any], config: LoraConfig, shows: bool) -> list[Seen]:
    """The layers by what they see, once the components that they are granted have settled.

    Raises:
        ValueError: there are no batches, or too few rows in all of them.
    """
    groups: list[Seen] | None = None
    bar = _Bar(shows)
    while True:
        empty, moved = True, False
        for batch in batches:
            empty = False
            if groups is None:
                rows = collect(batch, config, collect.layers)
                groups = _grouped(rows, collect.layers, config)
            else:
                open_groups = [group for group in groups if not _is_settled(group, groups, collect.layers, config)]
                rows = collect(batch, config, [group.paths[0] for group in open_groups])
            for group in groups:
                if group.paths[0] in rows:
                    moved |= _take_in(group, rows[group.paths[0]], options_of(config))
            done = sum(_is_settled(group, groups, collect.layers, config) for group in groups)
            bar.show(done, len(groups))
            if done == len(groups):
                bar.close()
                return groups
        if empty and groups is None:
            raise ValueError("dataloader is empty")
        if empty or not moved:
            missing = [group.paths[0] for group in groups or () if not group.pca.seen]
            if not missing:  # an iterator that can be gone through once
                bar.close()
                return groups or []
            needed = max(group.pca.count for group in groups or ())
            raise ValueError(
                f"there is too little data: {missing[0]} needs {needed} rows that count. Pass more of it, or lower the rank "
                "or `rho`."
            )


def _grouped(rows: Mapping[str, torch.Tensor], layers: Mapping[str, nn.Module], config: LoraConfig) -> list[Seen]:
    found: dict[tuple[object, ...], list[str]] = {}
    for path, x in rows.items():
        digest = hashlib.sha256(x.contiguous().cpu().view(torch.uint8).numpy().tobytes()).digest()
        found.setdefault((tuple(x.shape), digest), []).append(path)
    return [Seen(paths, IncrementalPCA(_most(paths, layers, config))) for paths in found.values()]


def _most(paths: Iterable[str], layers: Mapping[str, nn.Module], config: LoraConfig) -> int:
    """How many components these layers may be granted."""
    return max(_limit(path, layers[path], config) for path in paths)


def _limit(path: str, layer: nn.Module, config: LoraConfig) -> int:
    rank = value_for(config.rank_pattern, path, config.r)
    return min(round(rank * options_of(config).rho), features(layer)[0])


def _take_in(group: Seen, rows: torch.Tensor, options: EvaConfig) -> bool:
    """Whether the rows, with those that waited, were enough to be decomposed."""
    group.waiting.append(rows)
    if sum(map(len, group.waiting)) < group.pca.count:
        return False
    before, first = group.pca.components, not group.pca.seen
    group.pca.update(torch.cat(group.waiting))
    group.waiting.clear()
    if not first:
        alike = torch.nn.functional.cosine_similarity(before, group.pca.components) >= min(options.tau, _ALIKE)
        group.settled = int(alike.long().cumprod(0).sum())
    return True


def _is_settled(group: Seen, groups: list[Seen], layers: Mapping[str, nn.Module], config: LoraConfig) -> bool:
    ranks = ranks_of(groups, layers, config)
    return bool(group.pca.seen) and group.settled >= max(ranks[path] for path in group.paths)


def ranks_of(groups: Iterable[Seen], layers: Mapping[str, nn.Module], config: LoraConfig) -> dict[str, int]:
    """The rank that each layer earns: of all components the ones that explain most, as many as there are ranks."""
    owners = {path: group for group in groups for path in group.paths}
    candidates, budget = [], 0
    for place, (path, layer) in enumerate(layers.items()):
        if path not in owners:
            continue
        budget += value_for(config.rank_pattern, path, config.r)
        ratios = owners[path].pca.ratios[: _limit(path, layer, config)].tolist()
        candidates += [(-ratio, index, place, path) for index, ratio in enumerate(ratios)]
    ranks = dict.fromkeys(owners, 0)
    for _, _, _, path in sorted(candidates)[:budget]:
        ranks[path] += 1
    return ranks


class _Bar:
    """A progress bar, where one is wanted."""

    def __init__(self, shows: bool) -> None:
        self.bar: Any = None
        if shows:
            from tqdm import tqdm

            self.bar = tqdm(desc="EVA: layers settled")

    def show(self, done: int, total: int) -> None:
        if self.bar is not None:
            self.bar.total, self.bar.n = total, done
            self.bar.refresh()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
