"""Adapters that are loaded beside others lie at equal distances: mixed batches read them together; else nobody notices."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import nn

import splice
from splice.kinds import arena
from splice.kinds.bundles import Bundles
from splice.kinds.row_plan import Parts
from splice.selection import BASE, Group
from splice.surgery import rows, stacked_rows
from tests import bases
from tests.bases import run
from tests.comparing import assert_close, differ
from tests.test_slots import config_of, parameters_of, state_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no part of a mapping can be given back")

COUNT = 6
NAMES = [f"adapter {number}" for number in range(COUNT)]
INPUTS = bases.LLAMA.inputs(COUNT)


def loaded(ranks: tuple[int, ...] = (4,) * COUNT, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model: Any = None
    for number, rank in enumerate(ranks):
        config = config_of(rank)
        given: dict[str, Any] = {"config": config, "tensors": state_of(config, number), **options}
        if model is None:
            model = splice.PeftModel.from_pretrained(bases.LLAMA.build(dtype), adapter_name=NAMES[0], **given)
        else:
            model.load_adapter(None, NAMES[number], **given)
    return model


def places_of(model: Any, name: str) -> list[arena.Place | None]:
    return [arena.place_of(parameter.data_ptr()) for parameter in parameters_of(model, name)]


def row_by_row(model: Any, names: list[str], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What each row gives in a batch of its own."""
    own = ({key: value[n : n + 1] for key, value in inputs.items()} for n in range(len(names)))
    return torch.cat([run(model, one, adapter_names=[name]) for one, name in zip(own, names)])


@pytest.fixture(autouse=True)
def no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters of models that other tests made have no block among those that a test makes."""
    monkeypatch.setattr(arena, "_arenas", weakref.WeakValueDictionary())


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many adapters each product was for."""
    seen: list[int] = []

    def noted(y: Any, x: Any, factors: Any, run: Any, scales: Any, is_own: bool) -> torch.Tensor:
        seen.append(sum(group >= 0 for group in run.groups))
        return stacked_rows.add_run(y, x, factors, run, scales, is_own)

    monkeypatch.setattr(rows, "add_run", noted)
    return seen


def test_adapters_behind_the_first_are_neighbours() -> None:
    model = loaded()
    assert set(places_of(model, NAMES[0])) == {None}
    first = places_of(model, NAMES[1])
    for number, name in enumerate(NAMES[1:]):
        for place, of_first in zip(places_of(model, name), first):
            assert place is not None and of_first is not None
            assert place == of_first._replace(number=of_first.number + number)
    storages = {p.untyped_storage().data_ptr(): p for name in NAMES for p in parameters_of(model, name)}
    assert len(storages) == COUNT * 12
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in storages.values())


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize(
    "names",
    [NAMES, NAMES[::-1], [BASE, *NAMES[2:6], BASE], NAMES[1:3] * 3, [*NAMES[:3], *NAMES[:3]], NAMES[1:]],
    ids=["all", "reversed", "with the base", "apart", "twice", "all but the first"],
)
def test_mixed_batches_read_them_together(names: list[str], tokens: int, together: list[int]) -> None:
    model = loaded()
    inputs = {"input_ids": bases.LLAMA.inputs(len(names))["input_ids"][:, :tokens]}
    expected = row_by_row(model, names, inputs)
    together.clear()
    assert_close(run(model, inputs, adapter_names=names), expected)
    assert set(together) == {len(set(names) - {BASE, NAMES[0]})}


def test_adapters_of_other_ranks_are_read_by_themselves(together: list[int]) -> None:
    model = loaded((4, 4, 4, 2, 2, 2))
    expected = row_by_row(model, NAMES, INPUTS)
    together.clear()
    assert_close(run(model, INPUTS, adapter_names=NAMES), expected)
    assert set(together) == {2, 3}  # the first adapter has none beside it


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(autocast: bool, together: list[int]) -> None:
    model = loaded(dtype=torch.bfloat16, autocast_adapter_dtype=autocast)
    assert {p.dtype for p in parameters_of(model, NAMES[2])} == {torch.float32 if autocast else torch.bfloat16}
    expected = row_by_row(model, NAMES, INPUTS)
    together.clear()
    found = run(model, INPUTS, adapter_names=NAMES)
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.05, atol=0.05)
    assert together


