"""trl's trainers on splice, each beside the same training under the reference: what they log, and the trained tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ecosystem.both import reference
from tests.ecosystem.trl_runs import RUNS, Found, found_by

# The reference does not load a prompt for training; that here it does is tested by itself.
NOT_THERE = {"sft_loaded_prompt"}
SHOWS = {
    "sft_new": "`SFTTrainer(peft_config=...)`, LoRA",
    "sft_loaded": "`SFTTrainer` of a loaded `PeftModel`",
    "sft_head": '`SFTTrainer` with a copied head (`modules_to_save=["lm_head"]`), which its fused loss reads',
    "sft_loaded_head": "`SFTTrainer` of a loaded `PeftModel` with a copied head",
    "sft_new_tokens": "`SFTTrainer` with the tokens of a new chat template trained",
    "sft_prompt": "`SFTTrainer` with prompt tuning",
    "sft_prefix": "`SFTTrainer` with prefix tuning",
    "sft_loraplus": "`SFTTrainer(optimizers=...)` with LoRA+",
    "sft_lorafa": "`SFTTrainer(optimizers=...)` with LoRA-FA",
    "sft_riemannian": "`SFTTrainer(optimizers=...)` with the Riemannian optimizer",
    "sft_resumed": "`SFTTrainer` resumed from a checkpoint",
    "dpo_new": "`DPOTrainer(peft_config=...)`",
    "dpo_loaded": "`DPOTrainer` of a loaded `PeftModel`, against a copy of its adapter",
    "kto_new": "`KTOTrainer(peft_config=...)`",
    "kto_loaded": "`KTOTrainer` of a loaded `PeftModel`, against a copy of its adapter",
    "reward_new": "`RewardTrainer(peft_config=...)`",
    "grpo_new": "`GRPOTrainer(peft_config=...)`",
    "grpo_loaded": "`GRPOTrainer` of a loaded `PeftModel`, against a copy of its adapter",
    "grpo_float32_head": "`GRPOTrainer` with a copied head in float32 (`cast_lm_head_to_fp32`)",
    "grpo_prompt": "`GRPOTrainer` with prompt tuning",
    "dpo_prefix": "`DPOTrainer` with prefix tuning",
    "rloo_new": "`RLOOTrainer(peft_config=...)`",
    "rloo_loaded": "`RLOOTrainer` of a loaded `PeftModel`, against a copy of its adapter",
    "cpo_new": "`CPOTrainer(peft_config=...)`",
    "orpo_new": "`ORPOTrainer(peft_config=...)`",
    "sent_to_a_server": "merged weights sent to a server by their names (vLLM), and unmerged",
}


@pytest.fixture(scope="module")
def theirs() -> dict[str, Found]:
    """All trainings under the reference, in one process."""
    found: dict[str, Found] = reference(found_by, sorted(RUNS.keys() - NOT_THERE))
    return found


@pytest.fixture(scope="module")
def ours() -> dict[str, Found]:
    """Those here that more than one test looks at, filled as they are run."""
    return {}


def _run(ours: dict[str, Found], name: str) -> Found:
    if name not in ours:
        ours.update(found_by([name]))
    return ours[name]


def _assert_alike(mine: Any, reference: Any, where: str) -> None:
    if isinstance(reference, dict):
        assert set(mine) == set(reference), where
        for key in reference:
            # How long it took, and how fast it was.
            if not str(key).endswith(("_runtime", "_per_second")):
                _assert_alike(mine[key], reference[key], f"{where}: {key}")
    elif isinstance(reference, (list, tuple)):
        assert len(mine) == len(reference), where
        for index, pair in enumerate(zip(mine, reference)):
            _assert_alike(*pair, f"{where}[{index}]")
    elif isinstance(reference, torch.Tensor):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-4, msg=lambda text: f"{where}: {text}")
    elif isinstance(reference, float):
        assert mine == pytest.approx(reference, abs=2e-5, rel=1e-4), where
    else:
        assert mine == reference, where


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.shows("trl", what)) for name, what in SHOWS.items()]
)
def test_as_under_the_reference(name: str, ours: dict[str, Found], theirs: dict[str, Found]) -> None:
    _assert_alike(_run(ours, name), theirs[name], name)


def test_every_training_is_compared() -> None:
    assert set(SHOWS) | NOT_THERE == set(RUNS)


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("sft_resumed", "sent_to_a_server")])
def test_what_is_trained_moves_and_nothing_else(name: str, ours: dict[str, Found]) -> None:
    found = _run(ours, name)
    assert set(found["moved"]) == set(found["tensors"])
    assert found["moved"]
    assert found["frozen moved"] == []


@pytest.mark.parametrize("name", ["sft_head", "sft_loaded_head", "grpo_loaded", "dpo_loaded"])
def test_a_copied_head_is_trained(name: str, ours: dict[str, Found]) -> None:
    assert "base_model.model.lm_head.modules_to_save.default.weight" in _run(ours, name)["moved"]


def test_a_resumed_training_ends_where_the_unbroken_one_does(ours: dict[str, Found]) -> None:
    found = _run(ours, "sft_resumed")
    assert set(found["tensors"]) == set(found["whole"])
    for name, tensor in found["tensors"].items():
        assert torch.equal(tensor, found["whole"][name]), name


@pytest.mark.parametrize("name", ["dpo_loaded", "kto_loaded", "grpo_loaded", "rloo_loaded"])
def test_the_copy_that_is_the_reference_stays_what_was_loaded(name: str, ours: dict[str, Found]) -> None:
    told = _run(ours, name)["reference"]
    assert told["adapters"] == ["default", "ref"]
    assert told["names"]
    assert told["copied"]
    assert told["stayed"]


def test_what_new_tokens_have_learned_is_saved_and_loaded(ours: dict[str, Found]) -> None:
    found = _run(ours, "sft_new_tokens")
    rows, copied = found["config"]
    # The two of the template, and what fills the vocabulary up.
    assert rows == {"embed_tokens": list(range(26, 64))}
    assert copied == ["lm_head"]
    torch.testing.assert_close(found["loaded logits"], found["logits"])


def test_a_merge_for_a_server_is_taken_back(ours: dict[str, Found]) -> None:
    assert _run(ours, "sent_to_a_server")["back"]


def test_a_loaded_prompt_is_trained_on(ours: dict[str, Found]) -> None:
    """The reference trains a new one as this one is trained: its loading alone is refused there."""
    found = _run(ours, "sft_loaded_prompt")
    new = _run(ours, "sft_prompt")
    assert found["moved"] == ["prompt_encoder.default.embedding.weight"]
    _assert_alike(found["tensors"], new["tensors"], "sft_loaded_prompt")
