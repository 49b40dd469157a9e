"""Layers that are not where the checkpoint says are looked for elsewhere; what must not be taken for them is refused.

Each of these loads would give a model that answers, and answers nonsense.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from splice.errors import AdapterMismatchError
from splice.loading.published.relocating import find_moves
from tests.broken import PREFIX, Around, Parts, adapter_tensors, llama, load, parts, unchanged


def only(layer: int, **changes: Any) -> Parts:
    """An adapter of a network of three layers that was trained on one of them."""
    return parts(network=llama(layers=3), layers_to_transform=[layer], **changes)


@pytest.mark.parametrize("targets", ["ends", "whole paths", "an expression"])
@pytest.mark.parametrize("layer", [1, 2])
def test_the_layer_of_another_number_is_not_taken(layer: int, targets: str, tmp_path: Path) -> None:
    """The base has one layer, which the tensors of any other would fit."""
    made = only(layer)
    front = f"model.layers.{layer}.self_attn"
    made.config.update(
        {
            "ends": {},
            "whole paths": {"target_modules": [f"{front}.q_proj", f"{front}.v_proj"], "layers_to_transform": None},
            "an expression": {"target_modules": rf"model\.layers\.{layer}\..*[qv]_proj", "layers_to_transform": None},
        }[targets]
    )
    folder, network = made.write(tmp_path), llama(layers=1)
    with unchanged(network), pytest.raises(ValueError):
        load(folder, network)


@pytest.mark.parametrize("wrapped", [False, True], ids=["renamed", "below another module"])
def test_nor_under_another_name(wrapped: bool, tmp_path: Path) -> None:
    """Names and numbers differ both: neither another front nor the shapes may bring them together."""
    made = only(2, task_type=None).renamed(lambda name: name.replace("model.layers", "decoder.blocks"))
    made.config.update(target_modules=["q_proj", "v_proj"], layers_pattern="blocks")
    folder = made.write(tmp_path)
    network = Around(llama(layers=1)) if wrapped else llama(layers=1)
    with unchanged(network), pytest.raises(ValueError):
        load(folder, network)


def test_the_layer_of_the_same_number_is(tmp_path: Path) -> None:
    made = only(2, task_type=None).renamed(lambda name: name.replace("model.layers", "decoder.blocks"))
    made.config.update(target_modules=["q_proj", "v_proj"], layers_pattern="blocks")
    model = load(made.write(tmp_path), llama(layers=3))
    assert all(".layers.2." in name for name in adapter_tensors(model)) and len(adapter_tensors(model)) == 4


# -- layers that are taken


class Sides(nn.Module):
    """A linear layer of the same name in each of several parts."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, size in sizes.items():
            self.add_module(name, nn.ModuleDict({"dense": nn.Linear(size, size)}))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.children():
            x = x + part["dense"](x) if part["dense"].in_features == x.shape[-1] else x
        return x


def for_sides(*names: str) -> Parts:
    """LoRA for the dense layers, all of size 4, of these parts."""
    tensors = {}
    for number, name in enumerate(names, 1):
        tensors[f"{PREFIX}{name}.dense.lora_A.weight"] = torch.full((2, 4), 0.1 * number)
        tensors[f"{PREFIX}{name}.dense.lora_B.weight"] = torch.full((4, 2), 0.2 * number)
    return Parts(tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["dense"]})


def test_a_layer_that_is_taken_is_no_place_for_another(tmp_path: Path) -> None:
    """`left` is at home, and the only module that the tensors of `gone` would fit is `left` too."""
    network, folder = Sides(left=4, right=6), for_sides("left", "gone").write(tmp_path)
    with unchanged(network), pytest.raises(AdapterMismatchError) as caught:
        load(folder, network)
    assert "gone.dense" in str(caught.value)


def test_nor_does_it_stand_in_the_way(tmp_path: Path) -> None:
    """Of two modules that the tensors would fit one is taken, so that it can only be the other."""
    model = load(for_sides("left", "gone").write(tmp_path), Sides(left=4, other=4))
    assert {name.rpartition(".lora_")[0] for name in adapter_tensors(model)} == {
        f"{PREFIX}left.dense",
        f"{PREFIX}other.dense",
    }
    assert torch.equal(adapter_tensors(model)[f"{PREFIX}other.dense.lora_A.default.weight"], torch.full((2, 4), 0.2))


def test_two_layers_are_not_put_into_one(tmp_path: Path) -> None:
    network, folder = Sides(only=4), for_sides("left", "right").write(tmp_path)
    with unchanged(network), pytest.raises(AdapterMismatchError, match="0 of 2 tensors"):
        load(folder, network)


# -- the search by itself


def images(paths: Iterable[str], present: Iterable[str], network: nn.Module | None = None) -> list[dict[str, str]]:
    """Where the layers could be, if shapes say nothing."""
    modules = {path: nn.Identity() for path in present}
    moves = find_moves(list(paths), modules, network or nn.Module(), lambda old, new: True)
    return [dict(move.to) for move in moves]


def test_what_is_at_home_stays() -> None:
    assert images(["a.x", "b.x"], ["a.x", "b.x", "c.a.x"]) == [{"a.x": "a.x", "b.x": "b.x"}]


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("m.layers.2.q", "m.layers.0.q", False),
        ("m.layers.2.q", "n.layers.2.q", True),
        ("m.0.layers.2.q", "layers.2.q", True),
        ("layers.2.q", "m.0.layers.2.q", True),
        ("m.0.layers.2.q", "layers.0.q", False),
        ("layers.0.q", "m.0.layers.2.q", False),
    ],
)
def test_numbers_that_stand_last_are_the_same(old: str, new: str, found: bool) -> None:
    assert images([old], [new]) == ([{old: new}] if found else [])


def test_the_shortest_front_is_exchanged() -> None:
    """More of the path is the same, so this one is surer than those that differ in more."""
    assert images(["a.b.c.q"], ["z.b.c.q", "z.y.c.q"]) == [{"a.b.c.q": "z.b.c.q"}]


def test_roles_of_attention_are_not_mixed_up() -> None:
    """Shapes are often the same; the names of projections say which is which."""
    old = ["h.0.attn.query", "h.0.attn.value"]
    (to,) = images(old, [f"m.0.self.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")])
    assert to == {"h.0.attn.query": "m.0.self.q_proj", "h.0.attn.value": "m.0.self.v_proj"}
    assert images(["h.0.attn.query"], ["m.0.self.k_proj"]) == []


def test_too_many_choices_are_none() -> None:
    """Each of several layers could be each of several: that they are not all tried costs nothing, as none could be chosen."""
    old = [f"x.{letter}" for letter in "abcd"]
    assert images(old, [f"y.{letter}" for letter in "stuv"]) == []  # 256 ways
    assert len(images(old[:2], ["y.s", "y.t"])) == 2


def test_the_move_of_a_name_that_is_no_layer() -> None:
    """A head beside the layers goes with the front that all of them exchanged."""
    modules = {"new.a.x": nn.Identity(), "new.b.x": nn.Identity()}
    (move,) = find_moves(["old.a.x", "old.b.x"], modules, nn.Module(), lambda old, new: True)
    assert move.front == ("old.", "new.")
    assert move.of_name("old.head") == "new.head" and move.of_name("elsewhere") == "elsewhere"
    assert move.back("new.head") == "old.head" and move.back("elsewhere") == "elsewhere"
    assert move.reaches("new.c") and not move.reaches("old.c")
    assert move.said == "2 layers of the checkpoint begin with 'old.' where this model has 'new.'"
