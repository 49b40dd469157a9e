"""Which adapters take effect: rows with adapters of their own, threads, exceptions, disabling."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import peft
import pytest
import torch
from torch import nn

import splice
from splice.selection import BASE
from tests import bases
from tests.bases import Inputs, run
from tests.comparing import assert_close, differ, named
from tests.samples import SAMPLES, Case, kind_cases, plain_cases

ROWS = ["default", BASE, "second", "default", "second"]
every = pytest.mark.parametrize(
    "case", [*kind_cases(), *plain_cases(*bases.SPECIAL, bases.MIXED, *bases.TRANSFORMERS, bases.TIED)], ids=str
)
generating = pytest.mark.parametrize("case", plain_cases(bases.LLAMA, bases.GPT2, bases.T5, bases.TIED), ids=str)


def with_two(library: Any, case: Case, shared_checkpoint: Any, **changes: Any) -> Any:
    """A model with the adapters "default" and "second", which covers fewer layers; "default" is active."""
    model = library.PeftModel.from_pretrained(
        case.base.build(), str(shared_checkpoint(case.base, case.config(**changes)))
    )
    model.load_adapter(str(shared_checkpoint(case.base, case.other_config(**changes), seed=1)), adapter_name="second")
    return model


def row_by_row(model: Any, inputs: Inputs, names: Sequence[str]) -> torch.Tensor:
    """What each row gives on its own, with its adapter active."""
    return torch.cat([alone(model, {k: v[i : i + 1] for k, v in inputs.items()}, name) for i, name in enumerate(names)])


def together(model: Any, inputs: Inputs, names: Sequence[str]) -> torch.Tensor:
    """What the rows of each name give together, with its adapter active."""
    rows = {name: [i for i, other in enumerate(names) if other == name] for name in names}
    found = {name: alone(model, {k: v[own] for k, v in inputs.items()}, name) for name, own in rows.items()}
    return torch.stack([found[name][rows[name].index(i)] for i, name in enumerate(names)])


def expected_rows(case: Case, model: Any, inputs: Inputs) -> torch.Tensor:
    """What a batch with `ROWS` gives: all rows of an adapter at once, where it looks at them together."""
    return (row_by_row if case.sample.row_by_row else together)(model, inputs, ROWS)


def alone(model: Any, inputs: Inputs, name: str) -> torch.Tensor:
    if name == BASE:
        with model.disable_adapter():
            return run(model, inputs)
    model.set_adapter(name, inference_mode=True)
    return run(model, inputs)


# -- one adapter for each row


@every
def test_rows_equal_the_same_rows_alone(case: Case, shared_checkpoint: Any) -> None:
    model = with_two(splice, case, shared_checkpoint)
    inputs = case.base.inputs(len(ROWS))
    expected = expected_rows(case, model, inputs)
    mixed = run(model, inputs, adapter_names=ROWS)
    assert_close(mixed, expected, factor=3)
    assert differ(mixed, run(model, inputs, adapter_names=ROWS[::-1]))


@every
def test_rows_equal_those_of_the_reference(case: Case, shared_checkpoint: Any) -> None:
    sample = SAMPLES[case.method.name]
    if not sample.reference_mixes or (case.base.task == "SEQ_CLS" and "heads" in sample.mixing_lacks):
        pytest.skip("the reference cannot")
    models = [with_two(library, case, shared_checkpoint) for library in (peft, splice)]
    reference, ours = (run(model, case.base.inputs(5), adapter_names=ROWS) for model in models)
    assert_close(ours, reference, factor=3)


@every
def test_all_rows_of_one_adapter(case: Case, shared_checkpoint: Any) -> None:
    """Whatever adapter is active otherwise."""
    model = with_two(splice, case, shared_checkpoint)
    inputs = case.base.inputs(3)
    for name in ("second", "default"):
        expected = alone(model, inputs, name)
        model.set_adapter("default")
        assert_close(run(model, inputs, adapter_names=[name] * 3), expected)
    bare = run(model, inputs, adapter_names=[BASE] * 3)
    assert torch.equal(bare, run(case.base.build(), inputs))


@pytest.mark.parametrize("case", plain_cases(bases.LINEAR, bases.EMBEDDING, bases.MIXED, bases.LLAMA), ids=str)
def test_rows_with_heads_of_their_own(case: Case, shared_checkpoint: Any) -> None:
    if not case.saves_modules:
        pytest.skip("has no modules_to_save")
    """Every adapter brings its own copy of the head."""
    model = with_two(splice, case, shared_checkpoint, modules_to_save=[case.base.head])
    inputs = case.base.inputs(len(ROWS))
    mixed = run(model, inputs, adapter_names=ROWS)
    assert_close(mixed, expected_rows(case, model, inputs), factor=3)


@pytest.mark.parametrize("case", plain_cases(bases.LINEAR, bases.MIXED, bases.BERT), ids=str)
def test_rows_with_biases_of_their_own(case: Case, shared_checkpoint: Any) -> None:
    if "bias" not in vars(splice.get_peft_config(case.config())):
        pytest.skip("the method trains no biases")
    first = shared_checkpoint(case.base, case.config(bias="all"))
    model = splice.PeftModel.from_pretrained(case.base.build(), first)
    model.load_adapter(shared_checkpoint(case.base, case.other_config(), seed=1), "second")
    inputs = case.base.inputs(len(ROWS))
    mixed = run(model, inputs, adapter_names=ROWS)
    assert_close(mixed, expected_rows(case, model, inputs), factor=3)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_beams": 2, "use_cache": False}], ids=str)
@generating
def test_rows_of_a_generation(case: Case, options: dict[str, Any], shared_checkpoint: Any) -> None:
    if not case.sample.row_by_row:
        pytest.skip("what a row gives depends on those beside it")
    model = with_two(splice, case, shared_checkpoint)
    names = ["second", BASE, "default"]
    mixed = bases.generate(model, case.base, adapter_names=names, **options)
    for row, name in enumerate(names):
        if name == BASE:
            with model.disable_adapter():
                expected = bases.generate(model, case.base, **options)
        else:
            model.set_adapter(name)
            expected = bases.generate(model, case.base, **options)
        assert torch.equal(mixed[row], expected[row]), name
    sample = SAMPLES[case.method.name]
    if sample.reference_mixes and not ("num_beams" in options and "beams" in sample.mixing_lacks):
        reference = with_two(peft, case, shared_checkpoint)
        assert torch.equal(mixed, bases.generate(reference, case.base, adapter_names=names, **options))


@generating
def test_rows_of_a_generation_whose_beams_are_set_in_its_config(case: Case, shared_checkpoint: Any) -> None:
    """The number of beams can also come from the model's generation config, or from one that is passed in."""
    model = with_two(splice, case, shared_checkpoint)
    names = ["second", BASE, "default"]
    expected = bases.generate(model, case.base, adapter_names=names, num_beams=2)
    from transformers import GenerationConfig

    config = GenerationConfig(num_beams=2, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    config.decoder_start_token_id = model.generation_config.decoder_start_token_id
    inputs = {"input_ids": case.base.inputs(3)["input_ids"]}
    assert torch.equal(model.generate(**inputs, generation_config=config, adapter_names=names), expected)
    model.generation_config.num_beams = 2
    assert torch.equal(bases.generate(model, case.base, adapter_names=names), expected)


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "float32")], ids=str)
def test_rows_of_one_token(dtypes: tuple[str, str], shared_checkpoint: Any) -> None:
    base = bases.LINEAR
    config = {"peft_type": "LORA", "target_modules": base.targets, "r": 4}
    model: Any = splice.PeftModel.from_pretrained(base.build(), shared_checkpoint(base, config))
    model.load_adapter(shared_checkpoint(base, config, seed=1), "other")
    for name, dtype in zip(("default", "other"), dtypes):
        for key, parameter in named(model):
            if f".{name}." in key:
                parameter.data = parameter.to(getattr(torch, dtype))
    inputs = {key: tensor[:, :1] for key, tensor in base.inputs(3).items()}
    names = ["other", BASE, "default"]
    mixed = run(model, inputs, adapter_names=names)
    assert_close(mixed, row_by_row(model, inputs, names))


