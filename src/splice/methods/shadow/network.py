"""The shadow network of an adapter: its tensors, and what it makes of the input of the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.bare import own_tensors
from splice.base.dense import device_of
from splice.base.foreign_models import input_embedding_layer
from splice.base.signatures import named_arguments
from splice.checkpoint.types import TaskType
from splice.kinds.adapters import Adapters, layers_of
from splice.kinds.call import Call, ReadsCall
from splice.kinds.casting import cast_to
from splice.kinds.container import Holder
from splice.kinds.effect import Effect, Forward
from splice.kinds.host import name_of
from splice.kinds.layer import AdapterLayer
from splice.kinds.network import NetworkLayer
from splice.kinds.slot import Role, Slot
from splice.methods.shadow.backbones import Backbone, backbone_of
from splice.methods.shadow.caches import cache_in_output
from splice.methods.shadow.calls import First, call_trunk
from splice.methods.shadow.config import ShadowConfig
from splice.methods.shadow.head import empty_head, head_of
from splice.methods.shadow.loss import with_own_loss
from splice.methods.shadow.names import MARK, BlockNames, ShadowNames
from splice.methods.shadow.trunk import trunk_of, width_of
from splice.selection import Rows

BACKBONE, PROJECTION, HEAD = f"shadow_backbone{MARK}", f"shadow_projection{MARK}weight", f"shadow_head{MARK}"


class ShadowNetwork(ReadsCall, NetworkLayer):
    """The tensors of the shadow network, on what holds the base, and its loss."""

    names = ShadowNames()
    on_tuner = True
    # The network that makes the state.
    backbone: Backbone
    # Its loss in the last call of the model, without a graph; None where that had none.
    last_loss: torch.Tensor | None = None

    @classmethod
    def place(cls, network: nn.Module, config: ShadowConfig) -> str:
        return ""

    @classmethod
    def companions(cls, base: nn.Module, path: str) -> dict[str, type[AdapterLayer]]:
        trunk = trunk_of(base)
        return {trunk.path: ShadowTrunk} if trunk.path else {}

    @classmethod
    def slots(cls, base: nn.Module, config: ShadowConfig, path: str) -> dict[str, Slot]:
        backbone = backbone_of(base, config, with_values=False)
        # As the base's first parameter, and not in float32 where that is in half precision: so the reference trains them.
        dtype = next((p.dtype for _, p in own_tensors(base) if p.is_floating_point()), torch.float32)
        found: dict[str, Slot] = {}
        parameters = {name for name, _ in backbone.module.named_parameters()}
        for name, tensor in backbone.module.state_dict().items():
            trained = Role.FIXED if name in backbone.fixed else Role.TRAINED
            role = trained if name in parameters else Role.BUFFER
            kept = dtype if tensor.is_floating_point() else tensor.dtype
            found[BACKBONE + name] = Slot(tuple(tensor.shape), role, dtype=kept)
        if backbone.projects:
            found[PROJECTION] = Slot((width_of(base), backbone.width), dtype=dtype)
        head = head_of(base) if config.task_type == TaskType.SEQ_CLS else None
        for name, tensor in () if head is None else own_tensors(head):
            found[HEAD + name] = Slot(tuple(tensor.shape), dtype=dtype)
        return found

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: ShadowConfig) -> None:
        backbone = backbone_of(base, config, with_values=True)
        for name, tensor in backbone.module.state_dict().items():
            tensors[BACKBONE + name].copy_(tensor)
        if PROJECTION in tensors:
            width, own = tensors[PROJECTION].shape
            # Drawn in any case, as in the reference, and then that of a trained network where it has one.
            drawn = nn.Linear(own, width, bias=False).weight
            tensors[PROJECTION].copy_(drawn if backbone.projection is None else backbone.projection)
        head = head_of(base)
        for name, tensor in () if head is None else own_tensors(head):
            if HEAD + name in tensors:
                tensors[HEAD + name].copy_(tensor)

    def new_entry(self, container: str) -> nn.Module:
        # Modules without values: each gets the tensors of its slots next.
        if container == BACKBONE.removesuffix(MARK):
            self.backbone = backbone_of(self.base, self.config, with_values=False)
            return self.backbone.module
        head = head_of(self.base)
        if container == HEAD.removesuffix(MARK) and head is not None:
            return empty_head(head)
        return Holder()

    def prepare(self, base: nn.Module, config: ShadowConfig, path: str) -> None:
        trunk = trunk_of(base)
        self.is_trunk, self.diffuses = not trunk.path, trunk.diffuses
        self.arguments = named_arguments(self.backbone.module)
        self._bring_tables()

    @property
    def _first(self) -> torch.Tensor:
        """The first of its tensors, which are all of one dtype."""
        return self.tensor(next(iter(self.registered)))

    def _bring_tables(self) -> None:
        """Bring what no checkpoint holds of the shadow network where its tensors are, and into their dtype."""
        dtype, device = self._first.dtype, device_of(self.base)
        stored = {id(item.registry[item.name]) for item in self.registered.values()}
        for module in self.backbone.module.modules():
            for name, table in module._buffers.items():
                if table is not None and id(table) not in stored:
                    module._buffers[name] = table.to(device, dtype if table.is_floating_point() else None)

    @property
    def own_head(self) -> nn.Module | None:
        """The copy of the head; None where it has none."""
        return self.entries.get(HEAD.removesuffix(MARK))

    @property
    def projection(self) -> nn.Parameter | None:
        """(d, own width): what brings its states to the base's width; None where they have it."""
        return cast("nn.Parameter | None", self.find(PROJECTION))

    # -- what it makes of an input

    def of_call(self, call: Mapping[str, Any], cache: object | None, use_cache: bool | None) -> First | None:
        """The state before the first block, for the arguments of the trunk; None without tokens and embedded ones.

        Args:
            call: the arguments, by name.
            cache: of the shadow network, with the tokens before these.
            use_cache: whether it keeps one; None for what it does by itself.
        """
        given = self._input(call)
        if given is None:
            return None
        more = {"attention_mask": call.get("attention_mask"), "position_ids": call.get("position_ids")}
        more |= {"past_key_values": cache, "cache": cache, "use_cache": use_cache}
        named = {name: value for name, value in more.items() if value is not None and name in self.arguments}
        output = self.backbone.module(**given, **named)
        return First(self._projected(output[0]), cache_in_output(output))

    def _input(self, call: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
        """The tokens of a call, or what was made of them, as the shadow network takes them."""
        ids, embedded = call.get("input_ids"), call.get("inputs_embeds")
        if self.diffuses or (ids is None and embedded is None):
            return None
        if embedded is None and self.backbone.shares:
            embeddings = input_embedding_layer(self.base)
            embedded = None if embeddings is None else embeddings(ids)
        if embedded is None:
            return {"input_ids": cast(torch.Tensor, ids)}
        if not self.backbone.shares and embedded.shape[-1] != self.backbone.width:
            raise ValueError(
                f"`inputs_embeds` have {embedded.shape[-1]} features, and the shadow network takes {self.backbone.width}: "
                "give it `input_ids`."
            )
        return {"inputs_embeds": cast_to(embedded, self._first)}

    def of_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, T, d), the state that it makes of the input of the first block, of the same shape."""
        return self._projected(self.backbone.module(inputs_embeds=cast_to(hidden, self._first))[0])

    def _projected(self, state: torch.Tensor) -> torch.Tensor:
        return state if self.projection is None else F.linear(state, self.projection)

    # -- in a call

    @classmethod
    def call_context(cls, adapters: Adapters, names: Sequence[str], call: Call) -> AbstractContextManager[None]:
        networks = {name: layer for name in names for layer in layers_of(adapters, [name], cls).values()}
        return with_own_loss(adapters, networks, call)

    def wrapped(self, inner: Forward) -> Forward:
        return _beside({name_of(self): self}, self.base, inner) if self.is_trunk else inner

    @classmethod
    def wrapped_rows(cls, layers: Mapping[str, Effect], rows: Rows, inner: Forward) -> Forward:
        """As `wrapped`, with an adapter for each row."""
        networks = {n: layer for n, layer in layers.items() if n in rows.names and isinstance(layer, ShadowNetwork)}
        trunks = {name: layer for name, layer in networks.items() if layer.is_trunk}
        return _beside(trunks, next(iter(trunks.values())).base, inner) if trunks else inner


class ShadowTrunk(NetworkLayer):
    """The shadow beside the part of a network that holds the blocks; it has no tensors of its own."""

    names = BlockNames("")
    # That of the same adapter.
    network: ShadowNetwork

    @classmethod
    def slots(cls, base: nn.Module, config: ShadowConfig, path: str) -> dict[str, Slot]:
        return {}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: ShadowConfig) -> None:
        return None

    def join(self, shared: AdapterLayer) -> None:
        if isinstance(shared, ShadowNetwork):
            self.network = shared

    def wrapped(self, inner: Forward) -> Forward:
        return _beside({name_of(self): self.network}, self.base, inner)

    @classmethod
    def wrapped_rows(cls, layers: Mapping[str, Effect], rows: Rows, inner: Forward) -> Forward:
        """As `wrapped`, with an adapter for each row."""
        trunks = {n: layer for n, layer in layers.items() if n in rows.names and isinstance(layer, ShadowTrunk)}
        if not trunks:
            return inner
        networks = {name: trunk.network for name, trunk in trunks.items()}
        return _beside(networks, next(iter(trunks.values())).base, inner)


def _beside(networks: Mapping[str, ShadowNetwork], trunk: nn.Module, inner: Forward) -> Forward:
    """The forward `inner` of the trunk, with these shadow networks beside it."""
    return lambda *args, **kwargs: call_trunk(networks, trunk, inner, args, kwargs)