def exchange(model: Any) -> None:
    for parameter in parameters_of(model, NAMES[2]):
        parameter.data = parameter.data * 2


@torch.no_grad()
def write(model: Any) -> None:
    for parameter in parameters_of(model, NAMES[2]):
        parameter.mul_(2)


CHANGES: dict[str, Callable[[Any], object]] = {
    "written to": write,
    "given other memory": exchange,
    "in double precision": lambda model: model.double(),
    "rescaled": lambda model: [layer.set_scale(NAMES[2], 3.0) for layer in model.base_model.adapted.values()],
    "replaced": lambda model: splice.set_peft_model_state_dict(model, state_of(config_of(), 77), NAMES[2]),
    "deleted and loaded": lambda model: (
        model.delete_adapter(NAMES[2]),
        model.load_adapter(None, NAMES[2], config=config_of(), tensors=state_of(config_of(), 78)),
    ),
    "in shared memory": lambda model: model.share_memory(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whoever_changes_or_moves_tensors_is_followed(change: Callable[[Any], object]) -> None:
    model = loaded()
    before = run(model, INPUTS, adapter_names=NAMES)
    change(model)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in INPUTS.items()}
    assert_close(run(model, inputs, adapter_names=NAMES), row_by_row(model, NAMES, inputs))
    assert before.shape == (COUNT, *before.shape[1:])


def test_lower_ranks_in_the_same_place_are_noticed() -> None:
    """Someone who cuts an adapter down leaves it where it is, and its numbers mean something else there."""
    model = loaded()
    before = run(model, INPUTS, adapter_names=NAMES)
    for name, parameter in model.named_parameters():
        if f".{NAMES[3]}." in name:
            parameter.data = parameter.data[:2] if "lora_A" in name else parameter.data[:, :2]
    found = run(model, INPUTS, adapter_names=NAMES)
    assert_close(found, row_by_row(model, NAMES, INPUTS))
    assert differ(found[3], before[3]) and torch.equal(found[1], before[1])


class Keeps(nn.Linear):
    """Keeps what it gives, for whoever asks later."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.__dict__["kept"] = super().forward(x)
        return self.__dict__["kept"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("count", [1, 2, 5], ids=str)
@pytest.mark.parametrize("tokens", [1, 7])
def test_what_the_base_keeps_is_not_changed(count: int, tokens: int) -> None:
    """Whether the rows' adapters are computed together or one by one."""
    base = nn.Sequential(Keeps(6, 5))
    config = splice.LoraConfig(r=3, target_modules=["0"])
    model: Any = None
    names = [str(number) for number in range(count + 1)]
    for number, name in enumerate(names):
        source = bases.generator(number)
        state = {
            "base_model.model.0.lora_A.weight": torch.randn(3, 6, generator=source),
            "base_model.model.0.lora_B.weight": torch.randn(5, 3, generator=source),
        }
        if model is None:
            model = splice.PeftModel.from_pretrained(base, adapter_name=name, config=config, tensors=state)
        else:
            model.load_adapter(None, name, config=config, tensors=state)
    x = torch.randn(len(names), tokens, 6, generator=bases.generator(9))
    with torch.no_grad():
        with model.disable_adapter():
            own = model(x)
        found = model(x, adapter_names=names)
        assert torch.equal(base[0].kept, own) and differ(found, own)
        rows_alone = [model(x[n : n + 1], adapter_names=[name]) for n, name in enumerate(names)]
    assert_close(found, torch.cat(rows_alone))


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 2, 0], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("tokens", [1, 4])
def test_outputs_in_another_order_of_dimensions(order: list[int], tokens: int) -> None:
    """They are added to where they are, also where no view of them has the rows in one piece."""
    layout = ((torch.Size((2, 6)), torch.float32), (torch.Size((5, 2)), torch.float32))
    pairs = [arena.side_by_side(layout) or [] for _ in range(4)]
    for a, b in pairs:
        nn.init.normal_(a)
        nn.init.normal_(b)
    chosen = [pairs[n] for n in order]
    groups = [Group(str(n), [row], torch.tensor([row])) for row, n in enumerate(order)]
    parts = Parts([a for a, _ in chosen], [b for _, b in chosen], [0.5] * len(order), groups)
    x = torch.randn(4, tokens, 6)
    y = torch.randn(5, tokens, 4).permute(2, 1, 0)
    expected = y.clone()
    for row, (a, b) in enumerate(chosen):
        expected[row] += 0.5 * x[row] @ a.T @ b.T
    bundles = Bundles(parts.a, parts.b, None)
    assert len(bundles.found) == 1 and not bundles.alone
    with torch.no_grad():
        for is_own in (False, True):
            assert_close(rows.add_products(y.clone(), x, parts, is_own, bundles, {}), expected)


