"""transformers' tensor parallelism: each process has a part of the layers and of the adapters on them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import splice
from tests.ranks import on_ranks
from tests.test_distributed import IDS, adapted, base, far, logits, lora, said, tensors, trained

# Rows (q, gate), columns (o, down), rows whose outputs are joined (the head), and the embeddings.
TARGETS = ["q_proj", "o_proj", "gate_proj", "down_proj", "lm_head", "embed_tokens"]
shows = pytest.mark.shows
WIDE = {"hidden_size": 256, "intermediate_size": 512}


def parallel(folder: str) -> Any:
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    return LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2, tp_plan="auto"))


def bytes_read() -> int:
    """What this process has read by system calls."""
    return int(Path("/proc/self/io").read_text().split()[1])


def parts(container: Any) -> tuple[int, ...]:
    """The shape of what this process has of an adapter's tensor."""
    return tuple(container.default.weight.to_local().shape)


def _parallel(rank: int, folder: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    fields: dict[str, Any] = {"target_modules": TARGETS, "lora_bias": False}
    plain = adapted(base(), **fields)
    if rank == 0:
        base().save_pretrained(f"{folder}/base")
        plain.save_pretrained(f"{folder}/plain", save_embedding_layers=False)
    torch.distributed.barrier()
    want = logits(plain)
    model = splice.PeftModel.from_pretrained(parallel(f"{folder}/base"), f"{folder}/plain", is_trainable=True)
    found["loaded"] = (logits(model) - want).abs().max().item()
    found["with gradients"] = (model(input_ids=IDS).logits - want).abs().max().item()
    found["kinds"] = {type(p.data).__name__ for path, p in model.named_parameters() if "lora_" in path}
    block = model.get_base_model().model.layers[0]
    layers = {"rows": block.self_attn.q_proj, "columns": block.mlp.down_proj}
    found["local"] = {what: [parts(layer.lora_A), parts(layer.lora_B)] for what, layer in layers.items()}
    with model.disable_adapter():
        found["disabled"] = (logits(model) - logits(plain.unload())).abs().max().item()
    model.merge_adapter()
    found["merged"] = (logits(model) - want).abs().max().item()
    model.unmerge_adapter()
    found["unmerged"] = (logits(model) - want).abs().max().item()
    model.save_pretrained(f"{folder}/parallel", save_embedding_layers=False)
    torch.distributed.barrier()
    files = [Path(folder, name, "adapter_model.safetensors").read_bytes() for name in ("plain", "parallel")]
    found["size"] = [len(data) for data in files]
    again = splice.PeftModel.from_pretrained(base(), f"{folder}/parallel")
    found["back on one"] = (logits(again) - want).abs().max().item()
    found["losses"], found["tensors"] = trained(model), tensors(model)
    model.load_adapter(f"{folder}/plain", "default", is_trainable=True)
    found["loaded over"] = (logits(model) - want).abs().max().item()

    # New ones are the same in all processes, whatever each would have drawn.
    torch.manual_seed(rank)
    model.add_adapter("new", lora(target_modules=["q_proj", "down_proj"], init_lora_weights=True))
    found["new"] = tensors(model, "new")
    model.set_adapter("new")
    found["losses of new"] = trained(model)
    found["new, trained"] = tensors(model, "new")

    dora = lora(target_modules=["q_proj"], use_dora=True)
    found["dora"] = said(lambda: model.add_adapter("dora", dora))
    head = lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    found["whole"] = said(lambda: model.add_adapter("whole", head))
    scaled = splice.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    found["ia3"] = said(lambda: splice.get_peft_model(parallel(f"{folder}/base"), scaled))
    return found


def _read(rank: int, folder: str) -> dict[str, int]:
    """Bytes that a load reads, of an adapter large enough that its header does not matter."""
    warnings.simplefilter("ignore")
    targets = ["q_proj", "down_proj"]
    if rank == 0:
        base(**WIDE).save_pretrained(f"{folder}/base")
        adapted(base(**WIDE), target_modules=targets, r=64).save_pretrained(f"{folder}/wide")
    torch.distributed.barrier()
    network, before = parallel(f"{folder}/base"), 0
    config = splice.PeftConfig.from_pretrained(f"{folder}/wide")
    model = splice.get_peft_model(network, config)
    before = bytes_read()
    model.load_adapter(f"{folder}/wide", "default")
    over = bytes_read() - before
    before = bytes_read()
    model.load_adapter(f"{folder}/wide", "second")
    file = Path(folder, "wide", "adapter_model.safetensors").stat().st_size
    return {"over": over, "new": bytes_read() - before, "file": file}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(_parallel, str(tmp_path_factory.mktemp("parallel")))


@shows("transformers", "tensor parallelism on two processes of a CPU: LoRA loaded, merged, disabled")
def test_an_adapter_on_divided_layers_computes_what_it_does_on_whole_ones(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for what in ("loaded", "with gradients", "disabled", "merged", "unmerged", "loaded over"):
            assert found[what] < 1e-6, what


def test_each_process_has_its_part(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["kinds"] == {"DTensor"}
        assert found["local"] == {"rows": [(4, 32), (16, 4)], "columns": [(4, 32), (32, 4)]}


@shows("transformers", "tensor parallelism: what is saved is the whole adapter, and loads in one process")
def test_what_is_saved_is_the_whole_adapter(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert abs(found["size"][0] - found["size"][1]) < 1000  # without the base's fingerprint
        assert found["back on one"] < 1e-6


@shows("transformers", "tensor parallelism: training LoRA, equal to one process")
def test_training_in_parts_is_training_the_whole(ranks: list[dict[str, Any]]) -> None:
    alone = adapted(base(), target_modules=TARGETS)
    losses = trained(alone)
    want = {key: tensor for key, tensor in tensors(alone).items() if "lora_" in key}
    for found in ranks:
        assert found["losses"] == pytest.approx(losses, abs=1e-5)
        assert far({key: tensor for key, tensor in found["tensors"].items() if "lora_" in key}, want) < 1e-5


def test_new_adapters_are_the_same_in_all_processes(ranks: list[dict[str, Any]]) -> None:
    one, two = (found["new"] for found in ranks)
    assert far(one, two) == 0
    assert all(tensor.any() for key, tensor in one.items() if "lora_A" in key)


def test_a_new_adapter_trains_as_on_whole_layers(ranks: list[dict[str, Any]]) -> None:
    alone = adapted(base(), target_modules=["q_proj", "down_proj"])
    start = {key: tensor for key, tensor in ranks[0]["new"].items() if "lora_" in key}
    splice.set_peft_model_state_dict(alone, start)
    losses = trained(alone)
    for found in ranks:
        assert found["losses of new"] == pytest.approx(losses, abs=1e-5)
        assert far({key: found["new, trained"][key] for key in start}, tensors(alone)) < 1e-5


def test_what_cannot_compute_with_parts_is_refused(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "q_proj: tensor parallelism divides its tensors among processes" in found["dora"]
        assert "k_proj: tensor parallelism divides its tensors among processes" in found["ia3"]
        assert "lm_head: tensor parallelism divides its tensors" in found["whole"]


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="nothing counts what is read")
def test_each_process_reads_its_own_part_of_the_file(tmp_path: Path) -> None:
    for found in on_ranks(_read, str(tmp_path)):
        # Of each pair of factors one is halved: half the file and what each has of the other factor.
        for what in ("over", "new"):
            assert found["file"] * 0.5 < found[what] < found["file"] * 0.8, what


# -- without a PeftModel: by transformers' own methods, and on what torch itself has divided


def _by_transformers(rank: int, folder: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    fields: dict[str, Any] = {"target_modules": ["q_proj", "o_proj", "gate_proj", "down_proj"]}
    plain = adapted(base(), **fields)
    if rank == 0:
        base().save_pretrained(f"{folder}/base")
        plain.save_pretrained(f"{folder}/plain")
    torch.distributed.barrier()
    want, bare = logits(plain), logits(base())
    model = parallel(f"{folder}/base")
    model.load_adapter(f"{folder}/plain", adapter_name="one")
    found["loaded"] = (logits(model) - want).abs().max().item()
    model.disable_adapters()
    found["disabled"] = (logits(model) - bare).abs().max().item()
    model.enable_adapters()
    # Each process calls it, and the first one alone asks for the adapter's tensors.
    model.save_pretrained(f"{folder}/saved")
    torch.distributed.barrier()
    for name in ("saved", "plain"):
        again = base()
        again.load_adapter(f"{folder}/{name}")
        found[f"{name}, in one process"] = (logits(again) - want).abs().max().item()
    model.add_adapter(lora(**fields, init_lora_weights=True), "new")
    model.set_adapter("new")
    found["new"] = (logits(model) - bare).abs().max().item()
    start = {key: tensor.clone() for key, tensor in model.get_adapter_state_dict("new").items()}
    alone = base()
    alone.load_adapter(peft_config=lora(**fields), adapter_state_dict=start, is_trainable=True)
    found["losses"], found["losses alone"] = trained(model), trained(alone)
    found["trained"] = far(model.get_adapter_state_dict("new"), alone.get_adapter_state_dict())
    model.delete_adapter("new")
    model.set_adapter("one")
    found["deleted"] = (logits(model) - want).abs().max().item()
    model = parallel(f"{folder}/base")
    held = splice.load_peft_weights(f"{folder}/plain")
    model.load_adapter(peft_config=lora(**fields), adapter_state_dict=held)
    found["from memory"] = (logits(model) - want).abs().max().item()
    return found


@shows(
    "transformers",
    "tensor parallelism: `load_adapter`, `add_adapter`, training, `save_pretrained` of the network alone",
)
def test_transformers_own_methods_on_divided_layers(tmp_path: Path) -> None:
    for found in on_ranks(_by_transformers, str(tmp_path)):
        assert found.pop("losses") == pytest.approx(found.pop("losses alone"), abs=1e-5)
        assert {what: far for what, far in found.items() if not far < 1e-5} == {}


def blocks() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def _by_torch(rank: int, folder: str) -> dict[str, float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    fields: dict[str, Any] = {"target_modules": ["0", "2"], "lora_bias": True}
    plain = adapted(blocks(), **fields)
    wanted = plain(x)
    wanted.square().sum().backward()
    gradients = [p.grad for p in plain.parameters() if p.requires_grad]
    if rank == 0:
        plain.save_pretrained(f"{folder}/plain")
    torch.distributed.barrier()
    network = parallelize_module(
        blocks(), init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()}
    )
    model = splice.PeftModel.from_pretrained(network, f"{folder}/plain", is_trainable=True)
    output = model(x)
    output.square().sum().backward()
    found = {"output": (output - wanted).abs().max().item()}
    for index, (parameter, whole) in enumerate(zip((p for p in model.parameters() if p.requires_grad), gradients)):
        found[f"gradient {index}"] = (parameter.grad.full_tensor() - whole).abs().max().item()
    assert len(found) == 1 + len(gradients)
    model.save_pretrained(f"{folder}/saved")
    torch.distributed.barrier()
    found["saved"] = (splice.PeftModel.from_pretrained(blocks(), f"{folder}/saved")(x) - wanted).abs().max().item()
    return found


def test_layers_that_torch_itself_has_divided(tmp_path: Path) -> None:
    for found in on_ranks(_by_torch, str(tmp_path)):
        assert {what: far for what, far in found.items() if not far < 1e-5} == {}
