"""Slots in compiled graphs: one graph holds for every adapter that comes, goes or is chosen, and computes what names do."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import splice
from splice import hotswap
from splice.kinds.stack import Stack
from splice.selection import BASE
from splice.surgery.stacked_rows import add_by_seats
from tests import bases
from tests.bases import run
from tests.comparing import assert_close, differ
from tests.test_slots import COUNT, NAMES, RANK, config_of, loaded, state_of

# With gaps, one twice, and rows of the base.
ROWS = [NAMES[3], BASE, NAMES[0], NAMES[7], NAMES[3], NAMES[1]]
Call = Callable[[Any, Sequence[str]], torch.Tensor]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """How many graphs have been compiled since the test began."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def whole(model: Any, backend: str, names: Sequence[str]) -> Call:
    """Calls of a PeftModel that is compiled, with rows by slots."""
    step, rows = torch.compile(model, fullgraph=True, backend=backend), model.slot_rows(names)

    def call(inputs: Any, names: Sequence[str]) -> torch.Tensor:
        rows.assign(names)
        return run(step, inputs, adapter_names=rows)

    return call


def inside(model: Any, backend: str, names: Sequence[str]) -> Call:
    """Calls by names of a PeftModel whose network is compiled."""
    model.get_base_model().compile(fullgraph=True, backend=backend)
    return lambda inputs, names: run(model, inputs, adapter_names=names)


def first_tokens(count: int, rows: int = len(ROWS)) -> Any:
    return {name: tensor[:, :count] for name, tensor in bases.LLAMA.inputs(rows).items()}


WAYS = pytest.mark.parametrize("way", [whole, inside])


@pytest.mark.parametrize("tokens", [1, 6])
@WAYS
def test_nothing_is_compiled_again(way: Callable[..., Call], tokens: int) -> None:
    """Not for other rows, nor for adapters that are loaded, evicted, written over, trained in place or scaled."""
    plain, slotted, inputs = loaded(), loaded(COUNT), first_tokens(tokens)
    call = way(slotted, "aot_eager", ROWS)
    for _ in range(2):
        call(inputs, ROWS)
    assert graphs() == 1

    def assert_same(names: Sequence[str]) -> None:
        assert_close(call(inputs, names), run(plain, inputs, adapter_names=names))

    with torch._dynamo.config.patch(error_on_recompile=True):
        for names in (ROWS, ROWS[::-1], [BASE] * 6, [NAMES[2]] * 6, NAMES[2:]):
            assert_same(names)
        assert torch.equal(call(inputs, [BASE] * 6), run(bases.LLAMA.build(), inputs))
        for model in (plain, slotted):
            model.delete_adapter(NAMES[2])
        assert_same(ROWS)
        for rank, seed in ((2, 90), (RANK, 91)):  # also one that ranks below the slots
            for model in (plain, slotted):
                model.load_adapter(None, f"new {seed}", config=config_of(rank), tensors=state_of(config_of(rank), seed))
            assert_same([*ROWS[:4], f"new {seed}", f"new {seed}"])
            for model in (plain, slotted):
                model.delete_adapter(f"new {seed}")
        for model in (plain, slotted):
            model.load_adapter(None, NAMES[3], tensors=state_of(config_of(), 92))
            for layer in model.base_model.adapted.values():
                layer.scaling[NAMES[0]] *= 3
                layer.set_scale(NAMES[1], 0.25)
            for name, parameter in model.named_parameters():
                if f".{NAMES[7]}." in name:
                    parameter.data.mul_(2)
        assert_same(ROWS)
    assert graphs() == 1


@pytest.mark.slow
@WAYS
def test_by_the_compiler_itself(way: Callable[..., Call]) -> None:
    """One token for each row, where it makes a kernel of its own that reads the factors where they lie."""
    plain, slotted, inputs = loaded(), loaded(COUNT), first_tokens(1)
    call = way(slotted, "inductor", ROWS)
    for names in (ROWS, ROWS[::-1]):
        assert_close(call(inputs, names), run(plain, inputs, adapter_names=names))
    assert graphs() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("autocast", "tokens"), [(True, 1), (False, 6)])
