"""The same checkpoint, loaded by the reference and by splice: everything that can be observed is equal."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import splice
import splice.tasks
from splice.base.embeddings import scales_while_tied
from splice.base.layers import LayerKind
from splice.checkpoint.types import PeftType
from splice.kinds.registry import all_methods
from tests import bases
from tests.bases import run
from tests.comparing import (
    Pair,
    assert_close,
    assert_same_tensors,
    config_in,
    differ,
    in_base_terms,
    load_both,
    named,
    parameters_of,
    state_of,
    tensors_in,
    trainable_names,
)
from tests.samples import SAMPLES, Case, kind_cases, option_cases, plain_cases

FEW = (bases.LINEAR, bases.EMBEDDING, bases.CONV2D, bases.MIXED, bases.LLAMA)
every = pytest.mark.parametrize("case", plain_cases(), ids=str)
few = pytest.mark.parametrize("case", plain_cases(*FEW), ids=str)
transformers_only = pytest.mark.parametrize("case", plain_cases(*bases.TRANSFORMERS), ids=str)


def test_every_method_has_a_sample() -> None:
    assert set(SAMPLES) == set(all_methods())


def test_every_kind_of_layer_has_a_base() -> None:
    supported = {kind for method in all_methods().values() for kind in method.layers}
    # Torch's own attention, which takes three tensors, has tests of its own.
    assert supported - {LayerKind.ATTENTION} <= set(bases.BY_KIND)


# -- outputs


@pytest.mark.parametrize("case", [*plain_cases(), *option_cases()], ids=str)
def test_the_output_is_the_same(case: Case, shared_checkpoint: Any) -> None:
    pair = load_both(case.base, shared_checkpoint(case.base, case.config()))
    output = pair.assert_equal()
    assert differ(output, run(case.base.build(), case.base.inputs(3)))


@pytest.mark.parametrize("case", plain_cases(bases.CLIPPED), ids=str)
def test_an_embedding_that_clips_its_rows(case: Case, shared_checkpoint: Any) -> None:
    """A look-up with `max_norm` shortens the rows it reads, in place: in the adapter as well, and the same ones."""
    pair = load_both(case.base, shared_checkpoint(case.base, case.config()))
    for _ in range(2):
        output = pair.assert_equal()
    assert differ(output, run(case.base.build(), case.base.inputs(3)))
    theirs = dict(named(pair.reference))
    for name, parameter in named(pair.ours):
        assert_close(parameter.detach(), theirs[name].detach())


@every
def test_disabled_is_the_base(case: Case, shared_checkpoint: Any) -> None:
    pair = load_both(case.base, shared_checkpoint(case.base, case.config()))
    inputs = case.base.inputs(3)
    with pair.ours.disable_adapter():
        assert torch.equal(run(pair.ours, inputs), run(case.base.build(), inputs))
    pair.assert_equal()


@every
def test_a_second_adapter_and_back(case: Case, shared_checkpoint: Any) -> None:
    """The second one differs in size and covers only some of the layers."""
    first = shared_checkpoint(case.base, case.config())
    pair = load_both(case.base, first, shared_checkpoint(case.base, case.other_config(), seed=1))
    before = pair.assert_equal()
    pair.each(lambda model: model.set_adapter("second"))
    assert differ(pair.assert_equal(), before)
    pair.each(lambda model: model.set_adapter("default"))
    assert torch.equal(pair.assert_equal(), before)


@every
def test_two_active_at_once(case: Case, shared_checkpoint: Any) -> None:
    """Where both adapters have a head of their own, neither library lets both be active; that has its own test."""
    if case.method.exclusive or splice.PeftModel.class_for(splice.get_peft_config(case.config())).heads:
        pytest.skip("each adapter replaces a module as a whole")
    if not case.sample.reference_adds:
        pytest.skip("the reference cannot")
    first = shared_checkpoint(case.base, case.config())
    pair = load_both(case.base, first, shared_checkpoint(case.base, case.other_config(), seed=1))
    alone = pair.outputs()[1]
    for names in (["default", "second"], ["second", "default"]):
        pair.each(lambda model, names=names: model.base_model.set_adapter(names))
        assert differ(pair.assert_equal(), alone)
        assert pair.ours.active_adapters == pair.reference.active_adapters == names


@every
def test_gradients(case: Case, shared_checkpoint: Any) -> None:
    pair = load_both(case.base, shared_checkpoint(case.base, case.config()), is_trainable=True)
    gradients = [_gradients(model, case) for model in (pair.reference, pair.ours)]
    assert set(gradients[1]) == set(gradients[0]) == trainable_names(pair.ours)
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, factor=10)


def _gradients(model: Any, case: Case) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    if case.sample.draws_in_training:
        model.train()
    output = bases.tensors_of(model(**case.base.inputs(3)))[0]
    output.square().sum().backward()
    return {name: p.grad for name, p in named(model) if p.grad is not None}


@few
def test_the_gradient_reaches_the_input_of_a_layer(case: Case, shared_checkpoint: Any) -> None:
    """Through the base and through the adapter, also where only an earlier tensor is trained."""
    base = case.base
    if "x" not in base.inputs(1) or not base.inputs(1)["x"].is_floating_point():
        pytest.skip("the input is token ids")
    pair = load_both(base, shared_checkpoint(base, case.config()))
    found = []
    for model in (pair.reference, pair.ours):
        x = base.inputs(3)["x"].requires_grad_()
        model(x=x).square().sum().backward()
        found.append(x.grad)
    assert_close(found[1], found[0], factor=10)


@transformers_only
def test_generated_tokens(case: Case, shared_checkpoint: Any) -> None:
    if not case.base.generates:
        pytest.skip("no `generate`")
    pair = load_both(case.base, shared_checkpoint(case.base, case.config()))
    for options in ({}, {"num_beams": 2}, {"use_cache": False}):
        ours = bases.generate(pair.ours, case.base, **options)
        assert torch.equal(ours, bases.generate(pair.reference, case.base, **options)), options
    # Not the tokens: a tiny random model may repeat one of them whatever its adapter does.
    scores = [_scores_while_generating(model, case.base) for model in (pair.ours, pair.reference, case.base.build())]
    assert_close(scores[0], scores[1], factor=10)
    assert differ(scores[0], scores[2])


def _scores_while_generating(model: Any, base: bases.Base) -> torch.Tensor:
    return torch.stack(bases.generate(model, base, output_logits=True, return_dict_in_generate=True).logits)


# -- dtypes


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*kind_cases(), *plain_cases(bases.LLAMA, bases.BERT)], ids=str)
def test_half_precision_bases(case: Case, dtype: torch.dtype, autocast: bool, shared_checkpoint: Any) -> None:
    folder = shared_checkpoint(case.base, case.config(modules_to_save=[case.base.head]), dtype=dtype)
    pair = load_both(case.base, folder, dtype=dtype, autocast_adapter_dtype=autocast)
    assert _dtypes(pair.ours) == _dtypes(pair.reference)
    assert not trainable_names(pair.ours)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.base.inputs(3).items()}
    ours, reference = run(pair.ours, inputs), run(pair.reference, inputs)
    assert ours.dtype == dtype
    assert_close(ours, reference)


@pytest.mark.parametrize("autocast", [True, False])
@few
def test_half_precision_files_on_a_float32_base(case: Case, autocast: bool, shared_checkpoint: Any) -> None:
    if not case.sample.reference_on_other_bases:
        pytest.skip("the reference gets it wrong")
    folder = shared_checkpoint(case.base, case.config(), dtype=torch.bfloat16)
    pair = load_both(case.base, folder, autocast_adapter_dtype=autocast)
    assert _dtypes(pair.ours) == _dtypes(pair.reference)
    pair.assert_equal()


def _dtypes(model: Any) -> dict[str, torch.dtype]:
    """Without the flags: where the reference casts an embedding's adapter, it makes the new parameters trainable."""
    return {name: parameter.dtype for name, parameter in named(model)}


