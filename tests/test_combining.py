"""`add_weighted_adapter`: several adapters combined into a new one, against the reference and by its own rule.

Most of it is about the low-rank factors of LoRA; the last part about every method whose tensors add up.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import splice
from splice.kinds.combining import Summed
from splice.kinds.registry import all_methods
from tests import bases
from tests.bases import Base, run
from tests.comparing import Pair, assert_close, differ, layer_parameters, load_both, trainable_names
from tests.samples import Case, kind_cases, plain_cases

BASES = (bases.LINEAR, bases.TRANSPOSED, bases.EMBEDDING, bases.CONV1D, bases.CONV2D, bases.MIXED, bases.LLAMA)
over_bases = pytest.mark.parametrize("base", BASES, ids=str)
EXACT = ("cat", "svd")
# With a density of 1 nothing is left to chance.
PRUNED = ("ties", "dare_linear", "dare_ties", "magnitude_prune")


def lora(base: Base, **changes: Any) -> dict[str, Any]:
    fields = {"r": 4, "lora_alpha": 6, "target_modules": list(base.targets), "task_type": base.task}
    return {"peft_type": "LORA", **fields, **changes}


def three(base: Base, shared_checkpoint: Any, **changes: Any) -> Pair:
    """ "default", "second" and "third", of the same rank and with other scales."""
    configs = (lora(base, **changes), lora(base, lora_alpha=8, **changes), lora(base, lora_alpha=2, **changes))
    return load_both(base, *(shared_checkpoint(base, config, seed=seed) for seed, config in enumerate(configs)))


def combine(pair: Pair, adapters: list[str], weights: list[float], kind: str, **options: Any) -> torch.Tensor:
    """The output with the combination active; the same in both libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in (pair.reference, pair.ours):
            model.add_weighted_adapter(adapters, weights, "combined", combination_type=kind, **options)
            model.set_adapter("combined")
    reference, ours = pair.outputs()
    assert_close(ours, reference, factor=10)
    return ours


@pytest.mark.parametrize("kind", ["cat", "linear", "svd"])
@over_bases
def test_as_the_reference(base: Base, kind: str, shared_checkpoint: Any) -> None:
    if base is bases.CONV1D and kind == "svd":
        pytest.skip("the reference fails there")
    for weights in ([0.7, 0.3, 1.0], [1.0, -0.5, 0.2]):
        pair = three(base, shared_checkpoint)
        before = pair.outputs()[1]
        assert differ(combine(pair, ["default", "second", "third"], weights, kind), before)


@pytest.mark.parametrize("kind", [*PRUNED, *(f"{name}_svd" for name in PRUNED)])
@pytest.mark.parametrize("base", [bases.LINEAR, bases.EMBEDDING, bases.CONV2D], ids=str)
def test_pruning_as_the_reference(base: Base, kind: str, shared_checkpoint: Any) -> None:
    combine(three(base, shared_checkpoint), ["default", "second"], [0.7, 0.4], kind, density=1.0)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("kind", ["ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd"])
def test_pruning_by_magnitude_as_the_reference(kind: str, sign: str, density: float, shared_checkpoint: Any) -> None:
    pair = three(bases.LINEAR, shared_checkpoint)
    combine(pair, ["default", "second", "third"], [0.7, 0.4, 1.1], kind, density=density, majority_sign_method=sign)


@pytest.mark.parametrize("kind", EXACT)
@over_bases
def test_the_exact_combinations_are_the_weighted_sum_of_the_updates(
    base: Base, kind: str, shared_checkpoint: Any
) -> None:
    """With a rank that is large enough; for some layers it is larger than the layer, which the reference cannot."""
    model = three(base, shared_checkpoint).ours
    weights = {"default": 0.7, "second": -0.3, "third": 1.5}
    model.add_weighted_adapter(list(weights), list(weights.values()), "combined", combination_type=kind, svd_rank=12)
    model.set_adapter("combined")
    assert run(model, base.inputs(3)).isfinite().all()
    tuner = model.base_model
    for path, layer in tuner.placed["combined"].items():
        weight = tuner.adapted[path].weight
        expected = sum(w * tuner.placed[name][path].delta_weight(weight) for name, w in weights.items())
        assert_close(layer.delta_weight(weight), expected, factor=10)


@pytest.mark.parametrize("kind", EXACT)
def test_adapters_of_other_ranks_and_other_layers(kind: str, shared_checkpoint: Any) -> None:
    """Also with ranks of their own for some layers; a layer that lacks an adapter combines those it has."""
    base = bases.MIXED
    configs = (lora(base, r=2), lora(base, r=5, rank_pattern={"layers.0.up": 3}), lora(base, target_modules=["down"]))
    pair = load_both(base, *(shared_checkpoint(base, config, seed=seed) for seed, config in enumerate(configs)))
    combine(pair, ["default", "second", "third"], [0.7, 0.3, 1.0], kind)


