"""What is peculiar to FRoD: bases that follow from the weights of all layers of a kind, and what is worked out of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import splice
from splice.errors import PeftWarning
from splice.methods.frod.config import FrodConfig
from tests import bases
from tests.bases import run
from tests.comparing import assert_close, differ, tensors_in

FIELDS: dict[str, Any] = {"sparse_rate": 0.3, "init_weights": False, "progressbar": False}


class Nested(nn.Module):
    """Linear layers at these paths, which nothing calls."""

    def __init__(self, paths: list[str], size_in: int = 6, sizes_out: tuple[int, ...] = (8, 7, 9)) -> None:
        super().__init__()
        torch.manual_seed(0)
        for number, path in enumerate(paths):
            *parents, last = path.split(".")
            module: nn.Module = self
            for parent in parents:
                if parent not in module._modules:
                    module.add_module(parent, nn.Module())
                module = module.get_submodule(parent)
            module.add_module(last, nn.Linear(size_in, sizes_out[number % len(sizes_out)]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("paths", "options"),
    [
        (["layers.0.a.q", "layers.1.a.q", "layers.0.a.v", "w"], {}),
        (["layers.10.q", "layers.9.q", "layers.2.q"], {}),
        (["layers.0.q", "layers.1.q"], {"sizes_out": (2, 3)}),
        # An encoder and a decoder: the basis is that of the decoder's.
        (["encoder.layers.0.a.q", "encoder.layers.1.a.q", "decoder.layers.0.a.q", "decoder.layers.1.a.q"], {}),
        # Without numbers of blocks, and beside such with them.
        (["x.b.q", "z.c.q", "y.b.q", "layers.2.b.q"], {}),
        (["block.1.layer.0.attention.output.dense", "block.0.layer.1.output.dense"], {}),
    ],
    ids=lambda value: " ".join(value) or "-",
)
def test_a_new_adapter_has_the_references_bases(paths: list[str], options: Any, dtype: torch.dtype) -> None:
    """To the bit: checkpoints without bases were trained with these."""
    base = Nested(paths, **options).to(dtype)
    models: list[Any] = []
    for library in (splice, peft):
        torch.manual_seed(3)
        # Random numbers of half precision are others than those of float32.
        fields = {**FIELDS, "init_weights": dtype is not torch.float32}
        config = library.get_peft_config({"peft_type": "FROD", "target_modules": paths, **fields})
        models.append(library.get_peft_model(copy.deepcopy(base), config))
    ours, theirs = ({n: t for n, t in [*m.named_parameters(), *m.named_buffers()] if "frod_" in n} for m in models)
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype is tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def test_a_known_core() -> None:
    base = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        base[0].weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    model: Any = splice.get_peft_model(base, FrodConfig(target_modules=["0"], sparse_rate=0.5))
    layer = model.base_model.model[0]
    assert layer.frod_s_indices["default"].tolist() == [[0, 1], [1, 0]]
    assert torch.allclose(model(torch.tensor([1.0, 2.0])), torch.tensor([2.0, 2.0]))
    with torch.no_grad():
        layer.frod_lambda_s_values["default"].fill_(1.0)
    assert torch.allclose(layer.get_delta_weight("default"), torch.tensor([[0.0, 1.0], [2.0, 0.0]]), atol=1e-6)
    assert torch.allclose(model(torch.tensor([1.0, 2.0])), torch.tensor([4.0, 4.0]))


def _turned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same adapter in bases some columns of which have other signs, as another machine may make them."""
    found = dict(tensors)
    for name in ("first", "second"):
        signs = torch.ones(len(tensors[f"base_model.frod_V.{name}"]))
        signs[::2] = -1
        rows, columns = tensors[f"base_model.frod_s_indices.{name}"]
        found[f"base_model.frod_V.{name}"] = tensors[f"base_model.frod_V.{name}"] * signs
        values = f"base_model.model.{name}.frod_lambda_s_values"
        found[values] = tensors[values] * signs[rows] * signs[columns]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of the reference."""
    config = peft.FrodConfig(target_modules=["first", "second"], **FIELDS)
    peft.get_peft_model(bases.LINEAR.build(), config).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def test_what_is_worked_out_follows_the_bases_of_the_checkpoint(folder: Path) -> None:
    """The reference works it out of bases that it makes again, and computes with those of the file."""
    inputs = bases.LINEAR.inputs(3)
    model: Any = splice.PeftModel.from_pretrained(bases.LINEAR.build(), folder)
    before = run(model, inputs)
    save_file(turned := _turned(tensors_in(folder)), folder / "adapter_model.safetensors")
    again = splice.PeftModel.from_pretrained(bases.LINEAR.build(), folder)
    assert_close(run(again, inputs), before)
    assert differ(run(peft.PeftModel.from_pretrained(bases.LINEAR.build(), str(folder)), inputs), before)
    # So it does where weights are loaded over, in either way.
    model.load_adapter(folder, "default")
    assert_close(run(model, inputs), before)
    with torch.no_grad():
        model.base_model.frod_V.first.default.mul_(-1)  # and S is turned twice, which changes nothing
    assert_close(run(model, inputs), before)
    merged = model.merge_and_unload()
    assert_close(run(merged, inputs), before)
    assert turned.keys() == tensors_in(folder).keys()


def test_what_moves_with_the_model_is_not_worked_out_again(folder: Path) -> None:
    model: Any = splice.PeftModel.from_pretrained(bases.LINEAR.build(), folder).to(torch.float64)
    inputs = {"x": bases.LINEAR.inputs(3)["x"].double()}
    before, own = run(model, inputs), model.base_model.model.first.frod_U["default"]
    assert torch.equal(own, own.float().double())
    moved = copy.deepcopy(model)
    assert torch.equal(run(moved, inputs), before)
    assert torch.equal(moved.base_model.model.first.frod_U["default"], own)


def test_an_adapter_that_has_the_places_of_another(tmp_path: Path) -> None:
    """One that joins others on the same layers gets the first one's places in the reference, whatever its rate is."""
    names, inputs = ["first", "second"], bases.LINEAR.inputs(3)
    reference = peft.get_peft_model(bases.LINEAR.build(), peft.FrodConfig(target_modules=names, **FIELDS))
    reference.add_adapter("other", peft.FrodConfig(target_modules=names, **{**FIELDS, "sparse_rate": 0.9}))
    reference.save_pretrained(str(tmp_path))
    reference.set_adapter("other")
    model: Any = splice.PeftModel.from_pretrained(bases.LINEAR.build(), tmp_path / "other")
    assert_close(run(model, inputs), run(reference, inputs))
    assert model.base_model.model.first.frod_s_indices["default"].shape == (2, 10)
    assert model.peft_config["default"].sparse_rate == pytest.approx(0.3, abs=0.03)
    assert "sparse_rate" in str(model.load_report)


