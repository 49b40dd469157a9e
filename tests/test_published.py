"""Adapters as people published them: each way in which files stray from the format, and what is made of it."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import save_file
from torch import nn

import splice
from splice.base.bare import walk_bare
from splice.errors import AdapterMismatchError, CheckpointError
from splice.kinds.registry import method_of
from splice.loading.published.heads import with_heads_and_biases
from splice.loading.wanted import NewAdapter
from tests import broken
from tests.broken import BIN, CONFIG, PREFIX, SAFETENSORS, Parts, edited, llama, load, output, parts, unchanged


def straight(made: Parts, folder: Path, **options: Any) -> torch.Tensor:
    """The output with the adapter as it should have been written."""
    return output(load(made.write(folder), **options))


def notes_of(model: Any) -> list[str]:
    return list(model.load_report.notes)


# -- values of the config

SPELLED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "floats where ints belong": (
        {"r": 4.0, "lora_alpha": 8.0},
        ["the config has r=4.0: read as 4", "the config has lora_alpha=8.0: read as 8"],
    ),
    "floats in patterns": (
        {"rank_pattern": {"q_proj": 4.0}, "alpha_pattern": {"q_proj": 8.0}},
        [
            "the config has rank_pattern={'q_proj': 4.0}: read as {'q_proj': 4}",
            "the config has alpha_pattern={'q_proj': 8.0}: read as {'q_proj': 8}",
        ],
    ),
    "null flags": (
        {"fan_in_fan_out": None, "use_dora": None, "use_rslora": None, "init_lora_weights": None},
        [f"the config has {n}=null: read as False" for n in ("fan_in_fan_out", "use_rslora")]
        + ["the config has init_lora_weights=null: read as True", "the config has use_dora=null: read as False"],
    ),
    "null choices and collections": (
        {"bias": None, "rank_pattern": None, "alpha_pattern": None, "lora_dropout": None},
        [
            "the config has lora_dropout=null: read as 0.0",
            "the config has bias=null: read as 'none'",
            "the config has rank_pattern=null: read as {}",
            "the config has alpha_pattern=null: read as {}",
        ],
    ),
    "switches of long ago": ({"enable_lora": None, "merge_weights": False}, []),
    "modules_to_save as an empty list": ({"modules_to_save": []}, []),
    "a flag that is wrong for the class of the layers": ({"fan_in_fan_out": True}, []),
    "names of other architectures": ({"target_modules": ["q_proj", "v_proj", "q_lin", "query_key_value", "c_attn"]}, []),
    "a base on another machine": ({"base_model_name_or_path": "C:\\Users\\Jürgen\\模型", "revision": "unsloth"}, []),
    "more than the format has in auto_mapping": ({"auto_mapping": {"parent_library": "__main__", "unsloth_fixed": True}}, []),
}  # fmt: skip


@pytest.mark.parametrize("what", SPELLED)
def test_values_with_one_meaning(what: str, tmp_path: Path) -> None:
    changes, notes = SPELLED[what]
    expected = straight(parts(), tmp_path / "straight")
    model = load(edited(parts().write(tmp_path / "stray"), **changes))
    assert torch.equal(output(model), expected)
    assert sorted(notes_of(model)) == sorted(notes)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(output(load(tmp_path / "again")), expected)
    assert notes_of(load(tmp_path / "again")) == []


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "lines of Windows": lambda text: json.dumps(json.loads(text), indent=2).replace("\n", "\r\n").encode(),
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    "both": lambda text: b"\xef\xbb\xbf" + json.dumps(json.loads(text), indent=2).replace("\n", "\r\n").encode(),
}


@pytest.mark.parametrize("what", BYTES)
def test_a_config_from_an_editor_of_windows(what: str, tmp_path: Path) -> None:
    folder = parts().write(tmp_path / "a")
    (folder / CONFIG).write_bytes(BYTES[what]((folder / CONFIG).read_bytes()))
    assert torch.equal(output(load(folder)), straight(parts(), tmp_path / "b"))
    assert splice.PeftConfig.from_pretrained(folder).r == 4


def test_fields_that_are_missing_or_of_a_newer_release(tmp_path: Path) -> None:
    expected = straight(parts(), tmp_path / "straight")
    made = parts()
    kept = {name: made.config[name] for name in ("peft_type", "r", "lora_alpha", "target_modules")}
    assert torch.equal(output(load(Parts(made.tensors, kept).write(tmp_path / "few"))), expected)
    folder = edited(parts().write(tmp_path / "newer"), use_hyper_lora=True, telemetry=None)
    with pytest.warns(
        splice.PeftWarning, match=r"unexpected fields \['telemetry', 'use_hyper_lora'\].*use_hyper_lora"
    ) as caught:
        model = splice.PeftModel.from_pretrained(llama(), folder)
    assert "{'use_hyper_lora': True} are switched on" in str(caught[0].message)
    assert torch.equal(output(model), expected)


# -- what the config says and the file does not, and the other way round


@pytest.mark.parametrize("targets", ["q_proj", ["q_proj"], None, ["query"]], ids=str)
def test_layers_that_the_config_does_not_select(targets: Any, tmp_path: Path) -> None:
    """Every tensor has its place all the same: the file says which layers were trained."""
    made = parts()
    expected = straight(made, tmp_path / "straight")
    changed = {"target_modules": ".*q_proj" if targets == "q_proj" else targets}
    if targets == ["query"]:  # not one layer of the config is there, so it may be another model
        with pytest.raises(ValueError, match="query"):
            load(edited(made.write(tmp_path / "stray"), **changed))
        return
    model = load(edited(made.write(tmp_path / "stray"), **changed))
    assert torch.equal(output(model), expected)
    assert model.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    if targets is not None:
        (note,) = notes_of(model)
        assert re.fullmatch(r"target_modules do not select .*v_proj.*, and the file has its tensors: added", note)


def test_layers_that_only_the_config_selects(tmp_path: Path) -> None:
    """A part that the adapter's own base had not: a warning, as it stays as it is."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.draft = llama(), llama(layers=1)

        def forward(self, **inputs: Any) -> Any:
            return self.main(**inputs)

    made = parts(task_type=None).renamed(lambda name: name.replace(PREFIX, PREFIX + "main.", 1))
    with pytest.warns(splice.PeftWarning, match=r"target_modules select draft\..*: left as it is"):
        model = splice.PeftModel.from_pretrained(Two(), made.write(tmp_path / "a"))
    assert torch.equal(output(model), straight(parts(), tmp_path / "b"))


