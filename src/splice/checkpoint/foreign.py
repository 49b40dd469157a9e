"""Files that are no adapters of this format: what they are, told by how their fields and tensors are named."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

LFS_START = b"version https://git-lfs"


def lfs_pointer(place: str) -> str:
    """The sentence for a three-line text file that stands where a large file was not fetched."""
    return f"{place} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"


# Another library's tensors, by a pattern that no name of this format has, and what to do with them.
_FOREIGN: tuple[tuple[str, str, str], ...] = (
    (
        r"^lora_(unet|te\d?|prior|transformer)_",
        "kohya's sd-scripts (also A1111 and ComfyUI)",
        "load it with the `load_lora_weights` of a diffusers pipeline",
    ),
    (
        r"(\.processor\..*_lora\.(down|up)\.weight$)|(\.lora\.(down|up)\.weight$)"
        # Of networks that stand alone, some have a `transformer` at their head as well, but none of these blocks in it.
        r"|(^(unet|text_encoder(_\d)?)\.)|(^transformer\.(single_)?transformer_blocks\.)",
        "a diffusers pipeline",
        "load it with the pipeline's `load_lora_weights`",
    ),
    (
        r"\.lora_(down|up)\.weight$",
        "kohya's sd-scripts or LyCORIS (also A1111 and ComfyUI)",
        "convert its names to `lora_A.weight` and `lora_B.weight` first, and fold its `alpha` tensors into the config",
    ),
    (
        r"(\.adapters?\.[^.]+\.adapter_(down|up)\b)|(\.loras\.[^.]+\.lora_[AB]$)|(\.prefix_tunings?\.)",
        "the `adapters` library (adapter-transformers, AdapterHub)",
        "load it with `model.load_adapter` of that library",
    ),
    (
        r"(^|\.)adapter_query\.weight$|^layers\.\d+\.attention\.gate\d?$|\.(adapter_wte|gating_factor)(\.weight)?$",
        "LLaMA-Adapter's own code",
        "load it with that code: its names and its model are those of the original LLaMA release",
    ),
    (
        r"\.lora_[ab]$",
        "MLX",
        "its factors are transposed: fuse it with `mlx_lm.fuse`, or convert it to `lora_A.weight` and `lora_B.weight`",
    ),
    (
        r"(^|\.)(lora_\w*adapter|\w+_adapter|adapter)\.(linear_in|linear_out)\.weight$",
        "NeMo or Megatron",
        "export it with that library's converter first",
    ),
)


def foreign_names(names: Collection[str]) -> str | None:
    """A sentence if most of these tensors are named as another library names its own."""
    for pattern, library, remedy in _FOREIGN:
        found = [name for name in names if re.search(pattern, name)]
        if found and 2 * len(found) >= len(names):
            return f"the tensors are named as {library} names them ({found[0]}); {remedy}."
    return None


def what_config(fields: Mapping[str, Any]) -> str:
    """What a config without `peft_type` is, as a sentence with a space in front; "" where nothing is known."""
    if "lora_parameters" in fields or "fine_tune_type" in fields:
        return " It is a config of MLX: fuse the adapter with `mlx_lm.fuse`, or convert it."
    if isinstance(fields.get("config"), (dict, str)) and ("model_type" in fields or "model_class" in fields):
        return (
            " It is a config of the `adapters` library (adapter-transformers, AdapterHub): load it with `model.load_adapter` "
            "of that library."
        )
    if "adapter_len" in fields and "adapter_layer" in fields:
        return " It is a config of LLaMA-Adapter's own code; load it with that code."
    if "r" in fields and ("target_modules" in fields or "lora_alpha" in fields):
        return ' Its fields are those of LoRA: if it is one, add "peft_type": "LORA".'
    if "base_model" in fields or "base_model_name" in fields:
        return " It only describes how an adapter was trained; ask its author for the config that was saved with the weights."
    return ""
