"""The fields by which a config selects layers: what they mean, said once for all methods that have them."""

from __future__ import annotations

from typing import ClassVar

from splice.config import PeftConfig, TargetRule


class Targeted(PeftConfig):
    """A config whose adapter is put on layers that it selects.

    A method declares the fields it has, in the reference's order; what they mean is said in `TargetRule`. Those that it
    lacks have the values below.

    Raises:
        ValueError: fields contradict each other.
    """

    # No dataclass, and these are no fields: those of a parent come before all others, and the order of the constructor's
    # arguments is the reference's, a different one in each method. So they stand here as the type and the value that a
    # config has which was given no such field.

    # Layers to adapt.
    target_modules: list[str] | set[str] | str | None = None
    # Those of them to leave out.
    exclude_modules: list[str] | set[str] | str | None = None
    # Indices of the blocks whose layers are adapted.
    layers_to_transform: list[int] | int | None = None
    # The lists of blocks that these count in.
    layers_pattern: list[str] | str | None = None
    # Modules to train whole.
    modules_to_save: list[str] | None = None
    # Parameters to adapt without their layers.
    target_parameters: list[str] | None = None
    # Which biases of the base are trained with the adapter: "none", "all", or "<method>_only" for those of its targets.
    bias: str = "none"

    # Whether a regular expression as `target_modules` excludes choosing layers by index; otherwise the index is ignored.
    index_needs_names: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        # Sets, as in the reference: code that reads a config back compares them, and their order says nothing.
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.target_modules, str) and self.index_needs_names:
            for name, value in (
                ("layers_to_transform", self.layers_to_transform),
                ("layers_pattern", self.layers_pattern),
            ):
                if value is not None:
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    def target_rule(self) -> TargetRule:
        rule = TargetRule(
            self.target_modules,
            self.exclude_modules,
            self.layers_to_transform,
            self.layers_pattern,
            self.modules_to_save,
            self.target_parameters,
        )
        by_pattern = isinstance(rule.target_modules, str)
        return rule._replace(layers_to_transform=None, layers_pattern=None) if by_pattern else rule

    def trained_biases(self) -> str:
        return self.bias


def check_positive(**values: object) -> None:
    """Raise for the first value that is not a positive whole number.

    Raises:
        ValueError: with the name of the field.
    """
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"`{name}` should be a positive integer value but the value passed is {value!r}")
