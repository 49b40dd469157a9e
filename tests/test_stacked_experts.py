"""Adapters for mixture-of-experts models from when each expert's projections were layers: they are one parameter now."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import save_file
from torch import nn

import splice
from tests.broken import unchanged

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"),
    reason="before transformers 5 these projections are layers themselves",
)

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
EXPERTS = 3
IDS = torch.arange(12).reshape(2, 6)


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=EXPERTS, num_experts_per_tok=2)).eval()


def qwen() -> Any:
    """Its second layer has no experts, and projections of the same names."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    own = {"moe_intermediate_size": 12, "head_dim": 8, "num_experts": EXPERTS, "mlp_only_layers": [1]}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **own, num_experts_per_tok=2, decoder_sparse_step=1)).eval()


class Old:
    """Where the layers were in releases before 5: (path then, module or parameter now, which rows of it, its expert)."""

    def __init__(self, build: Any, block: str, parts: tuple[str, str, str], sparse: tuple[int, ...]) -> None:
        self.build, self.block, self.parts, self.sparse = build, block, parts, sparse

    def targets(self, network: nn.Module) -> dict[str, tuple[torch.Tensor, str]]:
        """Path then -> the weight now, a view of (out, in) that can be written to, and its last name."""
        first, second, down = self.parts
        found = {}
        for index, layer in enumerate(network.model.layers):
            front = f"model.layers.{index}"
            for name in ("q_proj", "v_proj"):
                found[f"{front}.self_attn.{name}"] = layer.self_attn.get_submodule(name).weight, name
            if index not in self.sparse:
                for name in self.parts:
                    found[f"{front}.mlp.{name}"] = layer.mlp.get_submodule(name).weight, name
                continue
            experts = layer.mlp.experts
            found[f"{front}.{self.block}.gate"] = layer.mlp.gate.weight, "gate"
            half = experts.gate_up_proj.shape[1] // 2
            for e in range(EXPERTS):
                at = f"{front}.{self.block}.experts.{e}"
                found[f"{at}.{first}"] = experts.gate_up_proj[e, :half], first
                found[f"{at}.{second}"] = experts.gate_up_proj[e, half:], second
                found[f"{at}.{down}"] = experts.down_proj[e], down
        return found


MIXTRAL = Old(mixtral, "block_sparse_moe", ("w1", "w3", "w2"), (0, 1))
QWEN = Old(qwen, "mlp", ("gate_proj", "up_proj", "down_proj"), (0,))
olds = pytest.mark.parametrize("old", [MIXTRAL, QWEN], ids=["mixtral", "qwen3_moe"])


def adapter(
    old: Old, names: set[str], folder: Path, ranks: Mapping[str, int] | None = None, **changes: Any
) -> tuple[Path, Any]:
    """A checkpoint as it was written then, and the base with its updates added: what it has to compute."""
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3, "target_modules": sorted(names),
              "rank_pattern": dict(ranks or {}), **changes}  # fmt: skip
    network, tensors = old.build(), {}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, (weight, name) in old.targets(network).items():
            if name not in names:
                continue
            rank = (ranks or {}).get(name, config["r"])
            a, b = (
                torch.randn(*s, generator=generator) / 4 for s in ((rank, weight.shape[1]), (weight.shape[0], rank))
            )
            tensors[f"base_model.model.{path}.lora_A.weight"] = a
            tensors[f"base_model.model.{path}.lora_B.weight"] = b
            weight += config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank) * (b @ a)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, network


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(logits(found), logits(expected), atol=2e-5, rtol=1e-4)


