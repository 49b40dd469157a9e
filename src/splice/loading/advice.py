"""What probably went wrong when a checkpoint does not fit, worked out from the plan: advice for the error."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Mapping

from torch import nn

from splice.checkpoint.foreign import foreign_names
from splice.checkpoint.header import Entry
from splice.checkpoint.keys import PREFIX, Key, parse_key
from splice.checkpoint.types import TaskType
from splice.config import PeftConfig
from splice.errors import counted
from splice.kinds.registry import Method, all_methods
from splice.loading.config_fields import field_value
from splice.loading.plan import Fitted, Mismatch, Plan
from splice.loading.published.vocabulary import resize_of

# What models of transformers call the head of a task, at the top of the tree.
_HEADS = ("score", "classifier", "qa_outputs", "lm_head")


def advice(
    found: Fitted, method: Method, adapter_name: str, network: nn.Module, modules: Mapping[str, nn.Module]
) -> list[str]:
    """Sentences, the most likely cause first.

    Args:
        found: what does not fit.
        method: the adapter's.
        adapter_name: what it was to be called here.
        network: the base model.
        modules: all modules of the network, by path.
    """
    plan, entries, config, paths = found.plan, found.checkpoint.entries, found.config, modules.keys()
    foreign = foreign_names(entries)
    if foreign:  # that explains all the rest, and further advice would lead away from it
        return [foreign]
    resize = resize_of(plan, entries, network, modules)
    causes = [
        _empty(entries),
        _zero_sized(entries),
        _outdated(plan, method),
        _other_method(plan, method),
        _other_prefix(plan, method, paths),
        _adapter_name_inside(plan, adapter_name),
        # A resized embedding in the file is named like a weight of the base as well, and the resize says more.
        None if resize is None else str(resize),
        _base_weights(plan, paths) if resize is None else None,
        _other_rank(plan, config),
        _other_task_class(plan, config),
        _nearest_module(plan, method, paths),
        _wrong_dtype(plan),
    ]
    return [sentence for sentence in causes if sentence]


def _empty(entries: Mapping[str, Entry]) -> str | None:
    return (
        None if entries else "the file holds no tensors at all; the save that wrote it was given an empty state dict."
    )


def _zero_sized(entries: Mapping[str, Entry]) -> str | None:
    empty = [name for name, entry in entries.items() if 0 in entry.shape]
    if not empty:
        return None
    return (
        f"{counted(len(empty), 'tensor has', 'tensors have')} no elements ({empty[0]}): the adapter was saved under "
        "DeepSpeed ZeRO-3 or FSDP without gathering the parameters first. Save it again from a gathered state dict."
    )


def outdated(plan: Plan, method: Method) -> dict[str, str]:
    """Tensors that only earlier versions wrote, and what to do about them: they mean something else today."""
    # By whole components: `lora_A` is part of other methods' names too.
    known = method.outdated_names
    parts = {name: next((part for part in name.split(".") if part in known), None) for name in plan.unexpected}
    return {name: known[part] for name, part in parts.items() if part is not None}


def _outdated(plan: Plan, method: Method) -> str | None:
    found = outdated(plan, method)
    return f"the tensors are of an earlier kind: {next(iter(found.values()))}" if found else None


def _other_method(plan: Plan, method: Method) -> str | None:
    if plan.sources:
        return None
    found = [
        other for other in all_methods().values() if other is not method and _holds(plan.unexpected, other, method)
    ]
    if not found:
        return None
    shown = " or ".join(other.name.value for other in found)
    return (
        f"the tensors are those of {shown} and the config says {method.name.value}: the two files belong to different "
        "adapters."
    )


def _holds(names: Collection[str], other: Method, method: Method) -> bool:
    """Whether tensors of `other`, that `method` has none of, are among `names`."""
    own = other.tensor_names - method.tensor_names
    if not other.on_layers:
        return any(name in own for name in names)
    return any(parse_key(name, own) for name in names)


def _other_prefix(plan: Plan, method: Method, paths: Collection[str]) -> str | None:
    """The names fit once something is added to, or taken from, the front of every path."""
    missing = {key[len(PREFIX) :] for key in plan.missing}
    if not missing or not plan.unexpected:
        return None
    fronts: Counter[tuple[str, str]] = Counter()
    # By their last four components: that tells kinds of layer apart, and leaves the front open.
    by_tail: dict[str, list[str]] = {}
    for key in missing:
        by_tail.setdefault(".".join(key.split(".")[-4:]), []).append(key)
    for name in plan.unexpected:
        for key in by_tail.get(".".join(name.split(".")[-4:]), ()):
            had, needs = _fronts(name, PREFIX + key)
            fronts[had, needs] += 1
    if not fronts:
        return None
    (had, needs), count = fronts.most_common(1)[0]
    if count < len(plan.unexpected) / 2:  # a coincidence
        return None
    if PREFIX.startswith(needs[: len(PREFIX)]) and needs.startswith(had) and not had:
        lack = counted(count, "name lacks", "names lack")
        return f"{lack} the prefix {needs!r}. They were written by another tool: put {needs!r} before each name."
    return (
        f"{counted(count, 'name begins', 'names begin')} with {had!r} where this model has {needs!r}: the base "
        f"model was renamed or wrapped since. Pass key_mapping={{{_regex(had)!r}: {_replacement(needs)!r}}}."
    )


def _fronts(name: str, key: str) -> tuple[str, str]:
    """What stands in front of the longest common tail of the two, from a dot on."""
    a, b = name.split("."), key.split(".")
    while a and b and a[-1] == b[-1]:
        a.pop()
        b.pop()
    return "".join(part + "." for part in a), "".join(part + "." for part in b)


def _regex(front: str) -> str:
    return "^" + front.removeprefix(PREFIX).replace(".", r"\.")


def _replacement(front: str) -> str:
    return front.removeprefix(PREFIX)


def _adapter_name_inside(plan: Plan, adapter_name: str) -> str | None:
    for name in plan.unexpected:
        parts = name.split(".")
        for candidate in dict.fromkeys((adapter_name, "default")):
            without = ".".join(part for i, part in enumerate(parts) if not (part == candidate and i >= len(parts) - 2))
            if without in plan.missing:
                return (
                    f"the names still carry the adapter name {candidate!r} ({name}), as in a raw state dict. "
                    f"Remove it ({without}), or save with `save_pretrained`."
                )
    return None


def _base_weights(plan: Plan, paths: Collection[str]) -> str | None:
    for name in plan.unexpected:
        path, _, leaf = name.removeprefix(PREFIX).rpartition(".")
        if path in paths and leaf in ("weight", "bias"):
            return (
                f"{name} is named like a weight of the base model, which loading an adapter never overwrites. If it was "
                f"trained, list {path!r} in `modules_to_save` of the config."
            )
    return None


def _other_rank(plan: Plan, config: PeftConfig) -> str | None:
    """Every tensor that does not fit has the same other number where the config's rank should be."""
    pairs = {_differing_size(wrong) for wrong in plan.mismatched}
    if len(pairs) != 1 or None in pairs:
        return None
    ((found, needed),) = filter(None, pairs)
    if needed not in _ranks(config):
        return None
    return (
        f"the tensors have rank {found} and the config says {needed}. If the tensors are right, set r (or rank_pattern) "
        f"to {found} in the config; the scale alpha / r changes with it."
    )


