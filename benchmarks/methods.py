"""Every method: what loading an adapter costs, and what it adds to a call, both beside the reference, in turns; and what a
batch of many adapters costs beside a call for each.

The methods are those that are registered. A new one is measured as soon as it is there.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.forward import BASE, added, logits_of, with_adapters
from benchmarks.measure import Settings, alternate, collect_garbage, one_thread, processor_time
from benchmarks.models import (
    LIBRARIES,
    LLAMA_TARGETS,
    REFERENCE,
    SPLICE,
    llama,
    load,
    write_checkpoint,
    write_checkpoint_of,
)
from benchmarks.report import Row, row
from splice.checkpoint.types import PeftType
from splice.kinds.registry import Method, all_methods

# What the documentation shows of the last full run.
FIGURES = Path(__file__).with_name("methods.json")

# Fields that configs cannot do without.
REQUIRED: Mapping[str, Mapping[str, Any]] = {
    "ADALORA": {"total_step": 100},
    "ADAPTION_PROMPT": {"adapter_len": 16, "adapter_layers": 1},
    "CARTRIDGE": {"num_virtual_tokens": 16},
    "CPT": {"cpt_token_ids": [4] * 16, "cpt_tokens_type_mask": [1] * 16, "cpt_mask": [1] * 16},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 16, "num_tasks": 4},
    "POLY": {"n_tasks": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 16},
    "PROMPT_TUNING": {"num_virtual_tokens": 16},
    "P_TUNING": {"num_virtual_tokens": 16},
    "SHADOW": {"target_modules": None},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": list(range(16))},
}
# Fields whose defaults do not go with the sizes of a small model, or leave a part of it out.
_SMALL: Mapping[str, Mapping[str, Any]] = {
    "ADAPTION_PROMPT": {"adapter_layers": 4},
    "C3A": {"block_size": 8},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
    "OFT": {"oft_block_size": 8},
    "ROAD": {"group_size": 8},
    "VBLORA": {"vector_length": 8},
}
# What every call of a model with such an adapter needs.
_CALLS: dict[str, Mapping[str, Any]] = {
    "MULTITASK_PROMPT_TUNING": {"task_ids": torch.tensor([2])},
    "POLY": {"task_ids": torch.tensor([2])},
}
# To whose addition to a call that of the others is compared.
_PLAIN = PeftType.LORA


@dataclass(frozen=True)
class Figures:
    """What was measured of one method.

    Attributes:
        load: how many times as long the reference takes to load an adapter.
        call: how many times as long a call takes, of what splice's LoRA adds to one.
        reference_call: the same of what the reference adds for this method.
        mixed: how many times as long a call for each row takes as one for a batch whose rows all have their own adapter;
            None of methods that a model has one adapter of.
    """

    load: float
    call: float
    reference_call: float
    mixed: float | None


def rows(settings: Settings) -> Iterator[Row]:
    """A load and a call of every method, by the processor's time; a full run leaves its figures for the documentation."""
    base: Any = llama(settings.pick(16, 4), 128, settings.device)
    base.config.use_cache = False  # else the reference refuses one of the methods
    found: dict[str, Figures] = {}
    plain = 0.0
    # Its own figures first, as the others are told in them.
    methods = sorted(all_methods().values(), key=lambda method: (method.name is not _PLAIN, method.name.value))
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for method in methods:
            name, checkpoint = method.name.value, _checkpoint(method, base, settings.folder)
            loading = _load_row(name, base, checkpoint, settings)
            calling = _call_row(name, base, checkpoint, settings)
            plain = plain or calling.ours
            yield from (loading, calling)
            mixed = None
            if method.experts is None:
                mixing = _mixed_row(name, base, checkpoint, settings)
                mixed = mixing.ratio
                yield mixing
            found[name] = Figures(loading.ratio, calling.ours / plain, calling.reference / plain, mixed)
    if not settings.small:
        write_figures(found)


