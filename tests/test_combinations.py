"""Two things that work by themselves, together: rows of different lengths, halves, pull requests, versions, resizes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import splice
from splice.kinds.row_plan import Parts
from splice.selection import BASE, Group
from splice.surgery import adapted_layer, rows
from tests import bases
from tests.bases import Base, run
from tests.broken import edited, llama, parts
from tests.comparing import assert_close, differ, load_both

# -- rows with different numbers of virtual tokens

LENGTHS = {"five": 5, "two": 2}
NAMES = ["two", BASE, "five", "two"]


def prompted(base: Base, shared_checkpoint: Any) -> Any:
    """A model with an adapter of 5 virtual tokens and one of 2."""
    folders = {
        name: shared_checkpoint(
            base, {"peft_type": "PROMPT_TUNING", "task_type": base.task, "num_virtual_tokens": count}, seed=count
        )
        for name, count in LENGTHS.items()
    }
    model = splice.PeftModel.from_pretrained(base.build(), folders["five"], adapter_name="five")
    model.load_adapter(folders["two"], "two")
    return model


def padded_in_front(base: Base) -> dict[str, torch.Tensor]:
    inputs = base.inputs(len(NAMES))
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :2], mask[2, :1] = 0, 0
    return {**inputs, "attention_mask": mask}


@contextmanager
def selected(model: Any, name: str) -> Iterator[None]:
    if name == BASE:
        with model.disable_adapter():
            yield
    else:
        model.set_adapter(name)
        yield


# GPT-2 has a learned vector for each position, and Llama turns its keys and queries by differences of positions: a row
# whose positions are all wrong by the same number gives the same there, and something else here.
by_positions = pytest.mark.parametrize("base", [bases.GPT2, bases.LLAMA], ids=str)


@pytest.mark.parametrize("padded", [False, True], ids=["no mask", "left padding"])
@by_positions
def test_rows_with_5_2_and_0_virtual_tokens(base: Base, padded: bool, shared_checkpoint: Any) -> None:
    model = prompted(base, shared_checkpoint)
    inputs = padded_in_front(base) if padded else base.inputs(len(NAMES))
    mixed = run(model, inputs, adapter_names=NAMES)
    length = inputs["input_ids"].shape[1]
    assert mixed.shape[1] == 5 + length
    for row, name in enumerate(NAMES):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        if padded and name == BASE:  # the bare base does not work out positions of its own from a mask
            one = {key: value[:, one["attention_mask"][0].bool()] for key, value in one.items()}
        with selected(model, name):
            expected = run(model, one)
        seen = min(int(inputs["attention_mask"][row].sum()) if padded else length, expected.shape[1])
        assert_close(mixed[row : row + 1, -seen:], expected[:, -seen:], factor=3)


@by_positions
def test_generating_from_such_rows(base: Base, shared_checkpoint: Any) -> None:
    """The virtual tokens are in the cache: later steps count on from where each row stands."""
    model = prompted(base, shared_checkpoint)
    mixed = bases.generate(model, base, rows=len(NAMES), adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        with selected(model, name):
            assert torch.equal(mixed[row], bases.generate(model, base, rows=len(NAMES))[row]), name


# -- random projections that no file holds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [True, False], ids=["in float32", "in its own"])
def test_projections_are_drawn_again_on_a_base_in_half_precision(
    dtype: torch.dtype, autocast: bool, shared_checkpoint: Any
) -> None:
    """They were rounded to the base's precision before the adapter was trained, whatever they are held in now."""
    config = {
        "peft_type": "VERA", "r": 4, "target_modules": list(bases.LLAMA.targets), "d_initial": 0.3,
        "save_projection": False, "projection_prng_key": 5, "task_type": bases.LLAMA.task,
    }  # fmt: skip
    folder = shared_checkpoint(bases.LLAMA, config, dtype=dtype)
    pair = load_both(bases.LLAMA, folder, dtype=dtype, autocast_adapter_dtype=autocast)
    theirs = dict(pair.reference.named_buffers())
    ours = {name: tensor for name, tensor in pair.ours.named_buffers() if "vera_" in name}
    assert ours
    for name, tensor in ours.items():
        assert tensor.dtype is theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    pair.assert_equal()


# -- a version that changed a formula