@pytest.mark.parametrize("case", plain_cases(bases.LINEAR), ids=str)
def test_gradients_of_mixed_rows_reach_each_adapter(case: Case, shared_checkpoint: Any) -> None:
    """In eval mode; each adapter learns from its own rows alone."""
    model = with_two(splice, case, shared_checkpoint)
    model.set_requires_grad(["default", "second"])
    inputs = case.base.inputs(4)
    model(**inputs, adapter_names=["default", "second", "default", BASE]).square().sum().backward()
    mixed = {name: p.grad.clone() for name, p in named(model) if p.grad is not None}
    assert {name for name in ("default", "second") for key in mixed if name in key.split(".")[-2:]} == {
        "default",
        "second",
    }
    for name, rows in (("default", [0, 2]), ("second", [1])):
        model.zero_grad()
        model.set_adapter(name)
        model(x=inputs["x"][rows]).square().sum().backward()
        for key, parameter in named(model):
            if parameter.requires_grad:
                assert_close(mixed[key], parameter.grad, factor=3)


class Squashed(nn.Linear):
    """A layer that needs its own output for its backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(x))


class Passing(nn.Linear):
    """A layer that gives back the very tensor it was given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("layer", [Squashed, Passing])
def test_rows_do_not_write_into_what_the_base_layer_gave(layer: type[nn.Linear], checkpoint: Any) -> None:
    """Its output may be needed by its backward, or be the caller's own tensor."""
    case = plain_cases(bases.LINEAR)[0]

    def build() -> nn.Module:
        torch.manual_seed(0)
        return bases.Net(layer(6, 6), nn.Linear(6, 4), 4).eval()

    folder = checkpoint(build, case.config(target_modules=["first"]))
    model = splice.PeftModel.from_pretrained(build(), folder, is_trainable=True).eval()
    x = torch.randn(3, 5, 6, requires_grad=True)
    before = x.detach().clone()
    run(model, {"x": x.detach()}, adapter_names=["default", BASE, "default"])
    assert torch.equal(x, before)
    model(x=x, adapter_names=["default", BASE, "default"]).square().sum().backward()
    mixed = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model(x=x[[0, 2]]).square().sum().backward()
    for found, parameter in zip(mixed, (p for p in model.parameters() if p.requires_grad)):
        assert_close(found, parameter.grad, factor=10)