@pytest.mark.parametrize("where", ["no field", "null", "duplicates", "absent ones"])
def test_a_head_that_old_classifiers_saved_by_themselves(where: str, tmp_path: Path) -> None:
    made = parts(network=broken.bert(), target_modules=["query"], task_type="SEQ_CLS")
    expected = output(load(made.write(tmp_path / "straight"), broken.bert()))
    folder = made.write(tmp_path / "stray")
    values = {
        "null": None,
        "duplicates": ["classifier", "classifier"],
        "absent ones": ["classifier", "score", "pooler2"],
    }
    fields = json.loads((folder / CONFIG).read_text())
    del fields["modules_to_save"]
    (folder / CONFIG).write_text(
        json.dumps({**fields, **({} if where == "no field" else {"modules_to_save": values[where]})})
    )
    assert torch.equal(output(load(folder, broken.bert())), expected)


def test_a_head_behind_a_layer_of_a_block() -> None:
    """A layer of a numbered block is no head, and what stands behind it in the file may be one."""
    network = broken.bert()
    config = splice.LoraConfig(target_modules=["query"])
    names = [
        f"{PREFIX}{path}.{n}"
        for path in ("bert.encoder.layer.0.output.LayerNorm", "classifier")
        for n in ("weight", "bias")
    ]
    wanted = NewAdapter(network, walk_bare(network), method_of(config), ())
    found = with_heads_and_biases(config, names, wanted)
    assert list(found.config.target_rule().modules_to_save or ()) == ["classifier"]
    assert config.modules_to_save is None


