"""CorDA: LoRA that starts at a part of the weight, chosen by the covariance of what the layer sees.

Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models", arXiv 2406.05223, section 3. With
the covariance C of a layer's inputs and W C = U S V^T, the part is that of the r largest singular values ("ipm") or of the r
smallest ("kpm"): `W = U S (V^T C^-1)`.

`preprocess_corda` runs the model on data and leaves the parts on the layers; a new adapter takes them from there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

from splice.base.bare import carried
from splice.base.layers import LayerKind, features, kind_of
from splice.discovery import public
from splice.errors import UnsupportedFeatureError, UnsupportedLayerError
from splice.kinds.matching import value_for
from splice.kinds.original import original_weight
from splice.kinds.slot import Slot
from splice.kinds.targets import targets_of
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.inits import CORDA, Taken
from splice.methods.lora.layers import OnLinear
from splice.methods.lora.residual import StartsAtTaken
from splice.methods.lora.subconfigs import CordaConfig

logger = logging.getLogger("splice")

# Under which attribute a layer keeps its part until an adapter has taken it, as in the reference.
_EIGENS = "eigens"
# How much of the mean variance is added to every variance at first, so that the covariance can be inverted.
_DAMPING = 0.01
# How far `C C^-1` may be from the identity.
_INVERSE_ERROR = 0.05


@dataclass(eq=False)
class CordaEigens:
    """The part of a weight W (out, in) that an adapter of rank r starts at: `U_WC diag(S_WC) V_WC^T`."""

    # S, (r).
    S_WC: torch.Tensor
    # U, (out, r).
    U_WC: torch.Tensor
    # C^-1 V, (in, r).
    V_WC: torch.Tensor


@public
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], object] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Find the part of each target's weight that a CorDA adapter starts at, and leave it on the layer as `eigens`.

    Args:
        model: the base model that the adapter is for.
        lora_config: with `init_lora_weights="corda"` and a `corda_config`, which may name files that keep the covariances,
            or the finished parts: those that are there are read, the others written.
        run_model: runs the model on data, any number of times. None where the files are there.
        hooked_model: the model that is run, where it is not `model` but one with the same names.

    Raises:
        ValueError: the config is for another initialisation, nothing was run, or a file is for another model.
    """
    options = lora_config.corda_config
    if lora_config.init_lora_weights != CORDA or not isinstance(options, CordaConfig):
        raise ValueError("preprocess_corda needs a LoraConfig with init_lora_weights='corda' and a `corda_config`.")
    if options.corda_method not in ("ipm", "kpm"):
        raise ValueError(f"`corda_method` must be 'ipm' or 'kpm', got {options.corda_method!r}")
    targets = _linear(targets_of(lora_config, model))
    cache = Path(options.cache_file) if options.cache_file else None
    if cache is not None and cache.is_file():
        found = _from_cache(torch.load(cache, map_location="cpu", weights_only=True), targets, cache)
    else:
        covariances = _covariances(targets, hooked_model or model, options, run_model)
        found = {}
        for path, layer in targets.items():
            rank = value_for(lora_config.rank_pattern, path, lora_config.r)
            found[path] = _part(original_weight(layer), covariances[path], rank, options.corda_method)
            if options.verbose:
                logger.info("CorDA: %s is decomposed", path)
        if cache is not None:
            _save({f"{p}.{_EIGENS}.{n}": t for p, eigens in found.items() for n, t in vars(eigens).items()}, cache)
    for path, layer in targets.items():
        layer.__dict__[_EIGENS] = found[path]