# -- what cannot be mixed


def _message(model: Any, names: Any, rows: int = 3) -> str:
    with pytest.raises((ValueError, TypeError)) as raised:
        run(model, bases.LINEAR.inputs(rows), adapter_names=names)
    return str(raised.value)


@pytest.fixture
def mixed_model(shared_checkpoint: Any) -> Any:
    return with_two(splice, plain_cases(bases.LINEAR)[0], shared_checkpoint)


def test_a_name_that_does_not_exist(mixed_model: Any) -> None:
    text = _message(mixed_model, ["default", "nobody", "second"])
    assert "non-existing adapter" in text
    assert "nobody" in text
    assert "'second'" in text


def test_another_number_of_rows(mixed_model: Any) -> None:
    assert "the number of inputs, but got 2 and 3" in _message(mixed_model, ["default", "second"])
    assert "got 4 and 3" in _message(mixed_model, ["default"] * 4)
    assert "got 0 and 3" in _message(mixed_model, [])


def test_names_that_are_no_list(mixed_model: Any) -> None:
    assert "list or a tuple" in _message(mixed_model, "default")
    assert run(mixed_model, bases.LINEAR.inputs(3), adapter_names=("default", BASE, "second")).shape[0] == 3


def test_in_training_mode(mixed_model: Any) -> None:
    mixed_model.train()
    assert "training mode" in _message(mixed_model, ["default"] * 3)


