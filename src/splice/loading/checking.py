"""What is looked at between the plan and the first change: whether it fits, and tensors that must be equal."""

from __future__ import annotations

from torch import nn

from splice.base.bare import walk_bare
from splice.checkpoint.tensors import Weights
from splice.errors import AdapterMismatchError, PeftWarning, warn
from splice.kinds.registry import Method
from splice.loading.advice import advice, outdated
from splice.loading.base_weight import base_weight, says_the_same
from splice.loading.options import LoadOptions
from splice.loading.other_base import both_bases, other_architecture
from splice.loading.plan import Fitted, Plan
from splice.loading.report import grouped, mismatch_error


def refuse_or_warn(found: Fitted, network: nn.Module, method: Method, options: LoadOptions) -> Plan:
    """The plan to be followed: `found.plan`, without the tensors of other shapes that the caller chose to leave out.

    Where it does not fit and the caller waived strictness, it is followed all the same, with a warning.

    Raises:
        AdapterMismatchError: something is missing, unexpected or of another shape.
    """
    plan = found.plan
    if plan.mismatched and options.ignores_sizes:
        # What a checkpoint only repeats is missing nowhere.
        known = {key for key, _ in plan.slots()}
        left_out = tuple(wrong.key for wrong in plan.mismatched if wrong.key in known)
        shown = [f"{w.key}: {w.found} in the checkpoint, {w.needed} in the model" for w in plan.mismatched]
        warn("Some weights were ignored because their sizes differ:\n" + "\n".join(shown), PeftWarning)
        # Then the one warning has said everything, and a second one about the same keys would only confuse.
        said_all = not plan.missing and not plan.unexpected
        plan = plan._replace(missing=plan.missing + left_out, mismatched=())
        if said_all:
            return plan
    if plan.fits:
        return plan
    # Outdated tensors mean something else today: leaving them out in silence is never what was meant.
    if options.strict or plan.mismatched or outdated(plan, method):
        weights = found.checkpoint.weights
        likely = advice(found._replace(plan=plan), method, options.adapter_name, network, walk_bare(network))
        bases = both_bases(found.config, network) + other_architecture(weights, network)
        raise mismatch_error(plan, weights.place, bases, [*found.hints, *likely])
    for what, keys in (("missing adapter keys", plan.missing), ("unexpected keys", plan.unexpected)):
        if keys:
            warn(f"Found {what} while loading the checkpoint: {grouped(keys)}.", PeftWarning)
    return plan


def check_base_copies(found: Fitted, weights: Weights) -> None:
    """Weights of the base that a checkpoint repeats must be those of this base: a load never changes the base.

    Raises:
        AdapterMismatchError: they differ.
    """
    names = found.checkpoint.names
    for key, layer in found.plan.base_copies.items():
        weight = base_weight(layer)
        # On the meta device there is nothing to compare with.
        if key not in names or weight is None or weight.is_meta:
            continue
        # Of another shape: the caller chose to leave it out, as otherwise the load would have been refused by now.
        if found.checkpoint.weights.entries[names[key]].shape != tuple(weight.shape):
            continue
        # One after the other: embeddings are large, and each is thrown away once it has been compared.
        (stored,) = weights.read([names[key]])
        if not says_the_same(stored, weight):
            raise AdapterMismatchError(
                f"the checkpoint at {weights.place} holds weights of its base model ({key}), and they differ "
                "from those of the given model: the base was trained too, or it is another one. The model is unchanged. "
                "Load them into the base model yourself, then load the adapter.",
                mismatched=[key],
            )


def check_repeated(found: Fitted, weights: Weights) -> None:
    """Tensors that layers share may stand in a checkpoint more than once, and must be the same each time.

    Raises:
        AdapterMismatchError: they differ.
    """
    names, sources = found.checkpoint.names, found.plan.sources
    repeating: dict[str, list[tuple[str, bool]]] = {}
    for key, of in found.plan.repeated.items():
        if key in names and of.key in sources and names[key] != sources[of.key]:
            repeating.setdefault(of.key, []).append((key, of.transposed))
    for leader, keys in repeating.items():
        (own,) = weights.read([sources[leader]])
        for key, transposed in keys:
            wanted = own.T if transposed else own
            # Equal to the last bit: when they were saved they were one tensor. Of another shape: the caller chose to leave
            # it out.
            if weights.entries[names[key]].shape == wanted.shape and not weights.says(names[key], wanted):
                raise _differing(key, leader, weights.place)


def _differing(key: str, leader: str, place: str) -> AdapterMismatchError:
    return AdapterMismatchError(
        f"the checkpoint at {place} has different tensors for {key} and {leader}, and the layers share them here. The model "
        "is unchanged. If they share them because they are tied, set `ensure_weight_tying` to False in the config, or load "
        "the adapter onto a base that is not tied; otherwise the checkpoint was changed by hand.",
        mismatched=[key],
    )
