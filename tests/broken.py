"""A tiny base model, checkpoints that are wrong in one way, and pictures of a model before and after a load.

Also `at_line` and `at_call`, which make something go wrong in the middle of an operation.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import splice

PACKAGE = str(Path(splice.__file__).parent)
PREFIX = "base_model.model."
VOCABULARY = 40
CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
BIN = "adapter_model.bin"


# -- base models


def llama(layers: int = 2, vocabulary: int = VOCABULARY) -> Any:
    """A real transformers Llama, new and always with the same weights."""
    return copy.deepcopy(_llama(layers, vocabulary))


@cache
def _llama(layers: int, vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    return _seeded(lambda: LlamaForCausalLM(config))


def bert(labels: int = 3) -> Any:
    """A real transformers BERT with a head for sequence classification."""
    return copy.deepcopy(_bert(labels))


@cache
def _bert(labels: int) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, num_labels=labels, initializer_range=0.2,
    )  # fmt: skip
    return _seeded(lambda: BertForSequenceClassification(config))


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


class Around(nn.Module):
    """A model inside another one: every path gets one more component in front."""

    def __init__(self, inner: nn.Module, name: str = "language_model") -> None:
        super().__init__()
        self.add_module(name, inner)
        self.inner_name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.inner_name)(*args, **kwargs)


def output(model: nn.Module) -> torch.Tensor:
    """The logits for three fixed rows."""
    rows = torch.arange(18).reshape(3, 6) % (VOCABULARY - 1) + 1
    training = [module for module in model.modules() if module.training]
    model.eval()
    with torch.no_grad():
        result = model(input_ids=rows).logits
    for module in training:
        module.training = True
    return result


# -- checkpoints


@dataclass
class Parts:
    """What a checkpoint is made of; a test changes it and writes it."""

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]

    def write(self, folder: Path, as_bin: bool = False) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.config), encoding="utf-8")
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        torch.save(tensors, folder / BIN) if as_bin else save_file(tensors, folder / SAFETENSORS, {"format": "pt"})
        return folder

    def renamed(self, rename: Callable[[str], str]) -> Parts:
        return Parts({rename(name): tensor for name, tensor in self.tensors.items()}, self.config)


def parts(seed: int = 0, network: Any = None, **changes: Any) -> Parts:
    """An adapter for `llama()` that the reference made, r=4 on q_proj and v_proj, with values that are nowhere zero."""
    import peft

    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes}
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = peft.get_peft_model(llama() if network is None else network, peft.LoraConfig(**options))
        tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        tensors = {n: t.detach() + 0.2 * torch.randn(t.shape) for n, t in sorted(tensors.items())}
    config = model.peft_config["default"].to_dict()
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    return Parts(tensors, {**config, "inference_mode": True})


def edited(folder: Path, **fields_of_config: Any) -> Path:
    """Change fields of the config in `folder`."""
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields_of_config}), encoding="utf-8")
    return folder


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / SAFETENSORS
    return load_file(file) if file.exists() else torch.load(folder / BIN, weights_only=True)


def load(folder: Path | str, network: Any = None, **options: Any) -> Any:
    """`PeftModel.from_pretrained` of splice, where any warning is an error."""
    # Made outside: in a process that has not imported transformers yet, other libraries warn of each other.
    network = llama() if network is None else network
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return splice.PeftModel.from_pretrained(network, folder, **options)


def by_reference(folder: Path | str, network: Any = None, **options: Any) -> Any:
    """The same load by the reference."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(llama() if network is None else network, str(folder), **options)


def adapter_tensors(model: Any, name: str = "default") -> dict[str, torch.Tensor]:
    """The live tensors of one adapter of splice by their names in memory."""
    return {n: t for n, t in model.named_parameters() if f".{name}." in n}


# -- pictures