def _load_row(name: str, base: nn.Module, checkpoint: Path, settings: Settings) -> Row:
    def candidate(library: str) -> float:
        fresh = copy.deepcopy(base)
        collect_garbage()
        return processor_time(lambda: load(library, fresh, checkpoint))

    turns = {library: partial(candidate, library) for library in LIBRARIES}
    samples = alternate(turns, rounds=settings.pick(5, 2))
    reference, ours = (samples[library].median * 1e3 for library in (REFERENCE, SPLICE))
    return row(f"load of {name}", reference, ours, "ms").at_least(1)


def _call_row(name: str, base: nn.Module, checkpoint: Path, settings: Settings) -> Row:
    ids = torch.tensor([[1]], device=settings.device)
    calls = {BASE: partial(logits_of, base, ids)}
    for library in LIBRARIES:
        model = load(library, copy.deepcopy(base), checkpoint).eval()
        calls[library] = partial(logits_of, model, ids, **_CALLS.get(name, {}))
    more = added(calls, settings.device, rounds=settings.pick(15, 3), time_of=processor_time)
    reference, ours = (more[library] * 1e6 for library in (REFERENCE, SPLICE))
    return row(f"call with {name}, added in all", reference, ours, "us")


def _mixed_row(name: str, base: nn.Module, checkpoint: Path, settings: Settings) -> Row:
    """One token for each row, each row with an adapter of its own; beside it a call of splice for each of them."""
    count = settings.pick(32, 3)
    names = [f"adapter-{number}" for number in range(count)]
    model: Any = with_adapters(SPLICE, base, checkpoint, names).eval()
    ids = torch.arange(count, device=settings.device).unsqueeze(1)
    options = _CALLS.get(name, {})
    of_rows = {key: value.expand(count) for key, value in options.items()}

    def each() -> torch.Tensor:
        found = []
        for row_number, adapter in enumerate(names):
            model.set_adapter(adapter, inference_mode=True)
            found.append(logits_of(model, ids[row_number : row_number + 1], **options))
        return torch.cat(found)

    def mixed() -> torch.Tensor:
        return logits_of(model, ids, adapter_names=names, **of_rows)

    with torch.inference_mode():
        torch.testing.assert_close(mixed(), each(), rtol=1e-4, atol=1e-4)
        turns = {"each": partial(processor_time, each), "mixed": partial(processor_time, mixed)}
        samples = alternate(turns, rounds=settings.pick(5, 2))
    alone, together = (samples[way].median * 1e3 for way in turns)
    return row(f"{count} adapters of {name} in one batch; beside it a call each", alone, together, "ms")


def _checkpoint(method: Method, base: Any, folder: Path) -> Path:
    """An adapter of the method, by the reference."""
    name = method.name.value
    place = folder / f"method {name}"
    fields: dict[str, Any] = {
        "peft_type": name,
        "task_type": "CAUSAL_LM",
        **REQUIRED.get(name, {}),
        **_SMALL.get(name, {}),
    }
    if method.experts is not None:
        # By splice, as the reference loses what weighs the experts and draws it anew at each load. Two experts that are
        # alike give the same with all weights.
        expert = str(write_checkpoint(base, folder / f"expert of {name}", LLAMA_TARGETS, rank=8))
        fields |= {"hidden_size": base.config.hidden_size, "adapters": {"0": expert, "1": expert}}
        return write_checkpoint_of(base, place, fields, SPLICE)
    if method.layers:
        fields.setdefault("target_modules", list(LLAMA_TARGETS))
    return write_checkpoint_of(base, place, fields)


def write_figures(found: Mapping[str, Figures]) -> None:
    """Keep what was measured, for the documentation."""
    told = {
        name: {key: None if value is None else round(value, 2) for key, value in vars(figures).items()}
        for name, figures in sorted(found.items())
    }
    FIGURES.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def read_figures() -> dict[str, Figures]:
    """What was measured in the last full run, by `peft_type`."""
    return {name: Figures(**told) for name, told in json.loads(FIGURES.read_text(encoding="utf-8")).items()}