def test_a_scale_with_a_root_is_not_counted_twice(shared_checkpoint: Any) -> None:
    """With rsLoRA the reference is off by a factor; the sum of the updates is what it should be."""
    pair = three(bases.LINEAR, shared_checkpoint, use_rslora=True)
    model = pair.ours
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "combined", combination_type="cat")
    model.set_adapter("combined")
    output = run(model, bases.LINEAR.inputs(3))
    model.base_model.set_adapter(["default", "second"])
    first, second = run(model, bases.LINEAR.inputs(3)), output
    weight = model.get_base_model().first.weight
    placed = model.base_model.placed
    expected = sum(placed[name]["first"].delta_weight(weight) for name in ("default", "second"))
    assert_close(placed["combined"]["first"].delta_weight(weight), expected)
    assert not differ(first, second)


def test_the_new_adapter_is_frozen_inactive_and_can_be_saved(shared_checkpoint: Any, tmp_path: Path) -> None:
    pair = three(bases.LINEAR, shared_checkpoint)
    model = pair.ours
    before, trainable = run(model, bases.LINEAR.inputs(3)), trainable_names(model)
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "combined", combination_type="cat")
    assert model.active_adapters == ["default"]
    assert trainable_names(model) == trainable
    assert torch.equal(run(model, bases.LINEAR.inputs(3)), before)
    config = model.peft_config["combined"]
    assert (config.r, config.lora_alpha) == (8, 8)
    model.set_adapter("combined")
    model.save_pretrained(tmp_path, selected_adapters=["combined"])
    again = splice.PeftModel.from_pretrained(bases.LINEAR.build(), tmp_path / "combined")
    assert torch.equal(run(again, bases.LINEAR.inputs(3)), run(model, bases.LINEAR.inputs(3)))
    model.delete_adapter("combined")
    assert "combined" not in model.peft_config


def test_the_parts_do_not_change(shared_checkpoint: Any) -> None:
    pair = three(bases.LINEAR, shared_checkpoint)
    before = {name: parameter.clone() for name, parameter in pair.ours.named_parameters()}
    for number, kind in enumerate(("cat", "linear", "svd", "ties")):
        pair.ours.add_weighted_adapter(["default", "second"], [2.0, -1.0], str(number), kind, density=0.5)
        pair.ours.set_adapter(str(number))
        with torch.no_grad():
            for path in pair.ours.base_model.placed[str(number)]:
                for parameter in layer_parameters(pair.ours, str(number), path):
                    parameter.fill_(7)
    now = dict(pair.ours.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in before.items())


def test_a_clamped_svd(shared_checkpoint: Any) -> None:
    combine(three(bases.LINEAR, shared_checkpoint), ["default", "second"], [1.0, 1.0], "svd", svd_clamp=0.8)


def test_one_adapter_alone(shared_checkpoint: Any) -> None:
    pair = three(bases.LINEAR, shared_checkpoint)
    combine(pair, ["second"], [2.0], "svd")


def test_chance_keeps_the_expectation(shared_checkpoint: Any) -> None:
    """DARE enlarges what it keeps: the mean over many draws is the plain sum."""
    model = three(bases.LINEAR, shared_checkpoint).ours
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "plain", combination_type="linear")
    factors, total = model.get_base_model().first.lora_A, 0
    for number in range(300):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], str(number), "dare_linear", density=0.5)
        total = total + factors[str(number)].weight
    expected = factors["plain"].weight
    torch.testing.assert_close(total / 300, expected, rtol=0, atol=0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["default", "nobody"], [1.0, 1.0], "x"), "nobody"),
        (([], [], "x"), "adapter|weight"),
        ((["default", "second"], [1.0], "x"), "weight"),
        ((["default", "second"], [1.0, 1.0], "x", "magic"), "magic"),
        ((["default", "second"], [1.0, 1.0], "x", "ties"), "density"),
        ((["default", "second"], [1.0, 1.0], "x", "ties", None, None, True, None, -0.1), "density"),
        ((["default", "second"], [1.0, 1.0], "x", "ties", None, None, True, None, 0.5, "magic"), "magic"),
    ],
    ids=str,
)
def test_refused_before_anything_is_made(arguments: Any, message: str, shared_checkpoint: Any) -> None:
    model = three(bases.LINEAR, shared_checkpoint).ours
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert [name for name, _ in model.named_parameters()] == names
    assert "x" not in model.peft_config


