"""Slots: adapters whose factors lie side by side compute, train and save what the same adapters do elsewhere."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import splice
from splice.selection import BASE, Group
from splice.surgery import rows, stacked_rows
from tests import bases
from tests.bases import Base, run
from tests.comparing import assert_close, differ

COUNT, RANK = 8, 4
TARGETS = list(bases.LLAMA.targets)
NAMES = [f"adapter {number}" for number in range(COUNT)]


def config_of(rank: int = RANK, base: Base = bases.LLAMA, **fields: Any) -> Any:
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(base.targets), **fields}
    return splice.get_peft_config({**fields, "task_type": base.task})


def state_of(config: Any, seed: int, base: Base = bases.LLAMA) -> dict[str, torch.Tensor]:
    model = splice.get_peft_model(base.build(), copy.copy(config))
    state, source = splice.get_peft_model_state_dict(model, save_embedding_layers=False), bases.generator(seed)
    return {name: torch.randn(tensor.shape, generator=source) / 3 for name, tensor in state.items()}


def loaded(
    slots: int | None = None,
    configs: Mapping[str, Any] | None = None,
    base: Base = bases.LLAMA,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    """A model with an adapter for each config; with slots, the first moves in and all others are read into them.

    Without slots, each tensor is anywhere in memory.
    """
    configs = configs or {name: config_of() for name in NAMES}
    model: Any = None
    for seed, (name, config) in enumerate(configs.items()):
        given: dict[str, Any] = {"config": config, "tensors": state_of(config, seed, base), **options}
        if model is None:
            model = splice.PeftModel.from_pretrained(base.build(dtype), adapter_name=name, **given)
            if slots is not None:
                model.slots(slots, RANK)
        else:
            model.load_adapter(None, name, **given)
    if slots is None:
        for name in configs:
            for parameter in parameters_of(model, name):
                parameter.data = parameter.data.clone()
    return model


def parameters_of(model: Any, name: str) -> list[nn.Parameter]:
    return [parameter for key, parameter in model.named_parameters() if f".{name}." in key]


def in_slots(model: Any, name: str) -> int:
    """How many of an adapter's tensors lie in stacks."""
    stacks = [host.stack for host in model.base_model.hosts.values() if host.stack is not None]
    return sum(any(stack.owns(p) for stack in stacks) for p in parameters_of(model, name))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[stacked_rows.Run]:
    """The runs that were computed."""
    seen: list[stacked_rows.Run] = []

    def noted(y: Any, x: Any, factors: Any, run: Any, scales: Any, is_own: bool) -> torch.Tensor:
        seen.append(run)
        return stacked_rows.add_run(y, x, factors, run, scales, is_own)

    monkeypatch.setattr(rows, "add_run", noted)
    return seen


# -- what a mixed batch gives

MIXTURES: dict[str, list[str]] = {
    "all in order": NAMES,
    "reversed": NAMES[::-1],
    "with rows of the base": [BASE, *NAMES[:3], BASE, *NAMES[3:6]],
    "with gaps": [NAMES[n] for n in (0, 1, 3, 4, 6, 7)],
    "two rows each": [name for name in NAMES[:4] for _ in range(2)],
    "two rows each, apart": NAMES[:4] * 2,
    "some once, some twice": [*NAMES[:4], *NAMES[4:7], *NAMES[4:7]],
    "one": [NAMES[3]] * 3,
    "neighbours and one by itself": [*NAMES[:4], NAMES[7]],
}


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_rows_are_what_they_are_without_slots(mixture: list[str], tokens: int, runs: list[Any]) -> None:
    plain, slotted = both()
    inputs = {"input_ids": bases.LLAMA.inputs(len(mixture))["input_ids"][:, :tokens]}
    expected = run(plain, inputs, adapter_names=mixture)
    assert_close(run(slotted, inputs, adapter_names=mixture), expected)
    assert bool(runs) == (len(set(mixture)) > 1)
    with torch.enable_grad():  # by the parameters themselves
        assert_close(slotted(**inputs, adapter_names=mixture).logits, plain(**inputs, adapter_names=mixture).logits)