@few
def test_under_torch_autocast(case: Case, shared_checkpoint: Any) -> None:
    pair = load_both(case.base, shared_checkpoint(case.base, case.config()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, reference = (run(model, case.base.inputs(3)) for model in (pair.ours, pair.reference))
    assert ours.dtype == reference.dtype
    assert_close(ours, reference, factor=5)


# -- merged


@every
def test_merged_in_place_and_back(case: Case, shared_checkpoint: Any) -> None:
    pair = load_both(case.base, shared_checkpoint(case.base, case.config()))
    if not mergeable(pair.ours):
        pytest.skip("cannot be merged")
    before = pair.assert_equal()
    pair.each(lambda model: model.merge_adapter())
    assert_close(pair.outputs()[1], before)
    if not case.base.tied:  # the reference changes the other end of a tied weight as well
        pair.assert_equal()
    for model in (pair.ours, *([pair.reference] if case.sample.reference_unmerges else [])):
        model.unmerge_adapter()
    assert torch.equal(pair.outputs()[1], before)


@pytest.mark.parametrize("case", [*plain_cases(), *option_cases(bases.LINEAR, bases.TRANSPOSED, bases.CONV2D)], ids=str)
def test_merged_and_unloaded(case: Case, shared_checkpoint: Any) -> None:
    pair = load_both(case.base, shared_checkpoint(case.base, case.with_head()))
    if not mergeable(pair.ours):
        pytest.skip("cannot be merged")
    before = pair.outputs()[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both say that the embeddings are no longer tied
        merged = Pair(case.base, pair.reference.merge_and_unload(), pair.ours.merge_and_unload())
    assert_close(merged.outputs()[1], before)
    assert list(merged.ours.state_dict()) == list(case.base.build().state_dict())
    if case.base.tied:  # the reference changes the other end of a tied weight as well
        return
    if scales_while_tied(merged.ours):  # and gives the head nothing of what is not multiplied any more
        return
    theirs = merged.reference.state_dict()
    for name, tensor in merged.ours.state_dict().items():
        if name in theirs:  # LayerNorm tuning leaves heads wrapped there
            assert_close(tensor, theirs[name])


def mergeable(model: Any) -> bool:
    adapters = [adapter for layers in model.base_model.placed.values() for adapter in layers.values()]
    return all(adapter.mergeable and adapter.merges_exactly for adapter in adapters)


# -- saved


@pytest.mark.parametrize("case", [*plain_cases(), *option_cases(*FEW)], ids=str)
def test_saved_again_the_files_are_the_same(case: Case, shared_checkpoint: Any, tmp_path: Path) -> None:
    folder = shared_checkpoint(case.base, case.with_head())
    pair = load_both(case.base, folder)
    pair.reference.save_pretrained(str(tmp_path / "peft"), save_embedding_layers=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", splice.errors.PeftWarning)
        pair.ours.save_pretrained(str(tmp_path / "splice"), save_embedding_layers=False)
    theirs, ours = tmp_path / "peft", tmp_path / "splice"
    assert_same_tensors(tensors_in(ours), tensors_in(folder))
    assert_same_tensors(tensors_in(ours), tensors_in(theirs))
    assert config_in(ours) == config_in(theirs)


@pytest.mark.parametrize("case", [*plain_cases(), *option_cases(*FEW)], ids=str)
def test_the_reference_loads_what_we_save(case: Case, shared_checkpoint: Any, tmp_path: Path) -> None:
    """Saved under a name that is not "default", and with two adapters on the model."""
    folder = shared_checkpoint(case.base, case.config())
    model = splice.PeftModel.from_pretrained(case.base.build(), folder, adapter_name="mine")
    model.load_adapter(shared_checkpoint(case.base, case.other_config(), seed=1), adapter_name="default")
    model.save_pretrained(tmp_path)
    for saved, name in ((tmp_path / "mine", "mine"), (tmp_path, "default")):
        model.set_adapter(name)
        reference = peft.PeftModel.from_pretrained(case.base.build(), str(saved))
        inputs = case.base.inputs(3)
        assert_close(run(reference, inputs), run(model, inputs))


@every
def test_a_new_adapter_has_the_same_tensors(case: Case, tmp_path: Path) -> None:
    """Made from a config, not loaded: names, shapes, dtypes, flags, and the config as it is written."""
    made = []
    for library in (peft, splice):
        torch.manual_seed(3)
        config = library.get_peft_config(case.config())
        model = library.get_peft_model(case.base.build(), config)
        model.save_pretrained(str(tmp_path / library.__name__), save_embedding_layers=False)
        made.append(model)
    assert parameters_of(made[1]) == parameters_of(made[0])
    described = [
        {name: (tensor.shape, tensor.dtype) for name, tensor in tensors_in(tmp_path / library).items()}
        for library in ("peft", "splice")
    ]
    assert described[1] == described[0]
    assert config_in(tmp_path / "splice") == config_in(tmp_path / "peft")


@pytest.mark.parametrize("case", plain_cases(bases.LLAMA, bases.BERT), ids=str)
def test_a_config_given_to_get_peft_model_is_kept_and_completed(case: Case) -> None:
    """Callers read the resolved values from the object that they passed in."""
    for changes in ({"target_modules": None}, {"target_modules": "all-linear"}, {}):
        if None in changes.values() and not _has_default(case):
            continue
        found = []
        for library in (peft, splice):
            config = library.get_peft_config(case.config(**changes))
            model = library.get_peft_model(case.base.build(), config)
            assert model.peft_config["default"] is config
            found.append((set(config.target_modules), set(saved_whole(config)), config.base_model_name_or_path))
        assert found[1] == found[0]


def _has_default(case: Case) -> bool:
    known = case.base.build().config.model_type in case.method.default_targets
    return known or case.method.find_targets is not None


def saved_whole(config: Any) -> list[str]:
    """`modules_to_save` of a config that has the field."""
    return vars(config).get("modules_to_save") or []


@every
def test_a_new_adapter_changes_nothing_yet(case: Case) -> None:
    """As in the reference, an adapter with its default initialisation starts as a no-op."""
    model = splice.get_peft_model(case.base.build(), splice.get_peft_config(case.config()))
    inputs = case.base.inputs(3)
    reference = peft.get_peft_model(case.base.build(), peft.get_peft_config(case.config())).eval()
    base_output = run(case.base.build(), inputs)
    assert differ(run(model.eval(), inputs), base_output) == differ(run(reference, inputs), base_output)


# -- names


@pytest.mark.parametrize("case", [*plain_cases(), *option_cases(*FEW)], ids=str)
def test_names_shapes_dtypes_and_flags(case: Case, shared_checkpoint: Any) -> None:
    pair = load_both(case.base, shared_checkpoint(case.base, case.with_head()))
    assert_same_parameters(pair, case)
    states = state_of(pair.reference), state_of(pair.ours)
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name], tensor), name


def assert_same_parameters(pair: Pair, case: Case) -> None:
    """The same names, shapes, dtypes and flags.

    Trained biases are the exception: the reference overwrites the base's, splice keeps the base's beside them.
    """
    theirs, ours = parameters_of(pair.reference), parameters_of(pair.ours)
    kept = {name: ours.pop(name) for name in set(ours) - set(theirs)}
    assert ours == theirs
    assert set(state_of(pair.ours)) - set(kept) == set(state_of(pair.reference))
    originals = dict(case.base.build().named_parameters())
    for name, described in kept.items():
        assert name.endswith("original_module.bias")
        assert not described.requires_grad
        original = originals[in_base_terms(name).removeprefix("base_model.model.")]
        assert torch.equal(dict(named(pair.ours))[name], original)
    assert case.trains_biases or not kept


@few
def test_names_with_two_adapters(case: Case, shared_checkpoint: Any) -> None:
    first = shared_checkpoint(case.base, case.config(modules_to_save=[case.base.head]))
    pair = load_both(case.base, first, shared_checkpoint(case.base, case.other_config(), seed=1))
    if case.sample.reference_shares:
        assert parameters_of(pair.ours) == parameters_of(pair.reference)
    assert set(state_of(pair.ours)) == set(state_of(pair.reference))


@few
def test_the_state_dict_goes_back_in(case: Case, shared_checkpoint: Any) -> None:
    """Also one of the reference: a trainer's checkpoint of either library resumes in splice."""
    pair = load_both(case.base, shared_checkpoint(case.base, case.config()))
    state = {name: tensor.clone() for name, tensor in pair.reference.state_dict().items()}
    fresh = splice.get_peft_model(case.base.build(), splice.get_peft_config(case.config()))
    result = fresh.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(run(fresh.eval(), case.base.inputs(3)), pair.outputs()[1])


@every
def test_the_adapters_own_state_dict(case: Case, shared_checkpoint: Any) -> None:
    pair = load_both(case.base, shared_checkpoint(case.base, case.config(modules_to_save=[case.base.head])))
    theirs = peft.get_peft_model_state_dict(pair.reference, save_embedding_layers=False)
    assert_same_tensors(splice.get_peft_model_state_dict(pair.ours, save_embedding_layers=False), theirs)


@every
def test_tensors_set_from_a_dict(case: Case, shared_checkpoint: Any) -> None:
    """`set_peft_model_state_dict` with the same dict gives the same model, and leaves the dict alone."""
    tensors = tensors_in(shared_checkpoint(case.base, case.config()))
    untouched = copy.deepcopy(tensors)
    models = []
    for library in (peft, splice):
        model = library.get_peft_model(case.base.build(), library.get_peft_config(case.config())).eval()
        result = library.set_peft_model_state_dict(model, tensors)
        assert not result.unexpected_keys
        models.append(model)
    Pair(case.base, *models).assert_equal()
    assert_same_tensors(tensors, untouched)


# -- flags, after every event


def _load_frozen(library: Any, model: Any, folders: dict[str, str], case: Case) -> None:
    model.load_adapter(folders["small"], adapter_name="third")


def _load_trainable(library: Any, model: Any, folders: dict[str, str], case: Case) -> None:
    model.load_adapter(folders["small"], adapter_name="third", is_trainable=True)


def _load_again(library: Any, model: Any, folders: dict[str, str], case: Case) -> None:
    model.load_adapter(folders["full"], adapter_name="default")


def _load_again_trainable(library: Any, model: Any, folders: dict[str, str], case: Case) -> None:
    model.load_adapter(folders["full"], adapter_name="default", is_trainable=True)


def _add(library: Any, model: Any, folders: dict[str, str], case: Case) -> None:
    model.add_adapter("new", library.get_peft_config(case.other_config()))


def _activate(library: Any, model: Any, folders: dict[str, str], case: Case) -> None:
    model.set_adapter("second")


def _activate_frozen(library: Any, model: Any, folders: dict[str, str], case: Case) -> None:
    model.set_adapter("second", inference_mode=True)


def _activate_both(library: Any, model: Any, folders: dict[str, str], case: Case) -> None:
    model.base_model.set_adapter(["second", "default"])


def _disable_and_enable(library: Any, model: Any, folders: dict[str, str], case: Case) -> None:
    with model.disable_adapter():
        pass


def _disable(library: Any, model: Any, folders: dict[str, str], case: Case) -> None:
    model.base_model.disable_adapter_layers()


def _delete_active(library: Any, model: Any, folders: dict[str, str], case: Case) -> None:
    model.delete_adapter("default")


def _delete_inactive(library: Any, model: Any, folders: dict[str, str], case: Case) -> None:
    model.delete_adapter("second")


def _freeze_by_name(library: Any, model: Any, folders: dict[str, str], case: Case) -> None:
    model.set_requires_grad("default", requires_grad=False)


def _thaw_by_name(library: Any, model: Any, folders: dict[str, str], case: Case) -> None:
    model.set_requires_grad(["default", "second"])


def _merge_and_back(library: Any, model: Any, folders: dict[str, str], case: Case) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


EVENTS = (
    _load_frozen,
    _load_trainable,
    _load_again,
    _load_again_trainable,
    _add,
    _activate,
    _activate_frozen,
    _activate_both,
    _disable_and_enable,
    _disable,
    _delete_active,
    _delete_inactive,
    _freeze_by_name,
    _thaw_by_name,
    _merge_and_back,
)


@pytest.mark.parametrize("trainable", [(False, False), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@pytest.mark.parametrize(
    "case",
    # Of flags only the kinds know something: for the others it takes more time than it is worth.
    [
        pytest.param(c, marks=[] if c.sample.on_every_base else pytest.mark.slow)
        for c in plain_cases(bases.LINEAR, bases.LLAMA)
        if c.sample.on_every_base or c.base is bases.LINEAR
    ],
    ids=str,
)
def test_flags_after(case: Case, event: Any, trainable: tuple[bool, bool], shared_checkpoint: Any) -> None:
    if case.method.exclusive and event is _activate_both:
        pytest.skip("only one can be active")
    if event is _merge_and_back and not case.sample.merges:
        pytest.skip("there is nothing to merge")
    if event is _merge_and_back and not case.sample.reference_unmerges:
        pytest.skip("the reference cannot unmerge")
    folders = {
        "full": str(shared_checkpoint(case.base, case.config(modules_to_save=[case.base.head]))),
        "small": str(shared_checkpoint(case.base, case.other_config(), seed=1)),
    }
    found = []
    for library in (peft, splice):
        with warnings.catch_warnings(), suppress(*([ValueError] if case.method.check_beside else [])):
            warnings.simplefilter("ignore")
            model = library.PeftModel.from_pretrained(case.base.build(), folders["full"], is_trainable=trainable[0])
            model.load_adapter(folders["small"], adapter_name="second", is_trainable=trainable[1])
            event(library, model, folders, case)
            found.append(model)
    if not found:  # both refuse to train two at once
        return
    reference, ours = found
    assert trainable_names(ours) == trainable_names(reference)
    # With its last adapter a layer is what it was before, and so are its names; in the reference it stays wrapped.
    renamed = [{in_base_terms(n): d for n, d in parameters_of(model).items()} for model in found]
    assert renamed[1] == renamed[0]
    assert ours.active_adapters == reference.active_adapters
    assert ours.training == reference.training
    assert ours.get_base_model().training == reference.get_base_model().training
    assert set(ours.peft_config) == set(reference.peft_config)
    assert ours.get_nb_trainable_parameters() == reference.get_nb_trainable_parameters()


@pytest.mark.parametrize("inference_mode", [True, False])
@few
def test_flags_of_a_new_adapter(case: Case, inference_mode: bool) -> None:
    fields = case.config(inference_mode=inference_mode, modules_to_save=[case.base.head])
    models = [lib.get_peft_model(case.base.build(), lib.get_peft_config(fields)) for lib in (peft, splice)]
    assert parameters_of(models[1]) == parameters_of(models[0])
    assert models[1].training == models[0].training


@pytest.mark.parametrize("bias", ["all", "targets"])
@pytest.mark.parametrize("is_trainable", [True, False])
@pytest.mark.parametrize("case", plain_cases(bases.LINEAR, bases.BERT), ids=str)
def test_flags_of_trained_biases(case: Case, bias: str, is_trainable: bool, shared_checkpoint: Any) -> None:
    config_class = case.method.config
    if "bias" not in {field.name for field in dataclasses.fields(config_class)}:
        pytest.skip("the method trains no biases")
    value = "all" if bias == "all" else f"{case.method.name.value.lower()}_only"
    folder = shared_checkpoint(case.base, case.config(bias=value))
    pair = load_both(case.base, folder, is_trainable=is_trainable)
    assert trainable_names(pair.ours) == trainable_names(pair.reference)
    pair.each(lambda model: model.set_adapter("default"))
    assert trainable_names(pair.ours) == trainable_names(pair.reference)


def test_documented_difference_unload_gives_the_flags_back(library: Any) -> None:
    """The reference leaves the base frozen; splice gives back the flags it had."""
    base = bases.LINEAR
    network = base.build()
    network.second.weight.requires_grad = False
    flags = {name: parameter.requires_grad for name, parameter in network.named_parameters()}
    config = library.get_peft_config(plain_cases(base)[0].config())
    unloaded = library.get_peft_model(network, config).unload()
    now = {name: parameter.requires_grad for name, parameter in unloaded.named_parameters()}
    assert now == (flags if library is splice else dict.fromkeys(flags, False))


def test_documented_difference_unload_gives_the_head_back(library: Any, shared_checkpoint: Any) -> None:
    """The reference's `unload` leaves the trained copy in place; splice's gives back the original."""
    base = bases.LINEAR
    folder = shared_checkpoint(base, plain_cases(base)[0].config(modules_to_save=[base.head]))
    unloaded = library.PeftModel.from_pretrained(base.build(), str(folder)).unload()
    restored = torch.equal(unloaded.head.weight, base.build().head.weight)
    assert restored == (library is splice)


# -- modules saved whole, biases


@pytest.mark.parametrize("case", plain_cases(bases.LINEAR, bases.EMBEDDING, bases.LLAMA, bases.GPT2, bases.T5), ids=str)
def test_a_module_saved_whole(case: Case, shared_checkpoint: Any) -> None:
    """Selected with the adapter, absent when disabled, the original for an adapter without a copy."""
    folder = shared_checkpoint(case.base, case.config(modules_to_save=[case.base.head]))
    pair = load_both(case.base, folder, shared_checkpoint(case.base, case.other_config(), seed=1))
    pair.assert_equal()
    pair.each(lambda model: model.set_adapter("second"))
    pair.assert_equal()
    if not case.method.exclusive and case.sample.reference_adds:
        pair.each(lambda model: model.base_model.set_adapter(["default", "second"]))
        pair.assert_equal()
    inputs = case.base.inputs(3)
    with pair.ours.disable_adapter():
        assert torch.equal(run(pair.ours, inputs), run(case.base.build(), inputs))


@pytest.mark.parametrize("case", plain_cases(bases.BERT), ids=str)
def test_the_head_of_a_classifier_comes_with_the_task(case: Case, shared_checkpoint: Any, tmp_path: Path) -> None:
    folder = shared_checkpoint(case.base, case.config())
    pair = load_both(case.base, folder)
    assert any(".classifier." in name for name in tensors_in(folder))
    assert type(pair.ours).__name__ == type(pair.reference).__name__ == "PeftModelForSequenceClassification"
    assert pair.ours.modules_to_save == pair.reference.modules_to_save
    pair.assert_equal()


def test_two_copies_of_one_module_cannot_be_active(library: Any, shared_checkpoint: Any) -> None:
    base = bases.LINEAR
    case = plain_cases(base)[0]
    config = case.config(modules_to_save=[base.head])
    model = library.PeftModel.from_pretrained(base.build(), str(shared_checkpoint(base, config)))
    model.load_adapter(str(shared_checkpoint(base, config, seed=1)), adapter_name="second")
    with pytest.raises(ValueError, match=r"Only one adapter can be set at a time for (modules_to_save|.*)"):
        model.base_model.set_adapter(["default", "second"])


# -- base models with tied embeddings


@pytest.mark.parametrize("case", plain_cases(bases.TIED), ids=str)
def test_a_checkpoint_with_the_embeddings_of_the_base(case: Case, shared_checkpoint: Any) -> None:
    """The reference adds the base's own embedding where the targets name it, by its default. It changes nothing here."""
    folder = shared_checkpoint(case.base, case.config(), save_embedding_layers="auto")
    assert any("base_layer.weight" in name for name in tensors_in(folder))
    pair = load_both(case.base, folder)
    pair.assert_equal()
    assert torch.equal(
        pair.ours.get_base_model().model.embed_tokens.weight, case.base.build().model.embed_tokens.weight
    )


@pytest.mark.parametrize("case", plain_cases(bases.TIED, bases.LLAMA), ids=str)
def test_which_embeddings_are_saved_with_the_adapter(case: Case, shared_checkpoint: Any, tmp_path: Path) -> None:
    """By default, those of the base that are targets, as the reference does; none, or all, if told so."""
    pair = load_both(case.base, shared_checkpoint(case.base, case.config()))
    for number, options in enumerate(({}, {"save_embedding_layers": False}, {"save_embedding_layers": True})):
        folders = [tmp_path / f"{library}{number}" for library in ("peft", "splice")]
        for model, folder in zip((pair.reference, pair.ours), folders):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.save_pretrained(str(folder), **options)
        assert_same_tensors(tensors_in(folders[1]), tensors_in(folders[0]))


# -- task classes, attributes


@pytest.mark.parametrize("case", plain_cases(bases.LINEAR, *bases.TRANSFORMERS), ids=str)
def test_the_class_follows_the_task(case: Case, shared_checkpoint: Any) -> None:
    pair = load_both(case.base, shared_checkpoint(case.base, case.config()))
    assert type(pair.ours).__name__ == type(pair.reference).__name__
    assert isinstance(pair.ours, splice.PeftModel)
    assert type(pair.ours.base_model.model) is type(case.base.build())
    assert pair.ours.peft_type == pair.reference.peft_type.value == PeftType(case.method.name)
    assert pair.ours.active_adapter == pair.reference.active_adapter
    assert pair.ours.active_peft_config is pair.ours.peft_config["default"]


@transformers_only
def test_attributes_of_the_base_are_found(case: Case, shared_checkpoint: Any) -> None:
    pair = load_both(case.base, shared_checkpoint(case.base, case.config()))
    assert pair.ours.config is pair.ours.get_base_model().config
    assert pair.ours.dtype == pair.reference.dtype
    assert pair.ours.device == pair.reference.device
    assert pair.ours.prefix == pair.reference.prefix
    assert type(pair.ours.get_input_embeddings()) is type(pair.ours.get_base_model().get_input_embeddings())
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = pair.ours.no_such_attribute


# -- status and counting


@pytest.mark.parametrize("case", plain_cases(bases.LINEAR, bases.MIXED, bases.LLAMA), ids=str)
def test_status(case: Case, shared_checkpoint: Any) -> None:
    first = shared_checkpoint(case.base, case.config(modules_to_save=[case.base.head]))
    pair = load_both(case.base, first, shared_checkpoint(case.base, case.other_config(), seed=1))
    for step in (lambda m: None, lambda m: m.set_adapter("second"), lambda m: m.base_model.disable_adapter_layers()):
        pair.each(step)
        assert _layers(pair.ours) == _layers(pair.reference)
        ours, theirs = (dataclasses.asdict(model.get_model_status()) for model in (pair.ours, pair.reference))
        if not case.sample.reference_shares:  # it has more of them
            ours["total_params"] = ours["trainable_params"] = theirs["total_params"] = theirs["trainable_params"] = 0
        assert ours == theirs


def _layers(model: Any) -> dict[str, dict[str, Any]]:
    """The status of every layer, without the class names, which are each library's own."""
    found = {}
    for status in model.get_layer_status():
        fields = dataclasses.asdict(status)
        fields.pop("module_type")
        found[fields.pop("name")] = fields
    return found


@pytest.mark.parametrize("case", plain_cases(bases.LINEAR), ids=str)
def test_status_when_merged(case: Case, shared_checkpoint: Any) -> None:
    pair = load_both(case.base, shared_checkpoint(case.base, case.config()))
    if not mergeable(pair.ours) or case.method.exclusive:
        pytest.skip("cannot be merged, or goes on computing beside the base's weights when it is")
    pair.each(lambda model: model.merge_adapter())
    assert _layers(pair.ours) == _layers(pair.reference)
    assert pair.ours.get_model_status().merged_adapters == pair.reference.get_model_status().merged_adapters


def test_status_needs_adapters() -> None:
    with pytest.raises(ValueError, match="adapter"):
        splice.get_layer_status(bases.LINEAR.build())
    with pytest.raises(ValueError, match="adapter"):
        splice.get_model_status(bases.LINEAR.build())


@pytest.mark.parametrize("is_trainable", [True, False])
@every
def test_counting(case: Case, is_trainable: bool, shared_checkpoint: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shared_checkpoint(case.base, case.config(modules_to_save=[case.base.head]))
    pair = load_both(case.base, folder, is_trainable=is_trainable)
    assert pair.ours.get_nb_trainable_parameters() == pair.reference.get_nb_trainable_parameters()
    pair.reference.print_trainable_parameters()
    theirs = capsys.readouterr().out
    pair.ours.print_trainable_parameters()
    assert capsys.readouterr().out == theirs
