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
    # By method, and of all adapters only where the new one asks for it: there may be thousands.
    for peft_type in tuner.methods:
        if peft_type == config.peft_type:
            continue
        name = next(iter(tuner.of_method(peft_type)))
        stands_on = method_of(tuner.peft_config[name]).experts
        if (beside is not None and peft_type == beside.of) or (
            stands_on is not None and config.peft_type == stands_on.of
        ):
            continue
        # Without a PeftModel around the network, each adapter was put on it by somebody who knows of the others.
        if not tuner.mixes_methods and not tuner.stands_alone:
            raise ValueError(
                f"Cannot combine adapters with different peft types: {name!r} is {peft_type} and the new one is "
                f"{config.peft_type}."
            )
    for name, other in tuner.peft_config.items() if new != "none" else ():
        if other.trained_biases() != "none":
            raise ValueError(
                f"A model supports only 1 adapter with bias: {name!r} has bias={other.trained_biases()!r} and the new "
                f"one {new!r}. When using multiple adapters, set bias to 'none' for all adapters but one."
            )
    method = method_of(config)
    if method.check_beside is not None:
        named = tuner.of_method(method.name)
        others = named if method.check_beside.concerns(config) else [name for name in tuner.ruling if name in named]
        method.check_beside.check(config, {name: tuner.peft_config[name] for name in others})
