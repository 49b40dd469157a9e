"""LoKr files for diffusers' Flux 2 and Z-Image, in each spelling that it reads: every figure is the reference's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn

from tests.ecosystem.comparing import same
from tests.ecosystem.tiny_diffusers import Tensors, draw, peft_file

# How wide the left factors are, and the rank of right ones that are products.
FACTOR, RANK = 4, 2


def flux2() -> Any:
    torch.manual_seed(0)
    network = Flux2Transformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    return Flux2Pipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, network.eval())


def z_image() -> Any:
    torch.manual_seed(0)
    network = ZImageTransformer2DModel(
        in_channels=4, dim=48, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 8, 8], axes_lens=[64, 16, 16],
    )  # fmt: skip
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, network.eval())


@torch.no_grad()
def output(pipe: Any) -> torch.Tensor:
    """What one step of the network gives."""
    if isinstance(pipe, ZImagePipeline):
        image, text = draw(4, 1, 4, 4, key="image", scale=1.0), draw(8, 16, key="text", scale=1.0)
        return pipe.transformer([image], torch.tensor([0.5]), [text], return_dict=False)[0][0]
    places = torch.zeros(1, 16, 4)
    places[0, :, 1], places[0, :, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return pipe.transformer(
        hidden_states=draw(1, 16, 4, key="image", scale=1.0),
        encoder_hidden_states=draw(1, 8, 16, key="text", scale=1.0),
        timestep=torch.tensor([0.5]), img_ids=places, txt_ids=torch.zeros(1, 8, 4), guidance=torch.tensor([1.0]),
        return_dict=False,
    )[0]  # fmt: skip


def factors(network: nn.Module, ends: Iterable[str], key: object, whole: bool = False) -> dict[str, Tensors]:
    """Path -> the factors of LoKr, for all linear layers whose paths end so; the right one whole, or as a product."""
    found = {}
    for path, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and path.endswith(tuple(ends)):
            rows, columns = layer.out_features // FACTOR, layer.in_features // FACTOR
            tensors = {"lokr_w1": draw(FACTOR, FACTOR, key=(key, path, 1), scale=0.5)}
            if whole:
                tensors["lokr_w2"] = draw(rows, columns, key=(key, path, 2), scale=0.1)
            else:
                tensors["lokr_w2_a"] = draw(rows, RANK, key=(key, path, 3), scale=0.3)
                tensors["lokr_w2_b"] = draw(RANK, columns, key=(key, path, 4), scale=0.3)
            found[path] = tensors
    return found


def named(
    layers: dict[str, Tensors], front: str, name: Callable[[str], str] = str, alpha: float | None = None
) -> Tensors:
    tensors = {f"{front}{name(path)}.{end}": t for path, found in layers.items() for end, t in found.items()}
    if alpha is not None:
        tensors |= {f"{front}{name(path)}.alpha": torch.tensor(alpha) for path in layers}
    return tensors


# The names of the layers of Flux 2 in the files of its authors.
ORIGINAL = {
    "transformer_blocks.0.attn.to_qkv": "double_blocks.0.img_attn.qkv",
    "transformer_blocks.0.attn.to_added_qkv": "double_blocks.0.txt_attn.qkv",
    "transformer_blocks.0.attn.to_out.0": "double_blocks.0.img_attn.proj",
    "transformer_blocks.0.ff.linear_in": "double_blocks.0.img_mlp.0",
    "single_transformer_blocks.0.attn.to_out": "single_blocks.0.linear2",
}
BLOCK = ("attn.to_q", "attn.to_k", "attn.add_v_proj", "to_out.0", "ff.linear_in", "to_qkv_mlp_proj")


def original(pipe: Any) -> Tensors:
    """Of layers that diffusers makes only when it reads such a file: three projections as one."""
    twin = flux2().transformer
    twin.fuse_qkv_projections()
    return named(factors(twin, ORIGINAL, "original"), "diffusion_model.", lambda path: ORIGINAL[path], 3.0)


FILES: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensors]]] = {
    "Flux 2, diffusers": (flux2, lambda pipe: named(factors(pipe.transformer, BLOCK, "a"), "transformer.")),
    "Flux 2, whole factors": (flux2, lambda pipe: named(factors(pipe.transformer, BLOCK, "b", True), "transformer.")),
    "Flux 2, LyCORIS": (
        flux2,
        lambda pipe: named(
            factors(pipe.transformer, BLOCK, "c"), "lycoris_", lambda path: path.replace(".", "_"), alpha=3.0
        ),
    ),
    "Flux 2, SimpleTuner": (flux2, lambda pipe: named(factors(pipe.transformer, BLOCK, "d"), "", alpha=5.0)),
    "Flux 2, its authors": (flux2, original),
    "Z-Image, ai-toolkit": (
        z_image,
        lambda pipe: named(factors(pipe.transformer, ("to_q", "to_v", "w2"), "e"), "diffusion_model.", alpha=3.0),
    ),
    "Z-Image, diffusers": (
        z_image,
        lambda pipe: named(factors(pipe.transformer, ("to_k", "w1"), "f", True), "transformer."),
    ),
}


def all_of_it(folder: str) -> dict[str, dict[str, Any]]:
    """Each file: loaded, weighed, beside another, in the weights and out again, switched off, taken off."""
    return {name: one_file(build(), make) for name, (build, make) in FILES.items()}


def one_file(pipe: Any, make: Callable[[Any], Tensors]) -> dict[str, Any]:
    out = {"base": output(pipe)}
    # Of the layers as they are before an adapter comes: the reference puts others in their places.
    other = named(factors(pipe.transformer, ("to_out.0", "attn.to_out"), "other"), "transformer.")
    lora = peft_file(
        pipe.transformer, "transformer", ("ff_context.linear_out", "norm_out.linear", "feed_forward.w3"), 4, "lora"
    )
    pipe.load_lora_weights(make(pipe), adapter_name="kr")
    out["loaded"], out["there are"] = output(pipe), pipe.get_list_adapters()
    pipe.load_lora_weights(other, "other")
    out["other"] = output(pipe)
    pipe.set_adapters(["kr", "other"], [0.5, 0.7])
    out["both"] = output(pipe)
    pipe.set_adapters("kr")
    pipe.disable_lora()
    out["disabled"] = output(pipe)
    pipe.enable_lora()
    pipe.fuse_lora(components=["transformer"], lora_scale=0.5)
    out["fused"] = output(pipe)
    pipe.unfuse_lora(components=["transformer"])
    out["unfused"] = output(pipe)
    pipe.load_lora_weights(lora, "lora")
    out["lora"] = output(pipe)
    pipe.set_adapters(["kr", "lora"], [0.5, 0.7])
    out["both methods"], out["all there are"] = output(pipe), pipe.get_list_adapters()
    pipe.delete_adapters("lora")
    pipe.delete_adapters("other")
    out["without the other"], out["then there are"] = output(pipe), pipe.get_list_adapters()
    pipe.unload_lora_weights()
    out["unloaded"] = output(pipe)
    return out


@pytest.mark.shows("diffusers", "LoKr files for Flux 2 and Z-Image, in each spelling: each figure is the reference's")
@pytest.mark.parametrize("name", FILES)
def test_every_figure_is_the_references(name: str, here: dict[str, Any], there: dict[str, Any]) -> None:
    found, expected = here[name], {**there[name]}
    # The reference leaves adapters of the other method on when one comes: see docs/differences.md.
    expected["lora"] = found["lora"]
    same(found, expected)
    for one, two in (
        ("base", "loaded"),
        ("loaded", "both"),
        ("loaded", "other"),
        ("base", "fused"),
        ("loaded", "both methods"),
    ):
        assert (found[one] - found[two]).abs().max() > 1e-4, (one, two)