_both: list[Any] = []


def both() -> list[Any]:
    """The same adapters without slots and with them; for tests that change neither."""
    if not _both:
        _both.extend((loaded(), loaded(COUNT)))
    return _both


def test_every_way_through_a_batch_is_taken(runs: list[Any]) -> None:
    """All rows at once, some of them, over gaps, several rows each: none of the mixtures above is in vain."""
    _, slotted = both()
    for mixture in MIXTURES.values():
        run(slotted, bases.LLAMA.inputs(len(mixture)), adapter_names=mixture)
        run(slotted, {"input_ids": torch.ones(len(mixture), 1, dtype=torch.long)}, adapter_names=mixture)
    assert {(run.rows is None, run.used is None) for run in runs} == {(True, True), (False, True), (False, False)}
    assert {len(run.groups) for run in runs} >= {COUNT, 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_of_several_ranks_and_scales(dtype: torch.dtype, autocast: bool, runs: list[Any]) -> None:
    """Behind a smaller rank stand zeros, larger ones stay outside; sums are made in the wider dtype."""
    configs = {"four": config_of(4), "two": config_of(2, lora_alpha=9), "one": config_of(1), "large": config_of(16)}
    configs["three"] = config_of(3, rank_pattern={"q_proj": 4, "v_proj": 9})
    plain, slotted = (loaded(n, configs, dtype=dtype, autocast_adapter_dtype=autocast) for n in (None, COUNT))
    report = slotted.slots()
    assert set(report.numbers) == {"four", "two", "one", "three"} and set(report.outside) == {"large", "three"}
    assert "its rank 16 is above that of the slots, 4" in report.outside["large"]
    assert report.outside["three"].startswith("2 of its 6 layers, for ") and in_slots(slotted, "three") == 8
    names = [*configs, BASE]
    inputs = bases.LLAMA.inputs(len(names))
    assert_close(run(slotted, inputs, adapter_names=names), run(plain, inputs, adapter_names=names))
    assert runs
    for name in configs:
        for model in (plain, slotted):
            model.set_adapter(name)
        assert torch.equal(run(slotted, inputs), run(plain, inputs))
        for one, two in zip(parameters_of(plain, name), parameters_of(slotted, name), strict=True):
            assert torch.equal(one, two) and one.shape == two.shape


@pytest.mark.parametrize("base", [bases.LINEAR, bases.TRANSPOSED, bases.GPT2, bases.T5], ids=str)
def test_other_networks(base: Base, runs: list[Any]) -> None:
    configs = {name: config_of(base=base) for name in NAMES[:5]}
    plain, slotted = loaded(None, configs, base), loaded(COUNT, configs, base)
    inputs, names = base.inputs(5), NAMES[:5]
    assert_close(run(slotted, inputs, adapter_names=names), run(plain, inputs, adapter_names=names))
    assert runs and differ(run(slotted, inputs, adapter_names=names), run(slotted, inputs, adapter_names=names[::-1]))


def test_generation(runs: list[Any]) -> None:
    plain, slotted = both()
    names = [NAMES[1], BASE, NAMES[2], NAMES[3], NAMES[4]]
    for options in ({}, {"num_beams": 2}):
        ours, expected = (
            bases.generate(model, bases.LLAMA, rows=5, adapter_names=names, **options) for model in (slotted, plain)
        )
        assert torch.equal(ours, expected)
    assert runs


def test_a_scale_that_was_changed_counts(runs: list[Any]) -> None:
    plain, slotted = loaded(), loaded(COUNT)
    inputs, before = bases.LLAMA.inputs(COUNT), run(plain, bases.LLAMA.inputs(COUNT), adapter_names=NAMES)
    for model in (plain, slotted):
        for layer in model.base_model.adapted.values():
            layer.scaling[NAMES[1]] *= 3
    expected = run(plain, inputs, adapter_names=NAMES)
    assert_close(run(slotted, inputs, adapter_names=NAMES), expected)
    assert runs and differ(expected, before)


def test_other_methods_stay_outside(runs: list[Any]) -> None:
    """They are told of, and share a batch with adapters in slots."""
    configs = {name: config_of() for name in NAMES[:4]}
    configs["dora"], configs["bias"] = config_of(use_dora=True), config_of(lora_bias=True)
    configs["embedded"] = config_of(target_modules=["embed_tokens", "q_proj"])
    plain, slotted = loaded(configs=configs), loaded(COUNT, configs)
    report = slotted.slots()
    assert sorted(report.numbers) == sorted([*NAMES[:4], "embedded"])
    assert "DoraLinear" in report.outside["dora"] and "lora_B.bias" in report.outside["bias"]
    assert report.outside["embedded"].startswith("1 of its 3 layers, for model.embed_tokens: a LoraEmbedding")
    names = list(configs)
    inputs = bases.LLAMA.inputs(len(names))
    assert_close(run(slotted, inputs, adapter_names=names), run(plain, inputs, adapter_names=names))
    assert runs


def test_tensors_that_tied_layers_share_stay_outside() -> None:
    config = config_of(base=bases.TIED, target_modules=["lm_head", "embed_tokens"], ensure_weight_tying=True)
    model: Any = splice.get_peft_model(bases.TIED.build(), config)
    report = model.slots(2, RANK)
    assert in_slots(model, "default") == 0 and "default" in report.outside and not report.numbers


# -- coming and going


def test_a_load_reads_straight_into_a_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(configs={"one": config_of()}).save_pretrained(tmp_path)
    model = loaded(2)
    copies = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *args: copies.append(args))
    model.slots()  # the two that there is room for are there; a third has to wait
    model.delete_adapter(NAMES[1])
    model.load_adapter(tmp_path / "one", "new")
    assert not copies and in_slots(model, "new") == 12


