"""Which adapters can stand together on one model."""

from __future__ import annotations

from splice.config import PeftConfig
from splice.kinds.registry import method_of
from splice.surgery.tuner import Tuner


def check_mixed(config: PeftConfig) -> None:
    """Raise where an adapter with this config cannot stand beside those of other methods.

    Raises:
        ValueError: it is no adapter of layers.
    """
    method = method_of(config)
    if method.network_layer is not None:
        raise ValueError(
            f"{method.name.value} acts on the call of the whole network, and cannot be mixed with adapters of other methods."
        )


def check_together(tuner: Tuner, config: PeftConfig) -> None:
    """Raise where an adapter with this config cannot stand beside those that are there.

    Raises:
        ValueError: another method, a second adapter that trains biases of the base, or what the method's own rule refuses.
    """
    # Of configs and not of layers: a load asks before there is a plan, and the answer is the same for every layer.
    new = config.trained_biases()
    if tuner.mixes_methods:
        check_mixed(config)
    beside = method_of(config).experts
    for name, other in tuner.peft_config.items():
        if other.peft_type != config.peft_type:  # asked first: of a thousand adapters hardly any is of another method
            stands_on = method_of(other).experts
            if (beside is not None and other.peft_type == beside.of) or (
                stands_on is not None and config.peft_type == stands_on.of
            ):
                continue
            # Without a PeftModel around the network, each adapter was put on it by somebody who knows of the others.
            if not tuner.mixes_methods and not tuner.stands_alone:
                raise ValueError(
                    f"Cannot combine adapters with different peft types: {name!r} is {other.peft_type} and the new one is "
                    f"{config.peft_type}."
                )
        if new != "none" and other.trained_biases() != "none":
            raise ValueError(
                f"A model supports only 1 adapter with bias: {name!r} has bias={other.trained_biases()!r} and the new "
                f"one {new!r}. When using multiple adapters, set bias to 'none' for all adapters but one."
            )
    own_rule = method_of(config).check_beside
    if own_rule is not None:
        own_rule(config, {name: c for name, c in tuner.peft_config.items() if c.peft_type == config.peft_type})