def load(old: Old, folder: Path, library: Any = splice, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.PeftModel.from_pretrained(old.build(), str(folder), **options).eval()


def all_names(old: Old) -> set[str]:
    return {"q_proj", "v_proj", "gate", *old.parts}


@olds
def test_every_expert_gets_its_own_update(old: Old, tmp_path: Path) -> None:
    folder, expected = adapter(old, all_names(old), tmp_path / "old")
    model = load(old, folder)
    close(model, expected)
    assert not torch.allclose(logits(model), logits(old.build()), atol=1e-3)
    (note,) = (n for n in model.load_report.notes if "experts" in n)
    parts = ", ".join(sorted(old.parts))
    assert note == f"the experts' layers ({parts}) are stacked parameters in this model: their tensors were joined"
    config = model.peft_config["default"]
    assert config.target_parameters == ["gate_up_proj", "down_proj", "gate.weight"]
    assert (config.rank_pattern, config.alpha_pattern) == ({r".*\.gate_up_proj": 4}, {r".*\.gate_up_proj": 6})
    model.save_pretrained(tmp_path / "new")
    close(load(old, tmp_path / "new"), expected)
    merged = model.merge_and_unload()
    close(merged, expected)


def test_the_reference_reads_the_same(tmp_path: Path) -> None:
    """And what is saved afterwards. It loses layers outside of experts that have the names of theirs."""
    folder, _ = adapter(MIXTRAL, all_names(MIXTRAL), tmp_path / "old")
    ours, theirs = load(MIXTRAL, folder), load(MIXTRAL, folder, peft)
    close(ours, theirs)
    mine = splice.get_peft_model_state_dict(ours)
    assert {n: tuple(t.shape) for n, t in mine.items()} == {
        n: tuple(t.shape) for n, t in peft.get_peft_model_state_dict(theirs).items()
    }
    for name, tensor in peft.get_peft_model_state_dict(theirs).items():
        torch.testing.assert_close(mine[name], tensor)
    ours.save_pretrained(tmp_path / "new")
    close(load(MIXTRAL, tmp_path / "new", peft), theirs)
    folder, expected = adapter(QWEN, all_names(QWEN), tmp_path / "qwen")
    assert not torch.allclose(logits(load(QWEN, folder, peft)), logits(expected), atol=1e-3)


@pytest.mark.parametrize("names", ["w2", "w1 w3", "w1", "w3 w2 q_proj", "gate q_proj", "gate"])
def test_some_of_the_layers(names: str, tmp_path: Path) -> None:
    """One half of a parameter too, which the reference refuses."""
    folder, expected = adapter(MIXTRAL, set(names.split()), tmp_path)
    close(load(MIXTRAL, folder), expected)


@olds
@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_of_their_own(rslora: bool, old: Old, tmp_path: Path) -> None:
    """Their scales differ, and a part of a parameter keeps its own. The reference reads such adapters with other scales."""
    first, second, down = old.parts
    for number, ranks in enumerate(({first: 4, second: 4}, {first: 1, second: 3, down: 5}, {})):
        folder, expected = adapter(old, {*old.parts, "q_proj"}, tmp_path / f"{number}", ranks, use_rslora=rslora)
        model = load(old, folder)
        close(model, expected)
        model.save_pretrained(tmp_path / f"{number} again")
        close(load(old, tmp_path / f"{number} again"), expected)


NAMED = (
    "all-linear",
    r".*\.(q_proj|v_proj|gate|w\d)",
    r"model\.layers\.\d+\.(self_attn|block_sparse_moe)\..*(q_proj|v_proj|gate|w\d)",
    ["w1", "w3", "w2", "gate", "q_proj", "v_proj"],
)


@pytest.mark.parametrize("targets", NAMED, ids=str)
def test_however_the_config_names_them(targets: Any, tmp_path: Path) -> None:
    folder, expected = adapter(MIXTRAL, all_names(MIXTRAL), tmp_path, target_modules=targets)
    if targets == "all-linear":  # it means k_proj and o_proj as well, and the file has nothing for them
        with pytest.raises(splice.AdapterMismatchError, match="k_proj"):
            load(MIXTRAL, folder)
    else:
        close(load(MIXTRAL, folder), expected)


def test_in_some_layers_alone(tmp_path: Path) -> None:
    folder, expected = adapter(MIXTRAL, {"w2"}, tmp_path, layers_to_transform=[1])
    tensors = {k: v for k, v in splice.load_peft_weights(folder).items() if ".layers.1." in k}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        expected.model.layers[0].mlp.experts.down_proj.copy_(mixtral().model.layers[0].mlp.experts.down_proj)
    model = load(MIXTRAL, folder)
    close(model, expected)
    assert model.peft_config["default"].target_parameters == ["model.layers.1.mlp.experts.down_proj"]


def test_dropout_is_left_out_and_that_is_said(tmp_path: Path) -> None:
    """The reference cannot load such an adapter at all."""
    folder, expected = adapter(MIXTRAL, all_names(MIXTRAL), tmp_path, lora_dropout=0.05)
    with pytest.raises(ValueError, match="lora_dropout"):
        load(MIXTRAL, folder, peft)
    model = load(MIXTRAL, folder, is_trainable=True)
    close(model, expected)
    assert "lora_dropout=0.05 cannot be applied to stacked experts: read as 0" in model.load_report.notes
    assert model.peft_config["default"].lora_dropout == 0.0


def test_an_expert_that_is_missing_is_refused(tmp_path: Path) -> None:
    folder, _ = adapter(MIXTRAL, {"w2", "q_proj"}, tmp_path)
    tensors = splice.load_peft_weights(folder)
    kept = {k: v for k, v in tensors.items() if "layers.1.block_sparse_moe.experts.2." not in k}
    network = mixtral()
    for held in (kept, {k: v[:1] if "experts.1.w2.lora_A" in k else v for k, v in tensors.items()}):
        save_file(held, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        with unchanged(network), pytest.raises(splice.AdapterMismatchError, match=r"experts\.\*?\d?\.?.*w2"):
            splice.PeftModel.from_pretrained(network, folder)


def test_training_on_and_beside_another_one(tmp_path: Path) -> None:
    folder, expected = adapter(MIXTRAL, all_names(MIXTRAL), tmp_path / "a")
    model = load(MIXTRAL, folder, is_trainable=True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    other, wanted = adapter(MIXTRAL, {"w1", "w3", "v_proj"}, tmp_path / "b")
    model.load_adapter(other, "other")
    close(model, expected)
    model.set_adapter("other")
    close(model, wanted)


# -- new adapters


def config_of(library: Any, **fields: Any) -> Any:
    return library.LoraConfig(r=2, lora_alpha=3, task_type="CAUSAL_LM", **fields)


NEW = (
    ["q_proj", "w1", "w2", "w3"],
    ["w2"],
    ["gate", "v_proj"],
    ["block_sparse_moe.gate", "w2"],
    "all-linear",
    r".*\.(q_proj|w2)",
)


@pytest.mark.parametrize("targets", NEW, ids=str)
def test_a_new_adapter_has_the_tensors_of_the_reference(targets: Any) -> None:
    """Old names mean the parameters there too; the config says so afterwards."""
    ours = splice.get_peft_model(mixtral(), config_of(splice, target_modules=targets))
    theirs = peft.get_peft_model(mixtral(), config_of(peft, target_modules=targets))
    shapes = [
        {n: tuple(t.shape) for n, t in get(m).items()}
        for get, m in ((splice.get_peft_model_state_dict, ours), (peft.get_peft_model_state_dict, theirs))
    ]
    assert shapes[0] == shapes[1]
    mine, reference = ours.peft_config["default"], theirs.peft_config["default"]
    assert set(mine.target_parameters) == set(reference.target_parameters)
    assert (mine.rank_pattern, mine.alpha_pattern) == (reference.rank_pattern, reference.alpha_pattern)
    for name, tensor in ours.get_base_model().named_parameters():
        if "lora_B" in name:
            nn.init.normal_(tensor, std=0.1)
    torch.testing.assert_close(logits(ours.eval()).isfinite().all(), torch.tensor(True))


def test_a_new_adapter_on_one_half_is_refused() -> None:
    network = mixtral()
    given = config_of(splice, target_modules=["w1", "q_proj"])
    with (
        unchanged(network),
        pytest.raises(ValueError, match=r"select w1 of model.layers.0.mlp.experts.gate_up_proj, and not w3"),
    ):
        splice.get_peft_model(network, given)
    assert given.target_modules == {"w1", "q_proj"} and given.target_parameters is None


def test_layers_of_the_same_name_stay_targets() -> None:
    model = splice.get_peft_model(qwen(), config_of(splice, target_modules=["down_proj"]))
    names = {n.split(".lora_")[0] for n in splice.get_peft_model_state_dict(model)}
    assert names == {f"base_model.model.model.layers.{p}" for p in ("0.mlp.experts", "1.mlp.down_proj")}


def test_old_weights_over_an_adapter_that_is_there(tmp_path: Path) -> None:
    """By path, and from a state dict."""
    folder, expected = adapter(MIXTRAL, all_names(MIXTRAL), tmp_path / "a")
    fields = {"target_modules": sorted(all_names(MIXTRAL)), "init_lora_weights": False}
    model = splice.get_peft_model(mixtral(), config_of(splice, **fields)).eval()
    assert not torch.allclose(logits(model), logits(expected), atol=1e-3)
    tensors = splice.load_peft_weights(folder)
    result = splice.set_peft_model_state_dict(model, tensors)
    assert result.unexpected_keys == []
    close(model, expected)
    nn.init.zeros_(dict(model.named_parameters())[next(n for n, _ in model.named_parameters() if "lora_B" in n)])
    model.load_adapter(folder, "default")
    close(model, expected)