@pytest.mark.parametrize(
    ("version", "warned"),
    [
        ("0.17.1", True), ("0.9.0", True), ("0.18.0", False), ("0.18.0.dev0", False), ("0.21.2", False), ("1.0", False),
        ("1.2.3", False), ("0.100", False), (None, True), ("of my own", True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("series", [True, False], ids=["series", "exact"])
def test_a_series_from_before_it_changed_is_told_by_its_version(
    version: str | None, warned: bool, series: bool, shared_checkpoint: Any, tmp_path: Path
) -> None:
    """Versions are numbers: 0.9 is older than 0.18, and 0.100 is not."""
    config = {"peft_type": "OFT", "target_modules": list(bases.LINEAR.targets), "oft_block_size": 4}
    written = shared_checkpoint(bases.LINEAR, {**config, "use_cayley_neumann": series})
    for file in written.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edited(tmp_path, peft_version=version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        splice.PeftModel.from_pretrained(bases.LINEAR.build(), tmp_path)
    said = [str(w.message) for w in caught if "the series changed slightly in version 0.18" in str(w.message)]
    assert bool(said) == (warned and series)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_version"] == version


# -- resizing, and the caller's random numbers


@pytest.mark.parametrize("size", [48, 39])
def test_resizing_leaves_the_random_state_alone(size: int, tmp_path: Path) -> None:
    """The new rows are drawn; what the caller draws next is what it would have been."""
    network = llama()
    network.resize_token_embeddings(size, mean_resizing=False)
    folder = parts(network=network, target_modules=["embed_tokens"]).write(tmp_path)
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        before = torch.random.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = splice.PeftModel.from_pretrained(llama(), folder, resize_vocabulary=True)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert model.get_base_model().get_input_embeddings().weight.shape[0] == size
        states.append(model.get_base_model().get_input_embeddings().weight.detach())
    assert torch.equal(*states)


# -- the mixed batch as a GPU takes it

SIZES = [(4, (0, 3)), (4, (1,)), (2, (2, 5)), (4, (4, 6))]


def some_parts(scales: list[float], dtype: torch.dtype = torch.float32) -> Parts:
    """Adapters of several ranks, with different numbers of rows."""
    source = bases.generator()
    a = [torch.randn(rank, 6, generator=source).to(dtype) for rank, _ in SIZES]
    b = [torch.randn(5, rank, generator=source).to(dtype) for rank, _ in SIZES]
    return Parts(a, b, scales, [Group(str(number), own, torch.tensor(own)) for number, (_, own) in enumerate(SIZES)])


@pytest.mark.parametrize("scales", [[0.5] * 4, [0.5, 2.0, 0.25, 1.0]], ids=["one scale", "several"])
@pytest.mark.parametrize("tokens", [(), (1,), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "float32")], ids=str)
def test_stacked_products_are_those_of_each_adapter(
    scales: list[float], tokens: tuple[int, ...], dtypes: tuple[str, str]
) -> None:
    """Every way of adding gives the rows what one product after the other gives; the row of nobody stays."""
    held, own = (getattr(torch, name) for name in dtypes)
    given, source = some_parts(scales, own), bases.generator(2)
    x = torch.randn(8, *tokens, 6, generator=source).to(held)
    y = torch.randn(8, *tokens, 5, generator=source).to(held)
    before = y.clone()
    expected = y.float().clone()
    for a, b, scale, group in zip(*given):
        for row in group.rows:
            expected[row] += scale * (nn.functional.linear(nn.functional.linear(x[row].float(), a.float()), b.float()))
    ways = [rows.add_alike(y, x, given), rows.add_products(y, x, given)]
    with torch.no_grad():
        ways.append(rows.add_products(y, x, given))
    tolerance = 1e-5 if held is own is torch.float32 else 0.1
    for found in ways:
        assert found.dtype is held
        torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(found[7], before[7])
    assert torch.equal(y, before) and differ(ways[0].float(), before.float())


@pytest.mark.parametrize("base", [bases.LINEAR, bases.LLAMA], ids=str)
def test_a_network_gives_the_same_by_either_way(
    base: Base, shared_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"peft_type": "LORA", "target_modules": list(base.targets), "r": 4, "task_type": base.task}
    model: Any = splice.PeftModel.from_pretrained(base.build(), shared_checkpoint(base, config))
    model.load_adapter(shared_checkpoint(base, {**config, "r": 2, "lora_alpha": 5}, seed=1), "second")
    model.load_adapter(shared_checkpoint(base, {**config, "lora_alpha": 3}, seed=2), "third")
    names, inputs = ["second", BASE, "default", "third", "default"], base.inputs(5)
    expected = run(model, inputs, adapter_names=names)
    called = []

    def as_on_a_gpu(*args: Any) -> torch.Tensor:
        called.append(args)
        return rows.add_alike(*args[:3])

    monkeypatch.setattr(adapted_layer, "add_products", as_on_a_gpu)
    assert_close(run(model, inputs, adapter_names=names), expected)
    assert called