def test_calls_that_are_mapped_over_parameters() -> None:
    """Inside `torch.func` parameters are stand-ins, which are nowhere in memory."""
    model = loaded()
    own = dict(model.named_parameters())

    def call(factor: torch.Tensor) -> torch.Tensor:
        scaled = {name: p * factor if "lora_B" in name else p for name, p in own.items()}
        out: torch.Tensor = torch.func.functional_call(model, scaled, (), {**INPUTS, "adapter_names": NAMES}).logits
        return out

    with torch.no_grad():
        found = torch.func.vmap(call)(torch.tensor([1.0, 2.0]))
    assert_close(found[0], run(model, INPUTS, adapter_names=NAMES))
    assert differ(found[1], found[0])


def test_training_one_of_them() -> None:
    model = loaded()
    model.set_adapter(NAMES[2])
    model.train()
    others = {name: [p.clone() for p in parameters_of(model, name)] for name in NAMES if name != NAMES[2]}
    optimizer = torch.optim.SGD(parameters_of(model, NAMES[2]), lr=0.1)
    before = run(model.eval(), INPUTS)
    model.train()
    model(**INPUTS).logits.square().mean().backward()
    optimizer.step()
    model.eval()
    assert differ(run(model, INPUTS), before)
    assert all(torch.equal(p, own) for name, kept in others.items() for p, own in zip(parameters_of(model, name), kept))
    assert_close(run(model, INPUTS, adapter_names=NAMES), row_by_row(model, NAMES, INPUTS))


def test_memory_is_given_back_when_the_last_tensor_goes() -> None:
    model = loaded()
    held, values = [(p, p.detach().clone()) for p in parameters_of(model, NAMES[2])], []
    place = arena.place_of(held[0][0].data_ptr())
    assert place is not None
    model.delete_adapter(NAMES[2])
    model.load_adapter(None, "new", config=config_of(), tensors=state_of(config_of(), 5))
    # Somebody holds its tensors: nobody else gets their memory.
    assert all(torch.equal(parameter, value) for parameter, value in held)
    assert all(item is not None and item.number != place.number for item in places_of(model, "new"))
    values = [value for _, value in held]
    del held
    model.delete_adapter(NAMES[1])  # the memory of the last one that went is kept for the next
    gc.collect()
    block = torch.frombuffer(place.chunk.block(place.number), dtype=torch.uint8)
    assert not block.any() and any(value.any() for value in values)
    del block
    model.load_adapter(None, "newest", config=config_of(), tensors=state_of(config_of(), 6))
    assert places_of(model, "newest")[0] not in (None, *(places_of(model, name)[0] for name in (*NAMES[3:], "new")))
    names = [NAMES[0], "newest", *NAMES[3:], "new"]
    assert_close(run(model, INPUTS, adapter_names=names), row_by_row(model, names, INPUTS))


def test_who_loads_and_deletes_in_turns_gets_the_same_memory() -> None:
    model = loaded()
    model.delete_adapter(NAMES[3])
    place = places_of(model, NAMES[4])[0]
    for number in range(3):
        model.load_adapter(None, NAMES[3], config=config_of(), tensors=state_of(config_of(), number))
        found = places_of(model, NAMES[3])[0]
        assert place is not None and found == place._replace(number=place.number - 1)
        model.delete_adapter(NAMES[3])


