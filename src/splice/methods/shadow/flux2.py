"""The shadow network of Flux2, a transformer for diffusion: a smaller one, of whose blocks the single-stream ones are used.

A new one is cut out of the base: some of its blocks, and of each tensor the first features of every part that it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn

from splice.base.bare import original_class
from splice.base.foreign_models import diffusion_config
from splice.errors import UnsupportedLayerError
from splice.kinds.original import original_tensor, original_weight
from splice.methods.shadow.config import ShadowConfig

_CLASS = "Flux2Transformer2DModel"
# What stands before the blocks; a mirror as wide as the base uses the base's, and nothing reads those of a shadow network.
STEMS = ("x_embedder", "context_embedder", "time_guidance_embed", "pos_embed")
# What a trained shadow network must have in common with the base, and what it may have less of.
_ALIKE = (
    "patch_size",
    "in_channels",
    "out_channels",
    "attention_head_dim",
    "joint_attention_dim",
    "timestep_guidance_channels",
    "axes_dims_rope",
    "guidance_embeds",
)
_AT_MOST = ("num_attention_heads", "num_layers", "num_single_layers")
# End of a name -> the dimension along which such a tensor consists of parts, how many of the width of the network, and how
# many behind them of that of its feed-forward layers. All others are one part.
_PARTS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "double_stream_modulation_img.linear.weight": (0, 6, 0),
        "double_stream_modulation_txt.linear.weight": (0, 6, 0),
        "single_stream_modulation.linear.weight": (0, 3, 0),
        "norm_out.linear.weight": (0, 2, 0),
        "attn.to_qkv_mlp_proj.weight": (0, 3, 2),
        "attn.to_out.weight": (1, 1, 1),
    }
)


class Flux2Shadow(nn.Module):
    """What the single-stream blocks of a small Flux2 make of the input of the base's first one.

    Args:
        model: the small one.
        width: of its hidden states.
    """

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.model, self.width = model, width

    def forward(self, inputs_embeds: torch.Tensor, call: Mapping[str, Any]) -> tuple[torch.Tensor]:
        """(batch, T, width) of the hidden states (batch, T, d), with the other arguments of the block they are given to."""
        modulation, more = call.get("temb_mod"), call.get("joint_attention_kwargs")
        if modulation is None:
            raise ValueError(
                "the shadow network of Flux2 goes by what its single-stream blocks are called with: adapt these "
                "(`single_transformer_blocks`) alone."
            )
        if more and "kv_cache_mode" in more:
            raise ValueError("the shadow network of Flux2 keeps no keys and values: leave out `kv_cache_mode`.")
        parts = [part[..., : self.width] for part in modulation.chunk(3, -1)]
        given = {"encoder_hidden_states": None, "image_rotary_emb": call.get("image_rotary_emb")}
        x = inputs_embeds[..., : self.width]
        for block in cast(nn.ModuleList, self.model.get_submodule("single_transformer_blocks")):
            x = block(hidden_states=x, temb_mod=torch.cat(parts, -1), joint_attention_kwargs=more, **given)
        return (x,)


def is_flux2(network: nn.Module) -> bool:
    """Whether `network` is a Flux2."""
    return any(cls.__name__ == _CLASS for cls in original_class(network).__mro__)


def mirror_of_flux2(network: nn.Module, config: ShadowConfig, with_values: bool) -> Flux2Shadow:
    """A smaller one of the sizes that `config` asks for.

    Raises:
        UnsupportedLayerError: (a ValueError) it would be larger than `network`, or have other attention heads.
    """
    own = _fields_of(network)
    head = own["attention_head_dim"]
    heads = (
        config.shadow_num_attention_heads or (config.shadow_hidden_size or own["num_attention_heads"] * head) // head
    )
    width, inner = config.shadow_hidden_size or heads * head, config.shadow_intermediate_size or _inner_of(own)
    count = config.shadow_num_hidden_layers or 1
    if width != heads * head:
        raise UnsupportedLayerError(
            f"a mirror of Flux2 has attention heads of the base's size, {head}: its width must be as many as it has heads, "
            f"and `shadow_hidden_size` is {width}, of {heads} heads."
        )
    sizes = {**own, "num_attention_heads": heads, "mlp_ratio": inner / width}
    sizes |= {"num_layers": count, "num_single_layers": 2 * count}
    _check_smaller(sizes, own, "a mirror of Flux2")
    make = cast("Callable[..., nn.Module]", original_class(network))
    model = make(**sizes)
    if with_values:
        _cut_out(model, network, (width, own["num_attention_heads"] * head), (inner, _inner_of(own)))
    if config.share_embeddings and width == own["num_attention_heads"] * head:
        model._modules.update(dict.fromkeys(STEMS))
    return Flux2Shadow(model, width)


def trained_flux2(network: nn.Module, location: str, with_values: bool) -> Flux2Shadow:
    """A trained one, from a folder or the Hub.

    Raises:
        OSError: it is not there.
        UnsupportedLayerError: (a ValueError) it is larger than `network`, or does not fit it.
    """
    cls = cast(Any, original_class(network))
    found = {name: value for name, value in cls.load_config(location).items() if not name.startswith("_")}
    own = _fields_of(network)
    fields = {name: found.get(name, own[name]) for name in own}
    for name in _ALIKE:
        if _plain(fields[name]) != _plain(own[name]):
            raise UnsupportedLayerError(
                f"`shadow_model` {location!r}: its `{name}` is {fields[name]}, and that of the base {own[name]}."
            )
    _check_smaller(fields, own, f"`shadow_model` {location!r}")
    model: nn.Module = cls.from_pretrained(location) if with_values else cls(**fields)
    return Flux2Shadow(model, fields["num_attention_heads"] * fields["attention_head_dim"])


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _fields_of(network: nn.Module) -> dict[str, Any]:
    config = cast("Mapping[str, Any]", diffusion_config(network))
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _inner_of(fields: Mapping[str, Any]) -> int:
    return int(fields["num_attention_heads"] * fields["attention_head_dim"] * fields["mlp_ratio"])


def _check_smaller(fields: Mapping[str, Any], own: Mapping[str, Any], what: str) -> None:
    found = {
        **{name: (fields[name], own[name]) for name in _AT_MOST},
        "intermediate size": (_inner_of(fields), _inner_of(own)),
    }
    for name, (size, most) in found.items():
        if not 1 <= size <= most:
            raise UnsupportedLayerError(f"{what}: its {name} is {size}, and has to be 1 to {most}, which the base has.")


@torch.no_grad()
def _cut_out(model: nn.Module, network: nn.Module, widths: tuple[int, int], inners: tuple[int, int]) -> None:
    """Fill `model` with parts of the tensors of `network`; widths and inner widths are (own, that of `network`)."""
    for path, module in model.named_modules():
        source = network.get_submodule(_source_of(path, model, network))
        for leaf, tensor in module._parameters.items():
            if tensor is None:
                continue
            whole = original_weight(source) if isinstance(source, nn.Linear) else original_tensor(source, leaf)
            assert whole is not None
            end = next((end for end in _PARTS if f"{path}.{leaf}".endswith(end)), "")
            tensor.copy_(_cropped(whole, tensor.shape, _PARTS.get(end), widths, inners))


def _source_of(path: str, model: nn.Module, network: nn.Module) -> str:
    """The path in the base of what stands at `path`: its blocks are taken evenly, the last one where there is one."""
    parts = path.split(".")
    if len(parts) < 2 or not parts[1].isdigit():
        return path
    count, own = (len(cast(nn.ModuleList, of.get_submodule(parts[0]))) for of in (model, network))
    index = own - 1 if count == 1 else round(int(parts[1]) * (own - 1) / (count - 1))
    return ".".join([parts[0], str(index), *parts[2:]])


def _cropped(
    whole: torch.Tensor,
    shape: Sequence[int],
    parts: tuple[int, int, int] | None,
    widths: tuple[int, int],
    inners: tuple[int, int],
) -> torch.Tensor:
    """The first rows and columns of `whole`, of each part where it consists of several."""
    if parts is not None:
        dimension, of_width, of_inner = parts
        sizes = [widths] * of_width + [inners] * of_inner
        split = torch.split(whole, [size for _, size in sizes], dimension)
        whole = torch.cat([part.narrow(dimension, 0, own) for part, (own, _) in zip(split, sizes)], dimension)
    for dimension, size in enumerate(shape):
        whole = whole.narrow(dimension, 0, size)
    return whole
