"""LoftQ: adapters beside a rounded weight, against what the reference made on the way (`make_loftq.py`)."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import splice
from splice.errors import UnsupportedFeatureError
from splice.methods.lora.loftq import rounded
from tests import bases
from tests.comparing import Snapshot, assert_close

CASES = [(4, 1), (4, 3), (8, 1), (8, 2)]
RANK = 4
KNOWN = load_file(Path(__file__).with_name("loftq.safetensors"))
each = pytest.mark.parametrize(("bits", "rounds"), CASES)
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(64, 24)
        self.lin.weight.data.copy_(KNOWN["weight"])
        self.lin.bias.data.fill_(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


def config(bits: int, rounds: int, **changes: Any) -> Any:
    options = {"loftq_bits": bits, "loftq_iter": rounds}
    fields = {
        "r": RANK,
        "lora_alpha": 8,
        "target_modules": ["lin"],
        "init_lora_weights": "loftq",
        "loftq_config": options,
    }
    return splice.LoraConfig(**{**fields, **changes})


def trained(folder: Path, bits: int, rounds: int, seed: int = 0) -> torch.Tensor:
    """Save an adapter whose factors were trained, and return what the reference computes with it."""
    model = splice.get_peft_model(Net(), config(bits, rounds))
    torch.manual_seed(seed)
    a, b = torch.randn(RANK, 64) / 8, torch.randn(24, RANK)
    with torch.no_grad():
        model.base_model.model.lin.lora_A["default"].weight.copy_(a)
        model.base_model.model.lin.lora_B["default"].weight.copy_(b)
    model.save_pretrained(folder)
    return F.linear(X, KNOWN[f"{bits}.{rounds}.base"] + 2 * b @ a, Net().lin.bias)


def load(folder: Path, network: nn.Module | None = None, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return splice.PeftModel.from_pretrained(network or Net(), folder, **options)


@each
def test_a_new_adapter_starts_where_that_of_the_reference_does(bits: int, rounds: int) -> None:
    model = splice.get_peft_model(Net(), config(bits, rounds))
    layer = model.base_model.model.lin
    # To the bit on the processor that made the file; another one's decomposition differs in the last places.
    assert_close(layer.lora_A["default"].weight, KNOWN[f"{bits}.{rounds}.A"])
    assert_close(layer.lora_B["default"].weight, KNOWN[f"{bits}.{rounds}.B"])
    product = KNOWN[f"{bits}.{rounds}.B"] @ KNOWN[f"{bits}.{rounds}.A"]
    assert_close(model(X), F.linear(X, KNOWN[f"{bits}.{rounds}.base"] + 2 * product, layer.bias))


@each
def test_a_trained_one_computes_beside_the_rounded_weight(bits: int, rounds: int, tmp_path: Path) -> None:
    expected = trained(tmp_path, bits, rounds)
    network = Net()
    before = Snapshot.of(network)
    model = load(tmp_path, network)
    assert_close(model(X), expected)
    assert not torch.allclose(expected, Net()(X), atol=0.1)
    assert not any("quantised" in name for name in model.state_dict())
    with model.disable_adapter():
        assert torch.equal(model(X), Net()(X))
    model.merge_adapter()
    assert_close(model(X), expected)
    model.unmerge_adapter()
    for clone in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(clone(X), expected)
    assert_close(copy.deepcopy(model).merge_and_unload()(X), expected)
    model.save_pretrained(tmp_path / "again")
    assert_close(load(tmp_path / "again")(X), expected)
    model.unload()
    before.assert_same(network)


def test_on_the_base_as_it_was_changed(tmp_path: Path) -> None:
    """Who saved the rounded weights as a model loads onto those: rounding them again changes nothing."""
    expected = trained(tmp_path, 4, 3)
    network = Net()
    network.lin.weight.data.copy_(KNOWN["4.3.base"])
    with pytest.warns(splice.PeftWarning, match="the base is not the one"):
        model = splice.PeftModel.from_pretrained(network, tmp_path)
    assert_close(model(X), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_training_learns_the_factors_alone(bits: int, tmp_path: Path) -> None:
    trained(tmp_path, bits, 1)
    model = load(tmp_path, is_trainable=True)
    model(X).square().sum().backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None}
    assert names == {f"base_model.model.lin.lora_{which}.default.weight" for which in "AB"}
    weight = KNOWN[f"{bits}.1.base"]
    layer = model.base_model.model.lin
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    own_a, own_b = (p.detach().clone().requires_grad_() for p in (a, b))
    F.linear(X, weight + 2 * own_b @ own_a, Net().lin.bias).square().sum().backward()
    assert_close(a.grad, own_a.grad, factor=100)
    assert_close(b.grad, own_b.grad, factor=100)


def test_rows_and_others_beside_it(tmp_path: Path) -> None:
    first, second = trained(tmp_path / "a", 4, 1), trained(tmp_path / "b", 8, 1, seed=1)
    plain = splice.get_peft_model(Net(), splice.LoraConfig(r=2, target_modules=["lin"], init_lora_weights=False))
    plain.save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "a")
    model.load_adapter(tmp_path / "b", "other")
    model.load_adapter(tmp_path / "plain", "plain")
    rows = model(X, adapter_names=["default", "other", "__base__", "plain", "default"])
    for row, expected in enumerate((first, second, Net()(X), plain(X), first)):
        assert_close(rows[row], expected[row])
    model.base_model.set_adapter(["default", "plain"])
    assert_close(model(X), first + plain(X) - Net()(X))
    with pytest.raises(ValueError, match="each puts another weight in the place of the base's"):
        model.base_model.set_adapter(["default", "other"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """It is rounded in float32, and held as the base is."""
    trained(tmp_path, 4, 1)
    model = load(tmp_path, Net().to(dtype))
    layer = model.base_model.model.lin.splice_host.layers["default"]
    assert layer.quantised.dtype is dtype
    assert torch.equal(layer.quantised, rounded(KNOWN["weight"].to(dtype).float(), 4).to(dtype))


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_zeros_and_of_other_sizes(bits: int) -> None:
    assert torch.equal(rounded(torch.zeros(3, 70), bits), torch.zeros(3, 70))
    odd = torch.randn(5, 13)
    assert rounded(odd, bits).shape == odd.shape
    assert (rounded(odd, bits) - odd).abs().max() < 0.3 * odd.abs().max()


def test_made_without_values(tmp_path: Path) -> None:
    expected = trained(tmp_path, 4, 1)
    model = splice.get_peft_model(Net(), config(4, 1), low_cpu_mem_usage=True)
    loaded = {n: t for n, t in load(tmp_path).state_dict().items() if "lora" in n}
    model.load_state_dict(loaded, strict=False, assign=True)
    assert_close(model(X), expected)


@pytest.mark.parametrize(
    ("base", "changes", "error", "message"),
    [
        (
            bases.LINEAR,
            {"loftq_config": {"loftq_bits": 2}},
            ValueError,
            "loftq_bits=2: weights are rounded to 4 or to 8",
        ),
        (bases.LINEAR, {"loftq_config": {"loftq_iter": 0}}, ValueError, "loftq_iter=0"),
        (bases.LINEAR, {"use_dora": True}, UnsupportedFeatureError, "'loftq' with `use_dora`"),
        (bases.TRANSPOSED, {}, ValueError, "linear layers alone, not on the kind TRANSPOSED_LINEAR"),
        (bases.EMBEDDING, {}, ValueError, "linear layers alone, not on the kind EMBEDDING"),
        (bases.CONV2D, {}, ValueError, "linear layers alone, not on the kind CONV2D"),
    ],
    ids=str,
)
def test_what_cannot_be_made(base: bases.Base, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    network = base.build()
    before = Snapshot.of(network)
    fields = {"target_modules": list(base.targets), "loftq_config": {"loftq_bits": 4}, **changes}
    with pytest.raises(error, match=message):
        splice.get_peft_model(network, splice.LoraConfig(r=2, init_lora_weights="loftq", **fields))
    before.assert_same(network)
