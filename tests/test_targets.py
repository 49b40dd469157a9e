"""Which modules a config selects: the same ones as in the reference, and the same refusals."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import splice
from splice.base.layers import LayerKind, kind_of
from splice.config import TargetRule
from splice.kinds.matching import TargetMatcher, value_for
from splice.kinds.registry import Method, all_methods
from tests import bases
from tests.bases import Base, run
from tests.comparing import assert_close, differ, load_both
from tests.samples import SAMPLES, Case, everywhere, plain_cases
from tests.task_bases import LLAMA_LABEL

# The example that failed is printed; nothing is written to disk, and every run tries the same examples.
quick = settings(
    max_examples=100, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
# The same for what makes a model of each library for each example.
with_models = settings(quick, max_examples=50)
# Methods whose targets follow the rules of all; some take any module, or look for their own.
TARGETING = [
    m
    for m in everywhere(all_methods().values())
    if LayerKind.LINEAR in m.layers and not (m.other_layer or m.find_targets)
]
targeting = pytest.mark.parametrize("method", TARGETING, ids=lambda method: method.name.value)


def fields_of(method: Method) -> set[str]:
    return {field.name for field in dataclasses.fields(method.config)}


def selected(library: Any, network: nn.Module, fields: dict[str, Any]) -> Any:
    """What a new adapter is put on; or the kind of the error, where it is refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = library.get_peft_model(network, library.get_peft_config(fields))
    except Exception as error:
        return _family(error)
    targets = set(model.base_model.targeted_module_names)
    return targets, {status.name for status in model.get_layer_status()} - {f"model.{path}" for path in targets}


def _family(error: Exception) -> list[str]:
    """What of the errors that people catch it is, the most special one first."""
    known = ("NoMatchingPeftModuleError", "ValueError", "TypeError")
    return [name for name in known if name in [cls.__name__ for cls in type(error).__mro__]]


def assert_same_selection(base: Base, method: Method, **fields: Any) -> Any:
    config = {"peft_type": method.name.value, "task_type": base.task, **SAMPLES[method.name].config, **fields}
    reference, ours = (selected(library, base.build(), dict(config)) for library in (peft, splice))
    if isinstance(reference, list) and isinstance(ours, list):
        assert reference[0] in ours
    else:
        assert ours == reference
    return ours


# -- generated configs


@cache
def paths(base: Base) -> list[str]:
    return [path for path, _ in base.build().named_modules() if path]


@cache
def linear_paths(base: Base) -> list[str]:
    return [path for path in paths(base) if kind_of(base.build().get_submodule(path)) is LayerKind.LINEAR]


def tails(path: str) -> st.SearchStrategy[str]:
    """The path, or its last components, or something that only looks like its end."""
    parts = path.split(".")
    whole = [".".join(parts[index:]) for index in range(len(parts))]
    return st.sampled_from([*whole, path[1:], parts[-1][1:] or "x"])


def entries(base: Base) -> st.SearchStrategy[str]:
    likely = st.sampled_from(linear_paths(base)).flatmap(tails)
    return st.one_of(likely, likely, likely, st.sampled_from(paths(base)).flatmap(tails))


REGEXES = (
    r".*q_proj", r"q_proj", r".*\.[qv]_proj", r"model\.layers\.0\..*_proj", r".*\.1\.mlp\.(up|down)_proj", r".*", r".*proj$",
    r"model.layers.\d+.self_attn.(k|o)_proj", r".*mlp", r"(.*)lm_head", r"lm_head|.*gate_proj", "ALL-LINEAR", "all-linear",
    r".*(?<!q_)proj", "none of them",
)  # fmt: skip


def names(base: Base) -> st.SearchStrategy[Any]:
    return st.one_of(st.lists(entries(base), max_size=4), st.sampled_from(REGEXES))


