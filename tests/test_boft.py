"""What is particular to BOFT: several butterfly factors, which the reference has on CUDA alone, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import splice
from tests import bases
from tests.bases import run
from tests.comparing import assert_close

BASE = bases.LLAMA


def boft(**changes: Any) -> dict[str, Any]:
    return {
        "peft_type": "BOFT",
        "target_modules": ["q_proj"],
        "boft_block_size": 2,
        "task_type": "CAUSAL_LM",
        **changes,
    }


def permutation(size: int, side: int, factor: int) -> torch.Tensor:
    """P_i as the paper has it: in each part of `side * 2^i` values the even chunks of half a block, then the odd ones."""
    order: list[int] = []
    for start in range(0, size, side * 2**factor):
        chunks = torch.arange(start, start + side * 2**factor).split(side // 2)
        order += torch.cat([*chunks[::2], *chunks[1::2]]).tolist()
    return torch.eye(size)[order]


@pytest.mark.parametrize(("factors", "side"), [(1, 4), (2, 4), (3, 2), (3, 4)])
def test_a_product_of_butterflies(factors: int, side: int) -> None:
    network = nn.Sequential(nn.Linear(16, 6))
    config = splice.BOFTConfig(
        target_modules=["0"], boft_block_size=side, boft_n_butterfly_factor=factors, init_weights=False
    )
    model = splice.get_peft_model(network, config).eval()
    layer: Any = network[0]
    rotation = torch.eye(16)
    for number, blocks in enumerate(layer.boft_R["default"].detach()):
        skew, identity, p = (blocks - blocks.mT) / 2, torch.eye(side), permutation(16, side, number)
        rotation = p @ torch.block_diag(*((identity - skew) @ torch.linalg.inv(identity + skew))) @ p.T @ rotation
    x = torch.randn(3, 16)
    expected = (x @ rotation @ layer.weight.T) * layer.boft_s["default"].flatten() + layer.bias
    assert_close(model(x).detach(), expected.detach(), factor=3)
    model.merge_adapter()
    assert_close(model(x).detach(), expected.detach(), factor=3)


def test_a_checkpoint_that_says_more_factors_than_it_holds(checkpoint: Any) -> None:
    """The reference writes such ones where it cannot compile its kernel, and computes with one factor."""
    folder: Path = checkpoint(BASE, boft())
    expected = run(splice.PeftModel.from_pretrained(BASE.build(), folder), BASE.inputs(2))
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "boft_n_butterfly_factor": 3}))
    model: Any = splice.PeftModel.from_pretrained(BASE.build(), folder)
    assert torch.equal(run(model, BASE.inputs(2)), expected)
    assert model.peft_config["default"].boft_n_butterfly_factor == 1
    assert "says 3 butterfly factors, and it was trained with one" in str(model.load_report)


def test_blocks_that_are_left_out_in_training() -> None:
    network = nn.Sequential(nn.Linear(8, 8))
    config = splice.BOFTConfig(target_modules=["0"], boft_block_size=2, boft_dropout=0.5, init_weights=False)
    model: Any = splice.get_peft_model(network, config)
    layer = model.base_model.placed["default"]["0"]
    left = (layer.rotations() == torch.eye(2)).flatten(2).all(-1)
    assert left.sum() == 2
    model.eval()
    assert not (layer.rotations() == torch.eye(2)).flatten(2).all(-1).any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"boft_block_size": 5}, "16 values, which `boft_block_size` .5. divides not"),
        ({"boft_block_size": 0, "boft_block_num": 3}, "16 values, which `boft_block_num` .3. divides not"),
        ({"boft_block_size": 4, "boft_n_butterfly_factor": 4}, "4 butterfly factors need .* multiple of 8 blocks"),
        ({"boft_block_size": 1, "boft_n_butterfly_factor": 2}, "an even block size"),
        ({"boft_n_butterfly_factor": 0}, "`boft_n_butterfly_factor` should be a positive"),
        ({"boft_block_num": 2}, "Either `boft_block_size` or `boft_block_num` must be non-zero, and not both"),
    ],
)
def test_sizes_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        splice.get_peft_model(BASE.build(), splice.get_peft_config(boft(**fields)))


def test_an_adapter_of_another_size_beside_it(shared_checkpoint: Any, tmp_path: Path) -> None:
    """The reference keeps one permutation for all adapters of a layer, that of the last."""
    model: Any = splice.PeftModel.from_pretrained(BASE.build(), shared_checkpoint(BASE, boft()))
    alone = run(model, BASE.inputs(2))
    model.add_adapter("other", splice.get_peft_config(boft(boft_block_size=4, boft_n_butterfly_factor=2)))
    assert torch.equal(run(model, BASE.inputs(2)), alone)
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    tensors = load_file(tmp_path / "other" / "adapter_model.safetensors")
    assert {tuple(t.shape) for name, t in tensors.items() if name.endswith("boft_R")} == {(2, 4, 4, 4)}
