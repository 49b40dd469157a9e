"""What is peculiar to SHiRA and Super-Tuning: which entries of a weight they train, and how a checkpoint says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import splice
from tests import bases
from tests.bases import run
from tests.comparing import Snapshot, assert_close, differ, load_both, tensors_in
from tests.quantised import WAYS, WIDE

SHIRA = {"peft_type": "SHIRA", "r": 1, "init_weights": False, "target_modules": ["first", "second"]}
SUPER = {"peft_type": "SUPERTUNING", "sparsity": 0.8, "init_weights": False, "target_modules": ["first", "second"]}
INDICES = {"SHIRA": "shira_indices", "SUPERTUNING": "supertuning_indices"}
both = pytest.mark.parametrize("fields", [SHIRA, SUPER], ids=lambda fields: fields["peft_type"])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def made(library: Any, fields: dict[str, Any], dtype: torch.dtype = torch.float32, **runtime: Any) -> Any:
    config = library.get_peft_config(dict(fields))
    vars(config).update(runtime)
    return library.get_peft_model(bases.LINEAR.build().to(dtype), config).eval()


def first_and_last(base: nn.Module, r: int, **options: Any) -> torch.Tensor:
    """As many entries as it has to be, half of them from each end of the weight."""
    mask = torch.zeros_like(base.weight)  # type: ignore[arg-type]
    count = r * sum(mask.shape)
    mask.view(-1)[: count // 2], mask.view(-1)[count // 2 - count :] = 1, 1
    return mask


def state(library: Any, model: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = library.get_peft_model_state_dict(model)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fields",
    [
        SHIRA,
        {**SHIRA, "random_seed": 7, "r": 2},
        SUPER,
        {**SUPER, "select_top": False},
        {**SUPER, "sparsity": 0.0, "r": 2},
    ],
)
def test_a_new_adapter_trains_the_entries_of_the_references(fields: dict[str, Any], dtype: torch.dtype) -> None:
    """To the bit, also among weights of which many are equal."""
    theirs, ours = (state(library, made(library, fields, dtype)) for library in (peft, splice))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype, key
        if key.endswith("_indices"):
            assert torch.equal(ours[key], tensor), key


def test_the_random_mask_is_the_references() -> None:
    from peft.tuners.shira.mask_functions import random_mask

    layer = nn.Linear(6, 5)
    for seed in (None, 3):
        assert torch.equal(splice.random_mask(layer, 2, seed), random_mask(layer, 2, seed))


def test_known_entries() -> None:
    weight = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    network = nn.Sequential(nn.Linear(4, 4))
    model = splice.get_peft_model(network, splice.ShiraConfig(r=1, random_seed=42, target_modules=["0"]))
    layer = model.base_model.placed["default"]["0"]
    assert layer.shira_indices.tolist() == [[0, 0, 0, 1, 1, 2, 3, 3], [0, 2, 3, 2, 3, 2, 0, 3]]
    layer.shira_weight.data.copy_(weight)
    expected = torch.zeros(4, 4)
    expected[layer.shira_indices[0].long(), layer.shira_indices[1].long()] = weight
    assert torch.equal(network[0].get_delta_weight("default").detach(), expected)


@pytest.mark.parametrize("mask_type", ["random", "mine"])
def test_a_mask_of_ones_own(mask_type: str, tmp_path: Path) -> None:
    """It is asked as in the reference, saved, and not needed any more to load what was saved."""
    asked: dict[Any, list[Any]] = {peft: [], splice: []}
    found = {}
    for library, calls in asked.items():

        def mask(*args: Any, calls: list[Any] = calls, **options: Any) -> torch.Tensor:
            calls.append((*args[1:], options))
            return first_and_last(*args)

        model = made(library, {**SHIRA, "mask_type": mask_type, "random_seed": 5}, mask_fn=mask)
        found[library] = state(library, model)
        model.save_pretrained(tmp_path / library.__name__)
    assert asked[splice] == asked[peft]
    for key, tensor in found[peft].items():
        assert key.endswith("weight") or torch.equal(found[splice][key], tensor), key
    for library in asked:
        pair = load_both(bases.LINEAR, tmp_path / library.__name__)
        assert differ(pair.assert_equal(), run(bases.LINEAR.build(), bases.LINEAR.inputs(3)))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (None, "`mask_type` is 'mine', for which there is no function"),
        (
            lambda base, r: torch.ones_like(base.weight),
            r"gave a mask of shape \(8, 6\) with 48 ones.*with r = 1 14 ones",
        ),
        (lambda base, r: first_and_last(base, r).T, r"of shape \(6, 8\).*needs the shape \(8, 6\)"),
    ],
)
def test_masks_that_are_none(mask: Any, message: str) -> None:
    network = bases.LINEAR.build()
    before = Snapshot.of(network)
    config = splice.ShiraConfig(r=1, mask_type="mine", target_modules=["first", "second"])
    config.mask_fn = mask
    with pytest.raises(ValueError, match=message):
        splice.get_peft_model(network, config)
    before.assert_same(network)


def test_whoever_trains_is_told_that_a_mask_is_needed() -> None:
    with pytest.warns(UserWarning, match=r"'mine' is not recognized.*config\.mask_fn = my_mask_fn"):
        splice.ShiraConfig(mask_type="mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splice.ShiraConfig(mask_type="mine", inference_mode=True)


def test_an_adapter_without_a_mask_can_be_put_on_and_then_loaded() -> None:
    """As programs do that inject first and load then; until then it changes nothing."""
    source = made(splice, {**SHIRA, "mask_type": "mine"}, mask_fn=first_and_last)
    network, inputs = bases.LINEAR.build(), bases.LINEAR.inputs(3)
    config = splice.get_peft_config({**SHIRA, "mask_type": "mine", "inference_mode": True})
    splice.inject_adapter_in_model(config, network)
    assert torch.equal(run(network, inputs), run(bases.LINEAR.build(), inputs))
    splice.set_peft_model_state_dict(network, state(splice, source))
    assert torch.equal(run(network, inputs), run(source, inputs))


@both
def test_entries_in_any_order(fields: dict[str, Any], checkpoint: Any) -> None:
    """A place that is named twice gets both values."""
    folder = checkpoint(bases.LINEAR, fields)
    tensors = tensors_in(folder)
    for key, values in tensors.items():
        if key.endswith("_indices"):
            own = key.replace("indices", "weight" if "shira" in key else "values")
            order = torch.randperm(values.shape[-1], generator=bases.generator())
            tensors[key], tensors[own] = values[..., order].contiguous(), tensors[own][order]
            tensors[key][..., 1] = tensors[key][..., 0]
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    pair = load_both(bases.LINEAR, folder)
    if fields is SUPER:  # of SHiRA's the reference keeps one of the two values
        pair.assert_equal()
    one = run(pair.ours, bases.LINEAR.inputs(3))
    pair.ours.merge_adapter()
    assert_close(run(pair.ours, bases.LINEAR.inputs(3)), one)


def as_floats(indices: torch.Tensor) -> torch.Tensor:
    return indices.float()


def beyond(indices: torch.Tensor) -> torch.Tensor:
    changed = indices.clone()
    changed.view(-1)[-1] = 48 if indices.dim() == 1 else 6
    return changed


def negative(indices: torch.Tensor) -> torch.Tensor:
    return torch.cat((indices[..., 1:], indices[..., :1].abs().neg() - 1), -1)


def halves(indices: torch.Tensor) -> torch.Tensor:
    return indices + 0.5


@pytest.mark.parametrize("change", [as_floats, beyond, negative, halves])
@pytest.mark.parametrize("over", [False, True], ids=["new", "over one that is there"])
@both
def test_indices_that_were_cast_or_damaged(
    fields: dict[str, Any], over: bool, change: Callable[[torch.Tensor], torch.Tensor], checkpoint: Any
) -> None:
    """Whole numbers are read as such, whatever their dtype; all else is refused before anything changes."""
    folder, inputs = checkpoint(bases.LINEAR, fields), bases.LINEAR.inputs(3)
    expected = run(splice.PeftModel.from_pretrained(bases.LINEAR.build(), folder), inputs)
    key = f"base_model.model.first.{INDICES[fields['peft_type']]}"
    tensors = tensors_in(folder)
    save_file({**tensors, key: change(tensors[key])}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    network = bases.LINEAR.build()
    model = made(splice, {**fields, "random_seed": 3} if fields is SHIRA else fields) if over else None
    before = run(network if model is None else model, inputs)

    def load() -> Any:
        if model is None:
            return splice.PeftModel.from_pretrained(network, folder)
        model.load_adapter(folder, "default")
        return model

    if change is as_floats:
        assert torch.equal(run(load(), inputs), expected)
        return
    with pytest.raises(splice.AdapterMismatchError, match=rf"{key} holds.*The model is unchanged"):
        load()
    assert torch.equal(run(network if model is None else model, inputs), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both
def test_few_tokens_and_many(fields: dict[str, Any], dtype: torch.dtype) -> None:
    """They are computed in two ways, which give the same, forward and backward."""
    own = {**fields, "target_modules": ["0"], **({"sparsity": 0.95} if fields is SUPER else {})}
    model = splice.get_peft_model(nn.Sequential(nn.Linear(64, 64)).to(dtype), splice.get_peft_config(own))
    x = torch.randn(100, 64, generator=bases.generator()).to(dtype)
    gradients, outputs = [], []
    for parts in (x.split(100), x.split(1)):
        model.zero_grad()
        given = [part.clone().requires_grad_() for part in parts]
        outputs.append(torch.cat([model(part) for part in given]))
        outputs[-1].float().square().sum().backward()
        gradients.append(
            [*(p.grad for p in model.parameters() if p.requires_grad), torch.cat([part.grad for part in given])]
        )
    assert_close(outputs[0], outputs[1], factor=3)
    for one, other in zip(*gradients):
        scale = one.abs().max()
        torch.testing.assert_close(one / scale, other / scale, rtol=0, atol=1e-5 if dtype is torch.float32 else 2e-2)


@both
def test_places_stay_whole_numbers(fields: dict[str, Any]) -> None:
    model = made(splice, fields)
    before = {key: tensor.clone() for key, tensor in state(splice, model).items() if key.endswith("_indices")}
    assert before
    for change in (lambda: model.half(), lambda: model.to(torch.float64), lambda: model.to(torch.bfloat16)):
        change()
        for key, tensor in before.items():
            assert torch.equal(state(splice, model)[key], tensor)


def test_weights_with_too_few_entries_are_refused() -> None:
    for fields, message in (
        ({**SHIRA, "r": 9}, r"first: r = 9 asks for 126 entries, and the weight has 8 x 6 = 48"),
        ({**SUPER, "sparsity": 0.99}, r"first: of the 48 entries of its weight sparsity=0.99 leaves none to train"),
    ):
        network = bases.LINEAR.build()
        before = Snapshot.of(network)
        with pytest.raises(ValueError, match=message):
            splice.get_peft_model(network, splice.get_peft_config(dict(fields)))
        before.assert_same(network)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be in"),
        ({"r": 0}, "r must be a positive integer or None, got 0"),
        ({"lora_alpha": 3}, "lora_alpha is set but r is None"),
        ({"lora_dropout": 1.0}, "lora_dropout must be in"),
    ],
)
def test_what_the_config_says_is_checked(fields: dict[str, Any], message: str) -> None:
    for library in (peft, splice):
        with pytest.raises(ValueError, match=message):
            library.SupertuningConfig(**fields)


# -- Super-Tuning without places in its checkpoints

WORKED_OUT = {**SUPER, "save_precomputed_indices": False}


def test_an_adapter_is_saved_without_places_beside_one_with_them(tmp_path: Path) -> None:
    """Each has its own answer; the reference refuses the second one."""
    model = made(splice, WORKED_OUT)
    model.add_adapter("with", splice.get_peft_config({**SUPER, "select_top": False}))
    model.save_pretrained(tmp_path)
    for place, there in ((tmp_path, False), (tmp_path / "with", True)):
        assert any(key.endswith("_indices") for key in tensors_in(place)) is there
        assert_close(load_both(bases.LINEAR, place).assert_equal(), run(model, bases.LINEAR.inputs(3)))
        model.set_adapter("with")


def test_whoever_trains_without_places_is_told() -> None:
    with pytest.warns(UserWarning, match="save_precomputed_indices=False.*right on the very base"):
        splice.SupertuningConfig(save_precomputed_indices=False)


def test_what_is_merged_changes_no_places(checkpoint: Any) -> None:
    """They are the largest of the base's own weight."""
    folder, inputs = checkpoint(bases.LINEAR, WORKED_OUT), bases.LINEAR.inputs(3)
    expected = run(splice.PeftModel.from_pretrained(bases.LINEAR.build(), folder), inputs)
    model = made(splice, SUPER)
    model.merge_adapter()
    model.load_adapter(folder, "other")
    model.unmerge_adapter()
    model.set_adapter("other")
    assert torch.equal(run(model, inputs), expected)


