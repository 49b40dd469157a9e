"""X-LoRA: a small classifier weighs frozen LoRA adapters, the experts, for each token.

Buehler & Buehler, "X-LoRA: Mixture of Low-Rank Adapter Experts", arXiv 2402.07148, section 2. The network is called twice.
The first time it is the base alone, whose last hidden states the classifier turns into weights; the second time each layer
gives `y + g * sum_e s_e * B_e A_e (sigma_e * x)`, with the weight sigma_e of each token for expert e.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from splice.base.bare import walk_bare
from splice.checkpoint.types import PeftType
from splice.config import PeftConfig
from splice.errors import UnsupportedFeatureError, warn
from splice.kinds.adapters import Adapters, adapters_on, layers_of
from splice.kinds.additive import Additive
from splice.kinds.call import Call, ReadsCall
from splice.kinds.effect import Effect, Forward
from splice.kinds.layer import AdapterLayer
from splice.kinds.names import Names, SharedNames
from splice.kinds.network import NetworkLayer
from splice.kinds.registry import Experts, Method, register
from splice.kinds.routed import check_can_be_mixed
from splice.kinds.slot import Role, Slot
from splice.kinds.tensors import Registered
from splice.selection import BASE, NOTHING, Choice, Mixture, Rows

_CLASSIFIER = "internal_xlora_classifier"


@dataclass
class XLoraConfig(PeftConfig):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.XLORA

    # Features of the base's hidden states; None for 4096, with a warning.
    hidden_size: int | None = None
    # The experts: any names -> folders or Hub ids of LoRA adapters. On the model they are called "0", "1"... in their order.
    adapters: dict[str, str] | None = None
    # Whether the weights of a token are a softmax over its experts; otherwise they are what the classifier gives.
    enable_softmax: bool = True
    # Whether there is a softmax over those weights that `top_k_lora` leaves.
    enable_softmax_topk: bool = False
    # Whether each layer has weights of its own; otherwise all have the same.
    layerwise_scalings: bool = False
    # How many linear layers the classifier has, at least 1.
    xlora_depth: int = 1
    # Features between them.
    xlora_size: int = 2048
    # Probability with which one of these is dropped in training.
    xlora_dropout_p: float = 0.2
    # Whether the experts are trained too.
    use_trainable_adapters: bool = False
    # What the classifier's output is divided by before the softmax.
    softmax_temperature: float = 1.0
    # How many experts a token is given, those of the largest weights; None for all.
    top_k_lora: int | None = None
    # Weight of the experts in the first call of the network. No effect: they are switched off in it.
    scaling_pass_value: float = 0.0
    # g, what the sum over the experts is multiplied with.
    global_scaling_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size is None:
            warn(
                "No value was provided for `hidden_size`. This will be set to 4096 by default, please ensure that this is"
            )
            self.hidden_size = 4096
        if self.adapters is None:
            warn("No value was provided for `adapters`. This will be set to empty, please provide the adapters.")
            self.adapters = {}
        if self.enable_softmax_topk and self.top_k_lora is None:
            warn("`enable_softmax_topk` enabled `top_k_lora` is not set")
        if self.enable_softmax_topk and self.enable_softmax:
            warn("`enable_softmax_topk` and `enable_softmax` are both enabled. This will result in worse performance.")
        if self.top_k_lora is not None and self.top_k_lora < 1:
            warn("`top_k_lora` value must be at least 1.")

    def computed(self) -> dict[str, object]:
        names = ("enable_softmax", "enable_softmax_topk", "softmax_temperature", "top_k_lora", "global_scaling_weight")
        return {name: value for name, value in vars(self).items() if name in names}


def _check(config: XLoraConfig) -> None:
    if config.xlora_depth <= 0:
        raise ValueError(f"`xlora_depth` must be at least 1, got {config.xlora_depth}")
    if not config.adapters:
        raise ValueError(
            "X-LoRA weighs LoRA adapters, and `adapters` names none: give a dict from any names to folders or Hub ids, "
            "in the config or as `from_pretrained(..., adapters=...)`."
        )
    if config.top_k_lora is not None and not 0 < config.top_k_lora <= len(config.adapters):
        raise ValueError(f"`top_k_lora` is {config.top_k_lora}, of {len(config.adapters)} experts")


def _places(config: XLoraConfig, options: Mapping[str, Any]) -> Mapping[str, str]:
    given = options.get("adapters")
    if given is not None:
        config.adapters = dict(given)
    return {str(number): place for number, place in enumerate((config.adapters or {}).values())}


def names_of_experts(config: XLoraConfig) -> tuple[str, ...]:
    """What the experts are called on the model."""
    return tuple(map(str, range(len(config.adapters or ()))))


class _ClassifierNames(SharedNames):
    """Of the classifier: a model has one, and no adapter's name stands in those of its tensors."""

    def nameless(self, suffix: str) -> str | None:
        return suffix