def test_names_and_files_are_the_same(tmp_path: Path) -> None:
    plain, slotted = loaded(), loaded(COUNT)
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in slotted.named_parameters()]
    assert [n for n, _ in plain.named_buffers()] == [n for n, _ in slotted.named_buffers()]
    assert plain.state_dict().keys() == slotted.state_dict().keys()
    for safe in (True, False):
        for model, folder in ((plain, tmp_path / "plain"), (slotted, tmp_path / "slotted")):
            model.save_pretrained(folder, safe_serialization=safe)
    files = [path for path in (tmp_path / "plain").rglob("adapter_*") if path.is_file()]
    assert len(files) == COUNT * 3 - COUNT  # safetensors make way for `.bin`
    for path in files:
        other = tmp_path / "slotted" / path.relative_to(tmp_path / "plain")
        if path.suffix == ".bin":
            one, two = (torch.load(p, weights_only=True) for p in (path, other))
            assert all(torch.equal(one[key], two[key]) for key in one) and path.stat().st_size == other.stat().st_size
        else:
            assert path.read_bytes() == other.read_bytes()


def test_safetensors_files_are_the_same(tmp_path: Path) -> None:
    configs = {"one": config_of(), "two": config_of(2)}
    for count, folder in ((None, tmp_path / "plain"), (2, tmp_path / "slotted")):
        loaded(count, configs).save_pretrained(folder)
    for path in (tmp_path / "plain").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "slotted" / path.relative_to(tmp_path / "plain")).read_bytes()


def test_a_state_dict_of_one_adapter_does_not_bring_the_others() -> None:
    sizes = []
    for model in both():
        file = io.BytesIO()
        torch.save(splice.get_peft_model_state_dict(model, adapter_name=NAMES[2]), file)
        sizes.append(len(file.getvalue()))
    assert sizes[1] <= sizes[0] * 1.05


