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
    assert (outputs[1] - expected).abs().max() > 3e-4
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


# -- EVA

QKV = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]


def tokens() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(4):
        ids = torch.randint(1, 40, (8, 12), generator=generator)
        labels = ids.clone()
        labels[:, :3] = -100
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return batches


def eva(library: Any, **fields: Any) -> Any:
    names = ("rho", "tau", "whiten", "adjust_scaling_factors", "use_label_mask")
    options = {name: fields.pop(name) for name in names if name in fields}
    asked = {"r": 3, "lora_alpha": 6, "target_modules": QKV, "init_lora_weights": "eva", "task_type": "CAUSAL_LM"}
    return library.LoraConfig(**{**asked, **fields}, eva_config=library.EvaConfig(**options))


def started(library: Any, **fields: Any) -> Any:
    model = library.get_peft_model(bases.LLAMA.build(), eva(library, **fields))
    library.initialize_lora_eva_weights(model, tokens(), show_progress_bar=False)
    return model


def ranks_of(model: Any) -> dict[str, int]:
    return {n: len(p) for n, p in model.named_parameters() if ".lora_A." in n}


@pytest.mark.parametrize("fields", [{}, {"rho": 1.0, "whiten": True}, {"adjust_scaling_factors": False}], ids=str)
def test_eva_starts_where_the_reference_does(fields: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = started(peft, **fields), started(splice, **fields)
    ranks = ranks_of(theirs)
    assert ranks_of(ours) == ranks
    assert len(set(ranks.values())) > 1 or fields.get("rho") == 1.0
    factors = [dict(model.named_parameters()) for model in (theirs, ours)]
    for name in ranks:
        a, b = (torch.nn.functional.normalize(f[name].detach(), dim=1) for f in factors)
        # The reference may stop after another batch; both have settled to a cosine of 0.99.
        assert (a * b).sum(1).abs().min() > 0.97, name
        if not fields.get("whiten"):
            assert_close(factors[1][name] @ factors[1][name].T, torch.eye(ranks[name]), factor=10)
        else:
            # Of layers that see the same input the reference whitens the one tensor again for each of them.
            times = 3 if any(f"{part}_proj" in name for part in "qkv") else 1
            size = [factors[0][name].norm(dim=1) ** (1 / times), factors[1][name].norm(dim=1)]
            torch.testing.assert_close(size[1], size[0], rtol=0.1, atol=0.0)
        assert factors[1][name].requires_grad
        assert not factors[1][name.replace("lora_A", "lora_B")].any()
    configs = [model.peft_config["default"] for model in (theirs, ours)]
    for field in ("target_modules", "rank_pattern", "alpha_pattern", "r", "lora_alpha", "init_lora_weights"):
        assert getattr(configs[1], field) == getattr(configs[0], field), field
    assert ours.active_adapters == ["default"]
    inputs = bases.LLAMA.inputs(2)
    assert torch.equal(run(ours, inputs), run(bases.LLAMA.build(), inputs))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.fill_(0.05) if "lora_B" in name else None
    ours.save_pretrained(tmp_path)
    for library in (peft, splice):
        again = library.PeftModel.from_pretrained(bases.LLAMA.build(), str(tmp_path))
        assert_close(run(again, inputs), run(ours, inputs))


def test_eva_takes_the_adapter_from_layers_that_earn_no_rank() -> None:
    base = bases.LLAMA
    model: Any = splice.get_peft_model(base.build(), eva(splice, target_modules=["q_proj", "embed_tokens"]))
    model.get_base_model().train()
    state = splice.get_eva_state_dict(model, tokens(), show_progress_bar=False)
    assert len(state) == 2
    first, second = sorted(state)
    state[second] = state[second][:0]
    splice.initialize_lora_eva_weights(model, eva_state_dict={**state, first: torch.eye(5, 16)})
    assert ranks_of(model) == {f"{first}.lora_A.default.weight": 5}
    assert [p for p in model.targeted_module_names if "q_proj" in p] == [first.removeprefix("base_model.model.")]
    assert "model.embed_tokens" in model.peft_config["default"].target_modules
    assert type(model.get_submodule(second)) is nn.Linear
    assert model.get_base_model().training
    expected = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.embed_tokens.lora_embedding_B",
    }
    assert set(splice.get_peft_model_state_dict(model, save_embedding_layers=False)) == expected
    model.unload()
    assert not any("lora" in name for name, _ in model.get_base_model().named_parameters())


def test_what_eva_needs() -> None:
    base, own = bases.LLAMA, eva(splice)
    with pytest.raises(ValueError, match="model must be a PeftModel"):
        splice.initialize_lora_eva_weights(base.build(), tokens())
    with pytest.raises(ValueError, match="peft_config is required"):
        splice.get_eva_state_dict(base.build(), tokens())
    with pytest.raises(ValueError, match="dataloader is empty"):
        splice.get_eva_state_dict(base.build(), [], own, show_progress_bar=False)
    with pytest.raises(ValueError, match="too little data: .* needs 6 rows"):
        small = [{"input_ids": torch.tensor([[1, 2]])}]
        splice.get_eva_state_dict(base.build(), iter(small), own, show_progress_bar=False)
    model: Any = splice.get_peft_model(base.build(), own)
    with pytest.raises(ValueError, match="dataloader is required"):
        splice.initialize_lora_eva_weights(model)
    plain: Any = splice.get_peft_model(base.build(), splice.LoraConfig(target_modules=QKV))
    with pytest.raises(ValueError, match="init_lora_weights='eva'"):
        splice.initialize_lora_eva_weights(plain, tokens())
    model.add_adapter("second", eva(splice))
    splice.initialize_lora_eva_weights(model, tokens(), adapter_name="second", show_progress_bar=False)
    assert model.active_adapters == ["default"]
    frozen = [p.requires_grad for n, p in model.named_parameters() if ".second." in n]
    assert frozen
    assert not any(frozen)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="single active adapter"):
        splice.initialize_lora_eva_weights(model, tokens())
    with pytest.raises(ValueError, match=r"has \(2, 3\) for model.layers.0.self_attn.q_proj"):
        model.set_adapter("default")
        splice.initialize_lora_eva_weights(model, eva_state_dict={"model.layers.0.self_attn.q_proj": torch.zeros(2, 3)})


def test_an_adapter_that_cannot_be_made_anew_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from splice.surgery.tuner import Tuner

    base = bases.LLAMA
    model: Any = splice.get_peft_model(base.build(), eva(splice))
    names = [name for name, _ in model.named_parameters()]
    before = dict(model.named_parameters())
    targets = model.peft_config["default"].target_modules
    commit = Tuner.commit
    calls = []

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(args)
        commit(self, *args, **kwargs)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Tuner, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        splice.initialize_lora_eva_weights(model, tokens(), show_progress_bar=False)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())
    assert model.peft_config["default"].target_modules == targets
    with pytest.raises(ValueError, match="left over"):
        model.remake_adapter("default", model.peft_config["default"], {"x": torch.zeros(1)})
    plain, several = (
        splice.LoraConfig(target_modules=["q_proj"], layer_replication=ranges) for ranges in (None, [[0, 1], [0, 2]])
    )
    for config, other in ((plain, several), (several, plain)):
        model = splice.get_peft_model(base.build(), config)
        with pytest.raises(splice.UnsupportedFeatureError, match="uses layers several times"):
            model.remake_adapter("default", other, {})