class XLoraClassifier(ReadsCall, NetworkLayer):
    """The classifier, and what it makes of the call of the network."""

    names: Names = _ClassifierNames()
    on_tuner = True
    # Merged it is the sum of the experts, as in the reference.
    mergeable, merges_exactly, changed_names = True, False, ()
    lost_when_merged = (
        "weighs its experts for each token, which no weight does: merged, each expert is added in full for every token, and "
        "the output is another one. Keep it unmerged to keep its router, or have one expert alone in the weights: "
        "`set_adapter` and the expert's name first."
    )
    # The weights of the last call, (batch, T, layers, experts); None before the first.
    latest: torch.Tensor | None = None
    # Those of all calls since somebody asked for them; None while nobody does.
    log: list[torch.Tensor] | None = None

    @classmethod
    def place(cls, network: nn.Module, config: XLoraConfig) -> str:
        return ""

    @classmethod
    def slots(cls, base: nn.Module, config: XLoraConfig, path: str) -> dict[str, Slot]:
        count = len(config.adapters or ())
        outputs = count * len(cls.paths(base, config)) if config.layerwise_scalings else count
        sizes = [config.hidden_size or 0, *[config.xlora_size] * (config.xlora_depth - 1), outputs]
        found: dict[str, Slot] = {}
        # As the base's first parameter, and not in float32 where that is in half precision: so the reference trains it.
        dtype = next((p.dtype for p in base.parameters() if p.is_floating_point()), torch.float32)
        for index, (size_in, size_out) in zip(cls.numbers_of(config), itertools.pairwise(sizes)):
            found[f"{_CLASSIFIER}.layers.{index}.weight"] = Slot((size_out, size_in), dtype=dtype)
            found[f"{_CLASSIFIER}.layers.{index}.bias"] = Slot((size_out,), dtype=dtype)
        return found

    @staticmethod
    def numbers_of(config: XLoraConfig) -> list[int]:
        """The numbers of the linear layers: what stands between them is counted too."""
        step = 3 if config.xlora_dropout_p > 0 else 2
        return [step * index for index in range(config.xlora_depth)]

    @staticmethod
    def paths(base: nn.Module, config: XLoraConfig) -> list[str]:
        """The layers that experts are on, in the order of the network.

        Raises:
            ValueError: they are not there, or what they are on cannot be mixed.
        """
        adapters, names = adapters_on(base), names_of_experts(config)
        placed = {} if adapters is None else layers_of(adapters, names, Additive)
        if adapters is None or not all(name in adapters.placed for name in names):
            raise ValueError(f"X-LoRA with {config.adapters} needs these adapters on the model, and they are not there")
        return [path for path in walk_bare(base) if path in placed]

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: XLoraConfig) -> None:
        for name, weight in tensors.items():
            if name.endswith(".weight"):
                drawn = nn.Linear(weight.shape[1], weight.shape[0])
                weight.copy_(drawn.weight)
                tensors[name.removesuffix("weight") + "bias"].copy_(drawn.bias)

    def prepare(self, base: nn.Module, config: XLoraConfig, path: str) -> None:
        adapters = adapters_on(base)
        assert adapters is not None
        for name in names_of_experts(config):
            for place, layer in layers_of(adapters, [name], AdapterLayer).items():
                check_can_be_mixed(layer, f"expert {name!r} on {place!r}", "X-LoRA")
        self.experts, self.expert_paths = names_of_experts(config), self.paths(base, config)
        self.merged_with = self.experts

    def tensors_by_role(self, role: Role) -> Iterator[Registered]:
        yield from super().tensors_by_role(role)
        adapters = adapters_on(self.base)
        if self.config.use_trainable_adapters and adapters is not None:
            for layer in (layer for name in self.experts for layer in layers_of(adapters, [name], Additive).values()):
                yield from layer.tensors_by_role(role)

    def deltas(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {}  # the experts have theirs

    @classmethod
    def call_context(cls, adapters: Adapters, names: Sequence[str], call: Call) -> AbstractContextManager[None]:
        # The weights follow from the hidden states of all tokens, which a cache keeps nothing of.
        if call.generates and any(name in adapters.selection.current().names for name in names):
            call.options["use_cache"] = False
        return nullcontext()

    def wrapped(self, inner: Forward) -> Forward:
        def run(*args: object, **kwargs: object) -> object:
            return self.mixed(inner, args, kwargs, None)

        return run

    @classmethod
    def wrapped_rows(cls, layers: Mapping[str, Effect], rows: Rows, inner: Forward) -> Forward | None:
        named = [layer for name, layer in layers.items() if name in rows.names and isinstance(layer, cls)]
        if not named:
            return None
        if len(named) > 1 or not set(rows.names) <= {BASE, *named[0].experts, *layers}:
            raise UnsupportedFeatureError(
                "`adapter_names`: rows of X-LoRA go with rows of its experts and of the base alone"
            )
        layer = named[0]

        def run(*args: object, **kwargs: object) -> object:
            return layer.mixed(inner, args, kwargs, rows)

        return run

    def mixed(self, inner: Forward, args: Sequence[object], kwargs: dict[str, Any], rows: Rows | None) -> object:
        """What the network gives with the experts weighed for each token; some rows may have one expert, or none."""
        if kwargs.get("past_key_values") is not None and kwargs["past_key_values"].get_seq_length() > 0:
            raise ValueError(
                "X-LoRA weighs a token by the hidden states of the whole sequence, and `past_key_values` holds a part of it: "
                "give all tokens, and `use_cache=False`."
            )
        adapters = adapters_on(self.base)
        assert adapters is not None
        given = {**{k: v for k, v in kwargs.items() if k != "past_key_values"}, "use_cache": False}
        with torch.no_grad(), adapters.selection.for_this_call(Choice(*NOTHING)):
            bare = inner(*args, **{**given, "output_hidden_states": True, "return_dict": True})
        weights = self.classify(bare.hidden_states[-1])
        self.latest = weights
        if self.log is not None:
            self.log.append(weights)
        if rows is not None:
            weights = self._as_rows_say(weights, rows)
        choice = Choice(rows=Mixture(self.experts, self._by_layer(weights), float(self.config.global_scaling_weight)))
        with adapters.selection.for_this_call(choice):
            result = inner(*args, **given)
        if torch.is_grad_enabled():
            self._keep(adapters, choice, result)
        return result

    def classify(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, T, layers, experts), the weights of the tokens with these hidden states (batch, T, dim)."""
        config: XLoraConfig = self.config
        numbers = self.numbers_of(config)
        out = hidden.to(self.tensor(f"{_CLASSIFIER}.layers.0.weight").dtype)
        for index in numbers:
            front = f"{_CLASSIFIER}.layers.{index}"
            out = F.linear(out, self.tensor(f"{front}.weight"), self.tensor(f"{front}.bias"))
            if index != numbers[-1]:
                out = F.dropout(F.relu(out), config.xlora_dropout_p, self.training)
        layers = len(self.expert_paths)
        out = out.reshape(*out.shape[:-1], layers if config.layerwise_scalings else 1, len(self.experts))
        out = out.expand(*out.shape[:-2], layers, len(self.experts))
        return torch.softmax(out / config.softmax_temperature, -1) if config.enable_softmax else out

    def _by_layer(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """The weights as each layer takes them, (batch, T, experts): the largest alone, where the config says so."""
        config: XLoraConfig = self.config
        if config.top_k_lora is not None:
            largest, chosen = weights.topk(config.top_k_lora, dim=-1)
            weights = torch.zeros_like(weights).scatter(-1, chosen, largest)
        if config.enable_softmax_topk:
            kept = weights != 0
            weights = torch.softmax(weights.masked_fill(~kept, float("-inf")), -1).masked_fill(~kept, 0.0)
        return dict(zip(self.expert_paths, weights.unbind(-2)))

    def _as_rows_say(self, weights: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The weights, but 1 for the expert that a row has in the place of the mixture, and 0 for rows of the base."""
        weights = weights.clone()
        for index, name in enumerate(rows.names * (len(weights) // len(rows.names))):
            if name == BASE or name in self.experts:
                weights[index] = 0.0
            if name in self.experts:
                weights[index, ..., self.experts.index(name)] = 1.0
        return weights

    def _keep(self, adapters: Adapters, choice: Choice, result: object) -> None:
        """Let blocks that compute themselves again in the backward mix as they did."""
        # Behind the hooks of the tensors themselves, with which the model keeps what was selected outside.
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(lambda _: adapters.selection.root.keep_for_backward(choice))


def _active(adapters: Adapters) -> XLoraClassifier:
    layers = layers_of(adapters, [*adapters.selection.active, *adapters.placed], XLoraClassifier)
    return next(iter(layers.values()))


def _set_topk(adapters: Adapters, value: int | None) -> None:
    """How many experts a token is given from now on."""
    _active(adapters).config.top_k_lora = value


def _set_global_weight(adapters: Adapters, weight: float) -> None:
    """What the sum over the experts is multiplied with from now on."""
    _active(adapters).config.global_scaling_weight = weight


def _global_weight(adapters: Adapters) -> float:
    """What the sum over the experts is multiplied with."""
    return float(_active(adapters).config.global_scaling_weight)


def _set_pass_value(adapters: Adapters, value: float | None) -> None:
    """Recorded alone: in the first call of the network the experts are switched off."""
    layer = _active(adapters)
    layer.config.scaling_pass_value = 1 / len(layer.experts) if value is None else value


def _latest(adapters: Adapters) -> torch.Tensor | None:
    """The weights of the last call, (batch, T, layers, experts)."""
    return _active(adapters).latest


def _log(adapters: Adapters) -> list[torch.Tensor]:
    """The weights of all calls since `enable_scalings_logging`."""
    return list(_active(adapters).log or ())


def _start_log(adapters: Adapters) -> None:
    """Keep the weights of all calls from now on."""
    layer = _active(adapters)
    layer.log = layer.log or []


def _stop_log(adapters: Adapters) -> None:
    """Keep them no longer, and forget those that were kept."""
    _active(adapters).log = None


def _clear_log(adapters: Adapters) -> None:
    """Forget those that were kept."""
    layer = _active(adapters)
    layer.log = None if layer.log is None else []


def _buckets(adapters: Adapters) -> dict[int, tuple[list[int], list[torch.Tensor]]]:
    """The kept weights by the length of their sequences: with the numbers of the calls."""
    found: dict[int, tuple[list[int], list[torch.Tensor]]] = {}
    for number, weights in enumerate(_active(adapters).log or ()):
        numbers, tensors = found.setdefault(weights.shape[1], ([], []))
        numbers.append(number)
        tensors.append(weights)
    return found


METHOD = register(
    Method(
        name=PeftType.XLORA,
        summary="Weighs trained LoRA adapters for each token, by a classifier of the base's hidden states.",
        config=XLoraConfig,
        prefix="internal_xlora_",
        tensor_names=frozenset({_CLASSIFIER}),
        network_layer=XLoraClassifier,
        experts=Experts(PeftType.LORA, _places),
        tuner_methods=MappingProxyType(
            {
                "set_topk_lora": _set_topk,
                "set_global_scaling_weight": _set_global_weight,
                "get_global_scaling_weight": _global_weight,
                "set_scaling_pass_value": _set_pass_value,
                "get_latest_scalings": _latest,
                "get_scalings_log": _log,
                "enable_scalings_logging": _start_log,
                "disable_scalings_logging": _stop_log,
                "clear_scalings_log": _clear_log,
                "get_bucketed_scalings_log": _buckets,
            }
        ),
        check=_check,
        paper="arXiv 2402.07148",
    )
)
