"""FSDP2 by way of accelerate: preparing, training, gathered and sharded checkpoints."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import on_ranks
from tests.test_distributed import IDS, adapted, base, far, optimizer_of, tensors, trained

TARGETS = ["q_proj", "down_proj"]
shows = pytest.mark.shows


def _prepared(rank: int, folder: str) -> dict[str, Any]:
    import peft
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from accelerate.utils.fsdp_utils import load_fsdp_model, save_fsdp_model
    from safetensors.torch import load_file

    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = Accelerator(cpu=True)
    # accelerate takes a plugin on accelerators alone; what it does with one is the same on a CPU. It asks both of its states.
    PartialState().distributed_type = DistributedType.FSDP
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model: Any = adapted(base(), target_modules=TARGETS)
    assert isinstance(model, peft.PeftModel)
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    found["class"] = type(model).__name__
    found["losses"], found["tensors"] = trained(model, IDS[rank : rank + 1], optimizer=optimizer), tensors(model)

    # As Trainer does it: the gathered tensors on the main process, and nothing on the others.
    gathered = accelerator.get_state_dict(model)
    model.save_pretrained(
        f"{folder}/main", state_dict=gathered if rank == 0 else {}, is_main_process=accelerator.is_main_process
    )
    model.save_pretrained(f"{folder}/own", is_main_process=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    torch.distributed.barrier()
    for name in ("main", "own"):
        saved = load_file(f"{folder}/{name}/adapter_model.safetensors")
        found[name] = far(saved, found["tensors"])

    for kind, adapter_only in itertools.product(("SHARDED", "FULL"), (True, False)):
        plugin.set_state_dict_type(f"{kind}_STATE_DICT")
        what = f"{kind.lower()}, adapter_only={adapter_only}"
        save_fsdp_model(plugin, accelerator, model, f"{folder}/{what}", adapter_only=adapter_only)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
        assert not any(tensor.any() for tensor in tensors(model).values())
        load_fsdp_model(plugin, accelerator, model, f"{folder}/{what}", adapter_only=adapter_only)
        found[what] = far(tensors(model), found["tensors"])
    found["files"] = sorted(path.name for path in Path(folder, "main").iterdir())

    network = model.merge_and_unload()
    found["left"] = [path for path, _ in network.named_parameters() if "lora" in path]
    found["classes"] = sorted({type(module).__name__ for module in network.modules()})
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(_prepared, str(tmp_path_factory.mktemp("prepared")))


@shows("accelerate", "FSDP2 on two processes of a CPU: prepare, train, equal to one process")
def test_a_prepared_model_trains_as_the_whole_one(ranks: list[dict[str, Any]]) -> None:
    alone = adapted(base(), target_modules=TARGETS)
    losses = trained(alone)
    both = [sum(pair) / 2 for pair in zip(*(found["losses"] for found in ranks))]
    assert both == pytest.approx(losses, abs=1e-5)
    for found in ranks:
        assert found["class"].startswith("FSDPPeftModel")
        assert far(found["tensors"], tensors(alone)) < 1e-6


@shows("accelerate", "FSDP2: gathered and sharded checkpoints, saved from every process or from the main one")
def test_gathered_and_sharded_checkpoints_hold_the_adapter(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        kinds = [f"{kind}, adapter_only={alone}" for kind in ("sharded", "full") for alone in (True, False)]
        assert {what: found[what] for what in ("main", "own", *kinds)} == dict.fromkeys(("main", "own", *kinds), 0)
        assert found["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_unloading_leaves_what_fsdp_made_of_the_base(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["left"] == []
        assert "FSDPEmbedding" in found["classes"] and not any("Adapted" in name for name in found["classes"])
