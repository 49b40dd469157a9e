"""Adapters on models that are divided among processes, or trained in several: two real processes, against one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import splice
from tests.ranks import on_ranks

IDS = torch.arange(12).reshape(2, 6)
TARGETS = ["q_proj", "down_proj", "lm_head"]


def base(dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": False, **fields})
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype)


def lora(**fields: Any) -> splice.LoraConfig:
    return splice.LoraConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": False, **fields})


def adapted(network: Any, **fields: Any) -> splice.PeftModel:
    torch.manual_seed(1)
    return splice.get_peft_model(network, lora(**fields))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)


def trained(model: Any, ids: torch.Tensor = IDS, count: int = 3, optimizer: Any = None) -> list[float]:
    """The losses of a few steps."""
    optimizer = optimizer or optimizer_of(model)
    losses = []
    for _ in range(count):
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def tensors(model: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    """The adapter's tensors, gathered and copied."""
    found = splice.get_peft_model_state_dict(model, adapter_name=name)
    return {key: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for key, t in found.items()}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base's tensors, gathered and copied."""
    found = {path: tensor for path, tensor in model.state_dict().items() if "lora_" not in path}
    return {path: tensor.full_tensor().clone() for path, tensor in found.items()}


def far(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return max((one[key].float() - two[key].float()).abs().max().item() for key in one)


def shard(model: Any, units: bool = False) -> None:
    from torch.distributed.fsdp import fully_shard

    network = model.get_base_model() if isinstance(model, splice.PeftModel) else model
    for layer in network.model.layers:
        if units:
            shard_units(layer)
        fully_shard(layer)
    fully_shard(model)


def shard_units(block: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    for holder in [m for path, m in block.named_modules() if path.endswith((".lora_A.default", ".lora_B.default"))]:
        fully_shard(holder)


def said(function: Any) -> str:
    """The message of what `function` raises."""
    with pytest.raises(Exception) as caught:
        function()
    return str(caught.value)


# -- FSDP2


def _divided(rank: int, folder: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    model = adapted(base())
    plain, own = logits(model), tensors(model)
    if rank == 0:
        model.save_pretrained(f"{folder}/whole")
    with model.disable_adapter():
        without = logits(model)
    torch.distributed.barrier()
    shard(model)
    found["forward"] = (logits(model) - plain).abs().max().item()

    # After a call the outermost unit stays whole: what is written there must not be lost with it.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and hasattr(parameter, "full_tensor"):
                parameter.zero_()
    logits(model)
    model.load_adapter(f"{folder}/whole", "default", is_trainable=True)
    for unit in model.modules():
        if hasattr(unit, "reshard"):
            unit.reshard()
    found["loaded over"] = far(tensors(model), own)
    found["divided"] = all(hasattr(p, "full_tensor") for p in model.parameters())

    model.load_adapter(f"{folder}/whole", "second")
    model.set_adapter("second")
    found["loaded beside"] = (logits(model) - plain).abs().max().item()
    for name in ("second", "default"):
        model.set_adapter(name)
        before = weights(model)
        logits(model)
        model.merge_adapter()
        found[f"merged {name}"] = (logits(model) - plain).abs().max().item()
        with pytest.warns(UserWarning, match="already merged"):
            model.merge_adapter()
        logits(model)
        model.unmerge_adapter()
        found[f"unmerged {name}"] = far(before, weights(model))
    with model.disable_adapter():
        found["disabled"] = (logits(model) - without).abs().max().item()
    logits(model)
    model.set_adapter("second")
    logits(model)
    model.set_adapter("default")
    found["trained"] = sorted({path.split(".")[-2] for path, p in model.named_parameters() if p.requires_grad})

    # The outermost unit, whole after a call, has the head's: its flags are those that FSDP keeps, whoever tells the layer.
    head = model.get_base_model().lm_head
    told = {
        "enabled": lambda on: head.enable_adapters(on),
        "selected": lambda on: head.set_adapter("default" if on else "second"),
        "flags": lambda on: head.set_requires_grad("default", on),
    }
    for name, tell in told.items():
        flags = []
        for on in (False, True):
            logits(model)
            tell(on)
            model.reshard()
            flags.append({p.requires_grad for path, p in head.named_parameters() if ".default" in path})
        found[f"{name} alone"] = flags
    model.set_adapter("default")

    # Every process saves, at once.
    model.save_pretrained(f"{folder}/divided")
    torch.distributed.barrier()
    one, two = (load_file(f"{folder}/{name}/adapter_model.safetensors") for name in ("whole", "divided"))
    found["saved"] = far(one, two)
    found["files"] = sorted(path.name for path in Path(folder, "divided").iterdir())
    found["losses"] = trained(model, IDS[rank : rank + 1])
    found["tensors"] = tensors(model)
    return found


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(_divided, str(tmp_path_factory.mktemp("divided")))


def test_a_divided_model_computes_what_the_whole_one_does(divided: list[dict[str, Any]]) -> None:
    for found in divided:
        for what in ("forward", "loaded beside", "merged default", "merged second", "disabled"):
            assert found[what] < 1e-6, what


def test_weights_are_loaded_over_divided_ones(divided: list[dict[str, Any]]) -> None:
    for found in divided:
        assert found["loaded over"] == 0
        assert found["divided"]


def test_unmerging_gives_back_the_bytes_of_divided_weights(divided: list[dict[str, Any]]) -> None:
    assert all(found[f"unmerged {name}"] == 0 for found in divided for name in ("default", "second"))


def test_a_switch_reaches_the_tensors_that_fsdp_keeps(divided: list[dict[str, Any]]) -> None:
    assert [found["trained"] for found in divided] == [["default"]] * 2


def test_what_a_layer_alone_is_told_reaches_the_tensors_that_fsdp_keeps(divided: list[dict[str, Any]]) -> None:
    for found in divided:
        assert [found[f"{name} alone"] for name in ("enabled", "selected", "flags")] == [[{False}, {True}]] * 3


def test_every_process_may_save_a_divided_adapter(divided: list[dict[str, Any]]) -> None:
    for found in divided:
        assert found["saved"] == 0
        assert found["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors", "second"]


def test_training_a_divided_model_is_training_the_whole_one(divided: list[dict[str, Any]]) -> None:
    alone = adapted(base())
    losses = trained(alone)
    both = [sum(pair) / 2 for pair in zip(*(found["losses"] for found in divided))]
    assert both == pytest.approx(losses, abs=1e-5)
    for found in divided:
        assert far(found["tensors"], tensors(alone)) < 1e-6


def _units(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    targets = ["q_proj", "down_proj"]
    mine = IDS[rank : rank + 1]
    model = adapted(base(torch.bfloat16), target_modules=targets)
    shard(model, units=True)
    found["losses"], found["tensors"] = trained(model, mine), tensors(model)
    found["dtype"] = next(iter(found["tensors"].values())).dtype

    # One that comes later is each process's own, and its training says so.
    model.add_adapter("late", lora(target_modules=targets))
    model.set_adapter("late")
    with pytest.warns(splice.PeftWarning, match="'late' is trained on a model that FSDP divides") as caught:
        trained(model, mine, count=2)
    found["said"] = sum("FSDP divides" in str(w.message) for w in caught)

    # Put on a divided base, and divided then.
    network = base()
    shard(network)
    logits(network)
    late = adapted(network, target_modules=targets)
    found["frozen"] = [p.requires_grad for path, p in late.named_parameters() if "lora_" not in path]
    shard_units(late)
    found["late losses"], found["late tensors"] = trained(late, mine), tensors(late)

    # A weight that two layers share cannot be exchanged on one of them alone.
    tied = base()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    shared = adapted(tied)
    shard(shared)
    before = tensors(shared)
    found["tied"] = said(shared.merge_adapter)
    found["tied alone"] = said(shared.get_base_model().lm_head.merge)
    found["tied for good"] = said(shared.merge_and_unload)
    found["unchanged"] = far(before, tensors(shared)), list(shared.base_model.merged)
    found["whole module"] = said(lambda: shared.add_adapter("whole", lora(modules_to_save=["norm"])))

    # Starts that are worked out of the weight.
    network = base()
    want = adapted(base(), target_modules=targets, use_dora=True)
    shard(network)
    dora = adapted(network, target_modules=targets, use_dora=True)
    found["dora"] = far(tensors(dora), tensors(want)), (logits(dora) - logits(want)).abs().max().item()
    return found


@pytest.fixture(scope="module")
def units() -> list[dict[str, Any]]:
    return on_ranks(_units)


def test_adapters_in_units_of_their_own_are_gathered(units: list[dict[str, Any]]) -> None:
    """In float32, on a base in bfloat16: FSDP wants one dtype in a unit."""
    alone = adapted(base(torch.bfloat16), target_modules=["q_proj", "down_proj"])
    losses = trained(alone)
    both = [sum(pair) / 2 for pair in zip(*(found["losses"] for found in units))]
    assert both == pytest.approx(losses, abs=1e-3)
    for found in units:
        assert found["dtype"] == torch.float32
        assert far(found["tensors"], tensors(alone)) < 1e-6


def test_an_adapter_may_come_after_the_base_was_divided(units: list[dict[str, Any]]) -> None:
    alone = adapted(base(), target_modules=["q_proj", "down_proj"])
    losses = trained(alone)
    both = [sum(pair) / 2 for pair in zip(*(found["late losses"] for found in units))]
    assert both == pytest.approx(losses, abs=1e-5)
    for found in units:
        assert not any(found["frozen"])
        assert far(found["late tensors"], tensors(alone)) < 1e-6
        assert found["dora"] == pytest.approx((0, 0), abs=1e-6)


def test_training_what_fsdp_does_not_know_says_so_once(units: list[dict[str, Any]]) -> None:
    assert [found["said"] for found in units] == [1, 1]


def test_what_cannot_be_done_to_divided_weights_is_refused_before_anything_changes(units: list[dict[str, Any]]) -> None:
    for found in units:
        for how in ("tied", "tied alone", "tied for good"):
            assert "lm_head: its weight is another layer's too, and is divided among processes" in found[how]
        assert found["unchanged"] == (0, [])
        assert "norm' cannot be saved whole" in found["whole module"]
        assert "before the model is divided" in found["whole module"]


# -- data-parallel


def _data_parallel(rank: int, folder: str) -> dict[str, Any]:
    model = adapted(base())
    model.add_adapter("second", lora(r=2))
    model.base_model.set_requires_grad("second")  # trained, and used in no step
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    found = {"losses": trained(wrapped, IDS[rank : rank + 1]), "tensors": tensors(model)}
    # Both save at once, again and again, and read what is there meanwhile.
    for _ in range(10):
        model.save_pretrained(folder, save_embedding_layers=False)
        assert splice.PeftConfig.from_pretrained(folder).r == 4
        assert splice.load_peft_weights(folder).keys() <= found["tensors"].keys()
    torch.distributed.barrier()
    found["files"] = sorted(path.name for path in Path(folder).rglob("*"))
    model.set_adapter("second")
    return {**found, "second losses": trained(wrapped, IDS[rank : rank + 1]), "second": tensors(model, "second")}


def test_data_parallel_training_is_training_in_one_process(tmp_path: Path) -> None:
    alone = adapted(base())
    alone.add_adapter("second", lora(r=2))
    first = trained(alone)
    alone.set_adapter("second")
    second = trained(alone)
    ranks = on_ranks(_data_parallel, str(tmp_path))
    for want, what in ((first, "losses"), (second, "second losses")):
        assert [sum(pair) / 2 for pair in zip(*(found[what] for found in ranks))] == pytest.approx(want, abs=1e-5)
    for found in ranks:
        assert far(found["tensors"], tensors(alone)) < 1e-6
        assert far(found["second"], tensors(alone, "second")) < 1e-6
        checkpoint = ["adapter_config.json", "adapter_model.safetensors"]
        assert found["files"] == sorted(["README.md", "second", *checkpoint, *checkpoint])


# -- reading parts


def test_any_part_of_a_tensor_can_be_read_alone(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from splice.base.sharding import Part, part_in
    from splice.checkpoint.tensors import TensorsInMemory, open_weights

    generator = random.Random(0)
    shapes = [tuple(generator.randint(1, 5) for _ in range(dims)) for dims in (0, 1, 2, 2, 3, 4)]
    whole = {f"{index}": torch.randn(shape) for index, shape in enumerate(shapes)}
    save_file(whole, tmp_path / "a.safetensors")
    weights = open_weights(tmp_path / "a.safetensors"), TensorsInMemory(whole, "memory")
    for name, tensor in whole.items():
        for _ in range(20):
            offset = tuple(generator.randint(0, size - 1) for size in tensor.shape)
            part = Part(offset, tuple(generator.randint(0, s - o) for s, o in zip(tensor.shape, offset)))
            for source in weights:
                assert torch.equal(source.read_part(name, part), part_in(tensor, part)), (tensor.shape, part)