def test_nothing_is_left_of_a_model() -> None:
    model = loaded()
    run(model, INPUTS, adapter_names=NAMES)
    place = arena.place_of(parameters_of(model, NAMES[1])[0].data_ptr())
    assert place is not None
    chunk = weakref.ref(place.chunk)
    del model, place
    gc.collect()
    assert chunk() is None


def test_deleting_all_gives_back_resident_memory() -> None:
    """Of 40 adapters of 3 MB each."""
    base = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024))
    config = splice.LoraConfig(r=192, target_modules=["0", "1"])
    state = splice.get_peft_model_state_dict(splice.get_peft_model(copy.deepcopy(base), copy.copy(config)))
    model = splice.PeftModel.from_pretrained(base, config=config, tensors=state)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    for number in range(4):
        model.load_adapter(None, f"first {number}", config=config, tensors=state)
    before = resident()
    for number in range(40):
        model.load_adapter(None, str(number), config=config, tensors=state)
    full = resident()
    for number in range(40):
        model.delete_adapter(str(number))
    assert full - before > 100e6 and resident() - before < 20e6


def test_copies_and_files_have_one_tensor_each() -> None:
    model = loaded()
    parameter = parameters_of(model, NAMES[2])[0]
    assert len(pickle.dumps(parameter)) < parameter.nbytes + 4000
    file = io.BytesIO()
    torch.save({"one": parameter}, file)
    assert len(file.getvalue()) < parameter.nbytes + 4000
    assert len(save({"one": parameter.data})) < parameter.nbytes + 4000
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert set(places_of(other, NAMES[2])) == {None}
        assert_close(run(other, INPUTS, adapter_names=NAMES), run(model, INPUTS, adapter_names=NAMES))


def test_a_forked_process_has_memory_of_its_own() -> None:
    model = loaded()
    parameter = parameters_of(model, NAMES[2])[0]
    before = parameter.detach().clone()
    child = os.fork()
    if not child:
        parameter.data.zero_()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(parameter, before)


def test_where_there_is_no_room_tensors_lie_anywhere(monkeypatch: pytest.MonkeyPatch, together: list[int]) -> None:
    def full(size: int, count: int) -> None:
        raise OSError("Cannot allocate memory")

    config = config_of(3)  # of a layout that nothing else has
    monkeypatch.setattr(arena, "Chunk", full)
    model = loaded((3,) * COUNT)
    assert set(places_of(model, NAMES[2])) == {None} and config.r == 3
    assert_close(run(model, INPUTS, adapter_names=NAMES), row_by_row(model, NAMES, INPUTS))
    assert not together


def test_more_than_a_chunk_has_room_for(monkeypatch: pytest.MonkeyPatch, together: list[int]) -> None:
    monkeypatch.setattr(arena, "_MOST", 4)
    names = [str(number) for number in range(11)]
    config = config_of(5)  # of a layout that nothing else has
    model: Any = splice.PeftModel.from_pretrained(
        bases.LLAMA.build(), adapter_name="0", config=config, tensors=state_of(config, 0)
    )
    for number in range(1, 11):
        model.load_adapter(None, str(number), config=config, tensors=state_of(config, number))
    inputs = bases.LLAMA.inputs(11)
    expected = row_by_row(model, names, inputs)
    together.clear()
    assert_close(run(model, inputs, adapter_names=names), expected)
    assert sorted(set(together)) == [2, 4]


def test_loads_in_several_threads() -> None:
    """Two models of one layout: their adapters get blocks of the same chunks."""
    models = [loaded((4,)), loaded((4,))]
    wrong: list[BaseException] = []

    def load(model: Any) -> None:
        try:
            for number in range(12):
                model.load_adapter(None, f"n{number}", config=config_of(), tensors=state_of(config_of(), number))
                if number % 3 == 2:
                    model.delete_adapter(f"n{number - 1}")
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=load, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    kept = [f"n{number}" for number in range(12) if number % 3 != 1]
    places = [place for model in models for name in kept for place in places_of(model, name)[:1]]
    assert len({(id(place.chunk), place.number) for place in places if place is not None}) == 2 * len(kept)
    for model in models:
        names = kept[:COUNT]
        assert_close(run(model, INPUTS, adapter_names=names), row_by_row(model, names, INPUTS))
