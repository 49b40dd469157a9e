"""X-LoRA: a small classifier weighs frozen LoRA adapters, the experts, for each token.

Buehler & Buehler, "X-LoRA: Mixture of Low-Rank Adapter Experts", arXiv 2402.07148, section 2. The network is called twice.
The first time it is the base alone, whose last hidden states the classifier turns into weights; the second time each layer
gives `y + g * sum_e s_e * B_e A_e (sigma_e * x)`, with the weight sigma_e of each token for expert e.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from splice.base.bare import walk_bare
from splice.errors import UnsupportedFeatureError
from splice.kinds.adapters import Adapters, adapters_on, layers_of
from splice.kinds.additive import Additive
from splice.kinds.call import Call, ReadsCall
from splice.kinds.effect import Effect, Forward
from splice.kinds.layer import AdapterLayer
from splice.kinds.names import Names, SharedNames
from splice.kinds.network import NetworkLayer
from splice.kinds.routed import check_can_be_mixed
from splice.kinds.slot import Role, Slot
from splice.kinds.tensors import Registered
from splice.methods.xlora.config import XLoraConfig, names_of_experts
from splice.selection import BASE, NOTHING, Choice, Mixture, Rows

CLASSIFIER = "internal_xlora_classifier"


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
            found[f"{CLASSIFIER}.layers.{index}.weight"] = Slot((size_out, size_in), dtype=dtype)
            found[f"{CLASSIFIER}.layers.{index}.bias"] = Slot((size_out,), dtype=dtype)
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
        hidden, drops = bare.hidden_states[-1], list[torch.Tensor]()
        weights = self.classify(hidden, drops)
        self.latest = weights
        if self.log is not None:
            self.log.append(weights)
        mixture = Mixture(self.experts, self._by_layer(weights, rows), float(self.config.global_scaling_weight))
        with adapters.selection.for_this_call(Choice(rows=mixture)):
            result = inner(*args, **given)
        if torch.is_grad_enabled():
            self._keep(adapters, mixture, result, lambda: self._by_layer(self.classify(hidden, drops), rows))
        return result

    def classify(self, hidden: torch.Tensor, drops: list[torch.Tensor]) -> torch.Tensor:
        """(batch, T, layers, experts), the weights of the tokens with these hidden states (batch, T, dim).

        `drops` are what features between the layers are multiplied with, in training; drawn where it is empty.
        """
        config: XLoraConfig = self.config
        numbers = self.numbers_of(config)
        drawn = iter(list(drops))
        out = hidden.to(self.tensor(f"{CLASSIFIER}.layers.0.weight").dtype)
        for index in numbers:
            front = f"{CLASSIFIER}.layers.{index}"
            out = F.linear(out, self.tensor(f"{front}.weight"), self.tensor(f"{front}.bias"))
            if index != numbers[-1]:
                out = F.relu(out)
                if self.training and config.xlora_dropout_p:
                    drop = next(drawn, None)
                    if drop is None:
                        drop = F.dropout(torch.ones_like(out), config.xlora_dropout_p)
                        drops.append(drop)
                    out = out * drop
        layers = len(self.expert_paths)
        out = out.reshape(*out.shape[:-1], layers if config.layerwise_scalings else 1, len(self.experts))
        out = out.expand(*out.shape[:-2], layers, len(self.experts))
        return torch.softmax(out / config.softmax_temperature, -1) if config.enable_softmax else out

    def _by_layer(self, weights: torch.Tensor, rows: Rows | None) -> dict[str, torch.Tensor]:
        """The weights as each layer takes them, (batch, T, experts): the largest alone, where the config says so."""
        config: XLoraConfig = self.config
        if rows is not None:
            weights = self._as_rows_say(weights, rows)
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

    def _keep(
        self, adapters: Adapters, mixture: Mixture, result: object, again: Callable[[], Mapping[str, torch.Tensor]]
    ) -> None:
        """Let blocks that compute themselves again in the backward mix as they did; `again` gives the same weights anew."""

        def begin(_: object) -> None:
            kept, weights = mixture, mixture.weights
            if any(weight.requires_grad for weight in weights.values()):
                # Reentrant checkpoints run a backward of their own for each block, which would go through the classifier
                # and take its graph from the next one. So each block ends at these, and what has come together there is
                # passed on once.
                ends = {path: weight.detach().requires_grad_() for path, weight in weights.items()}
                kept = replace(mixture, weights=ends)
                torch.autograd.Variable._execution_engine.queue_callback(partial(_pass_on, ends, again))
            adapters.selection.root.keep_for_backward(Choice(rows=kept))

        # Behind the hooks of the tensors themselves, with which the model keeps what was selected outside.
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(begin)


def _pass_on(ends: Mapping[str, torch.Tensor], again: Callable[[], Mapping[str, torch.Tensor]]) -> None:
    """Pass the gradients that have come together in `ends` on to the classifier, whose weights by layer they are of."""
    given = {path: end.grad for path, end in ends.items() if end.grad is not None}
    if given:
        with torch.enable_grad():
            weights = again()
        torch.autograd.backward([weights[path] for path in given], list(given.values()))
