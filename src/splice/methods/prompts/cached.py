"""The kind of prompt that stands in the cache: keys and values of n positions before the first token, in every layer.

The input and the output keep their length; the mask gets n ones in front, and positions start at n. Of an encoder-decoder
the decoder's self-attention gets them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import nn

from splice.base.foreign_models import accepted_by, backbone_path, device_map, text_config, uses_checkpointing
from splice.base.signatures import named_arguments
from splice.checkpoint.types import TaskType
from splice.config import PromptLearningConfig
from splice.errors import warn
from splice.kinds.casting import check_values
from splice.kinds.effect import Forward
from splice.kinds.layer import Config
from splice.kinds.slot import Slot
from splice.methods.prompts.cache import Cache
from splice.methods.prompts.counts import token_count
from splice.methods.prompts.prompt import TYPED, Call, Prompt, PromptLayer, main_input
from splice.methods.prompts.sizes import cache_sizes_of, rooms_of

_CACHES = {"past_key_values", "cache"}
_DECODER = ("decoder_input_ids", "decoder_inputs_embeds", "labels", "input_ids", "inputs_embeds")


class CachedPrompt(PromptLayer):
    """Virtual tokens as keys and values, (n, layers * 2 * heads * size of a head): a layer's keys, then its values."""

    @classmethod
    def place(cls, network: nn.Module, config: PromptLearningConfig) -> str:
        if uses_checkpointing(network.modules()):
            raise ValueError(_checkpointing_text(method_name(config)))
        if _CACHES.intersection(named_arguments(network)):
            return ""
        # The models that classify keep the cache of their backbone to themselves.
        path = backbone_path(network)
        backbone = network._modules.get(path)
        if backbone is None or not _CACHES.intersection(named_arguments(backbone)):
            raise ValueError(
                f"{type(network).__name__} does not support past key values which are required for {method_name(config)}: "
                "neither its forward nor that of its backbone takes a cache."
            )
        return path

    @classmethod
    def resolved(cls, base: nn.Module, config: Config) -> dict[str, object]:
        return {**cache_sizes_of(base, config)}

    @classmethod
    def slots(cls, base: nn.Module, config: Config, path: str) -> dict[str, Slot]:
        sizes = cache_sizes_of(base, config)
        shape = (token_count(config), sizes["num_layers"] * 2 * sizes["token_dim"])
        return {"embedding.weight": Slot(shape, dtype=torch.float32)}

    def prepare(self, base: nn.Module, config: Config, path: str) -> None:
        super().prepare(base, config, path)
        sizes = cache_sizes_of(base, config)
        self.method = method_name(config)
        self.layers, self.heads = sizes["num_layers"], sizes["num_attention_heads"]
        self.submodules = sizes["num_transformer_submodules"]
        self.decodes = self.task == TaskType.SEQ_2_SEQ_LM
        self.rooms = rooms_of(base, self.layers, self.heads, sizes["token_dim"] // self.heads)
        skipped = sorted(set(range(self.layers)) - set(self.rooms))
        if not self.rooms:
            raise ValueError(f"{self.method}: no layer of {type(base).__name__} can take its keys and values")
        if skipped:
            text = f"{self.method}: layers {skipped} have no room for its keys and values, and go without them."
            warn(text)

    def check_fillable(self) -> None:
        """Raise where these keys and values cannot be replaced by others.

        Raises:
            ValueError: they follow from other tensors, have no place in memory yet, or are not those of the layers in order.
        """
        if self.table().is_meta:
            raise ValueError(f"{self.method}: the adapter's tensors are on the meta device; load it first")
        if self.decodes and self.submodules != 1:
            raise ValueError(
                f"{self.method}: of an encoder-decoder, decoder layer l has what the table holds for layer 2 l modulo the "
                "number of layers, so that it cannot hold the cache of each; the adapter has to be trained from noise"
            )

    @torch.no_grad()
    def take(self, table: torch.Tensor) -> None:
        """Have these keys and values, (n, layers * 2 * heads * size of a head), in the place of those that are there.

        Raises:
            ValueError: as `check_fillable`, or the shape is another one.
        """
        self.check_fillable()
        wanted = tuple(self.table().shape)
        if tuple(table.shape) != wanted:
            raise ValueError(
                f"Invalid `prompt_embeddings` shape. Expected {wanted}, for {self.count} virtual tokens and {self.layers} "
                f"layers, got {tuple(table.shape)}. The adapter is unchanged."
            )
        for suffix, part in self.parts_of(table).items():
            self.tensor(suffix).copy_(part)

    def parts_of(self, table: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """The tensors, by suffix, that hold this table."""
        return {"embedding.weight": table}

    def virtual_tokens(self, call: Call) -> torch.Tensor:
        return self.table().view(1, self.count, 2 * self.layers, self.heads, -1)

    def prompted(self, call: Call, prompt: Prompt, inner: Forward) -> object:
        if self.training and torch.is_grad_enabled():
            self._check_no_checkpointing()
        call.pop("task_ids", None)
        # `generate` of transformers 4 counts the tokens that it was given; the network counts what is in the cache.
        call.pop("cache_position", None)
        self.drop_types(call, unless=TYPED)
        cache = self.cache_in(call)
        past = 0 if cache is None else cache.get_seq_length()
        kept = cache is not None or call.get("use_cache") is not False
        if past == 0:
            main = main_input(call, _DECODER if self.decodes else _DECODER[3:])
            values = prompt.values(call, main.shape[0])
            check_values(values, main)
            cache = self.filled(cache, values)
            call[self.cache_name] = cache
        length = main_input(call, _DECODER if self.decodes else _DECODER[3:]).shape[1]
        front = "decoder_" if self.decodes else ""
        self.set_mask(call, front + "attention_mask", prompt, length, past)
        self._set_positions(call, front + "position_ids", prompt, length, past or prompt.count)
        output = inner(**call)
        return output if kept else _without(output, cache)

    def _set_positions(self, call: Call, name: str, prompt: Prompt, length: int, past: int) -> None:
        given = call.get(name)
        if given is None:
            self.set_positions(call, name, prompt, length, past)
        else:
            call[name] = given + prompt.count - (0 if prompt.short is None else prompt.short)

    def filled(self, cache: Cache | None, values: torch.Tensor) -> Cache:
        """`cache`, or a new one, with `values` (batch, n, 2 * layers, heads, size of a head) in it.

        Raises:
            ValueError: it cannot grow, or no layer can take the values.
        """
        # Here, since a network that takes such a cache has imported transformers, and nobody else shall.
        from transformers import DynamicCache, EncoderDecoderCache

        values = values.to(cast("torch.dtype", self.base.dtype))
        if self.decodes:
            if self.submodules == 1:  # the reference's own result: one cache for both kinds of attention
                cache = DynamicCache()
            elif cache is None:
                cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        elif cache is None:
            make: Callable[..., Cache] = DynamicCache
            cache = make(**accepted_by(DynamicCache.__init__, {"config": text_config(self.base)}))
        assert cache is not None
        if cache.is_compileable:
            raise ValueError(
                f"{self.method}: a {type(cache).__name__} cannot be filled beforehand; use a cache that grows (for "
                "`generate`: leave out `cache_implementation`)"
            )
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        self._fill(own, values)
        return cache

    def _fill(self, cache: Cache, values: torch.Tensor) -> None:
        devices = _devices(self.base)
        for layer, (heads, dim) in self.rooms.items():
            for_keys, for_values = self._of_layer(values, layer)
            device = devices.get(layer, values.device)
            cache.update(for_keys[:, :heads, :, :dim].to(device), for_values[:, :heads, :, :dim].to(device), layer)

    def _of_layer(self, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, each (batch, heads, n, size of a head).

        With two submodules the reference deals out the layers of the table in pairs and keeps the first of each: decoder
        layer l has those of layer 2 l modulo the number of layers. Trained checkpoints depend on it.
        """
        entry = 2 * layer if self.submodules == 1 else 4 * layer % (2 * self.layers)
        return values[:, :, entry].transpose(1, 2), values[:, :, entry + 1].transpose(1, 2)

    def _check_no_checkpointing(self) -> None:
        """Layers that recompute themselves are called without the cache: the virtual tokens would be lost in silence."""
        if uses_checkpointing(self.base.modules()):
            raise ValueError(_checkpointing_text(self.method))


def computed_sizes(config: PromptLearningConfig) -> dict[str, object]:
    """What a table's shape does not tell of how it is read; filled in from the base where it is None."""
    sizes = {"num_attention_heads": config.num_attention_heads, "num_layers": config.num_layers}
    return {name: size for name, size in sizes.items() if size is not None}


def method_name(config: PromptLearningConfig) -> str:
    """How messages call the method."""
    assert config.method is not None
    return config.method.value


def _without(output: object, cache: Cache | None) -> object:
    """`output` without the cache: `generate` that was told to use none takes up whatever a step returns."""
    if isinstance(output, tuple):
        return tuple(part for part in output if part is not cache)
    assert isinstance(output, Mapping)  # an output of transformers
    made: Callable[..., object] = type(output)
    return made(**{name: part for name, part in output.items() if part is not cache})


def _checkpointing_text(method: str) -> str:
    return f"{method} does not work with gradient checkpointing. Call `model.gradient_checkpointing_disable()`."


def _devices(network: nn.Module) -> dict[int, torch.device]:
    """Layer -> its device, of a network that is spread over several."""
    found: dict[int, torch.device] = {}
    for path, device in device_map(network).items():
        index = next((part for part in path.split(".") if part.isdigit()), None)
        if index is not None and device not in ("cpu", "disk"):
            found[int(index)] = torch.device(cast("str | int", device))
    return found
