"""Mixed batches for every method of the registry: each row gets what it would get alone, whatever stands beside it."""

from __future__ import annotations

import dataclasses
import gc
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import splice
from splice.kinds import as_one
from splice.kinds.as_one import Alike
from splice.kinds.registry import all_methods
from splice.selection import BASE
from tests import bases
from tests.bases import Inputs, run
from tests.comparing import assert_close, differ
from tests.samples import Case, network_cases, supports
from tests.test_selection import alone

# Three adapters in no order, one of them twice in a row, and the base first, last and in between.
ROWS = [BASE, "third", "default", "second", "second", BASE, "third", "default", BASE]
# Those that are made of other adapters, which a config alone does not bring: tests/test_xlora.py.
MADE_OF_OTHERS = {method.name for method in all_methods().values() if method.experts is not None}


def case_of(method: Any) -> Case:
    """The method on a network that takes sentences: on Llama, or on BERT where that has no layer for it."""
    if method.network_layer is not None:
        return next(case for case in network_cases(bases.LLAMA) if case.method is method)
    return Case(
        method, bases.LLAMA if supports(method, bases.LLAMA) or not supports(method, bases.BERT) else bases.BERT
    )


CASES = [case_of(method) for method in all_methods().values() if method.name not in MADE_OF_OTHERS]
every = pytest.mark.parametrize("case", CASES, ids=str)


def with_three(case: Case, shared_checkpoint: Any) -> Any:
    """Adapters of other sizes, on other layers, and with other values, beside each other."""
    model = splice.PeftModel.from_pretrained(case.base.build(), shared_checkpoint(case.base, case.config()))
    model.load_adapter(shared_checkpoint(case.base, case.other_config(), seed=1), "second")
    plain = {"bias": "none"} if case.trains_biases else {}  # which one adapter of a model can
    model.load_adapter(shared_checkpoint(case.base, case.config(**plain), seed=2), "third")
    return model


def inputs_of(case: Case, tokens: int, rows: int = len(ROWS)) -> Inputs:
    ids = torch.randint(3, bases.VOCABULARY, (rows, tokens), generator=bases.generator(tokens))
    more = {name: torch.tensor(value)[torch.arange(rows) % len(value)] for name, value in case.sample.call.items()}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


def last(output: torch.Tensor, tokens: int) -> torch.Tensor:
    """What a network gives for the tokens of its input: virtual ones, in front of them, are more for some rows."""
    return output[:, -tokens:] if output.dim() == 3 else output


def expected_rows(case: Case, model: Any, inputs: Inputs, names: list[str]) -> torch.Tensor:
    """What each row gives alone; all rows of an adapter at once, where it looks at them together."""
    tokens, found = inputs["input_ids"].shape[1], {}
    for name in names:
        rows = [row for row, other in enumerate(names) if other == name]
        for part in [[row] for row in rows] if case.sample.row_by_row else [rows]:
            output = alone(model, {key: value[part] for key, value in inputs.items()}, name)
            found.update(zip(part, last(output, tokens)))
    return torch.stack([found[row] for row in range(len(names))])


@every
def test_each_row_is_what_it_is_alone(case: Case, shared_checkpoint: Any) -> None:
    """With one token and with 64, in both orders; what is no such batch is refused, and changes nothing."""
    model = with_three(case, shared_checkpoint)
    for tokens, names in ((64, ROWS), (1, ROWS[1:] + ROWS[:1])):
        inputs = inputs_of(case, tokens)
        mixed, expected = run(model, inputs, adapter_names=names), expected_rows(case, model, inputs, names)
        assert_close(last(mixed, tokens), expected)
        bare = run(case.base.build(), {k: v for k, v in inputs.items() if k not in case.sample.call})
        for row, name in enumerate(names):
            # One token has nothing to choose from, so its query, all that the second adapter changes, is of no effect.
            if name == BASE or tokens > 1:
                assert differ(expected[row], last(bare, tokens)[row]) == (name != BASE), name
    with pytest.raises(
        ValueError, match=r"non-existing adapter\(s\): thrid; there are \['default', 'second', 'third'\]"
    ):
        run(model, inputs, adapter_names=["thrid", *names[1:]])
    for count in (len(names) - 1, len(names) + 1):
        with pytest.raises(ValueError, match="`adapter_names` should be the same as the number of inputs, but got"):
            run(model, inputs, adapter_names=(names * 2)[:count])
    assert torch.equal(run(model, inputs, adapter_names=names), mixed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        dataclasses.replace(case, option=option)
        for case in CASES
        for option in case.sample.options
        if case.base.name not in case.sample.not_on.get(option, ())
    ],
    ids=str,
)
def test_each_row_with_options(case: Case, shared_checkpoint: Any) -> None:
    """Whatever an option changes, among it biases and rows of tokens that an adapter brings."""
    model, inputs = with_three(case, shared_checkpoint), inputs_of(case, 6)
    mixed = run(model, inputs, adapter_names=ROWS)
    assert_close(last(mixed, 6), expected_rows(case, model, inputs, ROWS), factor=3)


