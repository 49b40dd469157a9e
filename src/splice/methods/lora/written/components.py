"""The networks of a pipeline that LoRA is put on: their names in files, and how paths in them are told apart."""

from __future__ import annotations

import re
from collections.abc import Collection

from splice.errors import PeftError

# A component -> what kohya's files call it. The first text encoder of a pipeline with two is `te1`.
KOHYA_PREFIXES = {
    "unet": ("lora_unet_",),
    "transformer": ("lora_transformer_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
}
# Those whose files diffusers writes with the name in front.
COMPONENTS = (*KOHYA_PREFIXES, "transformer_2", "prior", "controlnet")

# What a path has in it, of a network of this kind and of no other.
_SIGNS = (
    ("unet", re.compile(r"^((down|up)_blocks\.\d|mid_block)\.")),
    ("transformer", re.compile(r"^(single_)?transformer_blocks\.\d")),
    ("text_encoder", re.compile(r"^(text_model\.)?encoder\.layers\.\d+\.(self_attn|mlp)\.")),
)
# CLIP has lost this front in newer releases of transformers. Files keep it, and readers look for it.
_TEXT_FRONT = "text_model."
_BEHIND_TEXT_FRONT = ("encoder.layers.", "embeddings.", "final_layer_norm.")


def is_text(component: str) -> bool:
    """Whether a component is a text encoder."""
    return component.startswith("text_encoder")


def guessed(paths: Collection[str]) -> str:
    """The component that has layers at these paths.

    Raises:
        PeftError: that cannot be told.
    """
    found = {name for name, sign in _SIGNS if any(sign.search(path) for path in paths)}
    if len(found) == 1:
        return found.pop()
    some = ", ".join(sorted(paths)[:2])
    raise PeftError(
        f"which network of a pipeline the adapter is for cannot be told from its layers ({some}): say it as `component`, one "
        f"of {', '.join(COMPONENTS)}"
    )


def with_text_front(component: str, path: str) -> str:
    """A path in a text encoder as files have it."""
    return _TEXT_FRONT + path if is_text(component) and path.startswith(_BEHIND_TEXT_FRONT) else path


def without_text_front(component: str, path: str) -> str:
    """The end of a path in a text encoder that all releases of transformers have."""
    return path.removeprefix(_TEXT_FRONT) if is_text(component) else path