def _ranks(config: PeftConfig) -> set[object]:
    """The ranks that a config gives its layers; none where its method has no ranks, or one for each layer alone."""
    field = config.pattern_fields.get("rank_pattern")
    if field is None:
        return set()
    pattern = field_value(config, "rank_pattern")
    return {field_value(config, field), *(pattern.values() if isinstance(pattern, Mapping) else ())}


def _differing_size(wrong: Mismatch) -> tuple[int, int] | None:
    """The size that the tensor has, and the one that it should have, in the one dimension in which they differ."""
    found, needed = _sizes(wrong.found), _sizes(wrong.needed)
    differing = [pair for pair in zip(found, needed) if pair[0] != pair[1]]
    return differing[0] if len(found) == len(needed) and len(differing) == 1 else None


def _sizes(text: str) -> list[int]:
    return [int(n) for n in text.strip("()").split(",") if n.strip().isdigit()]


def _other_task_class(plan: Plan, config: PeftConfig) -> str | None:
    heads = {key.removeprefix(PREFIX).partition(".")[0] for key in (*plan.missing, *plan.unexpected)} & set(_HEADS)
    shapes = {wrong.key.removeprefix(PREFIX).partition(".")[0] for wrong in plan.mismatched} & set(_HEADS)
    if shapes:
        return f"the head {sorted(shapes)[0]!r} has another size: load the base with the number of labels it was trained for."
    if not heads:
        return None
    task = config.task_type.value if isinstance(config.task_type, TaskType) else config.task_type
    return f"the head {sorted(heads)[0]!r} differs: the adapter was trained for {task}; load the base with that task's class."


def _nearest_module(plan: Plan, method: Method, paths: Collection[str]) -> str | None:
    for name in plan.unexpected:
        key: Key | None = parse_key(name, method.tensor_names)
        if key is not None and key.path not in paths:
            near = difflib.get_close_matches(key.path, paths, n=1)
            if near:
                return f"there is no module {key.path!r}; the nearest is {near[0]!r}."
        elif key is not None:
            return f"{key.path!r} exists, but the config's target_modules do not select it."
    return None


def _wrong_dtype(plan: Plan) -> str | None:
    dtypes = {wrong.found for wrong in plan.mismatched if wrong.found.startswith("dtype")}
    if not dtypes:
        return None
    return f"the tensors are stored as {', '.join(sorted(dtypes))}, as quantised or miscast weights are; adapters are floats."