def test_while_merged(mixed_model: Any) -> None:
    mixed_model.merge_adapter()
    text = _message(mixed_model, ["second"] * 3)
    assert "merged" in text
    assert "default" in text


def test_while_disabled_names_are_ignored(mixed_model: Any) -> None:
    inputs = bases.LINEAR.inputs(3)
    with mixed_model.disable_adapter():
        output = run(mixed_model, inputs, adapter_names=["default", "second", "default"])
    assert torch.equal(output, run(bases.LINEAR.build(), inputs))


@pytest.mark.parametrize("names", [["nobody"] * 3, ["default"], "default"], ids=str)
def test_after_an_error_the_selection_is_what_it_was(names: Any, mixed_model: Any) -> None:
    before = run(mixed_model, bases.LINEAR.inputs(3))
    _message(mixed_model, names)
    assert torch.equal(run(mixed_model, bases.LINEAR.inputs(3)), before)


def test_names_never_reach_the_base(shared_checkpoint: Any) -> None:
    """A base that takes no such argument is called without it, also where it is None."""
    model = with_two(splice, plain_cases(bases.LINEAR)[0], shared_checkpoint)
    inputs = bases.LINEAR.inputs(3)
    assert torch.equal(run(model, inputs, adapter_names=None), run(model, inputs))


# -- exceptions and interrupts inside a call


class Stop(Exception):
    """Raised by the tests' own hooks."""


def _interrupt_at(module: nn.Module, error: type[BaseException]) -> Any:
    def hook(*_: Any) -> None:
        raise error("stop here")

    return module.register_forward_hook(hook)


@pytest.mark.parametrize("how", ["plain", "rows", "disabled", "disabled rows", "generate rows"])
@pytest.mark.parametrize("case", plain_cases(bases.LINEAR, bases.LLAMA), ids=str)
def test_an_exception_leaves_the_selection_as_it_was(case: Case, how: str, shared_checkpoint: Any) -> None:
    model = with_two(splice, case, shared_checkpoint)
    inputs = case.base.inputs(3)
    before = {
        names: run(model, inputs, adapter_names=names and [*names]) for names in (None, ("second", BASE, "default"))
    }
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    layer = model.get_base_model().get_submodule(model.targeted_module_names[-1])
    options = {"adapter_names": ["default", "second", BASE]} if "rows" in how else {}
    generates = how.startswith("generate") and case.base.generates
    call = partial(bases.generate, model, case.base) if generates else partial(run, model, inputs)
    for error in (Stop, KeyboardInterrupt):
        handle = _interrupt_at(layer, error)
        block = model.disable_adapter() if how.startswith("disabled") else nullcontext()
        with pytest.raises(error, match="stop here"), block:
            call(**options)
        handle.remove()
        for names, output in before.items():
            assert torch.equal(run(model, inputs, adapter_names=names and [*names]), output)
        assert model.active_adapters == ["default"]
        assert model.base_model.selection.enabled
    # As in the reference, leaving `disable_adapter` makes the active adapter trainable.
    if not how.startswith("disabled"):
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@pytest.mark.parametrize("case", plain_cases(bases.BERT), ids=str)
def test_an_exception_under_a_trained_bias_leaves_the_parameters(case: Case, shared_checkpoint: Any) -> None:
    """While such a layer computes without its adapter, its bias is another tensor: it must be put back."""
    if "bias" not in vars(splice.get_peft_config(case.config())):
        pytest.skip("the method trains no biases")

    def biases(module: Any) -> dict[str, int]:
        return {name: id(p) for name, p in module.named_parameters() if name.endswith("bias")}

    network = case.base.build()
    own = biases(network)
    model = splice.PeftModel.from_pretrained(network, shared_checkpoint(case.base, case.config(bias="all")))
    trained = biases(model)
    layer = network.get_submodule(model.targeted_module_names[0])

    def fail() -> None:
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            run(model, {"input_ids": torch.tensor([[0, 99999]])})
        with pytest.raises(RuntimeError):
            layer(torch.zeros(2, 7))

    fail()
    assert biases(model) == trained
    with model.disable_adapter():
        fail()
    assert biases(model) == trained
    assert "bias" not in layer.__dict__
    assert biases(model.unload()) == own


