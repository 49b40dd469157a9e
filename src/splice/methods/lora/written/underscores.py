"""Paths that were written with `_` for their dots: `mid_block_attentions_0_proj_in` is `mid_block.attentions.0.proj_in`."""

from __future__ import annotations

from collections.abc import Collection

from splice.errors import PeftError
from splice.methods.lora.written.components import is_text, without_text_front

# What components of paths are called in the UNets and transformers of diffusers, and in CLIP.
# Both of UNets and of transformers.
_BOTH = frozenset(
    (
        "transformer_blocks",
        "attn1",
        "attn2",
        "to_q",
        "to_k",
        "to_v",
        "to_out",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "ff",
        "net",
        "proj",
        "proj_in",
        "proj_out",
        "linear_1",
        "linear_2",
    )
)
_UNET = _BOTH | frozenset(
    (
        "down_blocks",
        "up_blocks",
        "mid_block",
        "attentions",
        "resnets",
        "motion_modules",
        "downsamplers",
        "upsamplers",
        "temporal_transformer_blocks",
        "transformer_in",
        "conv",
        "conv1",
        "conv2",
        "conv_in",
        "conv_out",
        "conv_shortcut",
        "time_emb_proj",
        "time_embedding",
        "add_embedding",
        "class_embedding",
        "time_proj",
        "cond_proj",
    )
)
_TRANSFORMER = _BOTH | frozenset(
    (
        "single_transformer_blocks",
        "attn",
        "ff_context",
        "proj_mlp",
        "norm",
        "norm1",
        "norm1_context",
        "norm2",
        "norm_out",
        "linear",
        "x_embedder",
        "context_embedder",
        "time_text_embed",
        "timestep_embedder",
        "guidance_embedder",
        "text_embedder",
        "pos_embed",
    )
)
_TEXT = frozenset(
    (
        "text_model",
        "encoder",
        "layers",
        "self_attn",
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
        "mlp",
        "fc1",
        "fc2",
        "embeddings",
        "token_embedding",
        "position_embedding",
        "text_projection",
    )
)


def flattened(path: str) -> str:
    """`path` with underscores for its dots."""
    return path.replace(".", "_")


def path_of(name: str, component: str, paths: Collection[str] | None) -> str:
    """The path that was flattened to `name`.

    Args:
        name: without its prefix.
        component: the network that it is in.
        paths: of the network's layers; None where it is not known. Then the path is made of words that such networks use.

    Raises:
        PeftError: there is no such path, or several.
    """
    if paths is None:
        words = _TEXT if is_text(component) else _TRANSFORMER if component.startswith("transformer") else _UNET
        found = [".".join(parts) for parts in _readings(name.split("_"), words)]
    else:
        found = [path for path in paths if flattened(path) == name]
        # Without the front that CLIP has lost, or with it.
        bare = without_text_front(component, name.replace("text_model_", "text_model.", 1))
        found = found or [path for path in paths if flattened(without_text_front(component, path)) == bare]
    if len(found) == 1:
        return found[0]
    if found:
        said = f"may be any of {', '.join(sorted(found)[:3])}"
    else:
        said = "is no layer of the base" if paths is not None else "is made of words that are not known here"
    help_ = (
        ""
        if paths is not None
        else "; give the pipeline as `base` (its configs are enough), whose layers are known then"
    )
    raise PeftError(f"{name!r}, of {component}, {said}{help_}")


def _readings(parts: list[str], words: Collection[str]) -> list[list[str]]:
    """All ways to put `parts` together to words and numbers."""
    if not parts:
        return [[]]
    found = []
    for length in range(1, min(len(parts), 5) + 1):
        word = "_".join(parts[:length])
        if word in words or (length == 1 and word.isdigit()):
            found += [[word, *rest] for rest in _readings(parts[length:], words)]
    return found