def test_ranks_and_dtypes(dtype: torch.dtype, autocast: bool, tokens: int) -> None:
    configs = {"four": config_of(4), "two": config_of(2, lora_alpha=9), "one": config_of(1)}
    plain, slotted = (loaded(n, configs, dtype=dtype, autocast_adapter_dtype=autocast) for n in (None, COUNT))
    names, inputs = ["two", BASE, "one", "four"], first_tokens(tokens, 4)
    expected = run(plain, inputs, adapter_names=names)
    assert_close(whole(slotted, "eager", names)(inputs, names), expected, factor=3)
    assert_close(run(slotted, inputs, adapter_names=slotted.slot_rows(names)), expected, factor=3)


def test_without_a_compiler_rows_follow_the_tensor() -> None:
    """What has been captured reads the tensor of slots, and no names."""
    plain, slotted, inputs = loaded(), loaded(COUNT), first_tokens(6)
    rows = slotted.slot_rows(ROWS)
    numbers = rows.numbers
    for names in (ROWS, ROWS[::-1]):
        rows.assign(names)
        assert rows.numbers is numbers and rows.names == tuple(names)
        assert_close(run(slotted, inputs, adapter_names=rows), run(plain, inputs, adapter_names=names))
    numbers.copy_(torch.tensor([-1, 2, 2, 0, -1, 1]))
    names = [BASE, NAMES[2], NAMES[2], NAMES[0], BASE, NAMES[1]]
    assert_close(run(slotted, inputs, adapter_names=rows), run(plain, inputs, adapter_names=names))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_generation(options: dict[str, Any]) -> None:
    plain, slotted = loaded(), loaded(COUNT)
    names = [NAMES[1], BASE, NAMES[2]]
    expected = bases.generate(plain, bases.LLAMA, rows=3, adapter_names=names, **options)
    rows = slotted.slot_rows(names)
    with torch.no_grad():
        assert torch.equal(bases.generate(slotted, bases.LLAMA, rows=3, adapter_names=rows, **options), expected)


def test_other_adapters_beside_those_in_slots() -> None:
    """They cost nothing while no row uses them; where one does, names go, and slots are refused."""
    configs = {name: config_of() for name in NAMES[:3]}
    plain, slotted = loaded(configs=configs), loaded(COUNT, configs)
    for model in (plain, slotted):
        for name, config in (("dora", config_of(use_dora=True)), ("o_proj", config_of(target_modules=["o_proj"], r=8))):
            model.load_adapter(None, name, config=config, tensors=state_of(config, 5))
    names, inputs = [NAMES[2], NAMES[0], BASE], first_tokens(6, 3)
    expected = run(plain, inputs, adapter_names=names)
    assert_close(inside(slotted, "eager", names)(inputs, names), expected)
    others = ["dora", NAMES[1], "o_proj"]
    for name, why in (("dora", "a DoraLinear with"), ("o_proj", "its rank 8 is above that of the slots, 4")):
        with pytest.raises(ValueError, match=f"adapter '{name}' does not lie in a slot .*{why}"):
            slotted.slot_rows([name, *names])
    assert_close(run(slotted, inputs, adapter_names=others), run(plain, inputs, adapter_names=others))


def test_names_in_the_graph_itself() -> None:
    """Where a model is compiled as a whole they are a part of it: another mixture makes another graph, and both are right."""
    plain, slotted, inputs = loaded(), loaded(COUNT), first_tokens(6)
    step = torch.compile(slotted, fullgraph=True, backend="eager")
    for names in (ROWS, ROWS[::-1]):
        assert_close(run(step, inputs, adapter_names=names), run(plain, inputs, adapter_names=names))
    assert graphs() == 2


def test_a_scale_that_was_none_in_training() -> None:
    """While features are dropped an update is no product: what is loaded then is read afterwards."""
    configs = {name: config_of(lora_dropout=0.5) for name in NAMES[:2]}
    plain, slotted = loaded(configs=configs), loaded(COUNT, {NAMES[0]: configs[NAMES[0]]})
    slotted.train()
    slotted.load_adapter(None, NAMES[1], config=configs[NAMES[1]], tensors=state_of(configs[NAMES[1]], 1))
    slotted.eval()
    inputs, names = first_tokens(6, 3), [NAMES[1], BASE, NAMES[0]]
    expected = run(plain, inputs, adapter_names=names)
    assert_close(run(slotted, inputs, adapter_names=slotted.slot_rows(names)), expected)
    slotted.base_model.adapted["model.layers.0.self_attn.q_proj"].train()
    with pytest.raises(ValueError, match="q_proj: its scale is a tensor, or features of its input are dropped"):
        slotted.slot_rows(names)


