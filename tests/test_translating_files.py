"""An adapter in the files of other programs and under other names: the same tensors, and nothing where that is not certain.

What pipelines of diffusers make of them is in tests/ecosystem/test_dialects.py, what llama.cpp does in tests/test_gguf.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings, strategies
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import splice
from splice.cli.commands.convert import command
from splice.errors import AdapterMismatchError, CheckpointError, PeftError, UnsupportedFeatureError
from splice.methods.lora.written.components import guessed
from splice.methods.lora.written.underscores import flattened, path_of
from splice.methods.lora.written.unet_blocks import from_numbered, is_numbered, is_numbered_there, to_numbered
from tests import bases
from tests.bases import run
from tests.broken import Around, llama, parts
from tests.cli import BASE, EXAMPLE
from tests.cli import run as run_program
from tests.comparing import assert_close
from tests.hub import Hub
from tests.test_stacked_experts import MIXTRAL, adapter, all_names, logits
from tests.test_stacked_experts import pytestmark as needs_stacks

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def fields_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return found


def saved(network: nn.Module, folder: Path, config: splice.PeftConfig) -> Any:
    model = splice.get_peft_model(network, config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(folder)
    return model


# -- other names


def test_names_that_the_config_holds_for_as_well(tmp_path: Path) -> None:
    folder = parts(task_type=None).write(tmp_path / "own")
    told = splice.translate_files(folder, tmp_path / "new", rename={r"^model\.": "language_model.model."})
    assert (told.read_as, told.dialect, told.parts[0].layers) == ("peft", "peft", 4)
    own, new = load_file(folder / FILE), load_file(tmp_path / "new" / FILE)
    front = "base_model.model."
    assert all(torch.equal(new[f"{front}language_model.{key.removeprefix(front)}"], own[key]) for key in own)
    assert fields_in(tmp_path / "new") == fields_in(folder)
    inputs = bases.LLAMA.inputs(2)
    exact = run(splice.PeftModel.from_pretrained(llama(), folder), inputs)
    around = splice.PeftModel.from_pretrained(Around(llama()), tmp_path / "new")
    assert_close(run(around.base_model.model.language_model, inputs), exact)


class Twice(nn.Module):
    """Layers of one shape under names of choice."""

    def __init__(self, first: str, second: str, head: str) -> None:
        super().__init__()
        self.names = (first, second, head)
        torch.manual_seed(3)
        for name in self.names:
            self.add_module(name, nn.Linear(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.names:
            x = torch.tanh(self.get_submodule(name)(x))
        return x


CONFIGS: Mapping[str, splice.PeftConfig] = {
    "patterns": splice.LoraConfig(
        r=2,
        target_modules=["one", "two"],
        rank_pattern={"one": 3},
        alpha_pattern={"^two$": 5},
        modules_to_save=["head"],
    ),
    "expression": splice.LoraConfig(r=2, target_modules="one|t.o", use_dora=True),
    "two kinds of layers": splice.IA3Config(target_modules=["one", "two"], feedforward_modules=["two"]),
    "shared tensors": splice.VeraConfig(r=2, target_modules=["one", "two"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_names_that_the_config_has_to_follow(name: str, tmp_path: Path) -> None:
    model = saved(Twice("one", "two", "head"), tmp_path / "own", CONFIGS[name])
    splice.translate_files(
        tmp_path / "own",
        tmp_path / "new",
        rename={"^one$": "first", "^two$": "second", "^head$": "last"}
        if name == "patterns"
        else {"^one$": "first", "^two$": "second"},
    )
    head = "last" if name == "patterns" else "head"
    again = splice.PeftModel.from_pretrained(Twice("first", "second", head), tmp_path / "new")
    x = torch.randn(3, 6)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        ({"no_such_layer": "x"}, "'no_such_layer' is found in no path of a module; there are model.layers.0"),
        ({r"layers\.\d+": "layers.0"}, "would have the same name 'base_model.model.model.layers.0."),
        ({"(": "x"}, r"'\(' is no regular expression"),
        ({"model": r"\9"}, "cannot stand for 'model'"),
        (None, "is in the dialect 'peft' already"),
    ],
)
def test_renames_that_mean_nothing(rename: dict[str, str] | None, said: str, tmp_path: Path) -> None:
    folder = parts().write(tmp_path / "own")
    with pytest.raises(PeftError, match=said):
        splice.translate_files(folder, tmp_path / "new", rename=rename)
    assert not (tmp_path / "new").exists()


# -- the names of a base


def test_the_base_says_where_layers_are(tmp_path: Path) -> None:
    """Of a model that had no head when the adapter was trained."""
    base = llama()
    base.save_pretrained(tmp_path / "base")
    saved(
        base.model, tmp_path / "old", splice.LoraConfig(r=2, target_modules=["q_proj"], rank_pattern={"^layers.0.*": 3})
    )
    told = splice.translate_files(
        tmp_path / "old", tmp_path / "new", base=tmp_path / "base", class_name="LlamaForCausalLM"
    )
    assert "'model.'" in told.notes[0]
    keys = load_file(tmp_path / "new" / FILE)
    assert all(key.startswith("base_model.model.model.layers.") for key in keys)
    old = splice.PeftModel.from_pretrained(llama(), tmp_path / "old")
    new = splice.PeftModel.from_pretrained(llama(), tmp_path / "new")
    assert new.load_report.notes == ()
    assert_close(run(new, bases.LLAMA.inputs(2)), run(old, bases.LLAMA.inputs(2)))


@needs_stacks
def test_experts_that_were_layers(tmp_path: Path) -> None:
    """The adapter is written for the parameters that they are now."""
    folder, exact = adapter(MIXTRAL, all_names(MIXTRAL), tmp_path / "old")
    exact.config.save_pretrained(tmp_path / "base")
    told = splice.translate_files(folder, tmp_path / "new", base=tmp_path / "base")
    assert told.notes
    assert fields_in(tmp_path / "new")["target_parameters"]
    new = splice.PeftModel.from_pretrained(MIXTRAL.build(), tmp_path / "new").eval()
    assert new.load_report.notes == ()
    torch.testing.assert_close(logits(new), logits(exact), atol=2e-5, rtol=1e-4)


def test_two_places_are_no_place(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    network = CLIPModel(
        CLIPConfig(text_config={**sizes, "vocab_size": 30}, vision_config={**sizes, "image_size": 8, "patch_size": 4})
    )
    network.config.save_pretrained(tmp_path / "base")
    saved(network, tmp_path / "own", splice.LoraConfig(r=2, target_modules=r"vision_model\..*q_proj"))
    splice.translate_files(tmp_path / "own", tmp_path / "short", rename={r"^vision_model\.": ""})
    with pytest.raises(AdapterMismatchError, match="vision_model"):
        splice.translate_files(tmp_path / "short", tmp_path / "new", base=tmp_path / "base")
    assert not (tmp_path / "new").exists()


# -- kohya and diffusers


def kohya_file(path: Path, names: Mapping[str, tuple[int, float | None]]) -> Path:
    """Layers by their names -> rank and alpha."""
    tensors = {}
    for name, (rank, alpha) in names.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, 6)
        tensors[f"{name}.lora_up.weight"] = torch.randn(7, rank)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


ONE, TWO = "lora_unet_mid_block_attentions_0_proj_in", "lora_unet_down_blocks_0_resnets_1_time_emb_proj"


def test_alphas_of_layers(tmp_path: Path) -> None:
    """Where a file has none, there was no scale; the most frequent values are for all, the others in patterns."""
    three = "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj"
    file = kohya_file(tmp_path / "a.safetensors", {ONE: (4, 2.0), TWO: (4, 2.0), three: (3, None)})
    splice.translate_files(file, tmp_path / "own")
    fields = fields_in(tmp_path / "own")
    path = "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj"
    key = "^" + path.replace(".", r"\.")
    assert (fields["r"], fields["lora_alpha"]) == (4, 2)
    assert (fields["rank_pattern"], fields["alpha_pattern"]) == ({key: 3}, {key: 3})
    assert path in fields["target_modules"] and len(fields["target_modules"]) == 3


def test_and_back(tmp_path: Path) -> None:
    file = kohya_file(
        tmp_path / "a.safetensors",
        {ONE: (4, 2.0), TWO: (2, 3.5), "lora_te_text_model_encoder_layers_0_mlp_fc1": (3, 1.0)},
    )
    told = splice.translate_files(file, tmp_path / "own")
    assert {part.component for part in told.parts} == {"unet", "text_encoder"}
    splice.translate_files(tmp_path / "own", tmp_path / "b.safetensors", "kohya")
    old, new = load_file(file), load_file(tmp_path / "b.safetensors")
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    splice.translate_files(file, tmp_path / "c", "diffusers")
    splice.translate_files(tmp_path / "c" / "pytorch_lora_weights.safetensors", tmp_path / "d.safetensors", "kohya")
    newer = load_file(tmp_path / "d.safetensors")
    assert old.keys() == newer.keys() and all(torch.equal(old[name], newer[name]) for name in old)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["lora_unet_mid_block_strange_layer.lora_down.weight"],
            "is made of words that are not known here; give the pipeline",
        ),
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "a layer of the model's original code"),
        ([f"{ONE}.hada_w1_a"], "no tensor of a plain LoRA"),
        ([f"{ONE}.lora_down.weight"], "'mid_block_attentions_0_proj_in' has no lora_up.weight"),
        ([f"{ONE}.alpha", "lora_other_x.alpha"], "begins with none of lora_unet_"),
        (
            ["model.diffusion_model.x.weight"],
            "is in no dialect that is known here: peft, with its adapter_config.json, kohya",
        ),
    ],
)
def test_files_that_cannot_be_read(names: list[str], said: str, tmp_path: Path) -> None:
    tensors = {name: torch.ones(2, 6) for name in names}
    if "strange" in names[0]:
        tensors["lora_unet_mid_block_strange_layer.lora_up.weight"] = torch.ones(7, 2)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(PeftError, match=said):
        splice.translate_files(tmp_path / "a.safetensors", tmp_path / "own")
    assert not (tmp_path / "own").exists()


DAMAGED: Mapping[str, tuple[dict[str, torch.Tensor], str]] = {
    "one number": ({f"{ONE}.lora_down.weight": torch.tensor(1.0)}, r"factors of the shapes \(\) and"),
    "two ranks": ({f"{ONE}.lora_down.weight": torch.ones(3, 6)}, "A has 3 rows and B 2 columns"),
    "nothing": ({f"{ONE}.lora_down.weight": torch.ones(0, 6)}, "are not those of a layer"),
    "no alpha": ({f"{ONE}.alpha": torch.tensor(torch.nan)}, "alpha' is no number: nan"),
    "many alphas": ({f"{ONE}.alpha": torch.ones(2)}, "alpha' is no number"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged(name: str, tmp_path: Path) -> None:
    changes, said = DAMAGED[name]
    whole = {f"{ONE}.lora_down.weight": torch.ones(2, 6), f"{ONE}.lora_up.weight": torch.ones(7, 2)}
    save_file({**whole, **changes}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=said):
        splice.translate_files(tmp_path / "a.safetensors", tmp_path / "own")
    dotted = {
        f"unet.mid_block.proj_in.{key.rpartition(ONE + '.')[2]}": tensor for key, tensor in {**whole, **changes}.items()
    }
    save_file(dotted, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError):
        splice.translate_files(tmp_path / "b.safetensors", tmp_path / "own")
    for noted in ("{", "[1]"):
        save_file(whole_of_diffusers(), tmp_path / "c.safetensors", metadata={"lora_adapter_metadata": noted})
        with pytest.raises(CheckpointError, match="its lora_adapter_metadata is no"):
            splice.translate_files(tmp_path / "c.safetensors", tmp_path / "own")
    assert not (tmp_path / "own").exists()


def whole_of_diffusers() -> dict[str, torch.Tensor]:
    front = "unet.mid_block.proj_in"
    return {f"{front}.lora_A.weight": torch.ones(2, 6), f"{front}.lora_B.weight": torch.ones(7, 2)}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=strategies.data())
def test_names_with_one_letter_changed(data: strategies.DataObject, tmp_path: Path) -> None:
    """They are read, or refused in words; nothing is dropped."""
    whole = {f"{ONE}.lora_down.weight": torch.ones(2, 6), f"{ONE}.lora_up.weight": torch.ones(7, 2)}
    tensors = data.draw(strategies.sampled_from([{**whole, f"{ONE}.alpha": torch.tensor(1.0)}, whole_of_diffusers()]))
    name = data.draw(strategies.sampled_from(sorted(tensors)))
    place = data.draw(strategies.integers(0, len(name) - 1))
    changed = (
        name[:place] + data.draw(strategies.sampled_from(["", "_", ".", "x", "0", name[place] * 2])) + name[place + 1 :]
    )
    save_file({changed if key == name else key: tensor for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    shutil.rmtree(tmp_path / "own", ignore_errors=True)
    try:
        told = splice.translate_files(tmp_path / "a.safetensors", tmp_path / "own")
    except PeftError as error:
        assert str(error)  # noqa: PT017
        return
    alphas = sum(key.endswith(".alpha") for key in tensors)
    assert sum(part.tensors for part in told.parts) == len(tensors) - alphas


def test_a_config_beside_the_file_of_another_program(tmp_path: Path) -> None:
    """Which of the two says what it is, is for the user to say."""
    (tmp_path / "own").mkdir()
    file = kohya_file(tmp_path / "own" / FILE, {ONE: (4, 2.0)})
    (tmp_path / "own" / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 8, "target_modules": ["proj_in"]}))
    with pytest.raises(PeftError, match=r"has a config, but the tensors are named as kohya's .* name the file itself$"):
        splice.translate_files(tmp_path / "own", tmp_path / "new")
    assert splice.translate_files(file, tmp_path / "new").read_as == "kohya"
    assert fields_in(tmp_path / "new")["r"] == 4


SPELLINGS = {
    "unet.mid_block.attentions.0.proj_in.lora_A.weight": "mid_block.attentions.0.proj_in",
    "unet.mid_block.attentions.0.proj_in.lora.down.weight": "mid_block.attentions.0.proj_in",
    "unet.mid_block.attentions.0.proj_in.lora_down.weight": "mid_block.attentions.0.proj_in",
    "unet.mid_block.attn1.processor.to_out_lora.down.weight": "mid_block.attn1.to_out.0",
    "unet.mid_block.attn1.processor.add_k_proj_lora.down.weight": "mid_block.attn1.add_k_proj",
    "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.down.weight": (
        "text_model.encoder.layers.0.self_attn.out_proj"
    ),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight": (
        "text_model.encoder.layers.0.self_attn.q_proj"
    ),
    "mid_block.attn1.processor.to_q_lora.down.weight": "mid_block.attn1.to_q",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_diffusers(name: str, tmp_path: Path) -> None:
    up = name.replace("down", "up") if "down" in name else name.replace("_A", "_B")
    save_file({name: torch.ones(2, 3), up: torch.ones(4, 2)}, tmp_path / "a.safetensors")
    (part,) = splice.translate_files(tmp_path / "a.safetensors", tmp_path / "own").parts
    assert part.component == ("" if name.startswith("mid") else name.partition(".")[0])
    prefix = f"base_model.model.{SPELLINGS[name]}"
    assert set(load_file(tmp_path / "own" / FILE)) == {f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"}
    assert (fields_in(tmp_path / "own")["r"], fields_in(tmp_path / "own")["lora_alpha"]) == (2, 2)


def test_a_file_of_a_network_alone(tmp_path: Path) -> None:
    """As `save_lora_adapter` writes it: no component before the names, nor before the fields of the config."""
    front, noted = "mid_block.attentions.0.proj_in", {"r": 2, "lora_alpha": 7, "target_modules": ["proj_in"]}
    tensors = {f"{front}.lora_A.weight": torch.ones(2, 3), f"{front}.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(noted)})
    splice.translate_files(tmp_path / "a.safetensors", tmp_path / "own")
    assert fields_in(tmp_path / "own") == {**noted, "peft_type": "LORA"}
    told = splice.translate_files(tmp_path / "own", tmp_path / "b.safetensors", "kohya")
    assert told.notes == () and load_file(told.place)[f"{ONE}.alpha"].item() == 7
    save_file({**tensors, f"unet.{front}.x.lora_A.weight": torch.ones(2, 3)}, tmp_path / "c.safetensors")
    with pytest.raises(PeftError, match="some names begin with a component .unet., and 'mid_block"):
        splice.translate_files(tmp_path / "c.safetensors", tmp_path / "new")


def test_underscores_that_stand_for_dots() -> None:
    assert path_of("mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0", "unet", None) == (
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    )
    paths = ["a.b_c", "a_b.c", "text_model.x_y.z"]
    assert path_of("x_y_z", "text_encoder", paths) == path_of("text_model_x_y_z", "text_encoder", paths) == paths[2]
    with pytest.raises(PeftError, match=r"'a_b_c', of unet, may be any of a\.b_c, a_b\.c"):
        path_of("a_b_c", "unet", paths)
    with pytest.raises(PeftError, match="'a_b', of unet, is no layer of the base$"):
        path_of("a_b", "unet", paths)


def test_blocks_as_stability_numbers_them() -> None:
    """Every layer of SDXL's UNet that LoRA is put on has a name of its own there, and comes back from it."""
    resnet = ["conv1", "conv2", "time_emb_proj", "conv_shortcut"]
    inside = ["proj_in", "proj_out", "transformer_blocks.1.attn1.to_q", "transformer_blocks.0.ff.net.0.proj"]
    paths = ["conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.linear_2"]
    for way, block, layers, attentions in [
        ("down", 0, 2, 0), ("down", 1, 2, 2), ("down", 2, 2, 2), ("up", 0, 3, 3), ("up", 1, 3, 3), ("up", 2, 3, 0),
    ]:  # fmt: skip
        front = f"{way}_blocks.{block}"
        paths += [f"{front}.resnets.{n}.{layer}" for n in range(layers) for layer in resnet]
        paths += [f"{front}.attentions.{n}.{layer}" for n in range(attentions) for layer in inside]
        if way == "down" and block < 2:
            paths.append(f"{front}.downsamplers.0.conv")
        if way == "up" and block < 2:
            paths.append(f"{front}.upsamplers.0.conv")
    paths += [f"mid_block.resnets.{n}.{layer}" for n in range(2) for layer in resnet]
    paths += [f"mid_block.attentions.0.{layer}" for layer in inside]
    names = [flattened(path) for path in paths]
    numbered = [to_numbered(name) for name in names]
    assert is_numbered_there(names) and is_numbered(numbered) and not is_numbered(names)
    assert len(set(numbered)) == len(numbered) and not set(numbered) & set(names)
    assert [from_numbered(name) for name in numbered] == names
    assert [path_of(from_numbered(name), "unet", None) for name in numbered] == paths
    assert "input_blocks_4_1_transformer_blocks_1_attn1_to_q" in numbered and "output_blocks_2_2_conv" in numbered


