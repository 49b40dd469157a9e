"""Initialisations of LoRA that follow from data: EVA, CorDA and LoRA-GA, compared with the reference on the same data."""

from __future__ import annotations

import copy
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import splice
from splice.errors import UnsupportedFeatureError
from tests import bases
from tests.bases import Base, run
from tests.comparing import assert_close, config_in, tensors_in

# The reference's file of CorDA imports this package and does not ask for it.
try:
    import attr  # noqa: F401
except ModuleNotFoundError:
    sys.modules["attr"] = types.SimpleNamespace(dataclass=dataclass)  # type: ignore[assignment]

from peft.tuners.lora.corda import preprocess_corda as corda_of_reference

BASES = pytest.mark.parametrize("base", [bases.LINEAR, bases.TRANSPOSED], ids=str)
CORDA = (peft.CordaConfig if hasattr(peft, "CordaConfig") else peft.tuners.lora.config.CordaConfig, splice.CordaConfig)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def data(base: Base) -> list[dict[str, torch.Tensor]]:
    return [base.inputs(rows) for rows in (20, 12)]


def config(library: Any, base: Base, **fields: Any) -> Any:
    return library.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": list(base.targets), **fields})


def grown(model: Any) -> None:
    """As after some training: another adapter than the one it started at."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.3)


def products(model: Any) -> dict[str, torch.Tensor]:
    """s B A of each layer: no decomposition is free to turn it."""
    state = {name.replace("base_model.model.", ""): tensor for name, tensor in model.state_dict().items()}
    paths = [name.partition(".lora_A")[0] for name in state if "lora_A" in name]
    return {p: state[f"{p}.lora_B.default.weight"] @ state[f"{p}.lora_A.default.weight"] for p in paths}


# -- CorDA


def corda(library: Any, base: Base, method: str = "ipm", network: Any = None, **options: Any) -> tuple[Any, Any]:
    mine = int(library is splice)
    network = base.build() if network is None else network
    fields = {"init_lora_weights": "corda", "corda_config": CORDA[mine](corda_method=method, **options)}
    made = config(library, base, **fields)

    def run_model() -> None:
        with torch.no_grad():
            for row in base.inputs(16)["x"]:  # the reference knows what to do with single rows alone
                network(row[None])

    (splice.preprocess_corda if mine else corda_of_reference)(network, made, run_model)
    return network, made


@BASES
@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_starts_where_the_reference_does(base: Base, method: str, tmp_path: Path) -> None:
    models = []
    for library in (peft, splice):
        network, made = corda(library, base, method)
        expected = run(network, base.inputs(3))
        model = library.get_peft_model(network, made).eval()
        assert_close(run(model, base.inputs(3)), expected, factor=10)
        assert not any("eigens" in vars(module) for module in network.modules())
        models.append(model)
    theirs, ours = map(products, models)
    assert theirs.keys() == ours.keys()
    for path, product in theirs.items():
        assert_close(ours[path], product, factor=10)
        assert product.abs().max() > 2e-3
    models[1].save_pretrained(tmp_path / "initial")
    for model in models:
        grown(model)
    outputs = [run(model, base.inputs(3)) for model in models]
    assert_close(outputs[1], outputs[0], factor=10)
    assert (outputs[1] - expected).abs().max() > 2e-3
    models[1].save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    assert config_in(tmp_path / "plain")["init_lora_weights"] is True
    for library in (peft, splice):
        again = library.PeftModel.from_pretrained(base.build(), str(tmp_path / "plain"))
        assert_close(run(again, base.inputs(3)), outputs[0], factor=20)
    with models[1].disable_adapter():
        assert torch.equal(run(models[1], base.inputs(3)), run(base.build(), base.inputs(3)))


def test_files_of_corda_are_the_references(tmp_path: Path) -> None:
    base = bases.LINEAR
    for library, name in ((peft, "theirs"), (splice, "ours")):
        files = {"covariance_file": tmp_path / f"{name}.cov", "cache_file": tmp_path / f"{name}.cache"}
        corda(library, base, **{key: str(file) for key, file in files.items()})
    for ending in ("cov", "cache"):
        theirs, ours = (torch.load(tmp_path / f"{name}.{ending}") for name in ("theirs", "ours"))
        assert theirs.keys() == ours.keys()
        for name, tensor in theirs.items():
            # Directions are free in their sign.
            assert_close(ours[name].abs(), tensor.abs(), factor=100)
    # Each of them can be read, and is right without running anything.
    expected = products(splice.get_peft_model(*corda(splice, base)))
    for ending, option in (("cov", "covariance_file"), ("cache", "cache_file")):
        network = base.build()
        made = config(
            splice, base, init_lora_weights="corda",
            corda_config=splice.CordaConfig(**{option: str(tmp_path / f"theirs.{ending}")}),
        )  # fmt: skip
        splice.preprocess_corda(network, made)
        for path, product in products(splice.get_peft_model(network, made)).items():
            assert_close(product, expected[path], factor=10)
    with pytest.raises(ValueError, match="no covariance|has nothing for"):
        other = config(splice, base, target_modules=["head"], init_lora_weights="corda", corda_config=made.corda_config)
        splice.preprocess_corda(base.build(), other)


def test_what_corda_needs() -> None:
    base = bases.LINEAR
    made = config(splice, base, init_lora_weights="corda")
    with pytest.raises(ValueError, match="run_model must be specified"):
        splice.preprocess_corda(base.build(), made)
    with pytest.raises(ValueError, match="did not call first"):
        splice.preprocess_corda(base.build(), made, lambda: None)
    with pytest.raises(ValueError, match="init_lora_weights='corda'"):
        splice.preprocess_corda(base.build(), config(splice, base), lambda: None)
    network, _ = corda(splice, base)
    with pytest.raises(ValueError, match="consistent with `get_peft_model`"):
        splice.get_peft_model(network, config(splice, base, r=3, init_lora_weights="corda"))
    with pytest.raises(UnsupportedFeatureError, match="`preprocess_corda` first"):
        splice.get_peft_model(base.build(), made)
    network, made = corda(splice, base, prune_temporary_fields=False)
    assert network.first.sample_count == 16
    assert network.first.covariance_matrix.shape == (network.first.in_features,) * 2


def test_a_copy_of_a_corda_adapter_is_plain_lora() -> None:
    base = bases.LINEAR
    model: Any = splice.get_peft_model(*corda(splice, base)).eval()
    grown(model)
    expected = run(model, base.inputs(3))
    model.add_weighted_adapter(["default"], [1.0], "copy")
    model.set_adapter("copy")
    assert_close(run(model, base.inputs(3)), expected, factor=10)
    assert model.peft_config["copy"].init_lora_weights is True
    again = copy.deepcopy(model)
    again.set_adapter("default")
    assert_close(run(again, base.inputs(3)), expected)


# -- LoRA-GA


def loraga(library: Any, base: Base, network: Any = None, cache: Path | None = None, **options: Any) -> tuple[Any, Any]:
    network = base.build() if network is None else network
    made = config(library, base, init_lora_weights="lora_ga", lora_ga_config=library.LoraGAConfig(**options))

    def train_step() -> None:
        # Of what is below the head, which has few outputs: gradients of all directions.
        for batch in data(base):
            hidden = network.second(torch.tanh(network.first(batch["x"])))
            aim = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(9))
            (hidden - aim).square().mean().backward()

    library.preprocess_loraga(network, made, train_step, None if cache is None else str(cache))
    return network, made


@BASES
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"direction": "A2rBr", "scale": "gd_scale"},
        {"direction": "ArBr", "scale": "weight_svd"},
        {"scale": "unit"},
        {"stable_gamma": 64},
    ],
    ids=str,
)
def test_loraga_starts_where_the_reference_does(base: Base, options: dict[str, Any]) -> None:
    models = []
    for library in (peft, splice):
        network, made = loraga(library, base, **options)
        assert all(p.grad is None and p.requires_grad for p in network.parameters())
        expected = run(network, base.inputs(3))
        model = library.get_peft_model(network, made).eval()
        assert_close(run(model, base.inputs(3)), expected, factor=10)
        assert not any("_peft_loraga_grad" in vars(module) for module in network.modules())
        models.append(model)
    factors = []
    for model in models:
        state = {n.replace("base_model.model.", ""): t for n, t in model.state_dict().items() if ".lora_" in n}
        factors.append({name: state[name] for name in sorted(state)})
    assert factors[0].keys() == factors[1].keys()
    for name, tensor in factors[0].items():
        # A and B take other directions of the decomposition, whose signs are free.
        assert_close(factors[1][name].abs(), tensor.abs(), factor=100)


def test_loraga_at_random_and_trained_on(tmp_path: Path) -> None:
    base = bases.LINEAR
    network, made = loraga(splice, base, direction="random")
    expected = run(network, base.inputs(3))
    model: Any = splice.get_peft_model(network, made).eval()
    assert_close(run(model, base.inputs(3)), expected, factor=10)
    assert any(product.abs().max() > 0.01 for product in products(model).values())
    model.save_pretrained(tmp_path / "initial")
    grown(model)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    again = splice.PeftModel.from_pretrained(base.build(), tmp_path / "plain")
    assert_close(run(again, base.inputs(3)), run(model, base.inputs(3)), factor=10)
    assert tensors_in(tmp_path / "plain").keys() == tensors_in(tmp_path / "initial").keys()
    model.add_weighted_adapter(["default"], [1.0], "copy")
    expected = run(model, base.inputs(3))
    model.set_adapter("copy")
    assert_close(run(model, base.inputs(3)), expected, factor=10)
    merged = model.merge_and_unload()
    assert_close(run(merged, base.inputs(3)), expected, factor=10)


def test_gradients_are_the_mean_and_can_be_kept(tmp_path: Path) -> None:
    base, file = bases.LINEAR, tmp_path / "gradients.pt"
    network = base.build()
    network.head.weight.requires_grad = False
    network.first.weight.grad = given = torch.ones_like(network.first.weight)
    loraga(splice, base, network, file)
    assert network.first.weight.grad is given
    assert not network.head.weight.requires_grad
    loraga(peft, base, cache=tmp_path / "theirs.pt")
    theirs, ours = torch.load(tmp_path / "theirs.pt"), torch.load(file)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert_close(ours[name], tensor)
    again = base.build()
    made = config(splice, base, init_lora_weights="lora_ga", lora_ga_config=splice.LoraGAConfig())
    splice.preprocess_loraga(again, made, lambda: pytest.fail("it is in the file"), str(tmp_path / "theirs.pt"))
    assert torch.equal(again.first._peft_loraga_grad, theirs["first._peft_loraga_grad"])
    with pytest.raises(ValueError, match="made with another model"):
        splice.preprocess_loraga(bases.TRANSPOSED.build(), made, lambda: None, str(file))


def test_what_loraga_needs() -> None:
    base = bases.LINEAR
    made = config(splice, base, init_lora_weights="lora_ga", lora_ga_config=splice.LoraGAConfig())
    with pytest.raises(ValueError, match="If you want to use LoRA-GA"):
        splice.preprocess_loraga(base.build(), config(splice, base, init_lora_weights="lora_ga"), lambda: None)
    with pytest.raises(ValueError, match="first got no gradient"):
        splice.preprocess_loraga(base.build(), made, lambda: None)
    with pytest.raises(ValueError, match="`direction` of LoRA-GA must be one of"):
        loraga(splice, base, direction="ArB3r")
    with pytest.raises(UnsupportedFeatureError, match="`preprocess_loraga"):
        splice.get_peft_model(base.build(), made)
    network, _ = loraga(splice, base)
    large = config(splice, base, r=5, init_lora_weights="lora_ga", lora_ga_config=splice.LoraGAConfig())
    with pytest.raises(ValueError, match="chooses 5 of 10 directions"):
        splice.get_peft_model(network, large)
    assert isinstance(network.first, nn.Linear)
    assert "_peft_loraga_grad" in vars(network.first)


@pytest.mark.parametrize("start", [corda, loraga])
def test_relatives_that_start_otherwise_are_refused(start: Any) -> None:
    base = bases.LINEAR
    network, made = start(splice, base)
    made.kasa_config = splice.KasaConfig()
    with pytest.raises(UnsupportedFeatureError, match="kasa_config"):
        splice.get_peft_model(network, made)
