"""How the rows of a mixed batch are computed on one layer: worked out once, and kept while the same adapters are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from splice.kinds.as_one import Alike, Step, find_kin
from splice.kinds.bundles import Bundles
from splice.kinds.finishing import Finish, Finishing, find_finishes
from splice.kinds.layer import AdapterLayer
from splice.kinds.scale import Rescaled
from splice.kinds.stack import Stack
from splice.selection import Group, Groups


class Parts(NamedTuple):
    """Updates that are plain products, and the rows that they are for: in each list one entry for an adapter."""

    # The factors A (r, in).
    a: Sequence[torch.Tensor]
    # The factors B (out, r).
    b: Sequence[torch.Tensor]
    # What the products `B A x` are multiplied with.
    scales: Sequence[float]
    # The rows.
    groups: Sequence[Group]

    def some(self, numbers: Sequence[int]) -> Parts:
        """Those that have these numbers, counted from 0."""
        a, b, scales, groups = self
        return Parts(
            [a[n] for n in numbers], [b[n] for n in numbers], [scales[n] for n in numbers], [groups[n] for n in numbers]
        )


_NO_PARTS = Parts((), (), (), ())


class RowPlan:
    """Which rows of a batch are computed in which way on one layer. No copy or pickle of a layer has it."""

    def __init__(self, groups: Groups, layers: Mapping[str, AdapterLayer], one_by_one: bool, as_one: bool) -> None:
        """For these groups.

        Args:
            groups: of the batch, without rows of the base.
            layers: the adapter layers that are there now, by adapter name.
            one_by_one: whether each has to be computed by itself.
            as_one: whether those that are alike are to be computed as one, where they can be.
        """
        # What it was made for.
        self.groups, self.one_by_one = groups, one_by_one
        self.names = [group.name for group in groups]
        self.layers = tuple(map(layers.get, self.names))
        # The same; None where there are no two that could be alike.
        self.as_one = as_one if sum(isinstance(layer, Alike) for layer in self.layers) > 1 else None
        there = [(layer, group) for layer, group in zip(self.layers, groups) if layer is not None]
        # Those that only change what goes into the base layer, or what comes out; and all others.
        steps = [] if one_by_one else [step for step in there if _has_two_steps(step[0])]
        others = there if one_by_one else [step for step in there if not _has_two_steps(step[0])]
        # Of the steps: those that can be computed as one.
        self.kin_steps, self.steps = find_kin(steps) if as_one else ([], steps)
        # Of the others: those that are no product, and those that are one as long as they tell a scale.
        single = [step for step in others if one_by_one or not _is_product(step[0])]
        # Of these again, those that can be computed as one.
        self.kin, self.single = find_kin(single) if as_one and not one_by_one else ([], single)
        self.products = [] if one_by_one else [step for step in others if _is_product(step[0])]
        # Where the factors are registered. They are looked up at each call: anybody may exchange them at any time.
        found = [[layer.registered[suffix] for suffix in _names_of(layer)] for layer, _ in self.products]
        self._places_a = [(a.registry, a.name) for a, _ in found]
        self._places_b = [(b.registry, b.name) for _, b in found]
        self._groups_of_products = [group for _, group in self.products]
        # Of the last call: the scales, behind the last change of any before them; None where they have to be asked again.
        self._known_scales: tuple[object, list[float | None]] = (None, [])
        self._bundles: Bundles | None = None
        # What comes after the products of the groups with these ids; None where nothing does.
        finishing = any(isinstance(layer, Finishing) for layer, _ in self.products)
        self._finishes: tuple[list[int], list[Finish]] | None = ([], []) if finishing else None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def holds(self, groups: Groups, layers: Mapping[str, AdapterLayer], one_by_one: bool) -> bool:
        """Whether it is for these groups, and their adapters have the layers that they had; arguments as above."""
        known = self.groups is groups and self.one_by_one is one_by_one
        return known and tuple(map(layers.get, self.names)) == self.layers

    def split(self) -> tuple[Parts, Sequence[Step]]:
        """Of the others: those that can be worked out together now, and those that go one by one."""
        if not self.products:
            return _NO_PARTS, self.single
        # A list at a time: what is done for each adapter is most of what a mixed batch costs beside its kernels.
        scales = self._scales()
        a = [registry[name] for registry, name in self._places_a]
        b = [registry[name] for registry, name in self._places_b]
        parts = Parts(a, b, [0.0 if s is None else s for s in scales], self._groups_of_products)
        if None not in scales:
            return parts, self.single
        now = [n for n, scale in enumerate(scales) if scale is not None]
        return parts.some(now), [*self.single, *(step for step, scale in zip(self.products, scales) if scale is None)]

    def _scales(self) -> list[float | None]:
        # A compiled graph is made of what is there: that somebody sets some scale is no reason to make it again.
        if torch.compiler.is_compiling():
            return [layer.product_scale() for layer, _ in self.products]
        last = Rescaled.last
        known, scales = self._known_scales
        # In training features may be dropped, and the probability is anybody's to set.
        if known is not last or self.products[0][0].training:
            scales = [layer.product_scale() for layer, _ in self.products]
            self._known_scales = None if None in scales else last, scales
        return scales

    def finishes(self, parts: Parts) -> list[Finish]:
        """What comes after the products of these parts of `split`."""
        if self._finishes is None:
            return []
        known, found = self._finishes
        ids = [*map(id, parts.groups)]
        if known != ids:
            layers = {group.name: layer for layer, group in self.products}
            found = find_finishes([layers[group.name] for group in parts.groups], parts.groups)
            self._finishes = ids, found
        return found

    def bundles(self, parts: Parts, stack: Stack | None) -> Bundles:
        """Which of these parts lie at equal distances now, some of them in a stack."""
        known = self._bundles
        if known is None or not known.hold(parts.a, parts.b, stack):
            known = self._bundles = Bundles(parts.a, parts.b, stack)
        return known


def _has_two_steps(layer: AdapterLayer) -> bool:
    return layer.two_steps and not layer.shows


def _names_of(layer: AdapterLayer) -> tuple[str, ...]:
    """Suffixes of the factors, where it is a product, and perhaps more; empty where it is none."""
    if isinstance(layer, Finishing):
        return layer.product_names
    return layer.stacked_names if set(layer.registered) == set(layer.stacked_names) else ()


def _is_product(layer: AdapterLayer) -> bool:
    return bool(_names_of(layer))