def test_what_other_programs_have_no_place_for(tmp_path: Path) -> None:
    for name, options, said in (
        ("dora", {"use_dora": True}, "kohya's form has no place for use_dora=True"),
        ("saved", {"modules_to_save": ["head"]}, "head.*, a part of the base that is saved whole"),
        ("bias", {"bias": "lora_only"}, "no place for bias='lora_only': biases of the base are trained"),
    ):
        saved(Twice("one", "two", "head"), tmp_path / name, splice.LoraConfig(r=2, target_modules=["one"], **options))
        with pytest.raises(UnsupportedFeatureError, match=said):
            splice.translate_files(tmp_path / name, tmp_path / "out.safetensors", "kohya", component="unet")
    saved(Twice("one", "two", "head"), tmp_path / "plain", splice.LoraConfig(r=2, target_modules=["one"]))
    with pytest.raises(PeftError, match="cannot be told from its layers .one.: say it as `component`"):
        splice.translate_files(tmp_path / "plain", tmp_path / "out.safetensors", "kohya")
    with pytest.raises(UnsupportedFeatureError, match="kohya's files have no transformer"):
        splice.translate_files(tmp_path / "plain", tmp_path / "out.safetensors", "kohya", component="transformer")
    # DoRA has a place in files of diffusers.
    splice.translate_files(tmp_path / "dora", tmp_path / "dora.safetensors", "diffusers", component="unet")
    assert "unet.one.lora_magnitude_vector" in load_file(tmp_path / "dora.safetensors")
    splice.translate_files(tmp_path / "dora.safetensors", tmp_path / "dora again")
    again = splice.PeftModel.from_pretrained(Twice("one", "two", "head"), tmp_path / "dora again")
    exact = splice.PeftModel.from_pretrained(Twice("one", "two", "head"), tmp_path / "dora")
    x = torch.randn(3, 6)
    assert torch.equal(again(x), exact(x))