def test_threads_share_a_graph() -> None:
    """Each with rows of its own."""
    plain, slotted, inputs = loaded(), loaded(COUNT), first_tokens(6)
    call = inside(slotted, "eager", ROWS)
    call(inputs, ROWS)
    mixtures = [ROWS, ROWS[::-1], [BASE] * 6, NAMES[2:]]
    pairs = [(names, run(plain, inputs, adapter_names=names)) for names in mixtures]
    wrong: list[BaseException] = []

    def repeat(names: Sequence[str], expected: torch.Tensor) -> None:
        try:
            for _ in range(10):
                assert_close(call(inputs, names), expected)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=repeat, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]
    assert graphs() == 1


# -- what is refused


def test_layers_in_experts() -> None:
    """Rows of one adapter are the same in any order; of several they cannot be told there."""
    network: Any = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)])})
    network.forward = lambda x: network["experts"][0](x)
    fields = {"peft_type": "LORA", "r": 2, "target_modules": ["0"], "init_lora_weights": False}
    model: Any = splice.get_peft_model(network, splice.get_peft_config(fields), adapter_name="first").eval()
    model.slots(2, 2)
    model.add_adapter("second", splice.get_peft_config(fields))
    rows = model.slot_rows(["first", "first"])
    assert_close(run(model, {"x": torch.ones(2, 4)}, adapter_names=rows), run(model, {"x": torch.ones(2, 4)}))
    for refused in (lambda: model.slot_rows(["first", "second"]), lambda: rows.assign(["first", BASE])):
        with pytest.raises(ValueError, match="is inside an expert"):
            refused()


def test_what_rows_by_slots_need() -> None:
    model, inputs = loaded(2, {name: config_of() for name in NAMES[:3]}), first_tokens(6, 2)
    with pytest.raises(ValueError, match="no slots are reserved: `model.slots"):
        loaded(configs={"one": config_of()}).slot_rows(["one"])
    with pytest.raises(ValueError, match="'nobody'|nobody not found"):
        model.slot_rows(["nobody"])
    with pytest.raises(ValueError, match=f"adapter '{NAMES[2]}' does not lie in a slot .all 2 slots are taken"):
        model.slot_rows(NAMES[:3])
    for names in ([], NAMES[0]):
        with pytest.raises(ValueError, match="each needs a name"):
            model.slot_rows(names)
    rows = model.slot_rows(NAMES[:2])
    with pytest.raises(ValueError, match="these are 2 rows, and each needs a name"):
        rows.assign(NAMES[:1])
    with pytest.raises(ValueError, match="does not lie in a slot"):
        rows.assign([NAMES[0], NAMES[2]])
    before = run(model, inputs, adapter_names=rows)
    with pytest.raises(ValueError, match="rows by slots give no gradients"):
        model(**inputs, adapter_names=rows)
    with pytest.raises(ValueError, match="the same as the number of inputs, but got 2 and 3"):
        run(model, first_tokens(6, 3), adapter_names=rows)
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**inputs, adapter_names=rows)
    model.eval().merge_adapter([NAMES[0]])
    with pytest.raises(ValueError, match="there are merged adapters"):
        run(model, inputs, adapter_names=rows)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(run(model, inputs, adapter_names=rows), run(bases.LLAMA.build(), inputs))
    other = loaded(2, {name: config_of() for name in NAMES[:2]})
    with pytest.raises(ValueError, match="rows of another model"):
        run(other, inputs, adapter_names=rows)
    assert torch.equal(run(model, inputs, adapter_names=rows), before)


def evicted(model: Any) -> None:
    model.delete_adapter(NAMES[1])


def exchanged(model: Any) -> None:
    model.delete_adapter(NAMES[1])
    model.load_adapter(None, "new", config=config_of(), tensors=state_of(config_of(), 9))


def given_up(model: Any) -> None:
    model.slots(0)


def reserved_again(model: Any) -> None:
    model.slots(COUNT, RANK)


