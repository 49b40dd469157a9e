"""Arrow: a mixture of trained LoRA adapters, chosen for each token by the strongest direction of each, without training.

Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs", arXiv 2405.11157, section 4. With p_e the
strongest right singular direction of B_e A_e, a token x is given the `top_k` experts of the largest |p_e x|, with the softmax
of these as weights. GenKnowSub takes the mean of general adapters out of each expert's A and B first.

The router is an adapter with tensors of plain LoRA that nothing reads; its files are those of the reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F

from splice.config import PeftConfig
from splice.errors import UnsupportedFeatureError
from splice.kinds.additive import Additive
from splice.kinds.effect import Action, Factors
from splice.kinds.lasting import lasting
from splice.kinds.layer import AdapterLayer
from splice.kinds.routed import Routed
from splice.methods.lora.config import LoraConfig, active_variants
from splice.methods.lora.layers import OnLinear
from splice.methods.lora.subconfigs import ArrowConfig, options_of

ROUTER = "arrow_router"
_GENERAL = re.compile(r"gks_\d+")
_ROUNDS = 15


class Routes(NamedTuple):
    """What a layer has worked out of its experts; it holds as long as they have the values they had."""

    # Of each factor it was worked out of: where its values lie, and how often they were changed.
    of: tuple[tuple[int, int], ...]
    # (experts, in), the strongest direction of each.
    directions: torch.Tensor
    # The means of the general adapters' A (r, in) and B (out, r); None where nothing is taken out.
    general: tuple[torch.Tensor, torch.Tensor] | None


class ArrowLinear(Routed, OnLinear):
    """Arrow on a linear layer, stored either way round."""

    mergeable = False
    action = Action.OTHER
    routes: Routes | None = None

    def prepare(self, base: nn.Module, config: LoraConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.options, self.path = options_of(config.arrow_config, ArrowConfig), path
        self.dropout_after, self.general = config.lora_dropout, dict[str, OnLinear]()

    def experts(self, layers: Mapping[str, AdapterLayer]) -> Mapping[str, Additive]:
        """All adapters on the layer but general ones and routers: also those that came after the router."""
        plain = {name: layer for name, layer in layers.items() if isinstance(layer, OnLinear)}
        self.general = {name: layer for name, layer in plain.items() if _GENERAL.fullmatch(name)}
        found: dict[str, Additive] = {
            name: layer
            for name, layer in plain.items()
            if name not in self.general and not isinstance(layer, ArrowLinear)
        }
        if len(found) < self.options.top_k:
            raise ValueError(
                f"{self.path}: Arrow gives each token {self.options.top_k} experts (`top_k`), and there are {list(found)}. "
                "Load more of them, or give the router a smaller `top_k`."
            )
        return found

    def weights(self, x: torch.Tensor, experts: Mapping[str, Additive]) -> torch.Tensor:
        # Experts are on this layer because `experts` found them there.
        routes = self._routes(list(cast("Mapping[str, OnLinear]", experts).values()))
        alike = F.linear(self.cast_input(x), routes.directions).abs()
        largest, chosen = alike.topk(self.options.top_k, dim=-1)
        weights = torch.softmax(largest.float() / self.options.router_temperature, -1).to(alike.dtype)
        return torch.zeros_like(alike).scatter(-1, chosen, weights)

    def part(self, expert: Additive, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        general = None if self.routes is None else self.routes.general
        if general is None:
            return super().part(expert, x, weights)
        assert isinstance(expert, OnLinear)
        a, b = expert.a - general[0], expert.b - general[1]
        return F.linear(F.linear(expert.cast_input(x), a) * weights, b) * expert.scale

    def _routes(self, experts: list[OnLinear]) -> Routes:
        general = list(self.general.values()) if self.options.use_gks else []
        found = self.routes
        if found is not None and torch.compiler.is_compiling():  # a graph holds for the experts it was made for
            return found
        of = tuple(_state(factor) for layer in (*experts, *general) for factor in (layer.a, layer.b))
        if found is None or found.of != of:
            found = self.routes = self._worked_out(of, experts, general)
        return found

    @lasting()
    def _worked_out(self, of: tuple[tuple[int, int], ...], experts: list[OnLinear], general: list[OnLinear]) -> Routes:
        taken = None
        if general:
            # Left in the experts themselves: the reference changes these, and saves what it has made of them.
            taken = (
                torch.stack([layer.a for layer in general]).mean(0),
                torch.stack([layer.b for layer in general]).mean(0),
            )
        found = [self._direction(layer, taken) for layer in experts]
        return Routes(of, torch.stack(found).to(experts[0].a.dtype), taken)

    def _direction(self, expert: OnLinear, taken: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """(in): the strongest right singular direction of B A, by power iteration; its sign means nothing."""
        a, b = (expert.a, expert.b) if taken is None else (expert.a - taken[0], expert.b - taken[1])
        a, b = a.float(), b.float()
        generator = None
        if self.options.rng_seed is not None:
            generator = torch.Generator(device=a.device)
            generator.manual_seed(self.options.rng_seed)
        v = torch.randn(a.shape[1], device=a.device, generator=generator)
        v /= v.norm() + 1e-8
        squared = b.T @ b
        for _ in range(_ROUNDS):
            v = a.T @ (squared @ (a @ v))
            v /= v.norm() + 1e-8
        return v

    def plain(self) -> Factors:
        raise UnsupportedFeatureError(
            "an Arrow router (`arrow_config`) mixes other adapters token by token, so it has no sum with others. Combine the "
            "experts themselves."
        )

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor | None:
        return None


def _state(factor: torch.Tensor) -> tuple[int, int]:
    return factor.data_ptr(), 0 if factor.is_inference() else factor._version


def is_router(config: LoraConfig) -> bool:
    """Whether it says what others may stand beside it."""
    return config.arrow_config is not None


def check_beside_router(config: LoraConfig, others: Mapping[str, PeftConfig]) -> None:
    """Refuse a router whose experts are not there, and experts that no router can mix.

    Raises:
        ValueError: an expert that the router's config names is not on the model.
        UnsupportedFeatureError: an expert is more than plain LoRA on linear layers.
    """
    loras = {name: other for name, other in others.items() if isinstance(other, LoraConfig)}
    router = next((other for other in loras.values() if other.arrow_config is not None), None)
    if config.arrow_config is not None:
        options = options_of(config.arrow_config, ArrowConfig)
        named = [*(options.task_adapter_names or ()), *(options.gks_adapter_names or ())]
        missing = [name for name in named if name not in others]
        if missing:
            raise ValueError(
                f"this adapter is an Arrow router: it mixes the adapters {named}, of which {missing} are not there. "
                "Load them first, under these names (`load_adapter(path, adapter_name)`), or build the model with "
                "`create_arrow_model`."
            )
        for name, other in loras.items():
            check_expert(other, repr(name))
    elif router is not None:
        check_expert(config, "the new adapter")


def check_expert(config: LoraConfig, name: str) -> None:
    if config.arrow_config is not None:
        return
    more = [*active_variants(config), *_more(config)]
    if more:
        raise UnsupportedFeatureError(
            f"an Arrow router mixes all other adapters of its model, and {name} cannot be mixed: Arrow is for plain LoRA, "
            f"and that one has {', '.join(f'`{field}`' for field in more)}."
        )


def _more(config: LoraConfig) -> Iterator[str]:
    beside = ("lora_bias", "target_parameters", "modules_to_save", "trainable_token_indices")
    yield from (name for name, value in vars(config).items() if name in beside and value)
    if config.bias != "none":
        yield "bias"