def test_each_adapter_has_its_own_bases(folder: Path, tmp_path: Path) -> None:
    inputs = bases.LINEAR.inputs(3)
    model: Any = splice.PeftModel.from_pretrained(bases.LINEAR.build(), folder)
    before = run(model, inputs)
    model.add_adapter("new", FrodConfig(target_modules=["first"], projection_prng_key=4, sparse_rate=0.9))
    save_file(_turned(tensors_in(folder)), folder / "adapter_model.safetensors")
    model.load_adapter(folder, "turned")
    assert torch.equal(run(model, inputs), before)
    model.set_adapter("turned")
    assert_close(run(model, inputs), before)
    assert len(model.base_model.model.first.frod_lambda_s_values["new"]) == 30


def test_layers_of_a_kind_take_as_many_features() -> None:
    base = nn.ModuleDict({"tower": Nested(["layers.0.a.q"], 4), "text": Nested(["layers.0.a.q"], 6)})
    with pytest.raises(ValueError, match=r"text.layers.0.a.q: .* 'a_q'.* 6 features where tower.layers.0.a.q takes 4"):
        splice.get_peft_model(base, FrodConfig(target_modules=["q"]))
    assert not any("frod" in name for name, _ in base.named_modules())


def test_bases_are_not_made_of_weights_without_values() -> None:
    with torch.device("meta"):
        base = bases.LINEAR.make()
    with pytest.raises(splice.UnsupportedFeatureError, match="first: .* Load the base's weights first"):
        splice.get_peft_model(base, FrodConfig(target_modules=["first"]))


def test_bases_that_are_made_again_are_warned_of(tmp_path: Path) -> None:
    base, config = bases.LINEAR.build(), FrodConfig(target_modules=["first"], save_projection=False, sparse_rate=0.3)
    splice.get_peft_model(base, config).save_pretrained(tmp_path)
    assert set(tensors_in(tmp_path)) == {f"base_model.model.first.frod_lambda_{x}" for x in ("l", "s_values")}
    with pytest.warns(
        PeftWarning, match="adapter 'default': its checkpoint holds no bases.*elsewhere the output may be wrong"
    ):
        splice.PeftModel.from_pretrained(bases.LINEAR.build(), tmp_path)


@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_a_rate_that_is_no_share_is_refused(rate: float) -> None:
    for library in (splice, peft):
        with pytest.raises(ValueError, match=f"`sparse_rate` should be between 0 and 1, got {rate}"):
            library.FrodConfig(sparse_rate=rate)
