"""An adapter whose layers are under other paths: its keys, and a config that says the same of them there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import cast

from splice.checkpoint.dialects import Part
from splice.checkpoint.keys import PREFIX, format_key, parse_key
from splice.config import PeftConfig, TargetRule, read_config
from splice.errors import PeftError
from splice.kinds.matching import TargetMatcher, value_for
from splice.kinds.registry import Method, method_of
from splice.loading.config_fields import field_names, field_value


def renamed_part(part: Part, rename: Mapping[str, str], place: str) -> Part:
    """The adapter after `rename`: regular expression -> replacement, each applied to the path of every module, in turn.

    Args:
        part: the adapter.
        rename: the expressions.
        place: where the adapter is, for messages.

    Raises:
        PeftError: an expression is none, is found in no path, or makes two paths one; or the config names modules in a way
            that cannot be renamed.
    """
    config = read_config(json.dumps(part.fields).encode(), place).config
    method = method_of(config)
    expressions = [(_compiled(old), new) for old, new in rename.items()]
    unused = {expression.pattern for expression, _ in expressions}
    tensors, moves, keys = {}, {}, dict[str, str]()
    for key, tensor in part.tensors.items():
        path, suffix = _split(key, method)
        moved = path
        for expression, new in expressions:
            before = moved
            try:
                moved, count = expression.subn(new, before)
            except (re.error, IndexError) as error:
                raise PeftError(f"{new!r} cannot stand for {expression.pattern!r}: {error}") from error
            if count:
                unused.discard(expression.pattern)
        new_key = _joined(key, moved, suffix)
        if new_key in keys:
            raise PeftError(f"{place}: {keys[new_key]!r} and {key!r} would have the same name {new_key!r}")
        keys[new_key] = key
        tensors[new_key] = tensor
        if suffix:
            moves[path] = moved
    if unused:
        some = ", ".join(sorted(moves)[:3])
        raise PeftError(f"{place}: {min(unused)!r} is found in no path of a module; there are {some}")
    return Part(part.component, {**part.fields, **_changes(config, method, moves)}, tensors)


def _compiled(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise PeftError(f"{text!r} is no regular expression: {error}") from error


def _split(key: str, method: Method) -> tuple[str, str]:
    """The path of the module and what stands behind it; of a tensor that belongs to no module ("", "")."""
    parsed = parse_key(key, method.tensor_names)
    if parsed is not None:
        return parsed.path, parsed.suffix
    if not key.startswith(PREFIX):
        return "", ""
    path, _, name = key[len(PREFIX) :].rpartition(".")
    return path, name


def _joined(key: str, path: str, suffix: str) -> str:
    return format_key(path, suffix) if suffix else key


def _changes(config: PeftConfig, method: Method, moves: Mapping[str, str]) -> dict[str, object]:
    """Fields of the config that name modules, in words of the paths as they are now; none where they still say the same."""
    for name in ("target_parameters", "trainable_token_indices"):
        if field_value(config, name):
            raise PeftError(f"`rename` does not follow {name} of the config: give `base` in its place")
    rule = config.target_rule()
    if _says_the_same(config, method, rule, moves):
        return {}
    layers = {old: new for old, new in moves.items() if TargetMatcher(rule)(old)}
    changes: dict[str, object] = {"target_modules": _exactly(layers.values())}
    # The paths are spelled out, so whatever narrowed them down before has done its work.
    narrowing = ("exclude_modules", "layers_to_transform", "layers_pattern")
    changes.update({name: None for name in narrowing if name in field_names(config)})
    for name, default_field in config.pattern_fields.items():
        pattern = cast("Mapping[str, object]", field_value(config, name) or {})
        default = field_value(config, default_field)
        values = {new: value_for(pattern, old, default) for old, new in layers.items()}
        changes[name] = {"^" + re.escape(new): value for new, value in values.items() if value != default}
    for name in method.default_modules:
        names = _matcher(field_value(config, name))
        changes[name] = sorted(new for old, new in layers.items() if names(old))
    if rule.modules_to_save:
        saved = _saved(rule.modules_to_save, moves)
        changes["modules_to_save"] = saved
    return changes


def _exactly(paths: Iterable[str]) -> list[str] | str:
    """What selects these modules and no others: a path without a dot could be at the end of many."""
    found = sorted(set(paths))
    return found if all("." in path for path in found) else "|".join(map(re.escape, found))


def _says_the_same(config: PeftConfig, method: Method, rule: TargetRule, moves: Mapping[str, str]) -> bool:
    tests = [TargetMatcher(rule), *(_matcher(field_value(config, name)) for name in method.default_modules)]
    if any(test(old) != test(new) for test in tests for old, new in moves.items()):
        return False
    if any(_entry(rule, old) != _entry(rule, new) for old, new in moves.items()):
        return False
    patterns = [cast("Mapping[str, object]", field_value(config, name) or {}) for name in config.pattern_fields]
    return all(value_for(p, old, None) == value_for(p, new, None) for p in patterns for old, new in moves.items())


def _matcher(names: object) -> TargetMatcher:
    return TargetMatcher(TargetRule(target_modules=cast("set[str] | str | None", names)))


def _entry(rule: TargetRule, path: str) -> str | None:
    """The entry of `modules_to_save` that a module, or one inside of it, is saved by."""
    return next((e for e in rule.modules_to_save or () if f".{path}.".find(f".{e}.") >= 0), None)


def _saved(entries: Iterable[str], moves: Mapping[str, str]) -> list[str]:
    """The entries of `modules_to_save` as the modules are called now."""
    found = []
    for entry in entries:
        inside = {old: new for old, new in moves.items() if f".{entry}." in f".{old}."}
        if all(f".{entry}." in f".{new}." for new in inside.values()):
            found.append(entry)
            continue
        for old, new in inside.items():
            # What is behind the entry is inside of the module that is saved, and is called as it was.
            _, _, behind = f".{old}.".partition(f".{entry}.")
            found.append(new.removesuffix("." + behind.rstrip(".")) if behind else new)
    return sorted(set(found))