def test_a_head_without_the_task_that_says_so(tmp_path: Path) -> None:
    made = parts(network=broken.bert(), target_modules=["query"], task_type="SEQ_CLS")
    expected = output(load(made.write(tmp_path / "straight"), broken.bert()))
    model = load(edited(made.write(tmp_path / "stray"), task_type=None, modules_to_save=None), broken.bert())
    assert torch.equal(output(model), expected)
    assert "'classifier' in the file is not in the config's modules_to_save: loaded as a trained module" in notes_of(
        model
    )


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_that_the_file_does_not_hold(bias: str, tmp_path: Path) -> None:
    made = parts(network=broken.bert(), target_modules=["query"], task_type="SEQ_CLS")
    expected = output(load(made.write(tmp_path / "straight"), broken.bert()))
    model = load(edited(made.write(tmp_path / "stray"), bias=bias), broken.bert())
    assert torch.equal(output(model), expected)
    assert f"bias={bias!r} in the config, and the file holds no bias: they are the base's own" in notes_of(model)


# -- merged-linear LoRA of 2023


class Fused(nn.Module):
    """Query, key and value in one layer, as GPT-NeoX has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(6, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.qkv(x)


@pytest.mark.parametrize("two_groups", [False, True], ids=["a group a part", "two groups"])
@pytest.mark.parametrize("enabled", [[True, False, True], [True, True, True], [False, False, True]], ids=str)
def test_merged_linear_lora(enabled: list[bool], two_groups: bool, tmp_path: Path) -> None:
    """A convolution with one group for each enabled part (Hu et al. 2021, section 4.2, and their code of that time).

    The reference of that time had two groups, however many parts were enabled.
    """
    rank, count = 2, sum(enabled)
    groups = 2 if two_groups else count
    torch.manual_seed(1)
    a, b = torch.randn(count * rank, 6), torch.randn(4 * count, count * rank // groups, 1)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": ["qkv"], "enable_lora": enabled}
    front = f"{PREFIX}qkv"
    Parts({f"{front}.lora_A.weight": a, f"{front}.lora_B.weight": b}, config).write(tmp_path / "a")
    x = torch.randn(5, 6)
    grouped = torch.nn.functional.conv1d(a @ x.T, b, groups=groups).T * 3
    expected = Fused()(x)
    columns = torch.tensor([index for part, on in enumerate(enabled) for index in range(4 * part, 4 * part + 4) if on])
    expected[:, columns] = expected[:, columns] + grouped
    model = load(tmp_path / "a", Fused())
    torch.testing.assert_close(model(x), expected)
    (note,) = notes_of(model)
    assert (
        note == f"merged-linear LoRA of rank 2 on parts {enabled} of each layer: read as plain LoRA of rank {2 * count}"
    )
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(load(tmp_path / "again", Fused())(x), expected)


# -- bases whose modules were renamed since


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, image_size=8, patch_size=4
        )
    ).eval()


def old_vit(name: str) -> str:
    """The name that a tensor of ViT had before transformers 5."""
    name = name.replace("vit.layers.", "vit.encoder.layer.")
    for new, old in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
        name = name.replace(f"attention.{new}", f"attention.attention.{old}")
    name = name.replace("attention.o_proj", "attention.output.dense")
    return name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"), reason="transformers 5 gave its layers other names"
)
@pytest.mark.parametrize(
    ("now", "then"),
    [
        (["q_proj", "v_proj"], ["query", "value"]),
        (["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"], ["query", "key", "value", "dense"]),
        (["q_proj"], r".*attention\.query"),
    ],
    ids=str,
)
def test_vit_under_its_old_names(now: list[str], then: Any, tmp_path: Path) -> None:
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(pixel_values=pixels).logits

    made = parts(network=vit(), target_modules=now, task_type=None, modules_to_save=["classifier"])
    assert all(name == old_vit(name) or "layers" in name for name in made.tensors)
    expected = logits(load(made.write(tmp_path / "straight"), vit()))
    stray = made.renamed(old_vit)
    stray.config["target_modules"] = then
    model = load(stray.write(tmp_path / "stray"), vit())
    assert torch.equal(logits(model), expected)
    assert any("encoder.layer" in note for note in notes_of(model)), notes_of(model)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", vit())), expected)
    if isinstance(then, list):
        with pytest.raises(ValueError, match="modules were targeted|not found"):
            broken.by_reference(tmp_path / "stray", vit())


def llava() -> Any:
    """A vision-language model: its language model is a part of it, and its vision tower has layers of the same names."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=16),
            text_config=LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=40, max_position_embeddings=64),
            image_token_index=39,
        )
    ).eval()
    model.model.language_model.load_state_dict(llama().model.state_dict())
    model.lm_head.load_state_dict(llama().lm_head.state_dict())
    return model