def picture(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a load could change, as values that can be compared.

    The objects themselves are in it too, so that none can be replaced by another one under the same id.
    """
    seen: dict[str, Any] = {"state dict": list(model.state_dict())}
    for path, module in model.named_modules(remove_duplicate=False):
        seen[f"{path} object"] = Same(module)
        seen[f"{path} class"] = type(module)
        for name, value in module.__dict__.items():
            seen[f"{path} .{name}"] = _described(value)
        tensors = {**module._parameters, **module._buffers}
        for name, tensor in tensors.items():
            if tensor is not None:
                where = f"{path}.{name}"
                seen[f"{where} object"] = Same(tensor)
                seen[f"{where} bytes"] = raw_bytes(tensor)
                seen[f"{where} is"] = (tensor.dtype, tuple(tensor.shape), tensor.requires_grad, tensor.data_ptr())
    return seen


@dataclass(frozen=True)
class Same:
    """Equal only to the very same object."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __repr__(self) -> str:
        return f"<{type(self.value).__name__} at {id(self.value):x}>"


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _described(value: Any, depth: int = 0) -> Any:
    if value is None or isinstance(value, (bool, int, float, str, bytes, type)):
        return value
    if isinstance(value, Mapping):
        return {key: _inside(item, depth) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_inside(item, depth) for item in value]
    if isinstance(value, (set, frozenset)):
        return {item if isinstance(item, (str, int)) else id(item) for item in value}
    return _inside(value, depth)


def _inside(value: Any, depth: int) -> Any:
    """Objects of splice are looked into, others have to stay the same object."""
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    if depth > 2 or isinstance(value, (nn.Module, torch.Tensor)):
        return Same(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _described(getattr(value, f.name, None), depth + 1) for f in fields(value)}
    if type(value).__module__.startswith("splice.") and hasattr(value, "__dict__"):
        return {name: _described(item, depth + 1) for name, item in vars(value).items()}
    if isinstance(value, (Mapping, list, tuple)):
        return _described(value, depth + 1)
    return Same(value)


def assert_unchanged(before: Mapping[str, Any], model: nn.Module) -> None:
    """The model is what it was when `before` was taken."""
    after = picture(model)
    gone, new = sorted(set(before) - set(after)), sorted(set(after) - set(before))
    changed = [
        f"{key}: {before[key]!r:.200} -> {after[key]!r:.200}"
        for key in before
        if key in after and before[key] != after[key]
    ]
    assert not (gone or new or changed), f"gone {gone[:5]}, new {new[:5]}, changed {changed[:5]}"


@contextmanager
def unchanged(*models: nn.Module) -> Iterator[None]:
    """Whatever happens inside, these models are afterwards what they were before."""
    before = [picture(model) for model in models]
    yield
    for seen, model in zip(before, models):
        assert_unchanged(seen, model)


# -- something goes wrong in the middle


class Interrupted(KeyboardInterrupt):
    """A KeyboardInterrupt that no test framework would send."""


@contextmanager
def _each_line(tell: Callable[[Any], None], only: str | tuple[str, ...]) -> Iterator[None]:
    """Inside, call `tell` with the frame before each line of code of the files below `only`."""

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(only):
            return None
        if event == "line":
            tell(frame)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def at_line(number: int, happen: Callable[[], None], only: str | tuple[str, ...] = PACKAGE) -> Iterator[list[str]]:
    """Inside, call `happen` before the `number`-th line of code (from 0) of the files below `only` is run.

    Yields a list that holds the place once it has happened. Lines of clean-up (`except`, `finally` and what they call)
    are run after an exception only, so a second one never hits them.
    """
    count = 0
    places: list[str] = []

    def tell(frame: Any) -> None:
        nonlocal count
        if count == number:
            count += 1
            places.append(f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}")
            happen()
        count += 1

    with _each_line(tell, only):
        yield places


def lines_of(run: Callable[[], Any], only: str | tuple[str, ...] = PACKAGE) -> int:
    """How many lines of the files below `only` are executed by `run`."""
    lines: list[None] = []
    with _each_line(lambda frame: lines.append(None), only):
        run()
    return len(lines)


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, by its path in there."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def left_at_lines(
    run: Callable[[], Any], folder: Path, only: str | tuple[str, ...] = PACKAGE
) -> list[dict[str, bytes]]:
    """The files that a process leaves in `folder` which ends before a line of `run`: for each line, and for the end.

    It is all in one run, at each line of which the folder is read: what a process has not handed to the system by then,
    which is lost with it, cannot be read there either.
    """
    states: list[dict[str, bytes]] = []
    with _each_line(lambda frame: states.append(files(folder)), only):
        run()
    return [*states, files(folder)]


def interrupt() -> None:
    raise Interrupted


def at_call(function: Callable[..., Any], number: int, error: BaseException) -> Callable[..., Any]:
    """`function`, raising `error` at its `number`-th call (from 0)."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number + 1:
            raise error
        return function(*args, **kwargs)

    return counted


def in_fork(run: Callable[[], Any]) -> int:
    """Run in a forked child, which ends without any clean-up; returns its exit code (0 when `run` came to its end)."""
    return os.waitstatus_to_exitcode(os.waitpid(forked(run), 0)[1])


def forked(run: Callable[[], Any]) -> int:
    """Begin to run it in a forked child; gives the child's number."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child
