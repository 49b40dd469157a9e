"""Fixtures that all tests share: checkpoints written by the reference, and models loaded from them by both libraries."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

# Threads that tests start would begin with as many as there are processors, and sum in another order than the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jinja2
import peft
import pytest
import torch

import splice
from tests import bases
from tests.bases import Base, generator
from tests.hub import Hub, as_the_real_one
from tests.samples import Case
from tests.temporary import put_into_memory

# There `peft` is splice, in a run of their own: `python -m tests.ecosystem`.
collect_ignore = ["ecosystem"]
torch.set_num_threads(1)
if torch.__version__ < (2, 7):
    # The reference looks for `torch.distributed.tensor` there, and imports it only by accident of a later torch.
    importlib.import_module("torch.distributed.tensor")
# Whatever writes a model card, thousands of times in all, compiles one and the same template anew.
jinja2.Environment.compile = cache(jinja2.Environment.compile)  # type: ignore[method-assign,assignment]


def pytest_configure(config: pytest.Config) -> None:
    put_into_memory(config)


# Tests that every method goes through on every base, thousands of them.
_GENERIC = {
    "test_against_reference.py", "test_invariants.py", "test_loaded_twice.py", "test_merged_values.py", "test_merging.py",
    "test_merging_some.py", "test_selection.py", "test_training.py", "test_tree.py", "test_views.py",
}  # fmt: skip
# Of these, what is tried on real networks with every method each time.
_EVERYWHERE = {"test_the_output_is_the_same", "test_the_steps_are_those_of_the_reference"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to the slow tests what says little new: methods that stand for no kind, on nets of more than its layers."""
    found: list[tuple[pytest.Function, Case]] = []
    for item in items:
        case = (
            item.callspec.params.get("case")
            if isinstance(item, pytest.Function) and hasattr(item, "callspec")
            else None
        )
        if isinstance(item, pytest.Function) and isinstance(case, Case) and item.path.name in _GENERIC:
            found.append((item, case))
    larger = (bases.LLAMA, bases.MIXED)
    elsewhere = {(item.path, item.originalname, case.method.name) for item, case in found if case.base not in larger}
    for item, case in found:
        if item.originalname in _EVERYWHERE or case.sample.on_every_base or case.base not in larger:
            continue
        if (item.path, item.originalname, case.method.name) in elsewhere:
            item.add_marker(pytest.mark.slow)


def perturb(tensors: Mapping[str, torch.Tensor], seed: int) -> None:
    """Move every value of an adapter a little away from where it starts, so that nothing in it is zero."""
    source = generator(seed)
    with torch.no_grad():
        for name in sorted(tensors):
            tensor = tensors[name]
            if tensor.is_floating_point():
                tensor.add_((torch.randn(tensor.shape, generator=source) * 0.2).to(tensor.dtype))


def write_checkpoint(
    folder: Path,
    base: Base | Callable[[], Any],
    config: Mapping[str, Any],
    seed: int = 0,
    safe_serialization: bool = True,
    dtype: torch.dtype | None = None,
    save_embedding_layers: str | bool = False,
) -> Path:
    """Make an adapter with the reference, and let the reference save it into `folder`.

    Args:
        folder: where to.
        base: the base model, or a function that makes it.
        config: fields of the config, `peft_type` among them.
        seed: another seed gives other values.
        safe_serialization: safetensors; otherwise `.bin`.
        dtype: of the base model and so of the adapter; as they are, if None.
        save_embedding_layers: whether the reference adds the base's own embeddings; "auto" is its default.
    """
    network = base.build() if isinstance(base, Base) else base()
    if dtype is not None:
        network = network.to(dtype)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        fields = {"peft_type": "LORA", **config}
        model = peft.get_peft_model(network, peft.get_peft_config(fields), autocast_adapter_dtype=dtype is None)
        tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        trained = {parameter.data_ptr() for parameter in model.parameters()}  # and not what is drawn once and for all
        perturb({name: tensor for name, tensor in tensors.items() if tensor.data_ptr() in trained}, seed)
        model.save_pretrained(
            str(folder), safe_serialization=safe_serialization, save_embedding_layers=save_embedding_layers
        )
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes an adapter with the reference: `checkpoint(base, config, seed=0, name="adapter")` gives its folder.

    Every call with the same arguments writes the same bytes. The folder is the test's own and may be changed.
    """

    def write(
        base: Base | Callable[[], Any], config: Mapping[str, Any], *, name: str = "adapter", **options: Any
    ) -> Path:
        return write_checkpoint(tmp_path / name, base, config, **options)

    return write


@pytest.fixture(scope="session")
def shared_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """As `checkpoint`, written once for all tests that ask for the same one: they must not change it."""
    root = tmp_path_factory.mktemp("checkpoints")
    written: dict[str, Path] = {}

    def write(base: Base, config: Mapping[str, Any], **options: Any) -> Path:
        key = repr((base.name, sorted(config.items(), key=repr), sorted(options.items(), key=repr)))
        if key not in written:
            written[key] = write_checkpoint(root / str(len(written)), base, config, **options)
        return written[key]

    return write


@pytest.fixture(params=[peft, splice], ids=["reference", "splice"])
def library(request: pytest.FixtureRequest) -> Any:
    """Each of the two libraries, for what must hold of both."""
    return request.param


@pytest.fixture(autouse=True)
def _seeded() -> None:
    # As `torch.manual_seed` on a machine without accelerators, where it looks for them at every call, for milliseconds.
    torch.default_generator.manual_seed(0)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A Hub that this process takes for the real one, and an empty cache."""
    with as_the_real_one(tmp_path) as hub:
        yield hub
