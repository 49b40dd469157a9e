"""Classes that are made at run time: a mixin in front of a layer's own class, made once for each pair of the two.

They stand in no module, so pickle cannot find them by name. Each carries the recipe by which it is made again.
"""

from __future__ import annotations

from typing import ClassVar, SupportsIndex, TypeAlias

from torch import nn

from splice.base.bare import empty_instance
from splice.base.foreign_models import records_as

# The class of the layer as it was, and what was put in front of it, one after the other.
Recipe: TypeAlias = "tuple[type[nn.Module], tuple[type[Generated], ...]]"

# Made once, and never forgotten: as many as there are classes of adapted layers. A second class for the same pair would
# differ from the first for `isinstance`, for pickle and for the caches of torch.compile.
_made: dict[tuple[type[Generated], type[nn.Module]], type[nn.Module]] = {}


class Generated:
    """The root of what is put in front of a layer's class."""

    splice_recipe: ClassVar[Recipe]

    @classmethod
    def members_for(cls, base: type[nn.Module]) -> dict[str, object]:
        """What the generated class has of its own, in front of `base`."""
        return {}

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        # Also the way that `copy` and `deepcopy` take.
        return _made_again, type(self).splice_recipe, self.__dict__


def generated(mixin: type[Generated], base: type[nn.Module]) -> type[nn.Module]:
    """The class with `mixin` in front of `base`."""
    found = _made.get((mixin, base))
    if found is None:
        # A recipe is flat, since the class below may be generated itself.
        original, mixins = base.splice_recipe if issubclass(base, Generated) else (base, ())
        members = {
            "__module__": base.__module__,
            "splice_recipe": (original, (*mixins, mixin)),
            **mixin.members_for(base),
        }
        found = _made[mixin, base] = type(f"Adapted{original.__name__}", (mixin, base), members)
        records_as(found, original)
    return found


def was_generated(cls: type[nn.Module]) -> bool:
    """Whether `cls` is one of these classes itself, and not one that somebody derived from it."""
    return any(cls is made for made in _made.values())


def _made_again(original: type[nn.Module], mixins: tuple[type[Generated], ...]) -> nn.Module:
    """An empty instance, for pickle and `copy` to fill."""
    cls = original
    for mixin in mixins:
        cls = generated(mixin, cls)
    return empty_instance(cls)
