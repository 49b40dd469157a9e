"""Adapters in the files of other programs: a pipeline of diffusers makes the same of each, and so does the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn

from splice import LoraConfig, PeftModel, get_peft_model, translate_files
from tests.ecosystem.both import reference
from tests.ecosystem.tiny_diffusers import draw, flux, image, old_file, stable_diffusion, text_encoder

UNET = ["to_q", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.0.proj", "time_emb_proj", "conv_in", "conv_shortcut"]
TEXT = ["q_proj", "out_proj", "fc1"]
# Scales of their own for some layers, and the square root of the rank.
SCALES: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 3,
    "use_rslora": True,
    "rank_pattern": {"conv1": 2},
    "alpha_pattern": {"proj": 5},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters for both networks of a pipeline, and the same in every form."""
    place = tmp_path_factory.mktemp("dialects")
    pipe = stable_diffusion()
    adapted(pipe.unet, UNET, place / "parts" / "unet", **SCALES)
    adapted(pipe.text_encoder, TEXT, place / "parts" / "text_encoder", r=2, lora_alpha=3)
    pipe.unet.save_pretrained(place / "pipe" / "unet")
    pipe.text_encoder.save_pretrained(place / "pipe" / "text_encoder")
    (place / "pipe" / "model_index.json").write_text("{}")
    translate_files(place / "parts", place / "kohya.safetensors", "kohya")
    translate_files(place / "parts", place / "diffusers.safetensors", "diffusers")
    translate_files(place / "kohya.safetensors", place / "diffusers of kohya.safetensors", "diffusers")
    for name in ("kohya", "diffusers"):
        translate_files(place / f"{name}.safetensors", place / f"{name} again", base=place / "pipe")
    only = {"component": "unet", "base": place / "pipe" / "unet"}
    translate_files(place / "kohya.safetensors", place / "unet alone", **only)
    return place


def adapted(network: nn.Module, targets: list[str], place: Path, **options: Any) -> None:
    """Save an adapter of values that follow from their names."""
    model = get_peft_model(network, LoraConfig(target_modules=targets, **options))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = draw(*parameter.shape, key=name)
    model.save_pretrained(place)
    model.unload()


def files_loaded(place: str, names: list[str]) -> dict[str, torch.Tensor]:
    """What pipelines make after `load_lora_weights`."""
    found = {}
    for name in names:
        pipe = stable_diffusion()
        pipe.load_lora_weights(place, weight_name=f"{name}.safetensors")
        found[name] = image(pipe)
    return found


def folders_loaded(place: str, names: list[str]) -> dict[str, torch.Tensor]:
    """What pipelines make whose networks carry the adapters of folders, by whatever `peft` is."""
    from peft import PeftModel as Loaded

    found = {}
    for name in names:
        pipe = stable_diffusion()
        for component in ("unet", "text_encoder"):
            Loaded.from_pretrained(getattr(pipe, component), str(Path(place, name, component)))
        found[name] = image(pipe)
    return found


def everything(place: str) -> dict[str, torch.Tensor]:
    files = files_loaded(place, ["kohya", "diffusers", "diffusers of kohya"])
    return files | folders_loaded(place, ["parts", "kohya again", "diffusers again"])


@pytest.mark.shows("diffusers", "`load_lora_weights` of what `splice convert` writes, in its own form and in kohya's")
def test_a_pipeline_makes_the_same_of_every_form(folder: Path) -> None:
    ours = everything(str(folder))
    for name, made in (
        ours | {f"{k}, the reference": v for k, v in reference(everything, str(folder)).items()}
    ).items():
        assert torch.allclose(made, ours["parts"], atol=1e-5), name
    assert not torch.allclose(image(stable_diffusion()), ours["parts"], atol=1e-2)


def test_bytes_and_names(folder: Path) -> None:
    """Tensors are those of the adapter to the last bit; alpha is what kohya divides by the rank."""
    kohya = safetensors.torch.load_file(folder / "kohya.safetensors")
    own = safetensors.torch.load_file(folder / "parts" / "unet" / "adapter_model.safetensors")
    front, path = "lora_unet_mid_block_resnets_0_conv1", "base_model.model.mid_block.resnets.0.conv1"
    assert torch.equal(kohya[f"{front}.lora_down.weight"], own[f"{path}.lora_A.weight"])
    assert torch.equal(kohya[f"{front}.lora_up.weight"], own[f"{path}.lora_B.weight"])
    assert kohya[f"{front}.alpha"].item() == pytest.approx(3 * 2**0.5)
    assert "lora_te_text_model_encoder_layers_1_mlp_fc1.alpha" in kohya
    again = safetensors.torch.load_file(folder / "diffusers again" / "unet" / "adapter_model.safetensors")
    assert again.keys() == own.keys() and all(torch.equal(again[key], own[key]) for key in own)
    alone = safetensors.torch.load_file(folder / "unet alone" / "adapter_model.safetensors")
    assert alone.keys() == own.keys()


