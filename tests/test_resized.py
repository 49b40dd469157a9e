"""A vocabulary that was resized before training: its embeddings are saved with the adapter, as the reference does."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch

import splice
from tests import bases
from tests.bases import run
from tests.comparing import tensors_in

CONFIG = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("size", [48, bases.VOCABULARY])
def test_embeddings_are_saved_if_their_number_changed(size: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    bases.LLAMA.build().save_pretrained(tmp_path / "base")
    for library in (peft, splice):
        network = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(0)
        network.resize_token_embeddings(size, mean_resizing=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = library.get_peft_model(network, library.get_peft_config(CONFIG))
            model.save_pretrained(str(tmp_path / library.__name__))
    theirs, ours = (tensors_in(tmp_path / name) for name in ("peft", "splice"))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert any("embed_tokens" in name for name in ours) == (size != bases.VOCABULARY)
    again = splice.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "splice", resize_vocabulary=True
    )
    assert run(again, bases.LLAMA.inputs(3)).shape[-1] == size
