"""A function in several processes that are one group of torch.distributed (gloo, on this machine)."""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# What every process needs: imported once, in the server that they are forked from.
_PRELOADED = ["torch", "torch.distributed.fsdp", "torch.distributed.tensor", "transformers", "accelerate", "splice"]
_SECONDS = float(os.environ.get("RANKS_SECONDS", "240"))


def on_ranks(scenario: Callable[..., Any], *arguments: Any, count: int = 2) -> list[Any]:
    """What `scenario(rank, *arguments)` returns in each of `count` processes, by rank.

    Args:
        scenario: a function of a test module, found there by its name.
        arguments: what pickle can write.
        count: of the processes.

    Raises:
        AssertionError: it failed in one of them; what that one printed of its error.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        named = (scenario.__module__, scenario.__qualname__)
        processes = [
            context.Process(target=_run, args=(rank, count, port, folder, named, arguments)) for rank in range(count)
        ]
        for process in processes:
            process.start()
        failed = _wait(processes)
        told = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        assert not failed, "\n".join(told) or f"ranks {failed} did not end well"
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(count)]


def _wait(processes: list[Any]) -> list[int]:
    """The ranks that failed. Where one does, the others wait for it in a collective and are ended."""
    from time import monotonic, sleep

    end = monotonic() + _SECONDS
    while any(process.exitcode is None for process in processes) and monotonic() < end:
        if any(process.exitcode for process in processes):
            sleep(2.0)  # another one may have more to say
            break
        sleep(0.02)
    for process in processes:
        if process.exitcode is None:
            process.kill()
        process.join()
    return [rank for rank, process in enumerate(processes) if process.exitcode]


def _run(rank: int, count: int, port: int, folder: str, named: tuple[str, str], arguments: tuple[Any, ...]) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    # Processes that wait for one another say where, before they are ended.
    waiting = open(Path(folder, f"{rank}.error"), "w")  # noqa: SIM115
    faulthandler.dump_traceback_later(_SECONDS * 0.8, file=waiting)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
        module, name = named
        result = getattr(importlib.import_module(module), name)(rank, *arguments)
        torch.save(result, Path(folder, f"{rank}.pt"))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)
