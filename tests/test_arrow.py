"""Arrow mixes the same experts for each token as the reference's, and says what it cannot mix."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import splice
from splice.errors import UnsupportedFeatureError
from tests import bases
from tests.bases import run
from tests.comparing import assert_close, differ

BASE = bases.LLAMA


def expert(folder: Path, seed: int, **fields: Any) -> str:
    network = BASE.build()
    torch.manual_seed(seed)
    named = {"r": 3, "lora_alpha": 4 + seed, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    peft.get_peft_model(network, peft.LoraConfig(**{**named, **fields})).save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("experts")
    return [expert(folder / str(seed), seed) for seed in range(5)]


def built(library: Any, experts: list[str], general: int = 0, **options: Any) -> Any:
    config = library.ArrowConfig(**{"top_k": 2, "rng_seed": 7, "use_gks": bool(general), **options})
    tasks, others = experts[: len(experts) - general], experts[len(experts) - general :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.create_arrow_model(BASE.build(), tasks, config, general_adapter_paths=others or None)


@pytest.mark.parametrize(
    ("general", "options"),
    [(0, {}), (2, {}), (0, {"top_k": 1}), (0, {"router_temperature": 0.05}), (1, {"rng_seed": None})],
)
def test_it_is_the_reference_s(general: int, options: dict[str, Any], experts: list[str]) -> None:
    outputs = []
    for library in (peft, splice):
        model = built(library, experts, general, **options)
        assert model.active_adapters == ["arrow_router"]
        torch.manual_seed(3)
        outputs.append(run(model, BASE.inputs(3)))
    assert_close(outputs[1], outputs[0])
    assert differ(outputs[1], run(BASE.build(), BASE.inputs(3)))


def test_a_single_expert_is_that_adapter(experts: list[str]) -> None:
    model = built(splice, experts[:1], top_k=1)
    mixed = run(model, BASE.inputs(3))
    model.set_adapter("task_0")
    assert_close(mixed, run(model, BASE.inputs(3)))


def test_what_is_taken_out_of_experts_is_not_taken_from_them(experts: list[str], tmp_path: Path) -> None:
    plain = built(splice, experts[:3])
    plain.set_adapter("task_0")
    model = built(splice, experts[:4], general=1)
    run(model, BASE.inputs(3))
    model.set_adapter("task_0")
    assert torch.equal(run(model, BASE.inputs(3)), run(plain, BASE.inputs(3)))


def test_an_adapter_that_comes_later_is_one_more_expert(experts: list[str]) -> None:
    outputs = []
    for library in (peft, splice):
        model = built(library, experts[:2])
        run(model, BASE.inputs(3))
        model.load_adapter(experts[2], "late")
        model.set_adapter("arrow_router")
        outputs.append(run(model, BASE.inputs(3)))
    assert_close(outputs[1], outputs[0])
    assert torch.equal(outputs[1], run(built(splice, experts[:3]), BASE.inputs(3)))


def test_new_weights_of_an_expert_are_new_directions(experts: list[str]) -> None:
    model = built(splice, experts[:2])
    run(model, BASE.inputs(3))
    with pytest.warns(splice.PeftWarning, match="lora_alpha is 6 there and 5 here"):
        model.load_adapter(experts[2], "task_1")
    expected = _mixture(model, experts[:2])
    assert_close(run(model, BASE.inputs(3)), expected)


def test_what_is_kept_has_no_graph(experts: list[str]) -> None:
    """Also where all are trained: what is taken out of the experts is a constant."""
    model = built(splice, experts[:3], general=1).eval()
    model.base_model.set_requires_grad(list(model.peft_config))
    model(**BASE.inputs(3))
    routes = [host.splice_host.layers["arrow_router"].routes for host in model.base_model.adapted.values()]
    assert routes and not any(tensor.requires_grad for found in routes for tensor in found.general)


def test_directions_are_not_those_of_half_precision(experts: list[str]) -> None:
    model = built(splice, experts[:3])
    with torch.autocast("cpu", torch.bfloat16):
        run(model, BASE.inputs(3))
    assert torch.equal(run(model, BASE.inputs(3)), run(built(splice, experts[:3]), BASE.inputs(3)))


def _mixture(model: Any, experts: list[str]) -> torch.Tensor:
    """The output of a model that is built anew of the tensors that `model` has now."""
    again = built(splice, experts)
    for name in ("task_0", "task_1"):
        now = splice.get_peft_model_state_dict(model, adapter_name=name)
        splice.set_peft_model_state_dict(again, {key: t.clone() for key, t in now.items()}, adapter_name=name)
    return run(again, BASE.inputs(3))


@pytest.mark.parametrize("saves", [peft, splice], ids=["theirs", "ours"])
def test_a_saved_router_is_a_recipe_for_adapters_that_are_there(saves: Any, experts: list[str], tmp_path: Path) -> None:
    model = built(saves, experts[:3])
    before = run(model, BASE.inputs(3))
    model.save_pretrained(str(tmp_path))
    options = json.loads((tmp_path / "arrow_router" / "adapter_config.json").read_text())["arrow_config"]
    assert options["task_adapter_names"] == ["task_0", "task_1", "task_2"] and options["rng_seed"] == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = splice.PeftModel.from_pretrained(BASE.build(), tmp_path / "task_0", adapter_name="task_0")
    with pytest.raises(ValueError, match=r"an Arrow router: it mixes .*\['task_1', 'task_2'\] are not there"):
        again.load_adapter(tmp_path / "arrow_router", "arrow_router")
    for name in ("task_1", "task_2", "arrow_router"):
        again.load_adapter(tmp_path / name, name)
    again.set_adapter("arrow_router")
    assert_close(run(again, BASE.inputs(3)), before)


def test_rows_of_a_batch_may_have_the_router(experts: list[str]) -> None:
    model = built(splice, experts[:3])
    all_mixed = run(model, BASE.inputs(3))
    model.set_adapter("task_1")
    alone = run(model, BASE.inputs(3))
    rows = run(model, BASE.inputs(3), adapter_names=["arrow_router", "task_1", "__base__"])
    expected = torch.stack([all_mixed[0], alone[1], run(BASE.build(), BASE.inputs(3))[2]])
    assert_close(rows, expected)


def test_it_is_no_change_of_weights(experts: list[str]) -> None:
    model = built(splice, experts[:3])
    with pytest.raises(RuntimeError, match="'arrow_router' cannot be merged"):
        model.merge_adapter()
    before = run(model, BASE.inputs(3))
    with pytest.raises(
        ValueError, match=r"'task_1' without 'arrow_router' would.*twice.* Make 'task_1' the active adapter"
    ):
        model.merge_adapter(["task_1"])
    assert torch.equal(run(model, BASE.inputs(3)), before)
    with pytest.raises(UnsupportedFeatureError, match="mixes other adapters token by token"):
        model.add_weighted_adapter(["arrow_router", "task_0"], [1.0, 1.0], "sum", "linear")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"r": 2}, ValueError, "the same rank and shapes"),
        ({"target_modules": ["q_proj"]}, ValueError, "the same targets: of 'task_0' and 'task_1' only one is on"),
        ({"use_dora": True}, UnsupportedFeatureError, "'task_1' cannot be mixed: .*`use_dora`"),
        ({"lora_bias": True}, UnsupportedFeatureError, "'task_1' cannot be mixed: .*`lora_bias`"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedFeatureError, "'task_1' cannot be mixed: .*`modules_to_save`"),
    ],
)
def test_experts_that_cannot_be_mixed_are_refused(
    fields: dict[str, Any], error: type[Exception], message: str, experts: list[str], tmp_path: Path
) -> None:
    other = expert(tmp_path, 1, **fields)
    network = BASE.build()
    kept = type(network.model.layers[0].self_attn.q_proj)
    with pytest.raises(error, match=message):
        splice.create_arrow_model(network, [experts[0], other], splice.ArrowConfig(top_k=1))
    assert type(network.model.layers[0].self_attn.q_proj) is kept


def test_layers_that_are_not_linear_are_refused(tmp_path: Path) -> None:
    folders = [expert(tmp_path / str(seed), seed, target_modules=["embed_tokens"]) for seed in range(2)]
    with pytest.raises(TypeError, match="must only target Linear layers .* of class Embedding"):
        splice.create_arrow_model(BASE.build(), folders, splice.ArrowConfig(top_k=1))


def test_what_is_given_is_checked_first(experts: list[str]) -> None:
    create = splice.create_arrow_model
    with pytest.raises(ValueError, match="provide general LoRA paths"):
        create(BASE.build(), experts, splice.ArrowConfig(use_gks=True))
    with pytest.raises(ValueError, match="top_k=3 experts, and .* has 2"):
        create(BASE.build(), experts[:2], splice.ArrowConfig())
    with pytest.raises(ValueError, match="at least one adapter"):
        create(BASE.build(), [], splice.ArrowConfig())
    for name in ("top_k", "router_temperature"):
        with pytest.raises(ValueError, match=f"`{name}` must be greater than 0"):
            splice.ArrowConfig(**{name: 0})
    with pytest.raises(TypeError, match="task_adapter_names"):
        splice.ArrowConfig(task_adapter_names=["a"])


def test_an_expert_fewer_than_each_token_is_given_is_told(experts: list[str]) -> None:
    model = built(splice, experts[:2])
    model.delete_adapter("task_0")
    with pytest.raises(ValueError, match=r"gives each token 2 experts .*there are \['task_1'\]"):
        run(model, BASE.inputs(3))
