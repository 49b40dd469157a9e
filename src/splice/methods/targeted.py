"""The fields by which a config selects layers: what they mean, said once for all methods that have them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from splice.config import PeftConfig, TargetRule


@dataclass
class TargetedConfig(PeftConfig):
    """A config whose adapter is put on layers that it selects.

    A method declares the fields it has, in the reference's order: those of `TargetRule`, and `bias` where it can train
    biases of the base. What they mean is here.

    Raises:
        ValueError: fields contradict each other.
    """

    # Whether a regular expression as `target_modules` excludes choosing layers by index; otherwise the index is ignored.
    index_needs_names: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        fields = vars(self)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(fields.get(name), list):
                setattr(self, name, set(fields[name]))
        if isinstance(fields.get("target_modules"), str) and self.index_needs_names:
            for name in ("layers_to_transform", "layers_pattern"):
                if fields.get(name) is not None:
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if fields.get("layers_pattern") and fields.get("layers_to_transform") is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    def target_rule(self) -> TargetRule:
        names = {f.name for f in dataclasses.fields(TargetRule)} & vars(self).keys()
        rule = TargetRule(**{name: vars(self)[name] for name in names})
        by_pattern = isinstance(rule.target_modules, str)
        return dataclasses.replace(rule, layers_to_transform=None, layers_pattern=None) if by_pattern else rule

    def trained_biases(self) -> str:
        return str(vars(self).get("bias", "none"))


def check_positive(**values: object) -> None:
    """Raise for the first value that is not a positive whole number.

    Raises:
        ValueError: with the name of the field.
    """
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"`{name}` should be a positive integer value but the value passed is {value!r}")
