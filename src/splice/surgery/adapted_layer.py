"""The class of an adapted layer: its forward composes the selected adapter layers around the base layer's own forward."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn

from splice.base.bare import HOST, bare_children
from splice.base.foreign_models import CASTS_FOR_A_CALL, is_called_from
from splice.base.routing import gets_sorted_tokens
from splice.kinds.computing import computing, reading_as
from splice.kinds.effect import Forward
from splice.kinds.host import Host, host_of, in_order
from splice.kinds.layer import AdapterLayer
from splice.kinds.routed import mixed
from splice.kinds.row_plan import Parts, RowPlan
from splice.selection import Choice, Group, Groups, Mixture, Rows
from splice.surgery.generated import Generated
from splice.surgery.layer_attributes import AdaptedViews, bare_layer
from splice.surgery.layer_commands import LayerCommands
from splice.surgery.own_state import state_members
from splice.surgery.reading import publish_tensors
from splice.surgery.registering import called_through
from splice.surgery.replaced_forward import IN_REPLACED, around_replaced, running
from splice.surgery.replacing import BASE_NAMES, replace_base
from splice.surgery.rows import add_by_seats, add_products
from splice.surgery.spellings import check_spellings, plain_name
from splice.surgery.two_steps import adding, entering, leaving, put, taken

_NONE: Mapping[str, torch.Tensor] = {}
# Whether a function of `torch.func` is at work.
_maps_functions = torch._C._are_functorch_transforms_active
_ONE_TENSOR = "{}: `adapter_names` needs layers that take one tensor and give one tensor"


class Adapted(Generated, AdaptedViews, LayerCommands, nn.Module):
    """Mixed into the class of an adapted layer, in front of the class that it had."""

    splice_host: Host

    # A decode step pays this at every layer: no module is called here, and what is known at attach or by the selection is
    # not looked up again.

    def forward(self, *args: object, **kwargs: object) -> object:
        try:
            host = self.splice_host
        except AttributeError:  # somebody has kept this forward, and the adapters are gone
            return type(self).forward(self, *args, **kwargs)
        run: Forward = super().forward if host.own_forward is None else host.own_forward
        before = computing.stack
        if before:
            # A forward that stands in the place of this one may call it: then the adapters are around that one.
            inside = running(host)
            if inside is not None:
                return self._forward_inside(super().forward if inside is not IN_REPLACED else run, *args, **kwargs)
        host.reached = True
        # The tree may have a trained bias in the place of the base's; whoever is selected shows it again.
        shown = host.displaced if host.displaced and host.shows_displaced else _NONE
        # Not by `reading_as`: a generator would be most of what this costs. And `(*before, ...)` takes twice as long.
        computing.stack = before + ((host, shown),)  # noqa: RUF005
        try:
            choice = host.selection.current()
            if choice.rows is not None or len(choice.names) != 1 or host.merged or host.shows or host.hooked:
                return self._forward_choice(run, host, choice, *args, **kwargs)
            # What nearly every call is, with nothing in between.
            layer = host.layers.get(choice.names[0])
            return (run if layer is None else layer.wrapped(run))(*args, **kwargs)
        finally:
            computing.stack = before

    def _forward_inside(self, run: Forward, *args: object, **kwargs: object) -> object:
        with reading_as(self.splice_host, _NONE):
            return run(*args, **kwargs)

    def forward_around(self, run: Forward, *args: object, **kwargs: object) -> object:
        """What the selected adapters give around `run`, in the place of the base's own forward."""
        self.splice_host.reached = True
        return self._forward_choice(run, self.splice_host, self.splice_host.selection.current(), *args, **kwargs)

    def _forward_choice(self, run: Forward, host: Host, choice: Choice, *args: object, **kwargs: object) -> object:
        if choice.rows is not None:
            return self._forward_rows(run, choice.rows, *args, **kwargs)
        # The order matters only where there are two: one name is not sorted.
        for name in choice.names if len(choice.names) < 2 else in_order(host.layers, choice.names):
            layer = host.layers.get(name)
            if layer is not None and name not in host.merged:
                run = self._outside(layer, run) if layer.shows or host.hooked else layer.wrapped(run)
        return run(*args, **kwargs)

    def _outside(self, layer: AdapterLayer, inner: Forward) -> Forward:
        run = layer.wrapped(self._showing(layer, inner) if layer.shows else inner)
        return called_through(layer, run) if self.splice_host.hooked else run

    def _showing(self, layer: AdapterLayer, inner: Forward) -> Forward:
        def run(*args: object, **kwargs: object) -> object:
            # To this thread alone, and the parameter stays untouched. Another one in `_parameters` would be seen by whoever
            # walks the tree meanwhile, and an entry in the object's own dict by calls in other threads.
            before = computing.stack
            computing.stack = (*before, (self.splice_host, layer.shown(self)))
            try:
                return inner(*args, **kwargs)
            finally:
                computing.stack = before

        return run

    def _forward_mixed(self, run: Forward, mixture: Mixture, *args: object, **kwargs: object) -> object:
        """Each token with what the adapters of a mixture add to it."""
        y = run(*args, **kwargs)
        if self.splice_host.path not in mixture.weights:
            return y
        if not args or not isinstance(args[0], torch.Tensor) or not isinstance(y, torch.Tensor):
            raise TypeError(
                f"{self.splice_host.place}: adapters can be weighed where one tensor is taken and one given"
            )
        return mixed(y, args[0], self.splice_host.layers, mixture, self.splice_host.path)

    def _forward_rows(self, run: Forward, rows: Rows | Mixture, *args: object, **kwargs: object) -> object:
        """Each row of the batch with its own adapter: the base once for all rows, every adapter for its own."""
        if isinstance(rows, Mixture):
            return self._forward_mixed(run, rows, *args, **kwargs)
        host = self.splice_host
        if rows.seats is not None and (rows.by_seats or torch.compiler.is_compiling()):
            return self._forward_seats(run, rows, *args, **kwargs)
        # Asked of one for all: methods whose rows cannot be taken one by one never share a place with other methods.
        one = _one_of(host, rows)
        if one is None:  # all have been taken off meanwhile
            return run(*args, **kwargs)
        together_only = one.wrapped_rows(host.layers, rows, run)
        if together_only is not None:
            return together_only(*args, **kwargs)
        x = args[0] if args else None
        if not isinstance(x, torch.Tensor):
            raise TypeError(_ONE_TENSOR.format(host.place))
        groups = _groups(host, rows, x)
        if len(groups) == 1 and len(groups[0].rows) == len(x):  # as if it were the active one
            alone = host.layers.get(groups[0].name)
            return (run if alone is None else self._outside(alone, run))(*args, **kwargs)
        plan = _plan(host, groups, x)
        y = run(entering(x, plan), *args[1:], **kwargs)
        if not isinstance(y, torch.Tensor):
            raise TypeError(_ONE_TENSOR.format(host.place))
        written = False
        if plan.steps or plan.kin_steps or plan.kin:
            y, written = y.clone(), True  # what the base gave may be its input, or kept for a backward
            leaving(y, plan)
            adding(y, x, plan)
        together, single = plan.split()
        if together.groups:
            # Of the class itself and not of its heirs: they may keep what they give, or give what they got.
            is_own = written or (host.original is nn.Linear and host.own_forward is None)
            y, written = _with_products(host, plan, together, x, y, is_own), True
        for layer, group in single:
            base_rows = taken(y, group)
            reuse = layer.keeps_input and not layer.shows
            # Otherwise the base is called again, for these rows: the adapter changes what goes into it.
            inner: Forward = (lambda _, kept=base_rows: kept) if reuse else run
            if not written:
                y, written = y.clone(), True
            shown = self._showing(layer, inner) if layer.shows else inner
            wrapped = layer.wrapped_for(shown, group.indices, len(x))
            wrapped = called_through(layer, wrapped) if host.hooked else wrapped
            more, named = _of_rows(host, group, x, args[1:], kwargs) if layer.shows else ((), {})
            put(y, group, wrapped(taken(x, group), *more, **named).to(y.dtype))
        return y

    def _forward_seats(self, run: Forward, rows: Rows, *args: object, **kwargs: object) -> object:
        """Each row with the adapter in its slot, whichever that is; all of them lie in slots where they are on this layer."""
        host = self.splice_host
        y = run(*args, **kwargs)
        if host.stack is None:
            return y
        x = args[0] if args else None
        if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
            raise TypeError(f"{host.place}: slots need layers that take one tensor and give one tensor")
        seats = rows.seats_of(x.shape[0], flat=x.dim() < 3)
        return add_by_seats(y, x, seats, host.stack)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Adapted:
        # What moves a module (`.to`, `.half()`) gives each parameter memory of its own; those in slots come back into one.
        stack = self.splice_host.stack
        inside = [] if stack is None else stack.inside()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if stack is not None:
            stack.follow(inside)
        return self

    def to(self, *args: Any, **kwargs: Any) -> Adapted:
        """As of any module; a hook that casts the weight for each call gets the base's tensors cast alone."""
        # It means the layer's own, and the adapters would be rounded to what the base is stored in.
        if is_called_from(sys._getframe(1), CASTS_FOR_A_CALL):
            bare_layer(self.splice_host).to(*args, **kwargs)
            return self
        return super().to(*args, **kwargs)

    @classmethod
    def members_for(cls, base: type[nn.Module]) -> dict[str, object]:
        # A function of its own for each class, since it carries the signature. One wrapper around a shared forward would
        # cost a call more. The forward has the signature of the base's own: much code decides by it what it may pass.
        own = Adapted.forward
        forward = FunctionType(own.__code__, own.__globals__, own.__name__, own.__defaults__, own.__closure__)
        forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
        return {"forward": forward, **state_members(base)}

    def _load_from_state_dict(
        self, state_dict: dict[str, object], prefix: str, local_metadata: object, strict: bool, *lists: list[str]
    ) -> None:
        # The reference's spelling of the base's own tensors is understood too (`base_layer.weight`).
        check_spellings(self, state_dict, prefix)
        for key in [key for key in state_dict if key.startswith(prefix)]:
            own = plain_name(self.splice_host, key[len(prefix) :])
            if own:
                state_dict.setdefault(prefix + own, state_dict.pop(key))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def __setattr__(self, name: str, value: object) -> None:
        if name in BASE_NAMES and HOST in self.__dict__ and name not in dict(bare_children(self)):
            replace_base(self, value, name, Adapted)
        elif name == "forward":
            self.__dict__[name] = around_replaced(self, host_of(self), value)
        else:
            super().__setattr__(name, value)  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # In another process the class has just been made.
        publish_tensors(type(self), self, self.splice_host.original)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), f"adapters={list(self.splice_host.layers)}")))