OLD_FRONTS = ("model.layers.", "language_model.model.layers.", "model.language_model.layers.", "language_model.layers.")


@pytest.mark.parametrize("front", OLD_FRONTS)
@pytest.mark.parametrize("base", ["llama", "llava"])
def test_a_language_model_alone_and_inside_another(base: str, front: str, tmp_path: Path) -> None:
    """Both directions: trained on either, of any release, and loaded on either."""
    made = parts()
    expected = straight(made, tmp_path / "straight")
    stray = made.renamed(lambda name: name.replace("model.layers.", front) if front != "model.layers." else name)
    stray = made.renamed(lambda name: PREFIX + name.removeprefix(PREFIX).replace("model.layers.", front, 1))
    folder = stray.write(tmp_path / "stray")
    network = llama() if base == "llama" else llava()
    own = "model.layers." if base == "llama" else "model.language_model.layers."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = splice.PeftModel.from_pretrained(network, folder)
    torch.testing.assert_close(output(model), expected)
    if front != own:
        assert any("layers of the checkpoint begin with" in n or "is '" in n for n in notes_of(model)), notes_of(model)
    said = [str(w.message) for w in caught if issubclass(w.category, splice.PeftWarning)]
    assert all("vision_tower" in text and "left as it is" in text for text in said) and len(said) == (base == "llava")
    adapted = list(splice.get_peft_model_state_dict(model))
    assert len(adapted) == 8 and not any("vision" in name for name in adapted)