# -- disabling


def test_disabling_nests(mixed_model: Any) -> None:
    inputs = bases.LINEAR.inputs(3)
    adapted, bare = run(mixed_model, inputs), run(bases.LINEAR.build(), inputs)
    with mixed_model.disable_adapter():
        with mixed_model.disable_adapter():
            assert torch.equal(run(mixed_model, inputs), bare)
        assert torch.equal(run(mixed_model, inputs), bare)
    assert torch.equal(run(mixed_model, inputs), adapted)
    mixed_model.base_model.disable_adapter_layers()
    with mixed_model.disable_adapter():
        pass
    assert torch.equal(run(mixed_model, inputs), bare)
    mixed_model.base_model.enable_adapter_layers()
    assert torch.equal(run(mixed_model, inputs), adapted)


def test_activating_another_one_while_disabled(library: Any, shared_checkpoint: Any) -> None:
    """It takes effect at the end of the block."""
    model = with_two(library, plain_cases(bases.LINEAR)[0], shared_checkpoint)
    inputs = bases.LINEAR.inputs(3)
    model.set_adapter("second")
    expected = run(model, inputs)
    model.set_adapter("default")
    with model.disable_adapter():
        model.set_adapter("second")
        assert torch.equal(run(model, inputs), run(bases.LINEAR.build(), inputs))
    assert torch.equal(run(model, inputs), expected)


def test_a_merged_adapter_disabled(library: Any, shared_checkpoint: Any) -> None:
    """It is unmerged for the block, and stays so."""
    model = with_two(library, plain_cases(bases.LINEAR)[0], shared_checkpoint)
    inputs = bases.LINEAR.inputs(3)
    expected = run(model, inputs)
    model.merge_adapter()
    with model.disable_adapter():
        assert_close(run(model, inputs), run(bases.LINEAR.build(), inputs))
    assert_close(run(model, inputs), expected)
    assert model.get_model_status().merged_adapters == []


@pytest.mark.parametrize("name", ["nobody", "", "defaul"])
def test_activating_what_does_not_exist(name: str, library: Any, shared_checkpoint: Any) -> None:
    model = with_two(library, plain_cases(bases.LINEAR)[0], shared_checkpoint)
    for change in (model.set_adapter, model.delete_adapter):
        with pytest.raises(ValueError, match=r"not found|does not exist|Adapter"):
            change(name)
    assert model.active_adapters == ["default"]
    assert set(model.peft_config) == {"default", "second"}


def test_a_list_is_not_one_name(library: Any, shared_checkpoint: Any) -> None:
    model = with_two(library, plain_cases(bases.LINEAR)[0], shared_checkpoint)
    with pytest.raises(TypeError, match=r"unhashable|one name"):
        model.set_adapter(["default"])


def test_no_adapter_active(mixed_model: Any) -> None:
    """An empty list leaves the base model."""
    inputs = bases.LINEAR.inputs(3)
    mixed_model.base_model.set_adapter([])
    assert torch.equal(run(mixed_model, inputs), run(bases.LINEAR.build(), inputs))


@pytest.mark.parametrize("names", [["default", "default"], ["second", "default", "second"]], ids=str)
def test_a_name_given_twice(names: list[str], library: Any, shared_checkpoint: Any) -> None:
    """Both libraries do the same with it, whatever that is."""
    models = [with_two(lib, plain_cases(bases.LINEAR)[0], shared_checkpoint) for lib in (peft, splice)]
    for model in models:
        model.base_model.set_adapter(names)
    reference, ours = (run(model, bases.LINEAR.inputs(3)) for model in models)
    assert_close(ours, reference)


# -- threads