def test_reserving_moves_adapters_in_and_out_again() -> None:
    """The parameters stay the objects they are, with their flags, and an optimizer goes on training them."""
    model = loaded()
    inputs = bases.LLAMA.inputs(COUNT)
    before, parameters = run(model, inputs, adapter_names=NAMES), dict(model.named_parameters())
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    report = model.slots(COUNT - 1, RANK)
    assert list(report.numbers.items()) == [(name, number) for number, name in enumerate(NAMES[:-1])]
    assert report.outside == {NAMES[-1]: "all 7 slots are taken"}
    layers = len(model.base_model.adapted)  # each with a number for each slot, the scale
    assert report.nbytes == (COUNT - 1) * (sum(p.nbytes for p in parameters_of(model, NAMES[0])) + 4 * layers)
    assert str(report) == f"slots: 7 of 7 taken, 21.7 kB\n  outside: {NAMES[-1]!r}, all 7 slots are taken"
    for step in (lambda: None, lambda: model.slots(COUNT, RANK + 1), lambda: model.slots(0)):
        step()
        assert all(p is parameters[name] and torch.equal(p, values[name]) for name, p in model.named_parameters())
        assert_close(run(model, inputs, adapter_names=NAMES), before)
    assert not any(in_slots(model, name) for name in NAMES) and model.slots().total == 0
    assert all(host.stack is None for host in model.base_model.hosts.values())


def test_wrong_numbers_are_refused() -> None:
    model = loaded(2, {"one": config_of()})
    for count, rank in ((-1, 4), (4, 0), (4, None), (None, 4)):
        with pytest.raises(ValueError, match="slots need a count of at least 0 and a rank of at least 1"):
            model.slots(count, rank)
    assert model.slots().numbers == {"one": 0}


