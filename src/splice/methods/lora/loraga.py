"""LoRA-GA: LoRA whose first step is that of full fine-tuning, as far as its rank allows.

Wang et al., "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv 2407.05000, section 3. A and B start at
singular directions of the gradient of the weight, and `s B A` counts as taken out of the weight, so that the output is
unchanged.

`preprocess_loraga` runs training steps without an optimizer and leaves the gradients on the layers; a new adapter takes them
from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import nn

from splice.base.bare import carried
from splice.base.dense import device_of, in_linear_layout
from splice.base.layers import LayerKind, features, kind_of
from splice.base.weight_access import is_plain, why_unwritable
from splice.config import copy_config
from splice.discovery import public
from splice.errors import UnsupportedLayerError
from splice.kinds.slot import Slot
from splice.kinds.targets import targets_of
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.dora import DoraOnLinear
from splice.methods.lora.inits import LORA_GA, Taken
from splice.methods.lora.layers import OnLinear
from splice.methods.lora.residual import StartsAtTaken
from splice.methods.lora.subconfigs import LoraGAConfig

# Under which attribute a layer keeps its gradient until an adapter has taken it, as in the reference.
_GRADIENT = "_peft_loraga_grad"
# The directions are found by random numbers, and chosen by such: the same for the same gradient.
_SEED = 0
_LINEAR = (LayerKind.LINEAR, LayerKind.TRANSPOSED_LINEAR)
_DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
_SCALES = ("stable", "weight_svd", "gd_scale", "unit")


def has_gradient(layer: nn.Module) -> bool:
    """Whether `preprocess_loraga` has left a gradient on `layer` that no adapter has taken yet."""
    return carried(layer, _GRADIENT) is not None


@public
def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], object],
    cache_file: str | None = None,
) -> None:
    """Find the gradient of the weight of each linear target, and leave it on the layer as `_peft_loraga_grad`.

    The gradient is the mean over all backwards, in the layout and on the device of the weight. The gradients that the
    parameters had, and whether they require one, are what they were afterwards.

    Args:
        model: the base model that the adapter is for.
        lora_config: with `init_lora_weights="lora_ga"` and a `lora_ga_config`.
        train_step: runs forwards and backwards on data, any number of times, without an optimizer.
        cache_file: keeps the gradients. It is read where it is there, and nothing is run then; else it is written.

    Raises:
        ValueError: the config is for another initialisation, a target got no gradient, or the file is for another model.
    """
    options = lora_config.lora_ga_config
    if lora_config.init_lora_weights != LORA_GA or not isinstance(options, LoraGAConfig):
        raise ValueError(
            "If you want to use LoRA-GA, please initialize the LoraConfig with init_lora_weights='lora_ga' and "
            "lora_ga_config=LoraGAConfig(...)."
        )
    check_options(options)
    targets = {path: layer for path, layer in targets_of(lora_config, model).items() if kind_of(layer) in _LINEAR}
    for path, layer in targets.items():
        reason = why_unwritable(layer) if is_plain(layer) else "it is stored in a form that has none"
        if reason:
            raise UnsupportedLayerError(f"{path}: LoRA-GA needs the gradient of the weight: {reason}.")
    place = Path(cache_file) if cache_file else None
    if place is not None and place.is_file():
        found = _from_cache(torch.load(place, map_location="cpu", weights_only=True), targets, place)
    else:
        found = _gradients(model, targets, train_step)
        if place is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.save({f"{path}.{_GRADIENT}": gradient for path, gradient in found.items()}, place)
    for path, layer in targets.items():
        layer.__dict__[_GRADIENT] = found[path].to(device_of(layer))


def check_options(options: LoraGAConfig) -> None:
    """Refuse options that mean nothing.

    Raises:
        ValueError: one does.
    """
    for name, known in (("direction", _DIRECTIONS), ("scale", _SCALES)):
        if getattr(options, name) not in known:
            raise ValueError(f"`{name}` of LoRA-GA must be one of {', '.join(known)}, got {getattr(options, name)!r}")
    if not options.stable_gamma > 0:
        raise ValueError(f"`stable_gamma` must be greater than 0, got {options.stable_gamma!r}")


def _gradients(
    model: nn.Module, targets: Mapping[str, nn.Module], train_step: Callable[[], object]
) -> dict[str, torch.Tensor]:
    sums: dict[int, torch.Tensor] = {}
    counts: dict[int, int] = {}
    weights = {path: cast(nn.Parameter, layer._parameters["weight"]) for path, layer in targets.items()}
    wanted = {id(weight) for weight in weights.values()}

    def collect(parameter: torch.Tensor) -> None:
        # At once and for all of them: a model's gradients take as much memory as the model.
        gradient, parameter.grad = parameter.grad, None
        if id(parameter) in wanted and gradient is not None:
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
            so_far = sums.get(id(parameter))
            sums[id(parameter)] = gradient.float() if so_far is None else so_far + gradient

    with _collecting(model, list(weights.values()), collect):
        train_step()
    for path, weight in weights.items():
        if id(weight) not in sums:
            raise ValueError(
                f"{path} got no gradient: `train_step` has to run forwards that reach the layer, and `backward()` of a loss. "
                "Leave layers that the data does not reach out of the targets."
            )
    return {path: sums[id(weight)] / counts[id(weight)] for path, weight in weights.items()}


@contextmanager
def _collecting(
    model: nn.Module, weights: list[nn.Parameter], collect: Callable[[torch.Tensor], None]
) -> Iterator[None]:
    """Inside, `collect` gets each parameter of `model` whenever its gradient is complete; `weights` all have one."""
    flags = [(weight, weight.requires_grad) for weight in weights]
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    handles = []
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for parameter, _ in before:
            parameter.grad = None
            if parameter.requires_grad:
                handles.append(parameter.register_post_accumulate_grad_hook(collect))  # type: ignore[no-untyped-call]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, gradient in before:
            parameter.grad = gradient
        for weight, flag in flags:
            weight.requires_grad_(flag)


def _from_cache(
    kept: Mapping[str, torch.Tensor], targets: Mapping[str, nn.Module], place: Path
) -> dict[str, torch.Tensor]:
    found = {}
    for path, layer in targets.items():
        gradient = kept.get(f"{path}.{_GRADIENT}")
        if gradient is None or gradient.shape != layer.weight.shape:
            raise ValueError(f"{place} has no gradient of the shape of {path}.weight: it was made with another model")
        found[path] = gradient
    return found


class StartsAtGradient(StartsAtTaken):
    """LoRA that starts at directions of a gradient. It stands before the LoRA layer of the kind."""

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, Slot]:
        options = config.lora_ga_config
        if not isinstance(options, LoraGAConfig):
            raise ValueError(
                "lora_ga_config must be provided when init_lora_weights='lora_ga'. Please pass "
                "lora_ga_config=LoraGAConfig(...) to LoraConfig."
            )
        check_options(options)
        rank, most = cls.rank(config, path), min(features(base))
        if 2 * rank > most:
            raise UnsupportedLayerError(
                f"{path}: LoRA-GA chooses {rank} of {2 * rank} directions of a gradient, and this one has {most}. Lower the "
                "rank."
            )
        return super().slots(base, config, path)

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: LoraConfig) -> None:
        # What is taken out comes in their place.
        super().initialise(tensors, base, copy_config(config, init_lora_weights=True))

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        options = config.lora_ga_config
        assert isinstance(options, LoraGAConfig)
        self.options = options
        super().prepare(base, config, path)

    def taken(self, weight: torch.Tensor) -> Taken:
        gradient = cast("torch.Tensor | None", carried(self.base, _GRADIENT))
        assert gradient is not None
        a, b = _directions(in_linear_layout(self.base, gradient).to(weight), self.r, self.options.direction)
        if self.options.scale == "stable":
            # The first side of the weight as it is stored, also where that is its input: so adapters are trained.
            b = b * (gradient.shape[0] ** 0.25 / math.sqrt(self.options.stable_gamma))
        elif self.options.scale == "weight_svd":
            b = b * (torch.linalg.matrix_norm(weight, 2) / torch.linalg.matrix_norm(b, 2))
        elif self.options.scale == "gd_scale":
            a, b = a / self.initial_scale, b / self.initial_scale
        return Taken(a, b, self.initial_scale)

    def begin(self) -> None:
        super().begin()
        # Taken now, and of no further use: a gradient is as large as the weight.
        self.base.__dict__.pop(_GRADIENT, None)


def _directions(gradient: torch.Tensor, rank: int, which: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in) and B (out, rank) of the first 2 rank singular directions of a gradient (out, in)."""
    with torch.random.fork_rng(devices=[gradient.device] if gradient.device.type == "cuda" else []):
        torch.manual_seed(_SEED)
        u, s, v = torch.svd_lowrank(gradient, q=min(4 * rank, *gradient.shape), niter=4)
        chosen = torch.randperm(2 * rank)[:rank].to(gradient.device)
    left, right = (u * s)[:, : 2 * rank], v.T[: 2 * rank]
    if which == "ArB2r":
        return right[:rank], left[:, rank:]
    if which == "A2rBr":
        return right[rank:], left[:, :rank]
    if which == "ArBr":
        return right[1::2], left[:, 0::2]
    return right[chosen], left[:, chosen]


class GradientLinear(StartsAtGradient, OnLinear):
    """LoRA that starts at directions of a gradient."""


class GradientDoraLinear(StartsAtGradient, DoraOnLinear):
    """The same with DoRA, whose norms are those of what is left of the weight."""

    def base_weight(self, dtype: torch.dtype) -> torch.Tensor:
        a, b = self._taken_factors()
        return super().base_weight(dtype) + (b @ a).to(dtype)