@pytest.mark.parametrize("case", [case for case in CASES if case.base.generates], ids=str)
def test_each_row_is_generated_as_alone(case: Case, shared_checkpoint: Any) -> None:
    """Where each row becomes several: beams, and sequences for one prompt."""
    if not case.sample.row_by_row:
        pytest.skip("what a row gives depends on those beside it")
    model, names = with_three(case, shared_checkpoint), ["third", BASE, "second"]
    inputs = inputs_of(case, 4, rows=3)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 2, "num_return_sequences": 2}
    mixed = model.generate(**inputs, adapter_names=names, **options)
    found = []
    for row, name in enumerate(names):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        if name == BASE:
            one = {key: value for key, value in one.items() if key not in case.sample.call}
            found.append(case.base.build().generate(**one, **options))
        else:
            model.set_adapter(name, inference_mode=True)
            found.append(model.generate(**one, **options))
    assert torch.equal(mixed, torch.cat(found))


def is_of_kin(case: Case) -> bool:
    return any(issubclass(layer, Alike) for layer in case.method.layers.values())


@pytest.mark.parametrize(
    "names", [["c", "a", BASE, "b", "b", "a", "c"], ["b", "c", "a"]], ids=["some rows", "all rows"]
)
@pytest.mark.parametrize("case", [case for case in CASES if is_of_kin(case)], ids=str)
def test_adapters_that_are_alike_are_computed_as_one(
    case: Case, names: list[str], shared_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the gradients of each, and only as long as they are alike."""
    for layer_class in case.method.layers.values():
        monkeypatch.setattr(layer_class, "least", 2, raising=False)
    stacked: list[bool] = []
    plain = as_one.Kin._stacked
    monkeypatch.setattr(as_one.Kin, "_stacked", lambda kin: stacked.append(bool(plain(kin))) or plain(kin))
    folders = {name: shared_checkpoint(case.base, case.config(), seed=seed) for seed, name in enumerate("abc")}
    model: Any = splice.PeftModel.from_pretrained(case.base.build(), folders["a"], "a", is_trainable=True)
    for name in "bc":
        model.load_adapter(folders[name], name, is_trainable=True)
    model.eval()
    model.base_model.set_requires_grad([*"abc"])
    inputs = inputs_of(case, 5, len(names))
    for alike in (True, False):
        if not alike:
            del stacked[:]
            for layer_class in filter(lambda c: issubclass(c, Alike), case.method.layers.values()):
                monkeypatch.setattr(layer_class, "likeness", lambda layer: id(layer))
        model.zero_grad()
        mixed = model(**inputs, adapter_names=names)[0]
        mixed[:, -1].square().sum().backward()
        assert stacked and set(stacked) == {alike}
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert {name for name in "abc" if any(f".{name}" in key for key in found)} == {*"abc"}
        model.zero_grad()
        for name in "abc":
            rows = [row for row, other in enumerate(names) if other == name]
            model.set_adapter(name)
            model.base_model.set_requires_grad([*"abc"])
            output = model(**{key: value[rows] for key, value in inputs.items()})[0]
            assert_close(mixed[rows].detach(), output.detach())
            output[:, -1].square().sum().backward()
        for key, parameter in model.named_parameters():
            if key in found:
                assert_close(found[key], parameter.grad, factor=20)


def test_long_rows_and_few_adapters_are_computed_adapter_by_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one, they would be copied for nothing. What is kept of short rows between two calls is not for long ones."""
    assert Alike.least > 2
    monkeypatch.setattr(Alike, "least", 2)
    stacked: list[int] = []
    plain = as_one.Kin._stacked
    monkeypatch.setattr(as_one.Kin, "_stacked", lambda kin: stacked.append(len(kin.layers)) or plain(kin))
    config = splice.HRAConfig(r=2, target_modules=["0"], init_weights=False)
    model: Any = splice.get_peft_model(nn.Sequential(nn.Linear(8, 12)), config, "one").eval()
    model.add_adapter("two", config)
    for tokens, expected in ((1, [2]), (7, [2]), (8, []), (1, [2])):
        del stacked[:]
        x = torch.randn(3, tokens, 8)
        mixed = model(x, adapter_names=["two", BASE, "one"])
        assert stacked == expected
        for row, name in ((0, "two"), (2, "one")):
            model.set_adapter(name)
            assert_close(mixed[row].detach(), model(x[row : row + 1])[0].detach())
    monkeypatch.setattr(Alike, "least", 3)
    for host in model.base_model.hosts.values():
        host.row_plan = None
    del stacked[:]
    model(torch.randn(3, 1, 8), adapter_names=["two", BASE, "one"])
    assert not stacked


class Counting(nn.Linear):
    """Counts its calls."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("gradients", [True, False])
def test_the_base_is_called_once_for_all_rows(gradients: bool) -> None:
    """Also for methods that change what goes into it, each in its own way, and rows that are no neighbours."""
    fields: dict[str, dict[str, Any]] = {
        "OFT": {"oft_block_size": 4},
        "IA3": {"feedforward_modules": ["0"], "init_ia3_weights": False},
        "HRA": {"r": 2},
        "LORA": {"r": 2, "init_lora_weights": False},
        "ROAD": {"group_size": 2, "init_weights": False},
        "BOFT": {"boft_block_size": 4},
    }
    base, model = nn.Sequential(Counting(8, 12), nn.Tanh(), nn.Linear(12, 4)), None
    torch.manual_seed(0)
    for method, own in fields.items():
        config = splice.get_peft_config({"peft_type": method, "target_modules": ["0"], **own})
        if model is None:
            model = splice.PeftMixedModel(base, config, adapter_name=method)
        else:
            model.add_adapter(method, config)
    assert model is not None
    own_names = {method: {n for n, _ in model.named_parameters() if f".{method}" in n} for method in fields}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(name in names for names in own_names.values()):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.eval()
    model.base_model.set_requires_grad([*fields])
    x, names = torch.randn(9, 3, 8), [*fields, BASE, "OFT", "IA3"]
    kept = x.clone()
    with torch.set_grad_enabled(gradients):
        mixed = model(x, adapter_names=names)
        assert base[0].calls == 1 and torch.equal(x, kept)
    if gradients:
        mixed.square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for method in [*fields, BASE]:
        rows = [row for row, name in enumerate(names) if name == method]
        if method == BASE:
            with model.disable_adapter():
                assert_close(mixed[rows].detach(), model(x[rows]).detach())
            continue
        model.set_adapter(method)
        model.zero_grad()
        output = model(x[rows])
        assert_close(mixed[rows].detach(), output.detach())
        output.square().sum().backward()
        for name, parameter in model.named_parameters() if gradients else ():
            if name in own_names[method]:
                assert_close(found[name], parameter.grad, factor=10)


def _replaced(model: Any) -> None:
    model.set_adapter("two")
    model.delete_adapter("one")
    model.add_adapter("one", splice.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))


def _of_another_method(model: Any) -> None:
    model.set_adapter("two")
    model.delete_adapter("one")
    config = splice.LoHaConfig(r=2, target_modules=["0"], init_weights=False)
    model.add_adapter("one", config)


def _exchanged(model: Any) -> None:
    state = {name: tensor + 0.5 for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _hooked(model: Any) -> None:
    for name, module in model.named_modules():
        if name.endswith("lora_B.one"):
            module.register_forward_hook(lambda *_: None)


def _rescaled(model: Any) -> None:
    model.base_model.model[0].set_scale("one", 5)


def _written(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if ".one." in name:
            parameter.data.mul_(2)


CHANGES = [_replaced, _of_another_method, _exchanged, _hooked, _rescaled, _written, lambda model: model.double()]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_two_batches_counts(change: Any) -> None:
    """What a layer keeps of the way through the last batch is no more than which adapters it has."""
    torch.manual_seed(0)
    config = splice.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model: Any = splice.PeftMixedModel(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4)), config, adapter_name="one")
    for name, rank in (("two", 2), ("three", 4)):
        model.add_adapter(name, splice.LoraConfig(r=rank, target_modules=["0"], init_lora_weights=False))
    model.eval()
    names = ["two", "one", BASE, "three", "one"]
    with torch.no_grad():
        first = model(torch.ones(5, 8), adapter_names=names)
        assert torch.equal(first, model(torch.ones(5, 8), adapter_names=names))
        change(model)
        x = torch.ones(5, 8, dtype=next(model.parameters()).dtype)
        second = model(x, adapter_names=names)
        assert differ(second[1].float(), first[1]) == (change not in (_hooked, CHANGES[-1]))
        for row, name in enumerate(names):
            assert_close(second[row : row + 1].float(), alone(model, {"input": x[row : row + 1]}, name).float())


def test_a_compiled_batch_does_not_depend_on_those_before_it() -> None:
    config = splice.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model: Any = splice.get_peft_model(nn.Sequential(nn.Linear(8, 12)), config, "one").eval()
    model.add_adapter("two", config)
    step = torch.compile(lambda x: model(x, adapter_names=["two", BASE, "one"]), backend="eager", fullgraph=True)
    x = torch.randn(3, 8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler looks through caches, and says so
        for _ in range(2):
            expected = step(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for names in (["one", "two", BASE], ["two", "two", BASE], ["two", BASE, "one"]):
                mixed = model(x, adapter_names=names)
                assert torch.equal(step(x), expected)
    assert_close(mixed, expected)


def test_a_deleted_adapter_is_kept_by_nobody() -> None:
    config = splice.LoraConfig(target_modules=["0"])
    model: Any = splice.get_peft_model(nn.Sequential(nn.Linear(8, 12)), config, "one").eval()
    model.add_adapter("two", config)
    model(torch.ones(2, 8), adapter_names=["one", "two"])
    kept = weakref.ref(model.base_model.model[0].splice_host.layers["two"])
    assert pickle.loads(pickle.dumps(model))(torch.ones(2, 8)).shape == (2, 12)
    model.delete_adapter("two")
    gc.collect()
    assert kept() is None
