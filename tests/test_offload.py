"""Bases that accelerate dispatched over memory and disk, before and after an adapter was loaded, with every method."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import nn

import splice
from tests import bases
from tests.bases import run
from tests.comparing import assert_close, differ
from tests.samples import Case, network_cases, plain_cases

BASE = bases.LLAMA
# What a start that takes something out of the base, or norms of it, mean on a base that is not there.
VARIANTS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "LoftQ": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
    "rows": {"trainable_token_indices": [1, 3]},
    "head": {"modules_to_save": ["lm_head"]},
}
CASES = [*plain_cases(BASE), *network_cases(BASE)]
every = pytest.mark.parametrize("case", CASES, ids=str)
PLACES = ("disk", "memory")


def dispatched(model: Any, where: str, folder: Path) -> Any:
    """The model with the tensors of its blocks and its head kept in the folder, or those of all modules in memory."""
    if where == "memory":
        return cpu_offload(model, execution_device="cpu")
    kept = {"model.layers.0", "model.layers.1", "lm_head"}
    names = ["model.embed_tokens", *sorted(kept), "model.norm", "model.rotary_emb"]
    front = "base_model.model." if isinstance(model, splice.PeftModel) else ""
    device_map = {front + name: "disk" if name in kept else "cpu" for name in names}
    # What all layers of an adapter share.
    device_map.update({f"base_model.{name}": "cpu" for name in model.base_model.added} if front else {})
    folder.mkdir(exist_ok=True)
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def output(model: nn.Module, base: bases.Base = BASE) -> torch.Tensor:
    with torch.no_grad():
        return run(model, base.inputs(3))


# The files that have been opened.
_opened: list[str] = []
sys.addaudithook(lambda event, arguments: _opened.append(str(arguments[0])) if event == "open" else None)


@pytest.mark.parametrize("where", PLACES)
@every
def test_dispatched_before(case: Case, where: str, shared_checkpoint: Any, tmp_path: Path) -> None:
    first, second = shared_checkpoint(BASE, case.config()), shared_checkpoint(BASE, case.other_config())
    whole: Any = splice.PeftModel.from_pretrained(BASE.build(), first)
    whole.load_adapter(second, "second")
    network = dispatched(BASE.build(), where, tmp_path / "kept")
    _opened.clear()
    model: Any = splice.PeftModel.from_pretrained(network, first)
    model.load_adapter(second, "second")
    # Nothing of the base is read for a load.
    assert not [path for path in _opened if path.startswith(str(tmp_path / "kept"))]
    _assert_works_as(model, whole, case)
    assert torch.equal(output(model.unload()), output(BASE.build()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_lora(variant: str, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"], **VARIANTS[variant]}
    torch.manual_seed(0)
    whole: Any = splice.get_peft_model(BASE.build(), splice.get_peft_config(dict(config))).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    whole.save_pretrained(tmp_path / "adapter")
    network = dispatched(BASE.build(), "disk", tmp_path / "kept")
    _opened.clear()
    model: Any = splice.PeftModel.from_pretrained(network, tmp_path / "adapter")
    assert not [path for path in _opened if path.startswith(str(tmp_path / "kept"))]
    assert_close(output(model), output(whole))
    torch.manual_seed(0)
    fresh: Any = splice.get_peft_model(BASE.build(), splice.get_peft_config(dict(config))).eval()
    torch.manual_seed(0)
    kept: Any = splice.get_peft_model(
        dispatched(BASE.build(), "disk", tmp_path / "again"), splice.get_peft_config(dict(config))
    ).eval()
    assert_close(output(kept), output(fresh))


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("case", plain_cases(BASE), ids=str)
def test_dispatched_after(case: Case, where: str, shared_checkpoint: Any, tmp_path: Path) -> None:
    first, second = shared_checkpoint(BASE, case.config()), shared_checkpoint(BASE, case.other_config())
    whole: Any = splice.PeftModel.from_pretrained(BASE.build(), first)
    model: Any = dispatched(splice.PeftModel.from_pretrained(BASE.build(), first), where, tmp_path / "kept")
    for each in (whole, model):
        each.load_adapter(second, "second")
    _assert_works_as(model, whole, case)
    assert torch.equal(output(model.unload()), output(BASE.build()))


def _assert_works_as(model: Any, whole: Any, case: Case) -> None:
    base = case.base
    always = {name: value for name, value in base.inputs(3).items() if name in case.sample.call}
    bare, expected = output(BASE.build()), output(whole, base)
    assert differ(bare, expected)
    assert_close(output(model, base), expected)
    with model.disable_adapter():
        assert_close(output(model), bare)
    for each in (model, whole):
        each.set_adapter("second")
    assert_close(output(model, base), output(whole, base))
    rows = ["default", "__base__", "second"]
    mixed = [run(each, base.inputs(3), adapter_names=rows) for each in (model, whole)]
    assert_close(*mixed)
    for each in (model, whole):
        each.set_adapter("default")
    assert torch.equal(bases.generate(model, base, **always), bases.generate(whole, base, **always))
    for each in (model, whole):
        each.delete_adapter("second")
    assert_close(output(model, base), expected)


def mergeable(case: Case) -> bool:
    model: Any = splice.get_peft_model(BASE.build(), splice.get_peft_config(case.config()))
    return all(layer.mergeable for layer in model.base_model.placed["default"].values())


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("case", [case for case in plain_cases(BASE) if mergeable(case)], ids=str)
def test_merged(case: Case, where: str, after: bool, shared_checkpoint: Any, tmp_path: Path) -> None:
    folder, kept = shared_checkpoint(BASE, case.config()), tmp_path / "kept"
    whole: Any = splice.PeftModel.from_pretrained(BASE.build(), folder)
    unmerged = output(whole)
    whole.merge_adapter()
    if after:
        model: Any = dispatched(splice.PeftModel.from_pretrained(BASE.build(), folder), where, kept)
    else:
        model = splice.PeftModel.from_pretrained(dispatched(BASE.build(), where, kept), folder)
    before = {path: path.read_bytes() for path in kept.glob("**/*") if path.is_file()} if where == "disk" else {}
    model.merge_adapter()
    assert torch.equal(output(model), output(whole))
    # Nothing of the base has come into the modules for good, and nothing that was kept has been written over.
    assert all(
        p.is_meta for p in model.get_base_model().model.layers[0].mlp.up_proj._parameters.values() if p is not None
    )
    assert all(
        p.is_meta for p in model.get_base_model().model.layers[0].self_attn.q_proj._parameters.values() if p is not None
    )
    assert all(path.read_bytes() == held for path, held in before.items())
    model.unmerge_adapter()
    assert_close(output(model), unmerged)
    with model.disable_adapter():
        assert torch.equal(output(model), output(BASE.build()))
    assert {path for path in kept.glob("**/*") if path.is_file()} == set(before)
    merged = model.merge_and_unload()
    assert torch.equal(output(merged), output(whole))


@pytest.mark.parametrize("where", PLACES)
def test_a_merge_that_fails_half_way(where: str, shared_checkpoint: Any, tmp_path: Path) -> None:
    case = next(case for case in plain_cases(BASE) if case.method.name.value == "LORA")
    folder, kept = shared_checkpoint(BASE, case.config()), tmp_path / "kept"
    model: Any = splice.PeftModel.from_pretrained(dispatched(BASE.build(), where, kept), folder)
    unmerged, files = output(model), set(kept.glob("**/*"))
    last = list(model.base_model.placed["default"].values())[-1]
    with torch.no_grad():
        last.tensor("lora_A.weight").fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    last.deltas = _fail
    with pytest.raises(MemoryError):
        model.merge_adapter()
    assert model.base_model.merged == []
    assert set(kept.glob("**/*")) == files
    with torch.no_grad():
        last.tensor("lora_A.weight").copy_(_first_of(shared_checkpoint(BASE, case.config()), case))
    assert torch.equal(output(model), unmerged)


def _fail(*arguments: object) -> Any:
    raise MemoryError


def _first_of(folder: Path, case: Case) -> torch.Tensor:
    model: Any = splice.PeftModel.from_pretrained(BASE.build(), folder)
    found: torch.Tensor = list(model.base_model.placed["default"].values())[-1].tensor("lora_A.weight")
    return found


@every
def test_a_new_adapter_begins_as_on_a_whole_base(case: Case, tmp_path: Path) -> None:
    """Also where it starts from the weights, which are not there between calls, or gets its shapes from them."""
    states = []
    for network in (BASE.build(), dispatched(BASE.build(), "disk", tmp_path / "kept")):
        torch.manual_seed(0)
        model = splice.get_peft_model(network, splice.get_peft_config(case.config()))
        states.append(splice.get_peft_model_state_dict(model))
    whole, kept = states
    assert whole.keys() == kept.keys()
    assert all(torch.equal(whole[name], kept[name]) for name in whole)


@pytest.mark.parametrize("method", ["LORA", "LOHA"])
@pytest.mark.parametrize("where", PLACES)
def test_what_was_there_first_and_is_deleted_is_kept_nowhere(
    where: str, method: str, shared_checkpoint: Any, tmp_path: Path
) -> None:
    """Of an adapter that came before the hooks: the map has its tensors from these."""
    case = next(case for case in plain_cases(BASE) if case.method.name.value == method)
    folder = shared_checkpoint(BASE, case.config())
    model: Any = splice.PeftModel.from_pretrained(BASE.build(), folder)
    model.load_adapter(folder, "second")
    model = dispatched(model, where, tmp_path / "kept")
    expected = output(model)
    assert len([name for name in _map_of(model) if ".second" in name]) > 1
    model.delete_adapter("second")
    assert not [name for name in _map_of(model) if ".second" in name]
    assert [name for name in _map_of(model) if ".default" in name]
    assert torch.equal(output(model), expected)


@pytest.mark.parametrize("where", PLACES)
def test_what_was_deleted_is_kept_nowhere(where: str, shared_checkpoint: Any, tmp_path: Path) -> None:
    case = next(case for case in plain_cases(BASE) if case.method.name.value == "LOHA")
    folder = shared_checkpoint(BASE, case.config())
    model: Any = dispatched(splice.PeftModel.from_pretrained(BASE.build(), folder), where, tmp_path / "kept")
    known = set(_map_of(model))
    model.load_adapter(folder, "second")
    assert {name for name in _map_of(model) if ".second" in name}
    model.delete_adapter("second")
    assert set(_map_of(model)) == known


def _map_of(model: nn.Module) -> Any:
    module = next(m for name, m in model.named_modules() if name.endswith("q_proj"))
    where: Any = module._hf_hook
    where = where.weights_map.dataset
    return [*where.state_dict, *where.index] if hasattr(where, "index") else list(where)
