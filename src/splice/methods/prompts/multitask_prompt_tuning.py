"""Multitask prompt tuning: virtual tokens that all tasks share, times a matrix of low rank for each task.

Wang et al., "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning", arXiv 2303.02861, section 3.1. With the
shared tokens P (n, dim) and, of a row's task, u (n, r) and v (r, dim): the row gets `P * (u v)`, element by element.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, cast

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.decoder_input import shift_tokens_right
from splice.base.foreign_models import config_field
from splice.checkpoint.tensors import open_weights
from splice.checkpoint.types import PeftType, TaskType
from splice.kinds.effect import Forward
from splice.kinds.registry import Method, register
from splice.kinds.slot import Slot
from splice.kinds.tasks import TASK_IDS, ReadsTasks, check_tasks, tasks_of_call
from splice.kinds.tensors import Held
from splice.methods.prompts.attributes import PROMPT_METHODS, PROMPT_VIEWS
from splice.methods.prompts.counts import check_prompt
from splice.methods.prompts.embedded import EmbeddedPrompt, embeddings_of
from splice.methods.prompts.prompt import Call, Encoder, Prompt, PromptLayer
from splice.methods.prompts.starts import StartedConfig, start_tokens


class MultitaskPromptTuningInit(str, Enum):
    """What the tensors start from: a text or noise, or those of another adapter that was trained on one or more tasks."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


_FROM_SOURCE = (
    MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS,
    MultitaskPromptTuningInit.EXACT_SOURCE_TASK,
    MultitaskPromptTuningInit.ONLY_SOURCE_SHARED,
)


@dataclass
class MultitaskPromptTuningConfig(StartedConfig):
    """Fields and defaults of the reference, in its order."""

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.MULTITASK_PROMPT_TUNING

    # What the tensors start from: noise ("RANDOM"), a text ("TEXT"; the matrices are noise), or another adapter's: the mean
    # of its tasks ("AVERAGE_SOURCE_TASKS"), one of them ("EXACT_SOURCE_TASK"), or its shared tokens ("ONLY_SOURCE_SHARED").
    prompt_tuning_init: MultitaskPromptTuningInit | str = MultitaskPromptTuningInit.RANDOM
    # The weights of that other adapter, a `.safetensors` or `.bin` file. A load does not look for it.
    prompt_tuning_init_state_dict_path: str | None = None
    # Which of its tasks is meant by "EXACT_SOURCE_TASK", counted from 0.
    prompt_tuning_init_task: int | None = 0
    # Rank of the matrices.
    num_ranks: int = 1
    # How many tasks there are.
    num_tasks: int = 1


def _check(config: MultitaskPromptTuningConfig) -> None:
    check_prompt(config)
    for name, value in (("num_ranks", config.num_ranks), ("num_tasks", config.num_tasks)):
        if value < 1:
            raise ValueError(f"`{name}` should be a positive integer, got {value!r}")


class MultitaskPromptEmbedding(Encoder):
    """The virtual tokens of multitask prompt tuning, in the tree."""

    def forward(self, indices: object = None, task_ids: torch.Tensor | None = None) -> object:
        """The virtual tokens `indices`, of each of the tasks that are named: (rows, tokens, dim)."""
        if not isinstance(indices, torch.Tensor):
            return super().forward(indices)
        return self.layer.every_token(task_ids)[:, indices[0] if indices.dim() > 1 else indices]