def test_deleting_copies_nothing_that_nobody_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(COUNT, {name: config_of() for name in NAMES[:3]})
    run(model, bases.LLAMA.inputs(3), adapter_names=NAMES[:3])
    copied: list[torch.Size] = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(
        torch.Tensor, "clone", lambda own, **options: (copied.append(own.shape), clone(own, **options))[1]
    )
    model.delete_adapter(NAMES[1])
    assert not copied
    held = parameters_of(model, NAMES[2])[0]
    model.delete_adapter(NAMES[2])
    assert copied == [held.shape] and held.any()


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_a_backward_after_slots_were_left_has_the_values_of_its_call_or_is_refused(frozen: bool) -> None:
    def loss_of(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        model.set_adapter(NAMES[1], inference_mode=frozen)
        width = model.get_base_model().config.hidden_size
        inputs = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
        return inputs, model(inputs_embeds=inputs).logits.square().sum()

    plain, slotted = loaded(), loaded(COUNT)
    (inputs, loss), (slotted_inputs, slotted_loss) = loss_of(plain), loss_of(slotted)
    for model in (plain, slotted):
        model.slots(0)  # all of them get memory of their own
        model.delete_adapter(NAMES[1])
    for one in (loss, slotted_loss):
        one.backward()
    assert inputs.grad is not None and slotted_inputs.grad is not None
    assert_close(slotted_inputs.grad, inputs.grad)

    slotted = loaded(COUNT)
    _, loss = loss_of(slotted)
    slotted.delete_adapter(NAMES[1])  # another one may have its slot by now
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_deleted_adapter_leaves_its_slot_empty_and_its_values_to_whoever_holds_them() -> None:
    configs = {name: config_of() for name in NAMES[:3]}
    model = loaded(3, configs)
    held = parameters_of(model, NAMES[1])
    values = [parameter.detach().clone() for parameter in held]
    model.delete_adapter(NAMES[1])
    stacks = [host.stack for host in model.base_model.hosts.values()]
    assert all(not stack.a[1].any() and not stack.b[1].any() for stack in stacks)
    model.load_adapter(None, "new", config=config_of(2), tensors=state_of(config_of(2), 9))
    assert model.slots().numbers == {NAMES[0]: 0, NAMES[2]: 2, "new": 1}
    assert all(torch.equal(parameter, value) for parameter, value in zip(held, values, strict=True))
    plain = loaded(configs={**{name: config_of() for name in NAMES[:3]}})
    plain.load_adapter(None, "new", config=config_of(2), tensors=state_of(config_of(2), 9))
    names, inputs = [NAMES[0], "new", NAMES[2]], bases.LLAMA.inputs(3)
    assert_close(run(model, inputs, adapter_names=names), run(plain, inputs, adapter_names=names))


def test_a_load_that_fails_takes_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(3, {"one": config_of(), "two": config_of()})
    inputs = bases.LLAMA.inputs(2)
    before = run(model, inputs, adapter_names=["one", "two"])

    state = state_of(config_of(), 5)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for place in ("commit", "set_requires_grad"):
        with monkeypatch.context() as patch:
            patch.setattr(type(model.base_model), place, interrupt)
            with pytest.raises(KeyboardInterrupt):
                model.load_adapter(None, "three", config=config_of(), tensors=state, is_trainable=True)
        assert model.slots().numbers == {"one": 0, "two": 1}
        assert all(not host.stack.a[2].any() for host in model.base_model.hosts.values())
    assert torch.equal(run(model, inputs, adapter_names=["one", "two"]), before)
    model.load_adapter(None, "three", config=config_of(), tensors=state)
    assert model.slots().numbers["three"] == 2


def test_new_weights_over_an_adapter_in_a_slot(runs: list[Any]) -> None:
    plain, slotted = loaded(), loaded(COUNT)
    for model in (plain, slotted):
        model.load_adapter(None, NAMES[3], tensors=state_of(config_of(), 77))
    inputs = bases.LLAMA.inputs(COUNT)
    assert_close(run(slotted, inputs, adapter_names=NAMES), run(plain, inputs, adapter_names=NAMES))
    assert runs and in_slots(slotted, NAMES[3]) == 12


def test_unloading_gives_the_base_back() -> None:
    inputs = bases.LLAMA.inputs(3)
    for take_off in ("unload", "merge_and_unload"):
        plain, slotted = loaded(), loaded(COUNT)
        held = parameters_of(slotted, NAMES[2])
        values = [parameter.detach().clone() for parameter in held]
        one, two = (getattr(model, take_off)() for model in (plain, slotted))
        assert torch.equal(run(two, inputs), run(one, inputs))
        assert all(torch.equal(parameter, value) for parameter, value in zip(held, values, strict=True))
        assert slotted.slots().total == 0


# -- what moves parameters out of their slots


def deep_copy(model: Any) -> Any:
    return copy.deepcopy(model)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def in_double(model: Any) -> Any:
    return model.double()


def assigned(model: Any) -> Any:
    state = {
        name: tensor * 2 if "lora_A.adapter 3" in name else tensor.clone()
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    return model


def with_data_of_its_own(model: Any) -> Any:
    for parameter in parameters_of(model, NAMES[3]):
        parameter.data = parameter.data * 2
    return model


def swapped(model: Any) -> Any:
    for parameter in parameters_of(model, NAMES[3]):
        other = nn.Parameter(parameter.detach() * 2, requires_grad=False)
        torch.utils.swap_tensors(parameter, other)
    return model


def written(model: Any) -> Any:
    with torch.no_grad():
        for parameter in parameters_of(model, NAMES[3]):
            parameter.mul_(2)
    return model


@pytest.mark.parametrize(
    "change", [deep_copy, pickled, saved, in_double, assigned, with_data_of_its_own, swapped, written]
)
def test_a_parameter_counts_wherever_it_is(change: Callable[[Any], Any], runs: list[Any]) -> None:
    plain, slotted = loaded(), loaded(COUNT)
    inputs = bases.LLAMA.inputs(COUNT)
    before = run(slotted, inputs, adapter_names=NAMES)
    changed = [change(model) for model in (plain, slotted)]
    expected, ours = (run(model, inputs, adapter_names=NAMES) for model in changed)
    assert_close(ours, expected)
    if changed[1] is slotted and change is not in_double:
        assert differ(ours, before)
    else:
        assert_close(ours.float(), before)
    if changed[1] is not slotted:  # the copy has slots of its own, and the original keeps its
        assert changed[1].slots() == slotted.slots()
        assert in_slots(slotted, NAMES[3]) == 12 and runs
        stacks = [[host.stack for host in model.base_model.hosts.values()] for model in (slotted, changed[1])]
        assert all(one is not two and not one.owns(two.a) for one, two in zip(*stacks, strict=True))
    if change in (deep_copy, pickled, saved, in_double, written):
        assert in_slots(changed[1], NAMES[3]) == 12
    changed[1].slots(COUNT, RANK)  # all move in again
    assert_close(run(changed[1], inputs, adapter_names=NAMES), expected)
    assert in_slots(changed[1], NAMES[3]) == 12


def test_a_copy_of_the_network_alone_has_slots() -> None:
    """It carries the adapters, without a PeftModel around it; and a copy made before slots were full keeps the same ones."""
    model = loaded(3, {name: config_of() for name in NAMES[:3]})
    model.delete_adapter(NAMES[1])
    copied = copy.deepcopy(model.get_base_model())
    tuner = splice.surgery.tuner.Tuner.of(copied)
    assert tuner.reserved_slots is not None and list(tuner.reserved_slots.numbers) == [NAMES[0], NAMES[2]]
    assert all(host.stack is not None and host.stack.tenants for host in tuner.hosts.values())
    assert in_slots(model, NAMES[0]) == in_slots(model, NAMES[2]) == 12


MOVES: dict[str, Callable[[Any], Any]] = {
    "in bfloat16": lambda model: model.to(torch.bfloat16),
    "the network alone": lambda model: model.get_base_model().to(torch.float64),
    "there and back": lambda model: model.double().float(),
    "where it is": lambda model: model.to("cpu"),
    "with memory that is shared": lambda model: model.share_memory(),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_slots_follow_the_model(move: Callable[[Any], Any], runs: list[Any]) -> None:
    configs = {name: config_of(rank) for name, rank in zip(NAMES, (4, 2, 3))}
    plain, slotted = loaded(configs=configs), loaded(COUNT, configs)
    for model in (plain, slotted):
        move(model)
    names, inputs = [*configs, BASE], bases.LLAMA.inputs(4)
    assert_close(run(slotted, inputs, adapter_names=names), run(plain, inputs, adapter_names=names))
    assert runs and all(in_slots(slotted, name) == 12 for name in configs)
    stacks = [host.stack for host in slotted.base_model.hosts.values()]
    parameters = {n: p for name in configs for n, p in slotted.named_parameters() if f".{name}." in n}
    assert {stack.a.dtype for stack in stacks} == {p.dtype for p in parameters.values()}
    assert {p.is_shared() for p in parameters.values()} == {move is MOVES["with memory that is shared"]}
    # Behind a smaller rank there are zeros, wherever the stack is; and another adapter finds room.
    assert not any(stack.a[1, 2:].any() or stack.b[1, :, 2:].any() or stack.a[3:].any() for stack in stacks)
    slotted.set_adapter(NAMES[1])
    slotted.delete_adapter(NAMES[0])
    assert not any(stack.a[0].any() for stack in stacks)
    assert in_slots(slotted, NAMES[1]) == 12


def test_slots_without_memory_keep_nothing() -> None:
    model = loaded(COUNT, {name: config_of() for name in NAMES[:2]}).to("meta")
    assert all(not host.stack.tenants for host in model.base_model.hosts.values())
    with pytest.raises(ValueError, match="does not lie in a slot"):
        model.slot_rows(NAMES[:2])


def test_an_adapter_of_another_dtype_stays_outside() -> None:
    """Of one dtype with those that are there it would be in a slot."""
    configs = {name: config_of() for name in NAMES[:3]}
    model = loaded(COUNT, configs, dtype=torch.bfloat16, autocast_adapter_dtype=False)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in state_of(config_of(), 3).items()}
    model.load_adapter(None, "new", config=config_of(), tensors=state)
    assert "its tensors are float32 on cpu" in model.slots().outside["new"]
    names = [*configs, "new"]
    mixed = run(model, bases.LLAMA.inputs(4), adapter_names=names)
    for row, name in enumerate(names):
        model.set_adapter(name)
        assert_close(run(model, bases.LLAMA.inputs(4))[row], mixed[row])


# -- what else one does with adapters


def trained(model: Any, name: str) -> list[torch.Tensor]:
    model.train()
    model.set_adapter(name)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    for _ in range(2):
        output = model(**bases.LLAMA.inputs(3)).logits
        output.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return [parameter.detach().clone() for parameter in parameters_of(model, name)]


@pytest.mark.parametrize("rank", [RANK, 2])
def test_training(rank: int, runs: list[Any]) -> None:
    """One adapter in its slot; the others keep their values, and a batch sees the new ones."""
    configs = {name: config_of() for name in NAMES[:3]} | {"trained": config_of(rank), "after": config_of()}
    plain, slotted = loaded(configs=configs), loaded(COUNT, configs)
    others = [p.detach().clone() for p in parameters_of(slotted, "after")]
    for one, two in zip(trained(plain, "trained"), trained(slotted, "trained"), strict=True):
        assert_close(two, one)
    assert all(torch.equal(a, b) for a, b in zip(parameters_of(slotted, "after"), others, strict=True))
    assert in_slots(slotted, "trained") == 12
    names = list(configs)
    inputs = bases.LLAMA.inputs(5)
    assert_close(run(slotted, inputs, adapter_names=names), run(plain, inputs, adapter_names=names), factor=3)
    assert runs


def test_training_two_adapters_in_turn() -> None:
    """A step of one adapter is no change of another one's factors, which a backward still needs."""
    model = loaded(COUNT, {"moved in": config_of(), "one": config_of(), "two": config_of()})
    model.train()
    model.set_adapter("one")
    loss = model(**bases.LLAMA.inputs(3)).logits.square().mean()
    with torch.no_grad():
        for parameter in parameters_of(model, "two"):
            parameter.mul_(1.5)
    loss.backward()
    assert all(parameter.grad is not None for parameter in parameters_of(model, "one"))


def test_merging() -> None:
    plain, slotted = loaded(), loaded(COUNT)
    inputs, weights = bases.LLAMA.inputs(3), {n: p.clone() for n, p in slotted.named_parameters() if "lora" not in n}
    for model in (plain, slotted):
        model.merge_adapter([NAMES[1]])
    assert torch.equal(run(slotted, inputs), run(plain, inputs))
    with pytest.raises(ValueError, match="there are merged adapters"):
        slotted(**inputs, adapter_names=NAMES[:3])
    slotted.unmerge_adapter()
    assert all(torch.equal(p, weights[n]) for n, p in slotted.named_parameters() if "lora" not in n)


def test_slots_that_are_given_up_leave_no_memory() -> None:
    """Also after a mixed batch, of which the layers keep how it was computed."""
    slotted = loaded(COUNT)
    run(slotted, bases.LLAMA.inputs(COUNT), adapter_names=NAMES)
    stacks = [weakref.ref(host.stack) for host in slotted.base_model.hosts.values()]
    slotted.slots(0)
    assert len(stacks) > 1 and not [stack for stack in stacks if stack() is not None]


def test_disabling() -> None:
    _, slotted = both()
    inputs = bases.LLAMA.inputs(COUNT)
    with slotted.disable_adapter():
        assert torch.equal(run(slotted, inputs, adapter_names=NAMES), run(bases.LLAMA.build(), inputs))


def test_new_and_combined_adapters_take_slots(runs: list[Any]) -> None:
    configs = {name: config_of() for name in NAMES[:3]}
    models = loaded(configs=configs), loaded(COUNT, configs)
    for model in models:
        model.add_weighted_adapter(NAMES[:2], [0.5, 0.5], "sum", "linear")
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model.add_adapter("new", config_of(init_lora_weights=False))
    names = [*configs, "sum", "new"]
    inputs = bases.LLAMA.inputs(5)
    expected, ours = (run(model, inputs, adapter_names=names) for model in models)
    assert_close(ours, expected)
    assert runs and in_slots(models[1], "sum") == in_slots(models[1], "new") == 12


def test_hooked_adapters_are_called() -> None:
    """Whoever hooked what holds the tensors (FSDP, offloading) is called: they may not be in their place before."""
    plain, slotted = loaded(), loaded(COUNT)
    called = []
    holder = slotted.base_model.adapted["model.layers.0.self_attn.q_proj"].lora_A[NAMES[2]]
    holder.register_forward_pre_hook(lambda *_: called.append(1))
    inputs = bases.LLAMA.inputs(COUNT)
    assert_close(run(slotted, inputs, adapter_names=NAMES), run(plain, inputs, adapter_names=NAMES))
    assert called


def test_calls_while_others_come_and_go() -> None:
    """Four threads call with mixtures of their own, while adapters are loaded into slots and evicted in a fifth."""
    plain, slotted = loaded(), loaded(COUNT + 2)
    calls = [(NAMES[start:] + NAMES[:start])[:5] for start in range(4)]
    inputs = bases.LLAMA.inputs(5)
    expected = [run(plain, inputs, adapter_names=names) for names in calls]
    wrong: list[Any] = []
    done = threading.Event()

    def call(names: Sequence[str], right: torch.Tensor) -> None:
        try:
            while not done.is_set():
                assert_close(run(slotted, inputs, adapter_names=names), right)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=call, args=pair) for pair in zip(calls, expected)]
    for thread in threads:
        thread.start()
    states = [state_of(config_of(rank), rank) for rank in (2, 4)]
    try:
        for turn in range(30):
            for name, rank, state in zip(("x", "y"), (2, 4), states):
                slotted.load_adapter(None, name, config=config_of(rank), tensors=state)
            for name in ("x", "y")[:: 1 if turn % 2 else -1]:
                slotted.delete_adapter(name)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[0]


