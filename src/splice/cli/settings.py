"""What `splice run` was asked for: which base, and how text is made."""

from __future__ import annotations

from typing import NamedTuple

# Where accelerate divides the base over what there is.
SPREAD = "auto"


class Wanted(NamedTuple):
    """Which base, and how it is to be loaded."""

    # Its folder or its id on the Hub.
    place: str
    # Branch, tag or commit on the Hub; None for the one that the Hub shows.
    revision: str | None = None
    # A class of transformers that makes it; None for what its config says.
    class_name: str | None = None
    # Whether code that lies beside the config is run.
    trust_remote_code: bool = False
    # The dtype of its weights, as torch calls it; None for that of its files.
    dtype: str | None = None
    # Where it is to be: "cpu", "cuda:1"; `SPREAD`; None for a GPU where there is one.
    device: str | None = None
    # Folder or id of the tokenizer; None for the base's own.
    tokenizer: str | None = None


class Manner(NamedTuple):
    """How text is made."""

    # Tokens of an answer, at most.
    max_new_tokens: int = 128
    # 0 always takes the most probable token; otherwise what the logits are divided by before one is drawn.
    temperature: float = 0.0
    # Draw among the most probable tokens alone whose probabilities add up to this much.
    top_p: float = 1.0
    # Of the draws.
    seed: int = 0
    # The task that adapters are asked for which know several.
    task: int = 0