class MultitaskPromptTuning(ReadsTasks, EmbeddedPrompt):
    """Tokens that all tasks share, (n * submodules, dim), and for each task a matrix in two factors."""

    encoder = MultitaskPromptEmbedding
    prefix_task_cols, prefix_task_rows = Held(), Held()

    @classmethod
    def slots(cls, base: nn.Module, config: MultitaskPromptTuningConfig, path: str) -> dict[str, Slot]:
        shared = super().slots(base, config, path)
        (count, dim) = shared["embedding.weight"].shape
        cols, rows = (config.num_tasks, count, config.num_ranks), (config.num_tasks, config.num_ranks, dim)
        own = {"prefix_task_cols": Slot(cols, dtype=torch.float32), "prefix_task_rows": Slot(rows, dtype=torch.float32)}
        return {**own, **shared}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: MultitaskPromptTuningConfig) -> None:
        start_tokens(tensors["embedding.weight"], base, config)
        for name in ("prefix_task_cols", "prefix_task_rows"):
            nn.init.normal_(tensors[name], std=0.02)
        if config.prompt_tuning_init in _FROM_SOURCE:
            _start_from_source(tensors, config)

    def every_token(self, task_ids: torch.Tensor | None) -> torch.Tensor:
        """(rows, n * submodules, dim): the virtual tokens of each of these tasks.

        Raises:
            ValueError: `task_ids` is None, or no row of tasks that are there.
        """
        cols, rows = self.prefix_task_cols, self.prefix_task_rows
        ids = check_tasks(task_ids, len(cols), "num_tasks").to(cols.device, torch.long)
        return self.table_tensor * (cols[ids] @ rows[ids])

    def virtual_tokens(self, call: Call) -> torch.Tensor:
        return self.every_token(tasks_of_call.now)[:, : self.count]

    def prompted(self, call: Call, prompt: Prompt, inner: Forward) -> object:
        given = call.pop(TASK_IDS, None)  # where the network is called, and not the PeftModel
        if given is None:
            return super().prompted(call, prompt, inner)
        with tasks_of_call.during(None, given):
            return super().prompted(call, prompt, inner)

    def in_front_of_decoder(self, call: Call, prompt: Prompt) -> Call:
        """`call` with the second half of the tokens in front of what the decoder gets; `generate` has the first alone."""
        if self.task != TaskType.SEQ_2_SEQ_LM or len(self.table_tensor) == self.count:
            return call
        labels, ids = call.get("labels"), call.pop("decoder_input_ids", None)
        embeds = call.get("decoder_inputs_embeds")
        if embeds is None and ids is None:
            if labels is None:
                needs = "`labels`, `decoder_input_ids` or `decoder_inputs_embeds`"
                raise ValueError(f"with virtual tokens in front of its input the decoder needs {needs}")
            pad, start = (cast(int, config_field(self.base, f"{name}_token_id")) for name in ("pad", "decoder_start"))
            ids = shift_tokens_right(labels, pad, start)
        embeds = embeddings_of(self.base)(ids) if embeds is None else embeds
        tokens = prompt.values(call, len(embeds), _decoder_tokens).to(embeds.dtype)
        call["decoder_inputs_embeds"] = torch.cat([tokens, embeds], dim=1)
        if call.get("decoder_attention_mask") is not None:
            call["decoder_attention_mask"] = F.pad(call["decoder_attention_mask"], (prompt.count, 0), value=1)
        if labels is not None:
            call["labels"] = F.pad(labels, (prompt.count, 0), value=-100)
        return call


def _decoder_tokens(layer: PromptLayer, call: Call) -> torch.Tensor:
    assert isinstance(layer, MultitaskPromptTuning)
    return layer.every_token(tasks_of_call.now)[:, layer.count :]


def _start_from_source(tensors: dict[str, torch.Tensor], config: MultitaskPromptTuningConfig) -> None:
    """Take the values of another adapter.

    Raises:
        ValueError: no file is named, it lacks a tensor, or one has another shape.
    """
    place, init = config.prompt_tuning_init_state_dict_path, config.prompt_tuning_init
    if place is None:
        raise ValueError(f"prompt_tuning_init_state_dict_path needs to be specified with {init!s} init method")
    weights = open_weights(Path(place))
    wanted = {"prompt_embeddings": "embedding.weight"}
    if init != MultitaskPromptTuningInit.ONLY_SOURCE_SHARED:
        wanted.update(prefix_task_cols="prefix_task_cols", prefix_task_rows="prefix_task_rows")
    lacking = sorted(set(wanted).difference(weights.entries))
    if lacking:
        raise ValueError(f"{place}: it has no {', '.join(lacking)}, so it is no adapter of multitask prompt tuning")
    for (name, own), source in zip(wanted.items(), weights.read(list(wanted))):
        if name != "prompt_embeddings":
            one = config.prompt_tuning_init_task or 0
            is_mean = init == MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS
            source = source.mean(0, keepdim=True) if is_mean else source[one : one + 1]
        if source.shape != tensors[own].shape:
            raise ValueError(
                f"{place}: {name} gives {tuple(source.shape)} for {init!s}, and the new adapter needs "
                f"{tuple(tensors[own].shape)}. `num_tasks` must be 1; tokens and ranks those of the source."
            )
        tensors[own].copy_(source)


METHOD = register(
    Method(
        name=PeftType.MULTITASK_PROMPT_TUNING,
        summary="Puts trained vectors in front of the embedded input, each multiplied with a matrix of the row's task.",
        config=MultitaskPromptTuningConfig,
        prefix="prompt_tuning_",
        tensor_names=frozenset({"prompt_embeddings", "prefix_task_cols", "prefix_task_rows"}),
        network_layer=MultitaskPromptTuning,
        check=_check,
        tuner_methods=PROMPT_METHODS,
        tuner_views=PROMPT_VIEWS,
        names=MappingProxyType({"MultitaskPromptEmbedding": MultitaskPromptEmbedding}),
        paper="arXiv 2303.02861",
    )
)