def test_names_that_underscores_make_one(tmp_path: Path) -> None:
    network = nn.ModuleDict(
        {"a_b": nn.ModuleDict({"c": nn.Linear(6, 6)}), "a": nn.ModuleDict({"b_c": nn.Linear(6, 6)})}
    )
    model = splice.get_peft_model(network, splice.LoraConfig(r=2, target_modules=["a_b.c", "a.b_c"]))
    model.save_pretrained(tmp_path / "own")
    with pytest.raises(PeftError, match="with underscores for dots"):
        splice.translate_files(tmp_path / "own", tmp_path / "out.safetensors", "kohya", component="unet")


def test_convolutions_in_groups(tmp_path: Path) -> None:
    """B of such a one has a part of the rank for each group; diffusers hands it on as it is."""
    network = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, groups=2), "other": nn.Conv2d(4, 6, 3)})
    saved(network, tmp_path / "own", splice.LoraConfig(r=4, target_modules=["conv", "other"]))
    with pytest.raises(UnsupportedFeatureError, match="kohya's form has no place for a convolution in groups: 'conv'"):
        splice.translate_files(tmp_path / "own", tmp_path / "a.safetensors", "kohya", component="unet")
    splice.translate_files(tmp_path / "own", tmp_path / "b.safetensors", "diffusers", component="unet")
    splice.translate_files(tmp_path / "b.safetensors", tmp_path / "again")
    own, again = load_file(tmp_path / "own" / FILE), load_file(tmp_path / "again" / FILE)
    assert own.keys() == again.keys() and all(torch.equal(own[key], again[key]) for key in own)