def test_files_from_before_peft(tmp_path: Path) -> None:
    pipe = stable_diffusion()
    tensors = old_file(pipe.unet, "unet", ("to_q", "to_k", "to_out.0"), 4, "a")
    tensors |= old_file(pipe.text_encoder, "text_encoder", ("q_proj", "out_proj"), 2, "b")
    safetensors.torch.save_file(tensors, tmp_path / "old.safetensors")
    translate_files(tmp_path / "old.safetensors", tmp_path / "parts")
    pipe.load_lora_weights(str(tmp_path), weight_name="old.safetensors")
    assert torch.allclose(folders_loaded(str(tmp_path), ["parts"])["parts"], image(pipe), atol=1e-5)


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=2,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 2),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=40,
        use_linear_projection=True,
    )
    parts = {"vae": None, "tokenizer": None, "tokenizer_2": None, "scheduler": None}
    return StableDiffusionXLPipeline(
        text_encoder=text_encoder(), text_encoder_2=text_encoder(projects=True), unet=unet.eval(), **parts
    )


def outputs(pipe: StableDiffusionXLPipeline) -> list[torch.Tensor]:
    more = {"text_embeds": draw(1, 16, key="pooled"), "time_ids": draw(1, 6, key="sizes")}
    with torch.no_grad():
        noise = pipe.unet(draw(1, 4, 8, 8, key="x"), 5, draw(1, 8, 16, key="t"), added_cond_kwargs=more).sample
        ids = torch.arange(8)[None] + 3
        return [noise, pipe.text_encoder(ids)[0], pipe.text_encoder_2(ids)[0]]


@pytest.mark.shows("diffusers", "`load_lora_weights` of what `splice convert` writes, in its own form and in kohya's")
def test_blocks_and_encoders_of_sdxl(tmp_path: Path) -> None:
    """sd-scripts numbers its blocks as Stability's code does, and calls its encoders `te1` and `te2`."""
    pipe = stable_diffusion_xl()
    blocks = [*UNET, "conv2", "downsamplers.0.conv", "upsamplers.0.conv"]
    adapted(pipe.unet, blocks, tmp_path / "parts" / "unet", **SCALES)
    adapted(pipe.text_encoder, TEXT, tmp_path / "parts" / "text_encoder", r=2, lora_alpha=3)
    adapted(pipe.text_encoder_2, TEXT, tmp_path / "parts" / "text_encoder_2", r=3, lora_alpha=5)
    translate_files(tmp_path / "parts", tmp_path / "kohya.safetensors", "kohya")
    names = safetensors.torch.load_file(tmp_path / "kohya.safetensors")
    for name in (
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q",
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_output_blocks_2_2_conv",
        "lora_unet_middle_block_0_in_layers_2",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
    ):
        assert f"{name}.lora_up.weight" in names
    translate_files(tmp_path / "kohya.safetensors", tmp_path / "again")
    found = {}
    for folder in ("parts", "again"):
        pipe = stable_diffusion_xl()
        for component in ("unet", "text_encoder", "text_encoder_2"):
            PeftModel.from_pretrained(getattr(pipe, component), tmp_path / folder / component)
        found[folder] = outputs(pipe)
    pipe = stable_diffusion_xl()
    pipe.load_lora_weights(str(tmp_path), weight_name="kohya.safetensors")
    found["diffusers"] = outputs(pipe)
    for name, made in found.items():
        for mine, exact, base in zip(made, found["parts"], outputs(stable_diffusion_xl()), strict=True):
            assert torch.allclose(mine, exact, atol=1e-4) and not torch.allclose(base, exact, atol=1e-2), name


@pytest.mark.shows("diffusers", "`load_lora_weights` of what `splice convert` writes, in its own form and in kohya's")
def test_a_transformer(tmp_path: Path) -> None:
    """Of one network alone: its component is told by its layers."""
    pipe = flux()
    adapted(pipe.transformer, ["to_q", "to_out.0", "ff.net.2"], tmp_path / "own", r=4, lora_alpha=6)
    PeftModel.from_pretrained(pipe.transformer, tmp_path / "own")
    exact = image(pipe)
    translate_files(tmp_path / "own", tmp_path / "file", "diffusers")
    pipe = flux()
    pipe.load_lora_weights(str(tmp_path / "file"))
    assert torch.allclose(image(pipe), exact, atol=1e-5) and not torch.allclose(image(flux()), exact, atol=1e-2)