def test_other_ranks_cannot_be_added_factor_by_factor(shared_checkpoint: Any, library: Any) -> None:
    base = bases.LINEAR
    model = library.PeftModel.from_pretrained(base.build(), str(shared_checkpoint(base, lora(base))))
    model.load_adapter(str(shared_checkpoint(base, lora(base, r=2), seed=1)), adapter_name="second")
    with pytest.raises(ValueError, match="same r"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "x", combination_type="linear")


def test_two_copies_of_one_head_cannot_be_combined(shared_checkpoint: Any, library: Any) -> None:
    base = bases.LINEAR
    config = lora(base, modules_to_save=["head"])
    model = library.PeftModel.from_pretrained(base.build(), str(shared_checkpoint(base, config)))
    model.load_adapter(str(shared_checkpoint(base, config, seed=1)), adapter_name="second")
    with pytest.raises(ValueError, match="modules_to_save"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "x", combination_type="cat")


def test_a_name_that_is_taken_is_left_alone(shared_checkpoint: Any) -> None:
    pair = three(bases.LINEAR, shared_checkpoint)
    before = run(pair.ours, bases.LINEAR.inputs(3))
    pair.each(lambda m: m.add_weighted_adapter(["second", "third"], [1.0, 1.0], "default", combination_type="cat"))
    assert torch.equal(pair.assert_equal(), before)


# -- methods whose tensors add up


def summed(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", [c for c in cases if isinstance(c.method.combine, Summed)], ids=str)


@summed([*kind_cases(), *plain_cases(bases.LLAMA)])
def test_the_tensors_are_summed(case: Case, shared_checkpoint: Any, tmp_path: Path) -> None:
    """A layer that lacks one of the adapters sums those it has."""
    fewer = case.config(target_modules=[case.base.targets[0]])
    folders = (shared_checkpoint(case.base, case.config()), shared_checkpoint(case.base, fewer, seed=1))
    pair = load_both(case.base, *folders)
    alone, trainable = pair.outputs()[1], trainable_names(pair.ours)
    pair.each(lambda model: model.add_weighted_adapter(["default", "second"], [0.7, -0.5], "combined"))
    assert pair.ours.active_adapters == ["default"]
    assert trainable_names(pair.ours) == trainable
    pair.each(lambda model: model.set_adapter("combined", inference_mode=True))
    output = pair.assert_equal()
    assert differ(output, alone)
    configs = [dict(vars(model.peft_config["combined"])) for model in (pair.ours, pair.reference)]
    for name in ("target_modules", *case.method.default_modules):
        assert configs[0][name] == configs[1][name] or set(configs[0][name]) == set(configs[1][name]), name
    pair.ours.save_pretrained(tmp_path, selected_adapters=["combined"])
    again = splice.PeftModel.from_pretrained(case.base.build(), tmp_path / "combined")
    assert torch.equal(run(again, case.base.inputs(3)), output)


@summed(plain_cases(bases.LINEAR))
def test_names_given_in_two_ways_are_not_united(case: Case, shared_checkpoint: Any, library: Any) -> None:
    """A list and a regular expression: the new adapter's config could not say what it is put on."""
    targets = case.config(target_modules="first|second")
    model = library.PeftModel.from_pretrained(case.base.build(), str(shared_checkpoint(case.base, case.config())))
    model.load_adapter(str(shared_checkpoint(case.base, targets, seed=1)), adapter_name="second")
    with pytest.raises(ValueError, match="same type for"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "x")
    assert "x" not in model.peft_config


@summed(plain_cases(bases.LINEAR))
def test_ways_of_combining_factors_are_refused(case: Case, shared_checkpoint: Any) -> None:
    pair = load_both(case.base, *(shared_checkpoint(case.base, case.config(), seed=seed) for seed in (0, 1)))
    for options in ({"combination_type": "ties", "density": 0.5}, {"combination_type": "cat"}, {"svd_rank": 3}):
        with pytest.raises(ValueError, match="weighted sum of their tensors"):
            pair.ours.add_weighted_adapter(["default", "second"], [1.0, 1.0], "x", **options)
    assert "x" not in pair.ours.peft_config


@pytest.mark.parametrize("method", all_methods().values(), ids=lambda method: method.name.value)
def test_methods_that_cannot_be_combined_say_so(method: Any, shared_checkpoint: Any) -> None:
    cases = [case for case in plain_cases(bases.LINEAR) if case.method is method]
    if method.combine is not None or not cases:
        pytest.skip("it can be, or it is not on layers")
    model = splice.PeftModel.from_pretrained(bases.LINEAR.build(), shared_checkpoint(bases.LINEAR, cases[0].config()))
    with pytest.raises(splice.UnsupportedFeatureError, match="cannot be combined"):
        model.add_weighted_adapter(["default"], [1.0], "x")