def test_the_network_that_is_meant(tmp_path: Path) -> None:
    assert guessed(["text_model.encoder.layers.0.mlp.fc1"]) == guessed(["encoder.layers.0.mlp.fc1"]) == "text_encoder"
    assert guessed(["single_transformer_blocks.0.proj_out"]) == "transformer"
    file = kohya_file(tmp_path / "a.safetensors", {ONE: (4, 2.0)})
    with pytest.raises(PeftError, match="has nothing for a component 'text_encoder'; it has unet"):
        splice.translate_files(file, tmp_path / "own", component="text_encoder")
    with pytest.raises(PeftError, match="there is no dialect 'a1111'; there are peft, kohya, diffusers, gguf"):
        splice.translate_files(file, tmp_path / "own", "a1111")


# -- whole or not at all


def test_what_is_there_stays(tmp_path: Path) -> None:
    folder = parts().write(tmp_path / "own")
    rename = {r"^model\.": ""}
    (tmp_path / "there").mkdir()
    splice.translate_files(folder, tmp_path / "there", rename=rename)  # an empty folder will do
    before = (tmp_path / "there" / FILE).read_bytes()
    with pytest.raises(FileExistsError, match="there is there already, and nothing there is overwritten"):
        splice.translate_files(folder, tmp_path / "there", rename={r"^model\.": "other."})
    assert (tmp_path / "there" / FILE).read_bytes() == before
    (tmp_path / "b.safetensors").write_text("mine")
    file = kohya_file(tmp_path / "a.safetensors", {ONE: (4, 2.0)})
    with pytest.raises(FileExistsError):
        splice.translate_files(file, tmp_path / "b.safetensors", "diffusers")
    assert (tmp_path / "b.safetensors").read_text() == "mine"


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = kohya_file(tmp_path / "a.safetensors", {ONE: (4, 2.0), TWO: (4, 2.0)})

    def full(path: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("splice.checkpoint.unread.flush", full)
    for out, dialect in (("own", "peft"), ("folder", "diffusers")):
        with pytest.raises(OSError, match="no space left"):
            splice.translate_files(file, tmp_path / out, dialect)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_files_are_those_of_the_format(tmp_path: Path) -> None:
    """Read by the library of the format, tensors aligned, one after the other, and with what a save notes."""
    tensors = {"base_model.model.a.lora_A.weight": torch.ones(2, 3, dtype=torch.bfloat16)}
    tensors["base_model.model.a.lora_B.weight"] = torch.ones(3, 2)
    (tmp_path / "own").mkdir()
    save_file(tensors, tmp_path / "own" / FILE)
    fields = {"peft_type": "LORA", "r": 2, "target_modules": ["a"], "unknown_field": None}
    (tmp_path / "own" / CONFIG).write_text(json.dumps(fields))
    with pytest.warns(UserWarning, match="unknown_field"):
        splice.translate_files(tmp_path / "own", tmp_path / "new", rename={"^a$": "b.ä"})
    with safe_open(tmp_path / "new" / FILE, "pt") as opened:
        assert sorted(opened.keys()) == ["base_model.model.b.ä.lora_A.weight", "base_model.model.b.ä.lora_B.weight"]
        assert opened.metadata()["format"] == "pt" and "config_sha256" in opened.metadata()
    assert fields_in(tmp_path / "new") == {**fields, "target_modules": ["b.ä"], "alpha_pattern": {}, "rank_pattern": {},
        "exclude_modules": None, "layers_pattern": None, "layers_to_transform": None}  # fmt: skip


def test_a_pickle_and_a_repository(tmp_path: Path, hub: Hub) -> None:
    kohya_file(tmp_path / "a.safetensors", {ONE: (4, 2.0)})
    torch.save(load_file(tmp_path / "a.safetensors"), tmp_path / "a.bin")
    splice.translate_files(tmp_path / "a.bin", tmp_path / "one", "diffusers")
    (tmp_path / "repository").mkdir()
    (tmp_path / "a.safetensors").rename(tmp_path / "repository" / "my_style.safetensors")
    hub.repository("someone/style").commit(tmp_path / "repository")
    options = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1,localhost"}
    ran = run_program("convert", "someone/style", "--to", "diffusers", "--out", tmp_path / "two", **options)
    assert ran.code == 0, ran.err
    name = "pytorch_lora_weights.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_what_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Can't find 'adapter_config.json'"):
        splice.translate_files(tmp_path, tmp_path / "new", "kohya")
    for name in "ab":
        kohya_file(tmp_path / f"{name}.safetensors", {ONE: (4, 2.0)})
    with pytest.raises(CheckpointError):
        splice.translate_files(tmp_path, tmp_path / "new", "diffusers")