def configs(base: Base) -> st.SearchStrategy[dict[str, Any]]:
    layers = st.one_of(st.none(), st.integers(0, 3), st.lists(st.integers(0, 2), max_size=2))
    patterns = st.one_of(st.none(), st.sampled_from(["layers", ["layers"], ["h", "layers"], "block", "self_attn", ""]))
    whole = st.one_of(st.none(), st.lists(st.sampled_from(["lm_head", "norm", "proj", "self_attn", "mlp"]), max_size=2))
    return st.fixed_dictionaries(
        {
            "target_modules": names(base),
            "exclude_modules": st.one_of(st.none(), names(base)),
            "layers_to_transform": layers,
            "layers_pattern": patterns,
            "modules_to_save": whole,
        }
    )


@targeting
@with_models
@given(data=st.data())
def test_generated_configs_select_the_same(method: Method, data: st.DataObject) -> None:
    fields = data.draw(configs(bases.LLAMA))
    assert_same_selection(bases.LLAMA, method, **{name: fields[name] for name in fields if name in fields_of(method)})


@targeting
@with_models
@given(data=st.data())
def test_generated_targets_alone_select_the_same(method: Method, data: st.DataObject) -> None:
    """Without the fields that rule out most others: more of these configs select something."""
    assert_same_selection(bases.LLAMA, method, target_modules=data.draw(names(bases.LLAMA)))


@targeting
@with_models
@given(data=st.data())
def test_generated_layers_select_the_same(method: Method, data: st.DataObject) -> None:
    if "layers_to_transform" not in fields_of(method):
        return
    targets = data.draw(st.lists(st.sampled_from(linear_paths(bases.LLAMA)).flatmap(tails), min_size=1, max_size=4))
    layers = data.draw(st.one_of(st.integers(-1, 3), st.lists(st.integers(0, 3), max_size=3)))
    pattern = data.draw(st.sampled_from([None, "layers", ["blocks", "layers"], "self_attn", r"lay\w+", "model"]))
    assert_same_selection(
        bases.LLAMA, method, target_modules=targets, layers_to_transform=layers, layers_pattern=pattern
    )


PATTERN_KEYS = (
    "q_proj", "v_proj", ".*v_proj", r"layers\.0\.self_attn\.q_proj", r"^model\.layers\.1\.self_attn\.q_proj", "^q_proj",
    r"model.layers.0.mlp.down_proj", "proj", r".*\.1\..*", "self_attn", r"(q|v)_proj", "down_pro", r"mlp\.down_proj$",
)  # fmt: skip


@targeting
def test_keys_of_patterns_that_match_nothing_are_named(method: Method) -> None:
    config = Case(method, bases.LINEAR).config()
    created = splice.get_peft_config(config)
    for name, default in created.pattern_fields.items():
        for pattern, unmatched in (({"first": 2, "nowhere": 3, r"la\d": 2}, r"nowhere, la\d"), ({"first": 2}, "")):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                splice.get_peft_model(bases.LINEAR.build(), splice.get_peft_config({**config, name: dict(pattern)}))
            told = [str(w.message) for w in caught if str(w.message).startswith(name)]
            assert len(told) == bool(unmatched)
            if unmatched:
                assert f"{name} has keys that match no layer of the adapter: {unmatched}. " in told[0]
                assert f"get {default}={getattr(created, default)}. " in told[0]
                assert "one of the paths is first." in told[0]


@targeting
def test_keys_that_match_nothing_are_named_by_a_load_where_no_tensor_tells_the_value(
    method: Method, tmp_path: Path
) -> None:
    """The shapes of the tensors tell ranks; an alpha that no layer gets changes the scale of those it was meant for."""
    fields = Case(method, bases.LINEAR).config()
    plain = splice.get_peft_config(fields)
    for name, default in plain.pattern_fields.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            splice.get_peft_model(bases.LINEAR.build(), splice.get_peft_config(fields)).save_pretrained(tmp_path)
        file = tmp_path / "adapter_config.json"
        for pattern, unmatched in (({"nowhere": 3, "first": getattr(plain, default)}, "nowhere"), ({}, "")):
            file.write_text(json.dumps({**json.loads(file.read_text()), name: pattern}))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                splice.PeftModel.from_pretrained(bases.LINEAR.build(), tmp_path)
            told = [str(w.message) for w in caught if "match no layer" in str(w.message)]
            assert len(told) == bool(unmatched and default in plain.computed()), (name, told)
            assert all(
                f"adapter 'default': {name} has keys that match no layer of the adapter: nowhere" in t for t in told
            )


