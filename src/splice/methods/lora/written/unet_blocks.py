"""The blocks of a UNet as Stability's own code numbers them, which sd-scripts keeps for SDXL: `input_blocks_4_1_...`.

Flattened names go in and come out: dots and underscores do not matter to it.
"""

from __future__ import annotations

import re
from collections.abc import Collection

# Residual layers of a block; one more of each way up. It is the same in every Stable Diffusion.
_LAYERS = 2
_OUTSIDE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}
_IN_RESNETS = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_MIDDLE = {"0": "resnets_0", "1": "attentions_0", "2": "resnets_1"}
_NUMBERED = re.compile(r"(input|output)_blocks_(\d+)_(\d+)_(.+)")
# What SDXL alone has of the Stable Diffusions: more than one transformer block in a row.
_IS_SDXL = re.compile(r"_transformer_blocks_[1-9]")


def is_numbered(names: Collection[str]) -> bool:
    """Whether flattened names of a UNet are Stability's."""
    return any(re.match(r"(input_blocks|middle_block|output_blocks|time_embed_\d|label_emb)_?", name) for name in names)


def is_numbered_there(names: Collection[str]) -> bool:
    """Whether sd-scripts numbers the blocks of the UNet that has layers of these flattened names."""
    return any(_IS_SDXL.search(name) for name in names)


def from_numbered(name: str) -> str:
    """A flattened name as diffusers has it; `name` itself where nothing is known about it."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    middle = re.fullmatch(r"middle_block_([012])_(.+)", name)
    if middle:
        return f"mid_block_{_MIDDLE[middle[1]]}_{_IN_RESNETS.get(middle[2], middle[2])}"
    found = _NUMBERED.fullmatch(name)
    if not found:
        return name
    way, number, inner, rest = found[1], int(found[2]), found[3], found[4]
    block, layer = divmod(number - 1 if way == "input" else number, _LAYERS + 1)
    front = f"{'down' if way == 'input' else 'up'}_blocks_{block}"
    if rest == "op":
        return f"{front}_downsamplers_0_conv"
    if rest == "conv":
        return f"{front}_upsamplers_0_conv"
    return f"{front}_{'attentions' if inner == '1' else 'resnets'}_{layer}_{_IN_RESNETS.get(rest, rest)}"


def to_numbered(name: str) -> str:
    """A flattened name of diffusers, of a UNet of SDXL, as Stability's code has it."""
    outside = {new: old for old, new in _OUTSIDE.items()}
    resnets = {new: old for old, new in _IN_RESNETS.items()}
    if name in outside:
        return outside[name]
    found = re.fullmatch(r"mid_block_(resnets|attentions)_(\d)_(.+)", name)
    if found:
        place = {new: old for old, new in _MIDDLE.items()}[f"{found[1]}_{found[2]}"]
        return f"middle_block_{place}_{resnets.get(found[3], found[3])}"
    found = re.fullmatch(r"(down|up)_blocks_(\d)_(resnets|attentions|downsamplers|upsamplers)_(\d)_(.+)", name)
    if not found:
        return name
    way, block, kind, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
    front, first = ("input_blocks", 1) if way == "down" else ("output_blocks", 0)
    number = block * (_LAYERS + 1) + first
    if kind == "downsamplers":
        return f"{front}_{number + _LAYERS}_0_op"
    if kind == "upsamplers":
        return f"{front}_{number + _LAYERS}_2_conv"  # behind an attention, which these blocks have
    return f"{front}_{number + layer}_{1 if kind == 'attentions' else 0}_{resnets.get(rest, rest)}"