# -- the program


def called(*arguments: object) -> Any:
    """What the command ends with, in this process."""
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_the_program(tmp_path: Path) -> None:
    rename = r"^model\.=language_model.model."
    ran = run_program("convert", EXAMPLE, "--rename", rename, "--out", tmp_path / "renamed")
    assert (ran.code, ran.out) == (0, f"{tmp_path}/renamed: peft, was peft\n  28 layers, 56 tensors\n")


def test_what_the_program_says(tmp_path: Path) -> None:
    names = {ONE: (4, 2.0), "lora_te_text_model_encoder_layers_0_mlp_fc1": (3, 1.0)}
    file = kohya_file(tmp_path / "style.safetensors", names)
    told = json.loads(called(file, "--to", "peft", "--out", tmp_path / "style", "--json").output)
    assert told["read_as"] == "kohya" and {part["component"] for part in told["parts"]} == {"unet", "text_encoder"}
    ran = called(tmp_path / "style", "--to", "kohya", "--out", tmp_path / "again.safetensors")
    assert ran.exit_code == 0 and "  unet: 1 layer, 2 tensors\n" in ran.output
    for options, said in (
        (["--rename", "nothing"], "--rename takes OLD=NEW, and got 'nothing'"),
        (["--to", "kohya", "--rank", "2"], "--rank and --error for methods"),
        (["--to", "lora", "--component", "unet"], "for the forms of programs"),
        ([], "Say what the adapter is for: --base."),
    ):
        ran = called(EXAMPLE, "--out", tmp_path / "x", *options)
        assert ran.exit_code == 2 and said in ran.output, ran.output
    ran = called(file, "--base", BASE, "--out", tmp_path / "x")
    assert ran.exit_code == 2 and "is a file: write it as a folder first" in ran.output