def _one_of(host: Host, rows: Rows) -> AdapterLayer | None:
    """An adapter layer that the rows use here; any one, where they use none, and None where there is none."""
    for name in rows.names:
        layer = host.layers.get(name)
        if layer is not None:
            return layer
    # Copied first: other threads may put adapters on and take them off.
    return next(iter(list(host.layers.values())), None)


def _groups(host: Host, rows: Rows, x: torch.Tensor) -> Groups:
    """Which rows of the input each adapter of a mixed batch has.

    Raises:
        ValueError: it has another number of rows, or tokens in an order that nobody knows.
    """
    if gets_sorted_tokens(host.path, host.original.__name__) and rows.alike:
        return rows.whole(x.shape[0], x.device)
    # Token ids may stand in a row, and vectors in two dimensions: the batch was flattened, or has one token for each row.
    flat = x.dim() < (3 if x.is_floating_point() else 2)
    try:
        return rows.groups(x.shape[0], x.device, flat)
    except ValueError as error:
        raise ValueError(f"{host.path}: {error}") from None


def _plan(host: Host, groups: Groups, x: torch.Tensor) -> RowPlan:
    """How these groups are computed: as the last time, if they are the same and the same adapters are there."""
    # A compiled graph has worked it out once for all; it would be made again for whatever was computed before its call.
    compiling = torch.compiler.is_compiling()
    plan = None if compiling else host.row_plan
    holds = plan is not None and plan.holds(groups, host.layers, host.hooked)
    if plan is not None and holds and (plan.as_one is None or plan.as_one is _are_short(x)):
        return plan
    plan = RowPlan(groups, host.layers, host.hooked, _are_short(x))
    if not compiling:
        host.row_plan = plan
    return plan