@targeting
@with_models
@given(data=st.data())
def test_generated_patterns_give_the_same_values(method: Method, data: st.DataObject) -> None:
    """The first key that matches decides; a key is a regular expression for the end of a path."""
    if not {"rank_pattern", "alpha_pattern"} <= fields_of(method):
        return
    values = st.dictionaries(st.sampled_from(PATTERN_KEYS), st.integers(1, 6), max_size=4)
    config = {
        "peft_type": method.name.value,
        "task_type": bases.LLAMA.task,
        **SAMPLES[method.name].config,
        "target_modules": list(bases.LLAMA.targets),
        "rank_pattern": data.draw(values),
        "alpha_pattern": data.draw(values),
    }
    found = []
    for library in (peft, splice):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = library.get_peft_model(bases.LLAMA.build(), library.get_peft_config(dict(config)))
        layers = {path: model.get_submodule(f"base_model.model.{path}") for path in model.targeted_module_names}
        found.append({p: (dict(layer.r), dict(layer.scaling)) for p, layer in layers.items()})
    assert found[1] == found[0]


@quick
@given(
    pattern=st.dictionaries(st.sampled_from(PATTERN_KEYS), st.integers(), max_size=5),
    path=st.sampled_from(["a.q_proj", "q_proj", "model.layers.1.self_attn.q_proj", "x.v_proj", "mlp.down_proj"]),
)
def test_the_rule_of_patterns(pattern: dict[str, int], path: str) -> None:
    expected = next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", path)), None)
    assert value_for(pattern, path, None) == expected


# -- on other models


ALL_LINEAR = [bases.GPT2, bases.BERT, bases.T5, bases.LLAMA, bases.MIXED, bases.TIED, LLAMA_LABEL]


@pytest.mark.parametrize("base", ALL_LINEAR, ids=str)
@targeting
def test_all_linear(method: Method, base: Base) -> None:
    """Every linear layer but the output embedding, or the head of a classifier."""
    chosen = assert_same_selection(base, method, target_modules="all-linear")
    if LayerKind.TRANSPOSED_LINEAR not in method.layers and base is bases.GPT2:
        assert "ValueError" in chosen or "TypeError" in chosen
        return
    kinds = {kind_of(base.build().get_submodule(path)) for path in chosen[0]}
    assert kinds <= {LayerKind.LINEAR, LayerKind.TRANSPOSED_LINEAR}
    assert base.task is None or base.head not in chosen[0]


@pytest.mark.parametrize("base", [bases.GPT2, bases.BERT, bases.T5, bases.LLAMA, bases.TIED], ids=str)
@targeting
def test_default_targets(method: Method, base: Base) -> None:
    chosen = assert_same_selection(base, method)
    assert chosen[0]