@pytest.mark.parametrize("change", [evicted, exchanged, given_up, reserved_again])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_slot_that_was_left_is_not_read(change: Callable[[Any], None], compiled: bool) -> None:
    """Another adapter may be there by now."""
    model, inputs = loaded(2, {name: config_of() for name in NAMES[:2]}), first_tokens(6, 3)
    rows = model.slot_rows([NAMES[1], BASE, NAMES[0]])
    called = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    run(called, inputs, adapter_names=rows)
    change(model)
    with pytest.raises(Exception, match="has left its slot since: give these rows other adapters, `rows.assign"):
        run(called, inputs, adapter_names=rows)
    if change in (evicted, exchanged):
        rows.assign([NAMES[0]] * 3)
        assert_close(run(called, inputs, adapter_names=rows), run(model, inputs, adapter_names=[NAMES[0]] * 3))


def test_what_was_moved_out_of_its_slot_is_not_read_there() -> None:
    """By whoever sets `.data`: a call by names notices, and so do rows that are made or assigned."""
    plain, slotted, inputs = loaded(), loaded(COUNT), first_tokens(6)
    call = inside(slotted, "eager", ROWS)
    before, rows = call(inputs, ROWS), slotted.slot_rows(ROWS)
    for model in (plain, slotted):
        for name, parameter in model.named_parameters():
            if f".{NAMES[3]}." in name:
                parameter.data = parameter.data * 2
    expected = run(plain, inputs, adapter_names=ROWS)
    assert_close(call(inputs, ROWS), expected)
    assert differ(expected, before)
    for refused in (lambda: slotted.slot_rows(ROWS), lambda: rows.assign(ROWS)):
        with pytest.raises(ValueError, match="q_proj: its tensors were moved out of it"):
            refused()


def test_a_scale_that_is_a_tensor_is_not_read() -> None:
    model, inputs = loaded(2, {name: config_of() for name in NAMES[:2]}), first_tokens(6, 2)
    rows = model.slot_rows(NAMES[:2])
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=RANK)
    assert run(model, inputs, adapter_names=rows).isnan().all()
    with pytest.raises(ValueError, match="its scale is a tensor"):
        rows.assign(NAMES[:2])
    assert run(model, inputs, adapter_names=NAMES[:2]).isfinite().all()


def test_hooked_adapters_are_not_read() -> None:
    model = loaded(2, {name: config_of() for name in NAMES[:2]})
    model.base_model.adapted["model.layers.0.self_attn.q_proj"].lora_A[NAMES[1]].register_forward_pre_hook(
        lambda *_: None
    )
    with pytest.raises(ValueError, match="somebody has hooked the modules"):
        model.slot_rows(NAMES[:2])


# -- the sum itself


@pytest.mark.parametrize("shape", [(6, 16), (6, 1, 16), (6, 5, 16), (6, 2, 3, 16), (18, 16), (12, 5, 16)], ids=str)
def test_the_update_of_each_row(shape: tuple[int, ...]) -> None:
    """Rows with one token and with many, in a row or repeated; what is in a slot matters to nobody else."""
    stack = Stack(4, torch.Size((3, 16)), torch.Size((7, 3)), torch.empty(0))
    for tensor in stack.tensors:
        nn.init.normal_(tensor)
    stack.a[1], stack.b[1] = torch.inf, torch.nan
    seats = torch.tensor([2, -1, 0, 3, -1, 2])
    x, y = torch.randn(shape), torch.randn(*shape[:-1], 7)
    expected = y.clone()
    each = shape[0] // 6
    for row, slot in enumerate(seats.tolist()):
        if slot >= 0:
            here = slice(row * each, (row + 1) * each)
            expected[here] += stack.scales[slot] * (x[here] @ stack.a[slot].T @ stack.b[slot].T)
    kept = y.clone()
    assert_close(add_by_seats(y, x, seats, stack), expected)
    compiled = torch.compile(lambda y, x, seats: add_by_seats(y, x, seats, stack), fullgraph=True, backend="aot_eager")
    assert_close(compiled(y, x, seats), expected)
    assert torch.equal(y, kept)


def test_a_copy_has_graphs_of_its_own() -> None:
    model, inputs = loaded(COUNT), first_tokens(6)
    copied = copy.deepcopy(model)
    one, two = (whole(each, "eager", ROWS) for each in (model, copied))
    before = one(inputs, ROWS)
    assert torch.equal(two(inputs, ROWS), before)
    copied.delete_adapter(NAMES[3])
    assert torch.equal(one(inputs, ROWS), before)
