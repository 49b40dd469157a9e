"""What loads once loads twice: a checkpoint over the adapter that it came from, or that another file of it made.

And what stands in a checkpoint beside the adapter is no reason to refuse it where it says nothing new: weights of the base,
and tensors that are written a second time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file

import splice
from splice.checkpoint.keys import PREFIX
from splice.errors import AdapterMismatchError
from tests import bases
from tests.bases import run
from tests.broken import SAFETENSORS, unchanged
from tests.comparing import assert_close, tensors_in
from tests.samples import Case, as_stored, kind_cases, network_cases, option_cases, parameter_cases, plain_cases

EMBEDDINGS: tuple[str | bool, ...] = ("auto", True, False)
MODELS = (bases.LLAMA, bases.TIED, bases.BERT, bases.T5)
CASES = {
    str(case): case
    for case in (
        *kind_cases(), *plain_cases(*MODELS), *option_cases(bases.LLAMA), *as_stored(network_cases(bases.LLAMA)),
        *parameter_cases(),
    )
    if case.base.targets
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def filled(library: Any, base: bases.Base, fields: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A new adapter whose trained tensors are not what they start as."""
    torch.manual_seed(0)
    config = library.get_peft_config(dict(fields))
    model = library.get_peft_model(base.build(dtype), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def state(model: Any, **options: Any) -> dict[str, torch.Tensor]:
    return {k: t.detach().clone() for k, t in splice.get_peft_model_state_dict(model, **options).items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return list(found) == list(expected) and all(torch.equal(found[key], t) for key, t in expected.items())


def cleared(model: Any) -> None:
    """Zero wherever the adapter has a trained tensor."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_putting_back_what_was_taken_changes_nothing(case: Case) -> None:
    for head in (False, True):
        model = filled(splice, case.base, case.with_head() if head else case.config())
        for embeddings in EMBEDDINGS:
            taken = state(model, save_embedding_layers=embeddings)
            result = splice.set_peft_model_state_dict(model, taken)
            assert (result.missing_keys, result.unexpected_keys) == ([], [])
            assert same(state(model, save_embedding_layers=embeddings), taken)


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_a_folder_loads_over_the_adapter_that_it_was_saved_from(case: Case, tmp_path: Path) -> None:
    model = filled(splice, case.base, case.with_head())
    expected = state(model, save_embedding_layers=False)
    for embeddings in EMBEDDINGS:
        model.save_pretrained(tmp_path, save_embedding_layers=embeddings)
        cleared(model)
        model.load_adapter(tmp_path, "default", is_trainable=True)
        assert same(state(model, save_embedding_layers=False), expected)
        other = splice.PeftModel.from_pretrained(case.base.build(), tmp_path, is_trainable=True)
        assert same(state(other, save_embedding_layers=False), expected)
        cleared(other)
        other.load_adapter(tmp_path, "default", is_trainable=True)
        assert same(state(other, save_embedding_layers=False), expected)


@pytest.mark.parametrize("case", plain_cases(bases.LLAMA) + as_stored(network_cases(bases.LLAMA)), ids=str)
def test_a_part_of_the_tensors_leaves_the_others(case: Case) -> None:
    """Every second one, and every single one."""
    model = filled(splice, case.base, case.with_head())
    placed = model.base_model.placed["default"].values()
    if any(layer.leaders or any(shared.written_on_layers for shared in layer.shared) for layer in placed):
        pytest.skip("what layers share the checkpoint holds several times, and all of them are to be the same")
    before = state(model)
    for chosen in (list(before)[::2], list(before)[:1], list(before)[-1:]):
        # Of indices others are given that there is something for.
        given = {key: t + 1 if t.is_floating_point() else t.flip(-1) for key, t in before.items() if key in chosen}
        result = splice.set_peft_model_state_dict(model, given)
        assert result.unexpected_keys == [] and not set(result.missing_keys) & set(given)
        assert same(state(model), {**before, **given})
        splice.set_peft_model_state_dict(model, before)


WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled as a whole": lambda name: "_orig_mod." + name,
    "in parallel": lambda name: "module." + name,
    "both": lambda name: "module._orig_mod." + name,
    "without a prefix": lambda name: name.removeprefix(PREFIX),
    "in parallel, without a prefix": lambda name: "module." + name.removeprefix(PREFIX),
}


@pytest.mark.parametrize("case", plain_cases(bases.LLAMA) + as_stored(network_cases(bases.LLAMA)), ids=str)
@pytest.mark.parametrize("what", WRAPPED)
def test_names_from_a_wrapped_model(what: str, case: Case, tmp_path: Path) -> None:
    """The same for each method: a first load, a second one, and a dict."""
    model = filled(splice, case.base, case.config())
    expected = state(model)
    model.save_pretrained(tmp_path)
    # Copies: safetensors up to 0.4 reads where the file lies, which is written anew.
    stray = {WRAPPED[what](name): tensor.clone() for name, tensor in tensors_in(tmp_path).items()}
    save_file(stray, tmp_path / SAFETENSORS, metadata={"format": "pt"})
    assert same(state(splice.PeftModel.from_pretrained(case.base.build(), tmp_path)), expected)
    cleared(model)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert same(state(model), expected)
    cleared(model)
    splice.set_peft_model_state_dict(model, stray)
    assert same(state(model), expected)


# -- what the reference writes beside an adapter

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
BOTH = ["embed_tokens", "lm_head"]
WRITTEN: dict[str, dict[str, Any]] = {
    "nothing of the embeddings": {},
    "rows of the input embeddings": {"trainable_token_indices": [1, 5]},
    "rows of both": {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [1, 5]}},
    "other rows of both": {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [1, 6]}},
    "rows of the head": {"trainable_token_indices": {"lm_head": [1, 5]}},
    "embeddings as a target": {"target_modules": ["embed_tokens"]},
    "both as targets": {"target_modules": BOTH},
    "both as targets, tied": {"target_modules": BOTH, "ensure_weight_tying": True},
    "embeddings as a target, tied": {"target_modules": BOTH[:1], "ensure_weight_tying": True},
    "the head as a target, tied": {"target_modules": BOTH[1:], "ensure_weight_tying": True},
    "the head whole": {"modules_to_save": BOTH[1:]},
    "both whole": {"modules_to_save": BOTH},
    "both whole, tied": {"modules_to_save": BOTH, "ensure_weight_tying": True},
    "one as a target, the other whole": {"target_modules": BOTH[1:], "modules_to_save": BOTH[:1]},
    "biases and the head": {"bias": "all", "modules_to_save": BOTH[1:]},
    "layers that stand there twice": {"layer_replication": [[0, 2], [1, 2]]},
}


@pytest.mark.parametrize("base", [bases.LLAMA, bases.TIED], ids=str)
@pytest.mark.parametrize("what", WRITTEN)
def test_embeddings_that_the_reference_writes_beside_an_adapter(what: str, base: bases.Base, tmp_path: Path) -> None:
    model = filled(peft, base, {**LORA, **WRITTEN[what]})
    expected = run(model, base.inputs(3))
    for embeddings in ("auto", True):
        model.save_pretrained(tmp_path, save_embedding_layers=embeddings)
        ours = splice.PeftModel.from_pretrained(base.build(), tmp_path)
        assert_close(run(ours, base.inputs(3)), expected)
        ours.load_adapter(tmp_path, "default")
        assert_close(run(ours, base.inputs(3)), expected)
        saved = set(WRITTEN[what].get("modules_to_save", ()))
        assert {p.rpartition(".")[2] for p in ours.modules_to_save or ()} - {*saved, "embed_tokens"} == set()


@pytest.mark.parametrize("case", plain_cases(*MODELS) + as_stored(network_cases(bases.LLAMA)), ids=str)
def test_the_same_for_every_method(case: Case, tmp_path: Path) -> None:
    model = filled(peft, case.base, case.config())
    expected = run(model, case.base.inputs(3))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    ours = splice.PeftModel.from_pretrained(case.base.build(), tmp_path)
    assert_close(run(ours, case.base.inputs(3)), expected, factor=10)
    ours.load_adapter(tmp_path, "default")
    assert_close(run(ours, case.base.inputs(3)), expected, factor=10)


TYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("loaded", TYPES, ids=str)
@pytest.mark.parametrize("written", TYPES, ids=str)
@pytest.mark.parametrize("what", ["nothing of the embeddings", "both as targets", "both as targets, tied"])
def test_a_base_of_another_precision(what: str, written: torch.dtype, loaded: torch.dtype, tmp_path: Path) -> None:
    """Its copies are the same but for rounding, whichever side was rounded; also where sizes may differ."""
    model = filled(splice, bases.TIED, {**LORA, **WRITTEN[what]}, written)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    for options in ({}, {"ignore_mismatched_sizes": True}):
        ours = splice.PeftModel.from_pretrained(bases.TIED.build(loaded), tmp_path, **options)
        assert ours.modules_to_save in (None, set())
        ours.load_adapter(tmp_path, "default", **options)
    copies = [key for key in tensors_in(tmp_path) if key.endswith(("embed_tokens.weight", "base_layer.weight"))]
    changed = {key: t * 1.1 if key in copies else t for key, t in tensors_in(tmp_path).items()}
    save_file(changed, tmp_path / SAFETENSORS, metadata={"format": "pt"})
    with unchanged(ours), pytest.raises(AdapterMismatchError, match="weights of its base model.*differ"):
        ours.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("what", ["both as targets", "both as targets, tied"])
def test_copies_of_another_size_may_be_left_out(what: str, tmp_path: Path) -> None:
    """The reference leaves them out as well where the caller says so."""
    fields = {**LORA, **WRITTEN[what]}
    model = filled(splice, bases.TIED, fields)
    expected = run(model, bases.TIED.inputs(3))
    model.save_pretrained(tmp_path)
    copies = [key for key in tensors_in(tmp_path) if key.endswith("base_layer.weight")]
    shorter = {key: t[:-1].clone() if key in copies else t for key, t in tensors_in(tmp_path).items()}
    save_file(shorter, tmp_path / SAFETENSORS, metadata={"format": "pt"})
    for library in (peft, splice):
        loaded = library.PeftModel.from_pretrained(bases.TIED.build(), str(tmp_path), ignore_mismatched_sizes=True)
        assert_close(run(loaded, bases.TIED.inputs(3)), expected)
        result = loaded.load_adapter(str(tmp_path), "default", ignore_mismatched_sizes=True)
        assert not set(result.missing_keys) & set(copies)
        assert_close(run(loaded, bases.TIED.inputs(3)), expected)


def test_a_head_that_differs_is_trained_and_one_that_does_not_is_the_bases(tmp_path: Path) -> None:
    model = filled(splice, bases.LLAMA, LORA)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    key = f"{PREFIX}lm_head.weight"
    given = tensors_in(tmp_path)
    for changed, saved in ((given[key], set()), (given[key] + 1, {"lm_head"})):
        save_file({**given, key: changed}, tmp_path / SAFETENSORS, metadata={"format": "pt"})
        ours = splice.PeftModel.from_pretrained(bases.LLAMA.build(), tmp_path)
        assert (ours.modules_to_save or set()) == saved
        ours.load_adapter(tmp_path, "default")
    with unchanged(model), pytest.raises(AdapterMismatchError, match=r"holds weights of its base model \(.*lm_head"):
        model.load_adapter(tmp_path, "default")


# -- what does not fit, where the caller says that it need not


def unfitting(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[dict[str, torch.Tensor], bool]]:
    """Dicts that do not fit an adapter with these tensors, and whether sizes are to be ignored."""
    first, last = (key for key in (next(iter(tensors)), next(reversed(tensors))))
    longer = {**tensors, first: tensors[first].new_zeros([size + 1 for size in tensors[first].shape])}
    return {
        "one too few": ({key: t for key, t in tensors.items() if key != last}, False),
        "one too many": ({**tensors, "foo.bar": torch.zeros(2)}, False),
        "of another shape": (longer, True),
        "of another shape, and one too few": ({key: t for key, t in longer.items() if key != last}, True),
    }


@pytest.mark.parametrize("case", plain_cases(bases.LLAMA) + as_stored(network_cases(bases.LLAMA)), ids=str)
def test_what_does_not_fit_leaves_the_same_tensors_as_in_the_reference(case: Case, tmp_path: Path) -> None:
    """Over an adapter that is there, from a dict and from a folder."""
    source = filled(splice, case.base, case.config())
    source.save_pretrained(tmp_path)
    layers = [layer for placed in source.base_model.placed.values() for layer in placed.values()]
    hidden = tuple(suffix for layer in layers for suffix, item in layer.registered.items() if item.slot.hidden)
    for given, ignores in unfitting(state(source)).values():
        if not given:
            continue
        save_file(given, tmp_path / SAFETENSORS, metadata={"format": "pt"})
        for way in ("dict", "folder"):
            changed, missing = [], []
            for library in (peft, splice):
                model = filled(library, case.base, case.config())
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.data.fill_(0.5)
                before = {k: t.detach().clone() for k, t in library.get_peft_model_state_dict(model).items()}
                try:
                    if way == "dict":
                        result = library.set_peft_model_state_dict(model, dict(given), ignore_mismatched_sizes=ignores)
                    else:
                        options = {"strict": False} if library is splice else {}
                        result = model.load_adapter(
                            str(tmp_path), "default", ignore_mismatched_sizes=ignores, **options
                        )
                except (KeyError, ValueError, RuntimeError):
                    assert library is peft  # of what all layers share, and of prompts, it needs everything
                    break
                after = library.get_peft_model_state_dict(model)
                changed.append({key for key, t in after.items() if not torch.equal(t, before[key])})
                missing.append({key.replace(".default", "") for key in result.missing_keys})
            if len(changed) == 2:
                assert changed[0] == changed[1]
                # From a dict it also names what it never writes, and what it never loads; not what it has in no module.
                assert {key for key in missing[1] if ".layers." in key and not key.endswith(hidden)} <= missing[0]


def test_the_folder_of_a_model_with_several_adapters(tmp_path: Path) -> None:
    """The one of that name is below it, as it was saved; what lies in the folder itself is another adapter."""
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
    model = splice.get_peft_model(bases.LLAMA.build(), splice.get_peft_config(dict(config)))
    model.add_adapter("mine", splice.get_peft_config(dict(config)))
    model.save_pretrained(tmp_path)
    saved = {name: tensors_in(tmp_path / place) for name, place in (("default", ""), ("mine", "mine"))}
    with torch.no_grad():
        for parameter in model.base_model.parameters():
            parameter.zero_()
    with pytest.warns(splice.PeftWarning, match="the one called 'mine' is in 'mine' below it"):
        model.load_adapter(tmp_path, "mine")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_adapter(tmp_path, "default")
        model.load_adapter(tmp_path, "new")  # a name that is not on the model yet: the folder as it is
    for name, expected in (*saved.items(), ("new", saved["default"])):
        found = splice.get_peft_model_state_dict(model, adapter_name=name)
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