@pytest.mark.parametrize("case", plain_cases(bases.LINEAR, bases.LLAMA), ids=str)
def test_threads_with_rows_of_their_own(case: Case, shared_checkpoint: Any) -> None:
    """Every thread brings its own selection; none sees that of another, and all of them share the model."""
    model = with_two(splice, case, shared_checkpoint)
    inputs = case.base.inputs(3)
    plans = [["default"] * 3, ["second"] * 3, [BASE] * 3, ["second", BASE, "default"], None]
    expected = [run(model, inputs, adapter_names=plan) for plan in plans]
    meet = threading.Barrier(len(plans))
    wrong: list[Any] = []

    def work(plan: list[str] | None, output: torch.Tensor) -> None:
        meet.wait()
        for _ in range(20):
            found = run(model, inputs, adapter_names=plan)
            if not torch.equal(found, output):
                wrong.append(plan)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(plans, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_threads_inside_the_same_layer(shared_checkpoint: Any) -> None:
    """Held there together by a hook, so that the two calls certainly overlap."""
    model = with_two(splice, plain_cases(bases.LINEAR)[0], shared_checkpoint)
    inputs = bases.LINEAR.inputs(3)
    plans = [["default"] * 3, ["second", BASE, "second"]]
    expected = [run(model, inputs, adapter_names=plan) for plan in plans]
    meet = threading.Barrier(2, timeout=20)
    first = model.get_base_model().first

    def wait(*_: Any) -> None:
        meet.wait()

    first.register_forward_pre_hook(wait)
    first.register_forward_hook(wait)
    found: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        found[index] = run(model, inputs, adapter_names=plans[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], expected[index]) for index in range(2))


def test_threads_under_trained_biases(shared_checkpoint: Any) -> None:
    """Where an adapter shows the layer another bias while it computes, calls in other threads must not see it."""
    case = plain_cases(bases.LINEAR)[0]
    if "bias" not in vars(splice.get_peft_config(case.config())):
        pytest.skip("the method trains no biases")
    model = splice.PeftModel.from_pretrained(
        case.base.build(), shared_checkpoint(case.base, case.config(bias="lora_only"))
    )
    inputs = case.base.inputs(2)
    plans = [["default"] * 2, [BASE] * 2]
    expected = [run(model, inputs, adapter_names=plan) for plan in plans]
    wrong: list[Any] = []
    meet = threading.Barrier(2)

    def work(index: int) -> None:
        meet.wait()
        for _ in range(300):
            if not torch.equal(run(model, inputs, adapter_names=plans[index]), expected[index]):
                wrong.append(plans[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_models_do_not_share_a_selection(shared_checkpoint: Any) -> None:
    """A model that is called inside another one's call uses its own adapters."""
    case = plain_cases(bases.LINEAR)[0]
    inner = with_two(splice, case, shared_checkpoint)
    outer = with_two(splice, case, shared_checkpoint)
    inputs = case.base.inputs(3)
    expected_inner, expected_outer = run(inner, inputs), run(outer, inputs, adapter_names=["second"] * 3)
    found: list[torch.Tensor] = []
    outer.get_base_model().second.register_forward_hook(lambda *_: found.append(run(inner, inputs)))
    assert torch.equal(run(outer, inputs, adapter_names=["second"] * 3), expected_outer)
    assert torch.equal(found[0], expected_inner)


def test_rows_inside_rows_of_another_model(shared_checkpoint: Any) -> None:
    case = plain_cases(bases.LINEAR)[0]
    inner, outer = (with_two(splice, case, shared_checkpoint) for _ in range(2))
    inputs = case.base.inputs(3)
    names = ["second", BASE, "default"]
    expected = run(outer, inputs, adapter_names=names)

    def call_the_other(*_: Any) -> None:
        run(inner, inputs, adapter_names=["default"] * 3)

    outer.get_base_model().first.register_forward_hook(call_the_other)
    assert torch.equal(run(outer, inputs, adapter_names=names), expected)
