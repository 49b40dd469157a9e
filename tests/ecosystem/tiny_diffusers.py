"""Pipelines of diffusers as small as they can be, and LoRA files for them in the spellings that people publish."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.ecosystem.both import seed_of

Tensors = dict[str, torch.Tensor]


def text_encoder(projects: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=16,
    )
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config).eval()


def stable_diffusion() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    pipe = StableDiffusionPipeline(
        vae, text_encoder(), None, unet.eval(), DDIMScheduler(), None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux() -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, transformer.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion_3() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
    )
    pipe = StableDiffusion3Pipeline(
        transformer.eval(), FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, None, None
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(*shape: int, key: object, scale: float = 0.7) -> torch.Tensor:
    """Values that follow from `key` alone: the same in every process."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed_of(key))) * scale


@torch.no_grad()
def image(pipe: Any, steps: int = 1, **options: Any) -> torch.Tensor:
    """What the pipeline makes of a prompt, as latents: the text passes through its own encoder, where it has one."""
    ids = torch.arange(8)[None] + 3
    noise = torch.Generator().manual_seed(1)
    more: dict[str, Any] = {"prompt_embeds": draw(1, 8, 16, key="prompt", scale=1.0)}
    if isinstance(pipe, StableDiffusionPipeline):
        more = {"prompt_embeds": pipe.text_encoder(ids)[0]}
    elif isinstance(pipe, FluxPipeline):
        more |= {"pooled_prompt_embeds": draw(1, 16, key="pooled", scale=1.0)}
        more |= {"latents": draw(1, 16, 4, key="latents", scale=1.0), "height": 64, "width": 64}
    else:
        more |= {"pooled_prompt_embeds": draw(1, 16, key="pooled", scale=1.0)}
        more |= {"latents": draw(1, 4, 8, 8, key="latents", scale=1.0), "height": 64, "width": 64}
    return pipe(
        num_inference_steps=steps, guidance_scale=1.0, output_type="latent", generator=noise, **more, **options
    ).images


def pairs(
    network: nn.Module, ends: Iterable[str], rank: int, key: object
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Path -> (A, B) for all linear layers and convolutions whose paths end so."""
    found = {}
    for path, module in network.named_modules():
        if not path.endswith(tuple(ends)):
            continue
        if isinstance(module, nn.Linear):
            shapes = (rank, module.in_features), (module.out_features, rank)
        elif isinstance(module, nn.Conv2d):
            shapes = (rank, module.in_channels, *module.kernel_size), (module.out_channels, rank, 1, 1)
        else:
            continue
        found[path] = draw(*shapes[0], key=(key, path, "A")), draw(*shapes[1], key=(key, path, "B"))
    return found


def peft_file(
    network: nn.Module,
    component: str,
    ends: Iterable[str],
    rank: int,
    key: object,
    bias: bool = False,
    magnitude: bool = False,
) -> Tensors:
    """As diffusers itself writes it today; with biases of B, or with DoRA's magnitudes."""
    tensors = {}
    for path, (a, b) in pairs(network, ends, rank, key).items():
        name = f"{component}.{path}"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
        if bias:
            tensors[f"{name}.lora_B.bias"] = draw(b.shape[0], key=(key, path, "bias"))
        if magnitude:
            shape = (b.shape[0],) if b.dim() == 2 else (1, b.shape[0], 1, 1)
            tensors[f"{name}.lora_magnitude_vector"] = 1 + draw(*shape, key=(key, path, "m"), scale=0.1)
    return tensors


def old_file(network: nn.Module, component: str, ends: Iterable[str], rank: int, key: object) -> Tensors:
    """As diffusers wrote it when attention processors held the matrices."""
    # Projections of transformers had these names there too.
    names = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out", "to_out.0": "to_out"}
    tensors = {}
    for path, (a, b) in pairs(network, ends, rank, key).items():
        last = next((end for end in names if path.endswith(end)), path.rpartition(".")[2])
        above = path.removesuffix(last).rstrip(".")
        processor = ".processor" if component == "unet" else ""
        name = f"{component}.{above}{processor}.{names.get(last, last)}_lora"
        tensors[f"{name}.down.weight"], tensors[f"{name}.up.weight"] = a, b
    return tensors


def kohya_file(
    network: nn.Module, component: str, ends: Iterable[str], rank: int, alpha: float, key: object
) -> Tensors:
    """As sd-scripts writes it: names without dots, and an alpha for each layer."""
    tensors = {}
    for path, (a, b) in pairs(network, ends, rank, key).items():
        name = f"{component}_{path.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = a, b
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors
