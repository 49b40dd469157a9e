"""transformers' Trainer, publishing while it trains: on a Hub of this machine, over real HTTP."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers.utils.hub

from tests.ecosystem.comparing import same
from tests.ecosystem.test_trainer import llama, lora, trainer, weights
from tests.hub import TOKEN, as_the_real_one

NAME = "me/trained"


def named() -> Any:
    """A base with an id on the Hub, which the card names: without one the reference's card is refused there."""
    network = llama()
    network.config._name_or_path = "someone/base"
    return network


def all_of_it(folder: str) -> dict[str, Any]:
    """Train with a push at each checkpoint and at the end; what the repository holds then, and what loads from it."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    options: dict[str, Any] = {"push_to_hub": True, "hub_model_id": NAME, "hub_token": TOKEN}
    with as_the_real_one(Path(folder)) as hub, pytest.MonkeyPatch.context() as patch:
        # transformers keeps its client, with the address that it had.
        patch.setattr(transformers.utils.hub, "_hf_api", None)
        run = trainer(
            lora(named)(), Path(folder) / "run", 4, hub_strategy="checkpoint", hub_always_push=True, **options
        )
        run.train()
        run.push_to_hub(license="mit", tags="mine")
        repository = hub.repositories[NAME]
        loaded = peft.PeftModel.from_pretrained(llama(), NAME)
        earlier = peft.PeftModel.from_pretrained(llama(), NAME, subfolder="last-checkpoint")
    return {
        "files": sorted(path for path in repository.files() if "optimizer" not in path and "rng_state" not in path),
        "pushes": len(repository.commits),
        "trained": weights(run.model),
        "loaded": weights(loaded),
        "last checkpoint": weights(earlier),
        "card": {*repository.files()["README.md"].decode().splitlines()},
    }


@pytest.mark.shows("transformers", "Trainer with `push_to_hub=True`: each checkpoint, the end, and loading from there")
def test_training_is_published_as_it_goes_on(here: dict[str, Any], there: dict[str, Any]) -> None:
    cards = [found.pop("card") for found in (here, there)]
    same(here, there, 1e-4)
    for what in ("loaded", "last checkpoint"):
        assert all(torch.equal(here[what][key], tensor) for key, tensor in here["trained"].items())
    assert {"adapter_config.json", "adapter_model.safetensors", "last-checkpoint/adapter_config.json"} < {
        *here["files"]
    }
    assert {"license: mit", "library_name: peft", "- lora"} <= cards[0] & cards[1]
    assert "- mine" in cards[0]  # where the reference puts its own tags in the place of others
