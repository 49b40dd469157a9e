"""A base model that gives text, and its tokenizer, as transformers loads them."""

from __future__ import annotations

import re
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from splice.base.foreign_models import config_of, field_of, text_config
from splice.base_from_config import check_place, model_class
from splice.cli.settings import SPREAD, Wanted

# Names of the files that tokenizers consist of, of one kind or another.
_TOKENIZER = re.compile(
    r"(added_tokens|special_tokens|tokenizer|tokenization|vocab|merges|spiece|sentencepiece|.*\.(model|tiktoken)$)"
)


class Facts(NamedTuple):
    """What is told of a base."""

    # Its class, as it was before any adapter came.
    class_name: str
    # What most of its numbers are.
    dtype: str
    # Bytes that its parameters take.
    nbytes: int


class TextBase(NamedTuple):
    """A base model that gives text."""

    # The network, in eval mode.
    network: nn.Module
    # Where its inputs go.
    device: torch.device
    # What is told of it.
    facts: Facts
    # Seconds that loading it took.
    seconds: float

    @property
    def positions(self) -> int | None:
        """How many tokens it takes in all; None where its config does not say."""
        config = text_config(self.network)
        found = None if config is None else field_of(config, "max_position_embeddings")
        return found if isinstance(found, int) else None

    @property
    def gives_input_back(self) -> bool:
        """Whether it goes on with its input, as decoders do; encoder-decoders begin anew."""
        return not field_of(config_of(self.network), "is_encoder_decoder")


def open_tokenizer(wanted: Wanted) -> Any:
    """The tokenizer, before anything of the base is read.

    Raises:
        ValueError: there is no tokenizer.
    """
    place = wanted.tokenizer or wanted.place
    check_place(place, "base" if wanted.tokenizer is None else "tokenizer")
    if Path(place).is_dir() and not any(_TOKENIZER.match(path.name) for path in Path(place).iterdir()):
        raise ValueError(
            f"there is no tokenizer in {place}: name another folder, or an id of the Hub, with --tokenizer"
        )
    auto = _transformers().AutoTokenizer
    revision = {"revision": wanted.revision} if wanted.revision and wanted.tokenizer is None else {}
    try:
        return auto.from_pretrained(place, trust_remote_code=wanted.trust_remote_code, **revision)
    # What is raised depends on what is lacking: the file, a field of it, or a package that reads it.
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ValueError(
            f"{place} has no tokenizer that transformers can load: {_first_line(error)}; name another one with --tokenizer"
        ) from error


def load_base(wanted: Wanted) -> TextBase:
    """Read the base.

    Raises:
        OSError: it cannot be found.
        ValueError: it gives no text, there is no such device, or its memory does not do.
    """
    transformers = _transformers()
    device = _device(wanted.device)
    options: dict[str, object] = {"trust_remote_code": wanted.trust_remote_code}
    options |= {"revision": wanted.revision} if wanted.revision else {}
    config = transformers.AutoConfig.from_pretrained(wanted.place, **options)
    cls = _class_of(config, wanted)
    options["dtype"] = "auto" if wanted.dtype is None else getattr(torch, wanted.dtype)
    # Straight to where it is to be. Without accelerate it goes through memory.
    if device is None or (device.type != "cpu" and find_spec("accelerate") is not None):
        options["device_map"] = SPREAD if device is None else {"": str(device)}
    start = time.perf_counter()
    try:
        network = cls.from_pretrained(wanted.place, **options)
        if device is not None and "device_map" not in options and device.type != "cpu":
            network = network.to(device)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{wanted.place} does not fit into the memory of {device or 'the devices'}; --dtype bfloat16 takes half of "
            f"float32, and --device {SPREAD} spreads it over all there is"
        ) from error
    seconds = time.perf_counter() - start
    if "generate" not in dir(network):
        raise ValueError(f"{wanted.place} is a {type(network).__name__}, which gives no text")
    return TextBase(network.eval(), device or network.device, _facts_of(network), seconds)


def _transformers() -> Any:
    transformers: Any = import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _class_of(config: Any, wanted: Wanted) -> Any:
    """What reads the base: decoders and encoder-decoders have an auto class each."""
    transformers = _transformers()
    if wanted.class_name is not None:
        found = model_class(transformers, wanted.class_name)
        if found is None:
            raise ValueError(f"transformers has no class {wanted.class_name!r} to make the base with")
        return found
    auto, known = (
        (transformers.AutoModelForSeq2SeqLM, transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
        if config.is_encoder_decoder
        else (transformers.AutoModelForCausalLM, transformers.MODEL_FOR_CAUSAL_LM_MAPPING)
    )
    remote: Any = field_of(config, "auto_map") or {}
    if wanted.trust_remote_code and auto.__name__ in remote:
        return auto
    if type(config) not in known:
        raise ValueError(
            f"{wanted.place} is a base of {config.model_type!r}, and transformers has no {auto.__name__} of these, which "
            "would give text; --class names another one"
        )
    known[type(config)]  # imports the class, which is no part of reading the base
    return auto


def _device(text: str | None) -> torch.device | None:
    """Where the base is to be; None where it is to be divided.

    Raises:
        ValueError: there is no such device here.
    """
    if text == SPREAD:
        if find_spec("accelerate") is None:
            raise ValueError(f"--device {SPREAD}: accelerate divides the base: pip install 'splice[transformers]'")
        return None
    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {text}: {_first_line(error)}") from error
    return device


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".: ")


def _facts_of(network: nn.Module) -> Facts:
    counts: dict[torch.dtype, int] = {}
    for parameter in network.parameters():
        counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    # Norms are often of another dtype than the rest: the one of most numbers speaks for all.
    most = max(counts, key=lambda dtype: counts[dtype])
    nbytes = sum(count * dtype.itemsize for dtype, count in counts.items())
    return Facts(type(network).__name__, str(most).removeprefix("torch."), nbytes)
