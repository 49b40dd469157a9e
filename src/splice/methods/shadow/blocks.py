"""SHADOW on a block: what it adds to the block's input, and how it goes on with the state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.signatures import named_arguments
from splice.kinds.casting import cast_to
from splice.kinds.effect import Effect, Forward
from splice.kinds.host import name_of
from splice.kinds.layout import LaidOut, Layout
from splice.kinds.slot import ANY, Slot
from splice.kinds.tensors import Held
from splice.methods.shadow.config import ShadowConfig
from splice.methods.shadow.hidden import Hidden
from splice.methods.shadow.names import BlockNames
from splice.methods.shadow.states import STATES, States
from splice.methods.shadow.trunk import check_row, width_of
from splice.selection import Rows

_DOWN, _UP = "shadow_down.default.weight", "shadow_up.default.weight"
_TRANSFORM, _GATE = "shadow_update_transform.default.", "shadow_update_gate.default."


class ShadowBlock(LaidOut):
    """With the input h of a block and the state s: `o = block(h + alpha * up(down(h - s)))`, `s = (1 - g) * s + g * t`.

    The transform t and the gate g are small networks of o. Behind the last block nothing reads the state.
    """

    names = BlockNames()
    numbers = MappingProxyType({"shadow_alpha": "alpha", "shadow_r": "r"})
    # (r, d) and (d, r).
    down, up = Held(_DOWN), Held(_UP)
    # Whether the block was computed by a checkpoint that this stands outside of.
    outside_checkpoint: bool = False

    @classmethod
    def slots_in(cls, layout: Layout, base: nn.Module, config: ShadowConfig, path: str) -> dict[str, Slot]:
        if layout.network is not None:
            check_row(list(layout.targets))
        d = ANY if layout.network is None else width_of(layout.network)
        r, u = config.r, config.update_hidden_size or config.r
        shapes: dict[str, tuple[int, ...]] = {_DOWN: (r, d), _UP: (d, r)}
        for front in (_TRANSFORM, _GATE):
            sizes = {"0.weight": (u, d), "0.bias": (u,), "2.weight": (d, u), "2.bias": (d,)}
            shapes.update({front + name: shape for name, shape in sizes.items()})
        # In float32 whatever the base is in: so the reference trains and writes them.
        return {suffix: Slot(shape, dtype=torch.float32) for suffix, shape in shapes.items()}

    @classmethod
    def initialise_in(
        cls, layout: Layout, path: str, tensors: dict[str, torch.Tensor], base: nn.Module, config: ShadowConfig
    ) -> None:
        for suffix, tensor in tensors.items():
            if not suffix.endswith(".weight"):
                continue
            # Drawn by linear layers, so that the same seed gives what it gives in the reference.
            drawn = nn.Linear(tensor.shape[1], tensor.shape[0], bias=suffix not in (_DOWN, _UP))
            tensor.copy_(drawn.weight)
            if drawn.bias is not None:
                tensors[suffix.removesuffix("weight") + "bias"].copy_(drawn.bias)
        if config.init_weights:
            nn.init.zeros_(tensors[_UP])

    def prepare(self, base: nn.Module, config: ShadowConfig, path: str) -> None:
        self.alpha, self.r, self.dropout = config.shadow_alpha, config.r, config.shadow_dropout
        self.path, self.arguments = path, named_arguments(base)

    def prepare_in(self, layout: Layout, path: str) -> None:
        self.is_last = layout.positions[path] == len(layout.targets) - 1

    def conflict(self, other: Effect) -> str:
        return "each has a state of its own beside the hidden states" if isinstance(other, ShadowBlock) else ""

    # -- the mathematics

    def shadowed(self, h: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """The block's input: h, (batch, T, d), moved by what tells it from s."""
        difference = cast_to(h - s, self.down)
        if self.dropout and self.training:
            difference = F.dropout(difference, self.dropout)
        return h + (self.alpha * F.linear(F.linear(difference, self.down), self.up)).to(h.dtype)

    def updated(self, s: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        """The state behind the block, given the state before it and the block's output, each (batch, T, d)."""
        t, g = self._network(_TRANSFORM, o), torch.sigmoid(self._network(_GATE, o))
        return ((1 - g) * s + g * t).to(s.dtype)

    def _network(self, front: str, x: torch.Tensor) -> torch.Tensor:
        names = ("0.weight", "0.bias", "2.weight", "2.bias")
        weight, bias, weight_out, bias_out = (self.tensor(front + name) for name in names)
        return F.linear(F.gelu(F.linear(cast_to(x, weight), weight, bias)), weight_out, bias_out)

    # -- in a call

    def wrapped(self, inner: Forward) -> Forward:
        def run(*args: object, **kwargs: object) -> object:
            states = STATES.now
            if states is None:
                self._check_alone()
            elif not states.inside:
                return self._run(states, None, {name_of(self): self}, inner, args, kwargs)
            return inner(*args, **kwargs)

        return run

    def around_checkpoint(self, run: Forward) -> Forward:
        """`run`, which computes the block with its checkpoint, and what is around it outside of that."""

        def call(*args: object) -> object:
            states = STATES.now
            assert states is not None
            self.outside_checkpoint = True
            return self._run(states, None, {name_of(self): self}, states.inside_of(run), args, {})

        return call

    @classmethod
    def wrapped_rows(cls, layers: Mapping[str, Effect], rows: Rows, inner: Forward) -> Forward:
        """As `wrapped`, with an adapter for each row."""
        blocks = {name: layer for name, layer in layers.items() if isinstance(layer, ShadowBlock)}

        def run(*args: object, **kwargs: object) -> object:
            states = STATES.now
            if states is None:
                next(iter(blocks.values()))._check_alone()
                return inner(*args, **kwargs)
            return cls._run(states, rows, blocks, inner, args, kwargs)

        return run

    @staticmethod
    def _run(
        states: States,
        rows: Rows | None,
        blocks: Mapping[str, ShadowBlock],
        inner: Forward,
        args: Sequence[object],
        kwargs: Mapping[str, object],
    ) -> object:
        """What the block gives, with what these adapters make of its input; each has its rows, or one has all."""
        one = next(iter(blocks.values()))
        states.check_gradients(one.path)
        call = Hidden(one.arguments, args, kwargs)
        h = call.given
        for name, block, index in _parts(blocks, rows, h):
            s = states.of[name].at(h, block.path)
            h = block.shadowed(h, s) if index is None else h.index_copy(0, index, block.shadowed(h[index], s[index]))
        output = call.passed_to(inner, h)
        o = call.taken_from(output)
        for name, block, index in _parts(blocks, rows, o):
            if block.is_last:
                continue
            state = states.of[name]
            s = state.at(o, block.path)
            if index is None:
                state.now = block.updated(s, o)
            else:
                state.now = s.index_copy(0, index, block.updated(s[index], o[index]))
        return output

    def _check_alone(self) -> None:
        """Raise where the block runs without the network around it, and not as a part of it that a backward computes again.

        Raises:
            ValueError: so it is.
        """
        if torch._C._current_graph_task_id() == -1:
            raise ValueError(
                f"{self.path}: with SHADOW the block goes by a state that begins with the network's input, so it cannot be "
                "called by itself. Call the network, or call the block inside `model.disable_adapter()`."
            )
        if not self.outside_checkpoint:
            raise ValueError(
                f"{self.path}: a backward computes the block again, by a checkpoint that holds its adapter as well, and the "
                "state that belongs there is gone. Use `gradient_checkpointing_enable()` of the model instead."
            )


def _parts(
    blocks: Mapping[str, ShadowBlock], rows: Rows | None, x: torch.Tensor
) -> list[tuple[str, ShadowBlock, torch.Tensor | None]]:
    """The adapters that are on a block, with the indices of their rows; None for all rows."""
    if rows is None:
        return [(name, block, None) for name, block in blocks.items()]
    groups = rows.groups(len(x), x.device)
    return [(group.name, blocks[group.name], group.indices) for group in groups if group.name in blocks]
