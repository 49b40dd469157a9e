"""Helps for scripts: they do what the reference's do."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import peft
import peft.helpers as in_reference
import pytest
import torch
from torch import nn

import splice
from splice import helpers
from tests import bases
from tests.bases import run

BOTH = [pytest.param(splice, helpers, id="splice"), pytest.param(peft, in_reference, id="reference")]


def adapted(library: Any, config: str = "LoraConfig", **fields: Any) -> Any:
    torch.manual_seed(0)
    fields = {"target_modules": ["first", "second"], **fields}
    return library.get_peft_model(bases.LINEAR.build(), getattr(library, config)(**fields)).eval()


def test_adapters_count_more_or_less_for_a_while() -> None:
    outputs = []
    for library, functions in ((splice, helpers), (peft, in_reference)):
        model = adapted(library, init_lora_weights=False, lora_alpha=4)
        inputs, found = bases.LINEAR.inputs(2), []
        found.append(run(model, inputs))
        with functions.rescale_adapter_scale(model, 0.5):
            found.append(run(model, inputs))
            with functions.rescale_adapter_scale(model.base_model.model, 0):
                found.append(run(model, inputs))
        with pytest.raises(KeyError), functions.rescale_adapter_scale(model, 2):
            raise KeyError
        found.append(run(model, inputs))
        outputs.append(found)
    ours, theirs = outputs
    assert torch.equal(ours[0], ours[3]) and not torch.allclose(ours[0], ours[1], atol=1e-3)
    assert torch.equal(ours[2], run(bases.LINEAR.build(), bases.LINEAR.inputs(2)))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs))


@pytest.mark.parametrize(("library", "functions"), BOTH)
def test_what_cannot_be_rescaled(library: Any, functions: Any) -> None:
    with (
        pytest.raises(TypeError, match="should be of type float"),
        functions.rescale_adapter_scale(nn.Linear(2, 2), "2"),
    ):
        pass
    with (
        pytest.raises(ValueError, match="scaling is only supported"),
        functions.rescale_adapter_scale(nn.Linear(2, 2), 2),
    ):
        pass
    model = adapted(library, "IA3Config", feedforward_modules=[])
    with pytest.raises(ValueError, match="scaling is only supported"), functions.rescale_adapter_scale(model, 2):
        pass


@pytest.mark.parametrize(("library", "functions"), BOTH)
def test_inputs_are_left_in_their_dtype(library: Any, functions: Any) -> None:
    """Of another dtype than the adapter's they are an error then: torch multiplies none of two dtypes."""
    model = adapted(library, init_lora_weights=False)
    layer = model.base_model.model.first
    layer.get_base_layer().to(torch.bfloat16)
    x = torch.ones(2, 6, dtype=torch.bfloat16)
    assert layer(x).dtype is torch.bfloat16
    for part, active, casts in ((model, True, False), (layer, True, False), (model, False, True)):
        with functions.disable_input_dtype_casting(part, active):
            assert layer.cast_input_dtype_enabled is casts
            if casts:
                layer(x)
            else:
                with pytest.raises(RuntimeError, match="dtype"):
                    layer(x)
        assert layer.cast_input_dtype_enabled is True
    layer(x)


def test_an_adapter_is_told_from_other_folders(tmp_path: Path) -> None:
    adapted(splice).save_pretrained(tmp_path / "adapter")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{no")
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "adapter_config.json").write_text('{"peft_type": "NO_SUCH"}')
    for name, expected in (("adapter", True), ("empty", False), ("broken", False), ("unknown", False), ("none", False)):
        place = str(tmp_path / name)
        assert helpers.check_if_peft_model(place) is in_reference.check_if_peft_model(place) is expected


def test_signatures_tell_the_arguments_of_the_base() -> None:
    found = []
    for library, functions in ((splice, helpers), (peft, in_reference)):
        model = adapted(library)
        with pytest.raises(ValueError, match=r"choose one of \['forward', 'generate', 'all'\]"):
            functions.update_signature(model, "call")
        with pytest.raises(AttributeError, match="generate"):
            functions.update_generate_signature(model)
        before = run(model, bases.LINEAR.inputs(2))
        functions.update_forward_signature(model)
        assert torch.equal(run(model, bases.LINEAR.inputs(2)), before)
        causal = library.get_peft_model(bases.LLAMA.build(), library.LoraConfig(task_type="CAUSAL_LM"))
        own = inspect.signature(causal.forward)
        functions.update_signature(causal)
        assert inspect.signature(causal.forward) == own
        plain = library.get_peft_model(bases.LLAMA.build(), library.LoraConfig())
        functions.update_signature(plain, "generate")
        found.append([inspect.signature(f) for f in (model.forward, causal.generate, plain.generate)])
        assert causal.generate.__doc__ == causal.get_base_model().generate.__doc__
    assert found[0] == found[1]


def test_a_copy_of_a_model_with_a_new_signature_is_its_own() -> None:
    model = adapted(splice, init_lora_weights=False)
    helpers.update_forward_signature(model)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.base_model.model.first.weight.zero_()
    inputs = bases.LINEAR.inputs(2)
    assert not torch.equal(run(clone, inputs), run(model, inputs))