@targeting
def test_no_targets_and_no_defaults(method: Method) -> None:
    assert "ValueError" in assert_same_selection(bases.LINEAR, method)
    with pytest.raises(ValueError, match="target_modules"):
        fields = {"peft_type": method.name.value, **SAMPLES[method.name].config}
        splice.get_peft_model(bases.LINEAR.build(), splice.get_peft_config(fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["embed", "up", "down"]},
        {"target_modules": ["up"], "layers_to_transform": [0, 2]},
        {"target_modules": ["up"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ["layers.1.up", "down"], "layers_to_transform": 0},
        {"target_modules": ["layers.1.up"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": ["down"], "exclude_modules": ["layers.1.down"]},
        {"target_modules": r"layers\.\d\.(up|down)", "exclude_modules": r".*\.0\.up"},
        {"target_modules": ["head", "up"], "modules_to_save": ["head"]},
        {"target_modules": ["head"], "modules_to_save": ["head"]},
        {"target_modules": ["up"], "exclude_modules": ["up"]},
        {"target_modules": ["nothing"]},
        {"target_modules": ["norm"]},
        {"target_modules": ["layers"]},
        {"target_modules": ["up", "norm"], "exclude_modules": ["norm"]},
        {"target_modules": []},
        {"target_modules": {"up"}},
        {"target_modules": ["up"], "modules_to_save": ["ead"]},
        {"target_modules": ["up"], "modules_to_save": ["nobody"]},
        {"target_modules": ["up"], "modules_to_save": ["layers"]},
        {"target_modules": ["up"], "modules_to_save": ["norm", "head"]},
        {"target_modules": ["up"], "layers_to_transform": []},
        {"target_modules": ["up"], "layers_pattern": "layers"},
        {"target_modules": "up", "layers_to_transform": [0]},
    ],
    ids=str,
)
@targeting
def test_one_by_one(method: Method, fields: dict[str, Any]) -> None:
    if not set(fields) <= fields_of(method):
        pytest.skip("the method has no such field")
    if "embed" in fields["target_modules"] and LayerKind.EMBEDDING not in method.layers:
        pytest.skip("not on embeddings")
    assert_same_selection(bases.MIXED, method, **fields)


@pytest.mark.parametrize("fields", [
    {"target_modules": ["layers.0.self_attn.q_proj"]},
    {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1]},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("case", plain_cases(bases.LLAMA), ids=str)
def test_what_is_selected_is_also_what_loads(case: Case, fields: dict[str, Any], shared_checkpoint: Any) -> None:
    """The same rules decide for a checkpoint."""
    if not set(fields) <= fields_of(case.method):
        pytest.skip("the method has no such field")
    pair = load_both(case.base, shared_checkpoint(case.base, case.config(**fields)))
    assert set(pair.ours.targeted_module_names) == set(pair.reference.targeted_module_names)
    pair.assert_equal()


# -- messages


def _refusal(base: Base, method: Method, **fields: Any) -> str:
    config = {"peft_type": method.name.value, **SAMPLES[method.name].config, **fields}
    network = base.build()
    modules = {path: type(module) for path, module in network.named_modules()}
    with pytest.raises((ValueError, TypeError)) as raised:
        splice.get_peft_model(network, splice.get_peft_config(config))
    assert {path: type(module) for path, module in network.named_modules()} == modules
    assert all(parameter.requires_grad for parameter in network.parameters())
    return str(raised.value)


@targeting
def test_messages_say_what_was_looked_for(method: Method) -> None:
    text = _refusal(bases.MIXED, method, target_modules=["nothing", "nowhere"])
    assert "nothing" in text
    assert "not found" in text
    if "layers_to_transform" in fields_of(method):
        text = _refusal(bases.MIXED, method, target_modules=["up"], layers_to_transform=[7], layers_pattern="layers")
        assert "[7]" in text
        assert "layers_pattern" in text
    if "exclude_modules" in fields_of(method):
        text = _refusal(bases.MIXED, method, target_modules=["up"], exclude_modules=["up"])
        assert "excluded" in text
        assert "exclude_modules" in text
    assert "modules_to_save" in _refusal(bases.MIXED, method, target_modules=["head"], modules_to_save=["head"])
    assert "target_modules" in _refusal(bases.MIXED, method, target_modules=[])


@targeting
def test_a_module_of_the_wrong_kind_is_named(method: Method) -> None:
    """With its class, and with what is possible instead."""
    text = _refusal(bases.MIXED, method, target_modules=["up", "norm"])
    assert "'norm'" in text
    assert "LayerNorm" in text
    assert "Linear" in text.partition("modules are supported")[2]
    assert "ModuleList" in _refusal(bases.MIXED, method, target_modules=["layers"])


@targeting
def test_a_container_cannot_be_saved_whole(method: Method) -> None:
    text = _refusal(bases.MIXED, method, target_modules=["layers.1.up"], modules_to_save=["layers.0"])
    assert "ModuleDict" in text
    assert "layers.0" in text


@targeting
def test_an_adapter_without_targets(method: Method) -> None:
    """The placeholder that other libraries use: it is on no layer and changes nothing."""
    config = {"peft_type": method.name.value, **SAMPLES[method.name].config, "target_modules": "dummy-target-modules"}
    model = splice.get_peft_model(bases.LINEAR.build(), splice.get_peft_config(config)).eval()
    assert model.targeted_module_names == []
    assert torch.equal(run(model, bases.LINEAR.inputs(3)), run(bases.LINEAR.build(), bases.LINEAR.inputs(3)))


# -- the matcher itself


def test_many_targets() -> None:
    """Six hundred full paths, as a config of "all-linear" holds them."""
    names = [f"layers.{index}.{name}" for index in range(100) for name in ("a", "b", "c", "d", "e", "f")]
    matcher = TargetMatcher(TargetRule(set(names)))
    assert all(matcher(f"model.{name}") for name in names)
    assert not matcher("model.layers.100.a")
    assert not matcher("model.layers.1.aa")
    assert not matcher("modelayers.1.a")


def test_targets_that_are_already_adapted_stay_targets(shared_checkpoint: Any) -> None:
    """A second adapter selects among the base's modules, not among what the first one brought."""
    case = plain_cases(bases.LLAMA)[0]
    pair = load_both(case.base, shared_checkpoint(case.base, case.config()))
    for library, model in ((peft, pair.reference), (splice, pair.ours)):
        model.add_adapter("second", library.get_peft_config(case.config(target_modules="all-linear")))
    assert set(pair.ours.base_model.targeted_module_names) == set(pair.reference.base_model.targeted_module_names)
    pair.each(lambda model: model.set_adapter("second"))
    assert not [name for name, _ in pair.ours.named_parameters() if name.count("lora_A") > 1]


@pytest.mark.parametrize("case", plain_cases(bases.LINEAR), ids=str)
def test_a_subclass_of_a_layer_is_a_layer(case: Case, checkpoint: Any) -> None:
    """And its own forward is what runs below the adapter."""

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return bases.Net(Doubled(6, 8), nn.Linear(8, 4), 4).eval()

    if not case.sample.reference_calls_base:  # it computes in the place of the layer, or refuses it
        model = splice.PeftModel.from_pretrained(build(), checkpoint(bases.LINEAR.build, case.config()))
        assert differ(run(model, case.base.inputs(3)), run(build(), case.base.inputs(3)))
        with model.disable_adapter():
            assert torch.equal(run(model, case.base.inputs(3)), run(build(), case.base.inputs(3)))
        return
    folder = checkpoint(build, case.config())
    reference = peft.PeftModel.from_pretrained(build(), str(folder))
    ours = splice.PeftModel.from_pretrained(build(), folder)
    assert_close(run(ours, case.base.inputs(3)), run(reference, case.base.inputs(3)))


NOTHING_SELECTED: list[dict[str, Any]] = [
    {"target_modules": ["first"], "exclude_modules": ["secnd"]},
    {"target_modules": ["first"], "exclude_modules": "secnd.*"},
    {"target_modules": ["first"], "exclude_modules": ["second"]},
    {"target_modules": ["frst"], "target_parameters": ["second.weight"]},
    {"target_modules": [], "target_parameters": ["second.weight"]},
    {"target_modules": ["first"], "target_parameters": ["secnd.weight"]},
    {"target_modules": ["first"], "target_parameters": ["second.weight"]},
]


@pytest.mark.parametrize("fields", NOTHING_SELECTED, ids=str)
@targeting
def test_what_selects_nothing_is_named(method: Method, fields: dict[str, Any]) -> None:
    """By the reference's key words, of a new adapter; a load says nothing of what the adapter lives without."""
    if not fields.keys() <= fields_of(method):
        pytest.skip("the method has no such field")
    said = []
    for library in (peft, splice):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            others: dict[str, Any] = {field: [] for field in method.default_modules}
            config = library.get_peft_config({**Case(method, bases.LINEAR).config(), **others, **fields})
            library.get_peft_model(bases.LINEAR.build(), config)
        words = ("modules were excluded", "were set but no")
        lines = [(w.category, str(w.message)) for w in caught if any(word in str(w.message) for word in words)]
        said.append([(category, next(word for word in words if word in line)) for category, line in lines])
    assert said[1] == said[0]
