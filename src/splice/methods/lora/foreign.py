"""LoRA adapters of other libraries, in forms that are not this one: how they are told, and what to do with them.

It is read without torch and without the method, since `splice inspect` needs neither.
"""

from __future__ import annotations

from splice.checkpoint.foreign import (
    ADAPTERS_LIBRARY,
    ADAPTERS_REMEDY,
    ForeignConfig,
    ForeignNames,
    register_foreign,
)

# kohya before LyCORIS: its names match both patterns. diffusers before LyCORIS for the same reason.
_NAMES = (
    ForeignNames(
        r"^lora_(unet|te\d?|prior|transformer)_",
        "kohya's sd-scripts (also A1111 and ComfyUI)",
        "load it with the `load_lora_weights` of a diffusers pipeline, or convert it (`splice convert --to peft`)",
    ),
    ForeignNames(
        r"(\.processor\..*_lora\.(down|up)\.weight$)|(\.lora\.(down|up)\.weight$)"
        # Of networks that stand alone, some have a `transformer` at their head as well, but none of these blocks in it.
        r"|(^(unet|text_encoder(_\d)?)\.)|(^transformer\.(single_)?transformer_blocks\.)",
        "a diffusers pipeline",
        "load it with the pipeline's `load_lora_weights`, or convert it (`splice convert --to peft`)",
    ),
    ForeignNames(
        r"\.lora_(down|up)\.weight$",
        "kohya's sd-scripts or LyCORIS (also A1111 and ComfyUI)",
        "convert its names to `lora_A.weight` and `lora_B.weight` first, and fold its `alpha` tensors into the config",
    ),
    ForeignNames(
        r"\.loras\.[^.]+\.lora_[AB]$",
        ADAPTERS_LIBRARY,
        ADAPTERS_REMEDY,
    ),
    ForeignNames(
        r"\.lora_[ab]$",
        "MLX",
        "its factors are transposed: fuse it with `mlx_lm.fuse`, or convert it to `lora_A.weight` and `lora_B.weight`",
    ),
    ForeignNames(
        r"(^|\.)(lora_\w*adapter|\w+_adapter|adapter)\.(linear_in|linear_out)\.weight$",
        "NeMo or Megatron",
        "export it with that library's converter first",
    ),
)

_CONFIGS = (
    ForeignConfig(
        fields=(("lora_parameters", "fine_tune_type"),),
        sentence="It is a config of MLX: fuse the adapter with `mlx_lm.fuse`, or convert it.",
    ),
    ForeignConfig(
        fields=(("r",), ("target_modules", "lora_alpha")),
        sentence='Its fields are those of LoRA: if it is one, add "peft_type": "LORA".',
        certain=False,  # other methods have an `r` and target modules too
    ),
)

register_foreign(_NAMES, _CONFIGS)