# -- the way through a batch


def ways_of(slots: Sequence[int], counts: Sequence[int], batch: int, tokens: int = 1) -> stacked_rows.Way:
    pairs, row = [], 0
    for slot, count in zip(slots, counts, strict=True):
        taken = list(range(row, row + count))
        pairs.append((Group(str(slot), taken, torch.tensor(taken)), slot))
        row += count
    return stacked_rows.find_way(pairs, batch, tokens)


def test_neighbours_are_computed_together() -> None:
    way = ways_of([4, 2, 3, 5], [1] * 4, 5)
    assert [(run.first, run.end, run.groups) for run in way.runs] == [(2, 6, (1, 2, 0, 3))] and not way.alone
    assert way.runs[0].rows is not None and way.runs[0].rows.tolist() == [1, 2, 0, 3]


def test_one_by_itself_is_computed_alone() -> None:
    assert ways_of([7], [1], 1).alone == (0,)
    way = ways_of([0, 1, 2, 3, 60], [1] * 5, 5)
    assert way.alone == (4,) and len(way.runs) == 1


def test_gaps_are_computed_in_vain_where_it_costs_less() -> None:
    slots = [0, 1, 3, 4, 5, 8]
    (run,) = ways_of(slots, [1] * 6, 6).runs
    assert run.groups == (0, 1, -1, 2, 3, 4, -1, -1, 5) and run.used is not None
    assert run.used.tolist() == [0, 1, 3, 4, 5, 8]
    assert all(-1 not in run.groups for run in ways_of(slots, [1] * 6, 6, tokens=9).runs)


def test_adapted_layers_without_slots_have_no_stack() -> None:
    plain, _ = both()
    assert all(layer.splice_host.stack is None for layer in plain.base_model.adapted.values())