def _linear(targets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    kinds = (LayerKind.LINEAR, LayerKind.TRANSPOSED_LINEAR)
    other = next((path for path, layer in targets.items() if kind_of(layer) not in kinds), None)
    if other is not None:
        raise UnsupportedLayerError(
            f"{other}: init_lora_weights='corda' can be used on linear layers alone, and this one is a "
            f"{type(targets[other]).__name__}. Leave it out of the targets."
        )
    return dict(targets)


def _covariances(
    targets: Mapping[str, nn.Module],
    model: nn.Module,
    options: CordaConfig,
    run: Callable[[], object] | None,
) -> dict[str, torch.Tensor]:
    """The covariance (in, in) of the inputs of each target."""
    file = Path(options.covariance_file) if options.covariance_file else None
    if file is not None and file.is_file():
        kept = torch.load(file, map_location="cpu", weights_only=True)
        for path, layer in targets.items():
            size = features(layer)[0]
            if path not in kept or tuple(kept[path].shape) != (size, size):
                raise ValueError(
                    f"{file} has no covariance ({size}, {size}) for {path}: it was made with another model"
                )
        return {path: kept[path] for path in targets}
    if run is None:
        raise ValueError("run_model must be specified when covariance file and cache file aren't built.")
    dtype = torch.float16 if options.use_float16_for_covariance else torch.float32
    sums: dict[str, torch.Tensor] = {}
    counts = dict.fromkeys(targets, 0)

    def see(path: str, inputs: torch.Tensor) -> None:
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        # By the largest value, whatever its sign and those of others: adapters of the reference are made so.
        x = x / x.max().abs().clamp_min(torch.finfo(x.dtype).tiny)
        product = (x.T @ x).to(dtype)
        sums[path] = product if path not in sums else sums[path] + product
        counts[path] += 1

    with _seeing({path: model.get_submodule(path) for path in targets}, see):
        run()
    unseen = [path for path in targets if path not in sums]
    if unseen:
        raise ValueError(f"run_model did not call {unseen[0]}, so nothing is known of its inputs")
    broken = [path for path, total in sums.items() if not torch.isfinite(total).all()]
    if broken:
        raise ValueError(
            f"the covariance of {broken[0]} is not finite: look at its inputs, or do not use float16 for it"
        )
    found = {path: sums[path] / counts[path] for path in targets}
    if file is not None:
        _save(found, file)
    if not options.prune_temporary_fields:
        for path, layer in targets.items():
            layer.__dict__.update(sample_count=counts[path], covariance_matrix=found[path])
    return found


@contextmanager
def _seeing(layers: Mapping[str, nn.Module], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Inside, `see` gets the path and the input of each of these layers when it is called."""

    def hook(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda layer, inputs: see(path, inputs[0])

    handles = [layer.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _part(weight: torch.Tensor, covariance: torch.Tensor, rank: int, method: str) -> CordaEigens:
    weight = weight.float()
    c = covariance.to(device=weight.device, dtype=torch.float32)
    c, inverse = _invertible(c)
    u, s, vh = torch.linalg.svd(weight @ c, full_matrices=False)
    v = (vh @ inverse).T
    if method == "ipm":
        return CordaEigens(s[:rank].clone(), u[:, :rank].clone(), v[:, :rank].clone())
    first = len(s) - rank if rank <= len(s) else 0
    return CordaEigens(s[first:].clone(), u[:, first:].clone(), v[:, first:].clone())


def _invertible(c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The covariance with so much added to its diagonal that it can be inverted, and the inverse."""
    identity = torch.eye(len(c), dtype=c.dtype, device=c.device)
    damping = _DAMPING
    while True:
        damped = c + damping * c.diagonal().mean() * identity
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, identity) < _INVERSE_ERROR:
            return damped, inverse
        damping *= 2


def _from_cache(
    kept: Mapping[str, torch.Tensor], targets: Mapping[str, nn.Module], place: Path
) -> dict[str, CordaEigens]:
    found = {}
    for path in targets:
        names = [f"{path}.{_EIGENS}.{name}" for name in ("S_WC", "U_WC", "V_WC")]
        if any(name not in kept for name in names):
            raise ValueError(f"{place} has nothing for {path}: it was made with another model or other targets")
        found[path] = CordaEigens(*(kept[name] for name in names))
    return found


def _save(tensors: Mapping[str, torch.Tensor], place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(tensors), place)


class CordaLinear(StartsAtTaken, OnLinear):
    """LoRA that starts at the part of the weight that `preprocess_corda` found."""

    @classmethod
    def slots(cls, base: nn.Module, config: LoraConfig, path: str) -> dict[str, Slot]:
        found = super().slots(base, config, path)
        eigens, rank = cast("CordaEigens | None", carried(base, _EIGENS)), cls.rank(config, path)
        if eigens is None:
            raise UnsupportedFeatureError(
                f"{path}: init_lora_weights='corda' changes the base weight: it is decomposed along the covariance of the "
                "layers' inputs, which is in no checkpoint. For a new adapter, run `preprocess_corda` first. For a trained "
                "one: if the given base model is the changed one, saved after the initialisation, set `init_lora_weights` to "
                "true in adapter_config.json; otherwise save the adapter with `path_initial_model_for_weight_conversion` "
                "where it was trained."
            )
        size_in, size_out = features(base)
        shapes = tuple(eigens.S_WC.shape), tuple(eigens.U_WC.shape), tuple(eigens.V_WC.shape)
        if shapes != ((rank,), (size_out, rank), (size_in, rank)):
            raise ValueError(
                f"{path}: `preprocess_corda` left S, U and V of the shapes {shapes}, and rank {rank} needs "
                f"{((rank,), (size_out, rank), (size_in, rank))}. Please make sure the `lora_config` and `model` argument of "
                "`preprocess_corda` is consistent with `get_peft_model`, and so is what is in its files."
            )
        if not all(bool(torch.isfinite(tensor).all()) for tensor in vars(eigens).values()):
            raise ValueError(f"{path}: what `preprocess_corda` left is not finite. Look at the data that it ran on.")
        return found

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: LoraConfig) -> None:
        for tensor in tensors.values():
            nn.init.zeros_(tensor)  # what is taken out comes in their place

    def taken(self, weight: torch.Tensor) -> Taken:
        eigens = cast("CordaEigens | None", carried(self.base, _EIGENS))
        assert eigens is not None
        root = torch.sqrt(eigens.S_WC / self.initial_scale)
        return Taken(root[:, None] * eigens.V_WC.T, eigens.U_WC * root, self.initial_scale)

    def begin(self) -> None:
        super().begin()
        # Taken now, and of no further use: the next adapter asks for data of its own.
        self.base.__dict__.pop(_EIGENS, None)
