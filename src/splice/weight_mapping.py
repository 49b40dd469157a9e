"""Names of adapters' tensors for transformers' own loader: `model.load_adapter`, `AutoModel.from_pretrained(<adapter>)`.

That loader reads a file by a list of steps, each of which gives a name in the file its place in the tree of modules. Here
is what stands in the list for an adapter. Only transformers asks for it, release 5 or later: nothing of splice imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, WeightTransform

from splice.base.conversions import Stacking, renaming_by, stackings_in
from splice.base.foreign_models import hot_swapping
from splice.checkpoint.keys import PREFIX, parse_key
from splice.config import PeftConfig, copy_config
from splice.kinds.layer import AdapterLayer
from splice.kinds.names import Place
from splice.kinds.registry import Method, all_methods, method_of
from splice.loading.swapping import check_in_place
from splice.surgery.tuner import tuner_of

# What stands in files before the names of the base's own tensors, on layers that carry an adapter.
_BASE = ".base_layer"


def build_peft_weight_mapping(
    weight_conversions: Sequence[WeightTransform] | None, adapter_name: str, peft_config: PeftConfig | None = None
) -> list[WeightTransform]:
    """The steps by which the tensors of an adapter's file come to their places on a network that carries the adapter.

    Args:
        weight_conversions: transformers' own steps for the weights of this network, old names among them.
        adapter_name: the adapter's name in memory.
        peft_config: the adapter's config. Without one, names of every method are understood.

    Returns:
        `WeightRenaming`s and `WeightConverter`s of transformers; none where `weight_conversions` has none.

    Raises:
        ValueError: transformers is about to put the weights over those of an adapter of another rank or scale.
    """
    # Asked of the caller, which makes this one call before it writes, and does not say here what it is going to do.
    network = hot_swapping(sys._getframe(1))
    if network is not None and peft_config is not None:
        check_in_place(tuner_of(network)[0], adapter_name, peft_config)
    if not weight_conversions:
        return []
    methods = list(all_methods().values()) if peft_config is None else [method_of(peft_config)]
    names = frozenset(name for method in methods for name in method.tensor_names)
    steps: list[WeightTransform] = [
        _Naming(names, _placing(peft_config), adapter_name, renaming_by(weight_conversions) or str)
    ]
    joins = {} if peft_config is None else method_of(peft_config).joins
    if peft_config is not None and joins:
        stackings = stackings_in(weight_conversions)
        for stacking in stackings:
            for suffix in joins:
                steps.append(_Joining(stacking, stackings, suffix, adapter_name, peft_config))
    return steps


def _placing(config: PeftConfig | None) -> Callable[[str], Place]:
    """The suffix of a tensor -> its place on a layer."""
    classes = [] if config is None else list(_layer_classes(method_of(config), config))
    if classes:
        # Those of one adapter agree: what differs by the kind of layer is told apart by the suffix.
        return classes[0].names.place
    return lambda suffix: Place(*suffix.partition(".")[::2])


def _layer_classes(method: Method, config: PeftConfig) -> Iterator[type[AdapterLayer]]:
    for kind, plain in method.layers.items():
        try:
            asked = None if method.variant is None else method.variant(config, kind, None)
        except ValueError:  # on no layer of this kind, and so in no file
            continue
        yield asked or plain


def _entry(place: Place, adapter_name: str) -> str:
    return ".".join(filter(None, (place.container, adapter_name, place.leaf)))


class _Naming(WeightRenaming):
    """Every name of the file, at once: the layer's path as it is now, and behind it the tensor's place.

    By the grammar, where the class above searches for expressions: names of modules and adapters may be anything.
    """

    __slots__ = ("_adapter_name", "_names", "_placing", "_rename")

    def __init__(
        self,
        names: frozenset[str],
        placing: Callable[[str], Place],
        adapter_name: str,
        rename: Callable[[str], str],
    ) -> None:
        super().__init__(PREFIX, "")
        self._names, self._placing, self._adapter_name, self._rename = names, placing, adapter_name, rename

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        key = source_key if source_key.startswith(PREFIX) else PREFIX + source_key
        parsed = parse_key(key, self._names)
        if parsed is not None:
            entry = _entry(self._placing(parsed.suffix), self._adapter_name)
            return f"{self._rename(parsed.path)}.{entry}", PREFIX
        path, dot, leaf = key[len(PREFIX) :].rpartition(".")
        if leaf == "weight":
            path = path.removesuffix(_BASE)  # a copy of the base's own embeddings, that is put back over them
        return f"{self._rename(path)}{dot}{leaf}", PREFIX

    def was_used(self) -> bool:
        # What was used is kept, and turned round when the base itself is saved, which has none of these names.
        return False


class _Joining(WeightConverter):
    """The tensors of every expert, of layers that are parts of one parameter now, as one tensor of the adapter."""

    __slots__ = ("_adapter_name", "_config", "_live", "_stacking", "_stackings", "_suffix")

    def __init__(
        self,
        stacking: Stacking,
        stackings: Sequence[Stacking],
        suffix: str,
        adapter_name: str,
        config: PeftConfig,
    ) -> None:
        # Expressions that nobody searches for; as labels they tell the parts apart.
        labels = [f"{stacking.container}.*.{part}.{suffix}" for part in stacking.parts]
        super().__init__(labels, [f"{stacking.container}.{stacking.parameter}.{suffix}"], [_Join(self)])
        self._stacking, self._stackings, self._suffix, self._adapter_name = stacking, stackings, suffix, adapter_name
        # The first with the values of the layers that were; the second is restated when the adapter is put on the network.
        self._config, self._live = copy_config(config), config

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        entry = "." + _entry(Place(*self._suffix.partition(".")[::2]), self._adapter_name)
        front, _, part = source_key.removesuffix(entry).rpartition(".")
        owner, _, index = front.rpartition(".")
        known = source_key.endswith(entry) and index.isdigit() and part in self._stacking.parts
        if not known or owner.rpartition(".")[2] != self._stacking.container:
            return source_key, None
        self._was_used = True
        return f"{owner}.{self._front(owner)}{entry[1:]}", self.source_patterns[self._stacking.parts.index(part)]

    def _front(self, owner: str) -> str:
        """What stands before the tensors' names: the parameters of a module nest, the last one outermost."""
        targets = self._live.target_rule().target_parameters
        spelled = [(other, f".{owner}.{other.parameter}") for other in self._stackings]
        chosen = [
            other
            for other, path in spelled
            if other.container == self._stacking.container
            and (not targets or path.endswith(tuple("." + target for target in targets)))
        ]
        after = chosen[chosen.index(self._stacking) + 1 :] if self._stacking in chosen else []
        return "base_layer." * len(after)

    def join(self, collected: Mapping[str, Sequence[torch.Tensor]], target: str) -> torch.Tensor:
        parts = dict(zip(self._stacking.parts, (list(collected.get(label, ())) for label in self.source_patterns)))
        counts = {part: len(tensors) for part, tensors in parts.items()}
        if len(set(counts.values())) != 1:
            raise ValueError(f"{target} is made of every expert's {', '.join(parts)}; of these the file has {counts}")
        front, container, _ = f".{target}".rpartition(f".{self._stacking.container}.")
        owner = (front + container).strip(".")
        return method_of(self._config).joins[self._suffix](self._config, owner, parts)

    def was_used(self) -> bool:
        return False


class _Join(ConversionOps):
    """The operation of a `_Joining`."""

    def __init__(self, step: _Joining) -> None:
        self._step = step

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, list[torch.Tensor]]:
        target: str = kwargs["full_layer_name"]
        return {target: [self._step.join(input_dict, target)]}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("adapters of stacked experts are not written as those of single layers")