class Twins(nn.Module):
    """Two language models that are alike: nothing says which of them an adapter is for."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = llama(), llama()

    def forward(self, **inputs: Any) -> Any:
        return self.left(**inputs)


def test_two_ways_are_named_and_none_is_chosen(tmp_path: Path) -> None:
    network, folder = Twins(), parts(task_type=None).write(tmp_path)
    with unchanged(network), pytest.raises(AdapterMismatchError) as caught:
        splice.PeftModel.from_pretrained(network, folder)
    said = str(caught.value)
    assert "fit 2 modules of this model" in said and "none of them is chosen for you" in said
    for side in ("left", "right"):
        assert f"'{side}.model.layers.0.self_attn.q_proj'" in said
    (proposed,) = re.findall(r"key_mapping, for example (\{.*?\})\.", said)
    model = splice.PeftModel.from_pretrained(network, folder, key_mapping=eval(proposed))
    assert torch.equal(output(model), straight(parts(), tmp_path / "straight"))


def test_layers_that_were_renamed_and_could_be_two_are_not_guessed(tmp_path: Path) -> None:
    """Of the same shape, under other names, both."""

    class Gate(nn.Module):
        def __init__(self, *names: str) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({name: nn.Linear(4, 4) for name in names})])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    front = f"{PREFIX}blocks.0.dense"
    tensors = {f"{front}.lora_A.weight": torch.ones(2, 4), f"{front}.lora_B.weight": torch.ones(4, 2)}
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["dense"]}
    Parts(tensors, config).write(tmp_path)
    with pytest.raises(ValueError, match="fit 2 modules of this model, 'blocks.0.left' and 'blocks.0.right'"):
        load(tmp_path, Gate("left", "right"))
    assert notes_of(load(tmp_path, Gate("only")))[0] == "'blocks.*.dense' is 'blocks.*.only' here"


# -- a vocabulary that was resized


def resized(folder: Path, size: int, **options: Any) -> torch.Tensor:
    """Write an adapter that was trained after a resize, and return its output there."""

    def network() -> Any:
        torch.manual_seed(0)
        model = llama()
        model.resize_token_embeddings(size, mean_resizing=False)
        return model

    return output(load(parts(network=network(), **options).write(folder), network()))


@pytest.mark.parametrize("size", [48, 39])
@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": ["embed_tokens"]}], ids=str
)
def test_a_resized_vocabulary(options: dict[str, Any], size: int, tmp_path: Path) -> None:
    expected = resized(tmp_path / "a", size, **options)
    network = llama()
    with unchanged(network), pytest.raises(AdapterMismatchError) as caught:
        load(tmp_path / "a", network)
    assert (
        f"{size} tokens, here 40). Pass resize_vocabulary=True, or call `model.resize_token_embeddings({size})`"
        in str(caught.value)
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = splice.PeftModel.from_pretrained(llama(), tmp_path / "a", resize_vocabulary=True)
    assert notes_of(model)[0] == f"the base's vocabulary was resized from 40 to {size} tokens"
    found = output(model)
    assert found.shape == expected.shape
    if "modules_to_save" in options:  # the checkpoint holds all that is new
        assert torch.equal(found, expected)
    elif size > 40:  # the rows of a frozen base are in no checkpoint
        assert any("rows 40 to 47 of" in str(w.message) and "are new" in str(w.message) for w in said)


def test_a_vocabulary_that_fits_is_left_alone(tmp_path: Path) -> None:
    model = load(parts(modules_to_save=["lm_head"]).write(tmp_path), resize_vocabulary=True)
    assert model.get_base_model().config.vocab_size == 40 and notes_of(model) == []


def test_a_failed_load_takes_the_resize_back(tmp_path: Path) -> None:
    resized(tmp_path, 48, modules_to_save=["embed_tokens", "lm_head"])
    tensors = splice.load_peft_weights(tmp_path)
    save_file({**tensors, "stray": torch.ones(1)}, tmp_path / SAFETENSORS, metadata={"format": "pt"})
    network = llama()
    with unchanged(network), pytest.raises(AdapterMismatchError, match="stray"):
        load(tmp_path, network, resize_vocabulary=True)


# -- what is no adapter of this format

KOHYA, PIPELINE = "kohya's sd-scripts", "a diffusers pipeline"
LIBRARIES: dict[str, tuple[str, str]] = {
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (KOHYA, "`load_lora_weights` of a diffusers"),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": (KOHYA, "`load_lora_weights`"),
    "unet.down_blocks.0.attentions.0.processor.to_q_lora.down.weight": (PIPELINE, "the pipeline's `load_lora_weights`"),
    "unet.conv_in.lora_A.weight": (PIPELINE, "the pipeline's `load_lora_weights`"),
    "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (PIPELINE, "`load_lora_weights`"),
    "diffusion_model.blocks.0.attn.lora_down.weight": (
        f"{KOHYA} or LyCORIS",
        "fold its `alpha` tensors into the config",
    ),
    "bert.encoder.layer.0.adapters.sst.adapter_down.0.weight": ("the `adapters` library", "of that library"),
    "bert.encoder.layer.0.attention.self.query.loras.sst.lora_A": ("the `adapters` library", "`model.load_adapter`"),
    "layers.2.attention.gate": ("LLaMA-Adapter's own code", "load it with that code"),
    "model.layers.0.self_attn.q_proj.lora_a": ("MLX", "`mlx_lm.fuse`"),
    "decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_in.weight": (
        "NeMo or Megatron",
        "converter",
    ),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_an_adapter_of_another_library(name: str, tmp_path: Path) -> None:
    """It is told by the names of its tensors, and what to load it with is said."""
    library, remedy = LIBRARIES[name]
    network, folder = llama(), Parts({name: torch.ones(2, 2)}, parts().config).write(tmp_path)
    with unchanged(network), pytest.raises((AdapterMismatchError, ValueError)) as caught:
        load(folder, network)
    assert f"he tensors are named as {library}" in str(caught.value)
    assert name in str(caught.value) and remedy in str(caught.value)


CONFIGS: dict[str, tuple[Mapping[str, Any], str]] = {
    "nothing known": ({"a": 1}, "has no 'peft_type': it does not say which kind of adapter this is."),
    "LoRA without saying so": (
        {"r": 8, "lora_alpha": 16, "target_modules": ["q"]},
        'Its fields are those of LoRA: if it is one, add "peft_type": "LORA".',
    ),
    "a description": (
        {"base_model": "x/y", "alpha": 16, "dropout": 0.1},
        "It only describes how an adapter was trained",
    ),
    "MLX": ({"lora_parameters": {"rank": 8}, "fine_tune_type": "lora"}, "It is a config of MLX"),
    "AdapterHub": (
        {"config": {"reduction_factor": 16}, "model_type": "bert"},
        "It is a config of the `adapters` library",
    ),
    "LLaMA-Adapter": ({"adapter_len": 10, "adapter_layer": 30}, "It is a config of LLaMA-Adapter's own code"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_of_something_else(what: str, tmp_path: Path) -> None:
    fields, sentence = CONFIGS[what]
    folder = Parts(parts().tensors, dict(fields)).write(tmp_path)
    network = llama()
    with unchanged(network), pytest.raises(CheckpointError, match=re.escape(sentence)):
        load(folder, network)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n"


@pytest.mark.parametrize("name", [CONFIG, SAFETENSORS, BIN])
def test_a_git_lfs_pointer(name: str, tmp_path: Path) -> None:
    folder = parts().write(tmp_path, as_bin=name == BIN)
    (folder / name).write_bytes(POINTER)
    network = llama()
    with unchanged(network), pytest.raises(CheckpointError) as caught:
        load(folder, network)
    assert f"{name} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`" in str(caught.value)


def test_a_folder_with_several_checkpoints(tmp_path: Path) -> None:
    for step in (10, 20):
        parts().write(tmp_path / f"checkpoint-{step}")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert "There are checkpoints in its subfolders: checkpoint-10, checkpoint-20; pass one as `subfolder`." in str(
        caught.value
    )
    load(tmp_path, subfolder="checkpoint-20")


def test_several_adapters_in_one_file(tmp_path: Path) -> None:
    made = parts()
    tensors = {
        name.replace(".weight", f".{adapter}.weight"): tensor.clone()
        for name, tensor in made.tensors.items()
        for adapter in ("style", "subject")
    }
    with pytest.raises(AdapterMismatchError) as caught:
        load(Parts(tensors, made.config).write(tmp_path))
    assert "the names hold the adapter names 'style', 'subject': these are several adapters in one file." in str(
        caught.value
    )


def test_files_beside_the_checkpoint_are_nobodys_business(tmp_path: Path) -> None:
    """What trainers leave there."""
    folder = parts().write(tmp_path / "a")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "tokenizer.json", "trainer_state.json", "README.md"):
        (folder / name).write_bytes(b"\0")
    parts(seed=1).write(folder / "checkpoint-5")
    assert torch.equal(output(load(folder)), straight(parts(), tmp_path / "b"))


@pytest.mark.parametrize("name", ["prompt_encoder.embedding.weight", "prompt_encoder.default.embedding.weight"])
def test_prefix_tuning_of_long_ago(name: str, tmp_path: Path) -> None:
    import peft

    config = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(llama(), peft.PrefixTuningConfig(**config))
        model.save_pretrained(str(tmp_path / "straight"))
    expected = output(load(tmp_path / "straight"))
    (tensor,) = splice.load_peft_weights(tmp_path / "straight").values()
    fields = json.loads((tmp_path / "straight" / CONFIG).read_text())
    stray = load(Parts({name: tensor}, fields).write(tmp_path / "stray"))
    assert torch.equal(output(stray), expected)
    assert any(f"{name!r} is read as 'prompt_embeddings'" in note for note in notes_of(stray))
