"""Methods whose calls say which task each row is of: `task_ids`, whole numbers (batch)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from splice.kinds.adapters import Adapters
from splice.kinds.call import Call, ReadsCall, Telling

TASK_IDS = "task_ids"

# The tasks of the rows of a call; one telling for all methods, since the call has one such argument.
tasks_of_call: Telling[torch.Tensor] = Telling("task ids", "task ids")


class ReadsTasks(ReadsCall):
    """An ability of adapter layers: they know the tasks of the rows."""

    @classmethod
    def call_context(cls, adapters: Adapters, names: Sequence[str], call: Call) -> AbstractContextManager[None]:
        # Taken out here, since `generate` of transformers refuses what the network's own forward does not take.
        given = call.options.pop(TASK_IDS, None)
        return nullcontext() if given is None else tasks_of_call.during(adapters, given)


def check_tasks(task_ids: torch.Tensor | None, count: int, field: str) -> torch.Tensor:
    """The ids of a call, where they are such of `count` tasks, a number that the config has in `field`.

    Raises:
        ValueError: there are none, or they are no whole numbers (batch) of tasks that are there.
    """
    if task_ids is None:
        raise ValueError("task_ids cannot be None: give the task of each row, a tensor (batch), to every call.")
    if task_ids.dim() != 1 or task_ids.is_floating_point():
        raise ValueError(f"`task_ids` must be integers (batch), got {task_ids.dtype} {tuple(task_ids.shape)}")
    if not torch.compiler.is_compiling() and not 0 <= int(task_ids.min()) <= int(task_ids.max()) < count:
        raise ValueError(f"`task_ids` must be from 0 to {count - 1} (`{field}`), got {task_ids.tolist()}")
    return task_ids