def _are_short(x: torch.Tensor) -> bool:
    """Whether rows are so short that what is done for each adapter costs more than their numbers, and than to copy these."""
    return x.numel() < 8 * len(x) * (x.shape[-1] if x.is_floating_point() else 1)


def _with_products(
    host: Host, plan: RowPlan, parts: Parts, x: torch.Tensor, y: torch.Tensor, is_own: bool
) -> torch.Tensor:
    """`y` with these updates of a plan added, and with what comes after them; it may be changed where it `is_own`."""
    # With gradients each parameter is used itself: a backward would not notice that its place got other values since. So it
    # is in a graph that is compiled for these names: addresses, by which places are known, are none there. Nor are they where
    # `torch.func` maps a call over parameters.
    looks = not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not _maps_functions()
    bundles = plan.bundles(parts, host.stack) if looks else None
    finishes = plan.finishes(parts)
    if not finishes:
        return add_products(y, x, parts, is_own, bundles, plan.groups.ways)
    # The sum is not rounded before it is finished.
    out = add_products(
        y.to(torch.promote_types(y.dtype, parts.a[0].dtype)), x, parts, is_own, bundles, plan.groups.ways
    )
    for finish in finishes:
        out = finish(out)
    return out.to(y.dtype)


def _of_rows(
    host: Host, group: Group, x: torch.Tensor, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[list[object], dict[str, object]]:
    """Further arguments of a module, as stacked experts have them, for these rows alone.

    Raises:
        ValueError: one of them does not have the rows of the first.
    """

    def taken(value: object) -> object:
        if not isinstance(value, torch.Tensor) or not value.dim():
            return value
        if value.shape[0] != x.shape[0]:
            raise ValueError(
                f"{host.path}: `adapter_names` cannot be followed here: it is called with tensors of {x.shape[0]} and of "
                f"{value.shape[0]} rows. Call the model once for each adapter."
            )
        return value[group.indices]

    return [taken(value) for value in args], {name: taken(value) for name, value in kwargs.items()}


def is_whole(layer: Adapted) -> bool:
    """Whether the layer carries only copies of itself, or biases, and no method's own tensors."""
    # By names and not by classes: the reference writes `base_layer` into those below a layer of a method, and into no other.
    return all(adapter.names.base != "base_layer." for adapter in layer.splice_host.layers.values())