def test_a_base_may_get_its_weights_later(checkpoint: Any) -> None:
    folder, inputs = checkpoint(bases.LINEAR, WORKED_OUT), bases.LINEAR.inputs(3)
    expected = run(splice.PeftModel.from_pretrained(bases.LINEAR.build(), folder), inputs)
    model = splice.PeftModel.from_pretrained(bases.LINEAR.build().to("meta"), folder)
    model.get_base_model().load_state_dict(bases.LINEAR.build().state_dict(), strict=False, assign=True)
    model.load_adapter(folder, "default")
    assert torch.equal(run(model.eval(), inputs), expected)


def test_places_of_another_checkpoint_are_refused(checkpoint: Any) -> None:
    """Where the adapter that is there works out its own, and the other way round."""
    folders = [checkpoint(bases.LINEAR, fields, name=str(n)) for n, fields in enumerate((SUPER, WORKED_OUT))]
    for one, other, what in ((*folders, "missing"), (*folders[::-1], "unexpected")):
        model = splice.PeftModel.from_pretrained(bases.LINEAR.build(), one)
        before = run(model, bases.LINEAR.inputs(3))
        with pytest.raises(splice.AdapterMismatchError, match=rf"(?s){what}.*supertuning_indices"):
            model.load_adapter(other, "default")
        assert torch.equal(run(model, bases.LINEAR.inputs(3)), before)


def test_the_entries_of_a_quantised_weight_are_not_guessed(checkpoint: Any) -> None:
    network = WAYS[0].base()
    before = Snapshot.of(network)
    with pytest.raises(
        ValueError, match="first: the weight is quantised, and the checkpoint does not say which entries"
    ):
        splice.PeftModel.from_pretrained(network, checkpoint(WIDE, WORKED_OUT))
    before.assert_same(network)
