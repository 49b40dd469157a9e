"""The store: adapters that are registered come where they are used, go when others need their room, and compute the same."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import re
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import splice
from splice.fleet.store import AdapterStore
from tests import bases
from tests.bases import run
from tests.broken import Interrupted, at_line, interrupt, lines_of
from tests.comparing import assert_close, differ
from tests.counting import lines_run
from tests.hub import Hub
from tests.test_slots import config_of, in_slots, parameters_of

RANK = 4
_SHAPES: dict[str, dict[str, torch.Size]] = {}


def shapes_of(config: Any) -> dict[str, torch.Size]:
    """Names and shapes of the tensors of an adapter with this config."""
    key = str(config.to_dict())
    if key not in _SHAPES:
        model = splice.get_peft_model(bases.LLAMA.build(), copy.copy(config))
        state = splice.get_peft_model_state_dict(model, save_embedding_layers=False)
        _SHAPES[key] = {name: tensor.shape for name, tensor in state.items()}
    return _SHAPES[key]


def write(folder: Path, seed: int, config: Any = None) -> Path:
    """An adapter on disk, of values that depend on the seed alone."""
    config = config or config_of(RANK)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    source = bases.generator(seed)
    state = {name: torch.randn(shape, generator=source) / 3 for name, shape in shapes_of(config).items()}
    save_file(state, folder / "adapter_model.safetensors")
    return folder


NAMES = [f"a{number}" for number in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight adapters; tests that change files make their own."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        write(root / name, seed)
    return root


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("outside") / "own", 99)


@pytest.fixture
def model(outside: Path) -> Any:
    """A model with an adapter that is not registered."""
    return splice.PeftModel.from_pretrained(bases.LLAMA.build(), outside, adapter_name="own")


def store_of(model: Any, folder: Any, **limits: Any) -> AdapterStore:
    report = model.register_adapters(folder)
    assert not report.failed, report
    model.adapter_store.limits = splice.StoreLimits(**limits)
    store: AdapterStore = model.adapter_store
    return store


def alone(folder: Path, rows: int) -> torch.Tensor:
    """What a fresh model gives with the adapter in this folder."""
    return run(splice.PeftModel.from_pretrained(bases.LLAMA.build(), folder), bases.LLAMA.inputs(rows))


def right(model: Any, folder: Path, names: Sequence[str]) -> None:
    """A call with these names gives for each row what a fresh model with that adapter gives."""
    mixed = run(model, bases.LLAMA.inputs(len(names)), adapter_names=list(names))
    for row, name in enumerate(names):
        assert_close(mixed[row], alone(folder / name, len(names))[row])


NBYTES = 3072  # of one of these adapters on the model


# -- registering


def test_a_folder_is_registered_and_nothing_is_loaded(model: Any, tmp_path: Path) -> None:
    for seed, name in enumerate(("b", "team/one", "team/two/deep", ".hidden/x")):
        write(tmp_path / "all" / name, seed)
    (tmp_path / "all" / "b" / "loop").symlink_to(tmp_path / "all")
    report = model.register_adapters(tmp_path / "all")
    assert report.names == ("b", "team/one", "team/two/deep") and not report.failed
    assert str(report).startswith("registered 3 adapters in ") and "could not" not in str(report)
    store = model.adapter_store
    assert store.names == report.names and len(store) == 3 and "b" in store and "own" not in store
    assert list(model.peft_config) == ["own"] and store.on_device == () and store.stats().registered == 3
    right(model, tmp_path / "all", ["team/one", "b"])
    assert store.on_device == ("team/one", "b")
    (only,) = model.register_adapters(write(tmp_path / "single", 3)).names
    assert only == "single"


def test_bad_adapters_are_reported_and_the_others_registered(model: Any, folder: Path, tmp_path: Path) -> None:
    for name in ("good", "cut off", "no weights", "config", "method", "replicated", "bin"):
        write(tmp_path / name, 1)
    cut = tmp_path / "cut off" / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-10])
    (tmp_path / "no weights" / "adapter_model.safetensors").unlink()
    (tmp_path / "config" / "adapter_config.json").write_text("{")
    (tmp_path / "method" / "adapter_config.json").write_text('{"peft_type": "LORRA"}')
    config_of(layer_replication=[[0, 2], [0, 2]]).save_pretrained(tmp_path / "replicated")
    report = model.register_adapters(tmp_path)
    assert report.names == ("bin", "good")
    assert set(report.failed) == {"cut off", "no weights", "config", "method", "replicated"}
    said = {
        "cut off": "CheckpointError: .*adapter_model.safetensors is damaged, at .* bytes",
        "no weights": "CheckpointError: .*neither adapter_model.safetensors nor adapter_model.bin",
        "config": "CheckpointError: .*adapter_config.json is not valid JSON",
        "method": "UnknownMethodError: .*unknown peft_type 'LORRA'",
        "replicated": "UnsupportedFeatureError: .*changes which layers the network has cannot come and go",
    }
    for name, pattern in said.items():
        assert re.search(pattern, report.failed[name]), report.failed[name]
    assert "5 could not be\n  'config': CheckpointError" in str(report)
    report = model.register_adapters({"own": folder / "a0", "": folder / "a0", "nowhere": tmp_path / "nowhere/x/y"})
    assert not report.names
    assert "the model has an adapter of this name already" in report.failed["own"]
    assert "must be a non-empty string" in report.failed[""] and "There is no such folder" in report.failed["nowhere"]
    with pytest.raises(splice.CheckpointError, match=r"no folder .*nowhere.*register_adapters\(\{'name'"):
        model.register_adapters(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(splice.CheckpointError, match="there are no adapters"):
        model.register_adapters(tmp_path / "empty")


def test_names_that_are_not_registered(model: Any, folder: Path) -> None:
    store = store_of(model, folder)
    expected = (
        r"non-existing adapter\(s\): a22; there are \['own'\]. 8 adapters are registered; the nearest name to 'a22' is"
    )
    with pytest.raises(ValueError, match=expected):
        run(model, bases.LLAMA.inputs(2), adapter_names=["a1", "a22"])
    with pytest.raises(
        ValueError, match=r"Adapter zzz not found; .* 8 adapters are registered, none with a name like that"
    ):
        model.set_adapter("zzz")
    for function in (store.pin, store.unpin, store.evict, store.prefetch):
        with pytest.raises(
            ValueError, match=r"adapter 'a11' is not registered. 8 adapters are registered; the nearest"
        ):
            function("a11")
    assert store.on_device == () and store.stats().misses == 0  # nothing was loaded for a call that is refused
    with pytest.raises(ValueError, match="Adapter 'a1' is registered"):
        model.add_adapter("a1", config_of())
    with pytest.raises(ValueError, match="Adapter 'a1' is registered"):
        model.load_adapter(folder / "a1", "a1")


def test_from_the_hub(model: Any, folder: Path, hub: Hub) -> None:
    """The config comes at once, the weights of the same commit at first use, whatever has been pushed since."""
    repository = hub.repository("someone/lora")
    repository.commit(folder / "a1")
    report = model.register_adapters({"far": "someone/lora", "gone": "someone/else"})
    assert report.names == ("far",) and "there is no such repository" in report.failed["gone"]
    assert not any("safetensors" in line for line in hub.requests)
    repository.commit(folder / "a2")
    assert_close(run(model, bases.LLAMA.inputs(2), adapter_names=["far", "far"]), alone(folder / "a1", 2))
    model.adapter_store.evict("far")
    assert_close(run(model, bases.LLAMA.inputs(2), adapter_names=["far", "far"]), alone(folder / "a1", 2))
    assert model.register_adapters({"far": "someone/lora"}).names == ("far",)  # the new one takes its place
    assert model.adapter_store.on_device == ()
    assert_close(run(model, bases.LLAMA.inputs(2), adapter_names=["far", "far"]), alone(folder / "a2", 2))


# -- coming and going


def test_first_use_loads(model: Any, folder: Path) -> None:
    store = store_of(model, folder)
    right(model, folder, ["a1", "a5", "a1"])
    assert store.on_device == ("a1", "a5") and model.active_adapters == ["own"]
    model.set_adapter("a3")
    assert_close(run(model, bases.LLAMA.inputs(2)), alone(folder / "a3", 2))
    model.base_model.set_adapter(["a3", "a4"], inference_mode=True)
    assert model.active_adapters == ["a3", "a4"]
    with model.disable_adapter():
        assert_close(run(model, bases.LLAMA.inputs(2)), run(bases.LLAMA.build(), bases.LLAMA.inputs(2)))
        run(model, bases.LLAMA.inputs(1), adapter_names=["a7"])
    assert "a7" not in store.on_device  # all rows are the base's
    model.set_adapter("own")
    generated = model.generate(**bases.LLAMA.inputs(2), adapter_names=["a6", "own"], max_new_tokens=2, do_sample=False)
    assert generated.shape[0] == 2 and "a6" in store.on_device


def test_the_one_that_is_longest_unused_goes_first(model: Any, folder: Path) -> None:
    store = store_of(model, folder, device_count=3)
    for names in (["a0"], ["a1"], ["a2"], ["a0"], ["a3"]):
        right(model, folder, names)
    assert store.on_device == ("a2", "a0", "a3")
    right(model, folder, ["a4", "a0", "a4"])
    assert store.on_device == ("a3", "a4", "a0") or store.on_device == ("a3", "a0", "a4")
    stats = store.stats()
    assert (stats.hits, stats.misses, stats.evictions, stats.loads) == (2, 5, 2, 5)
    right(model, folder, ["a3", "a4", "a0"])
    assert store.stats().evictions == 2


def test_limits_in_bytes(model: Any, folder: Path, tmp_path: Path) -> None:
    store = store_of(model, folder, device_bytes=3 * NBYTES)
    for name in NAMES[:4]:
        right(model, folder, [name])
    assert store.on_device == ("a1", "a2", "a3") and store.stats().device_bytes == 3 * NBYTES
    large = {"large": write(tmp_path / "large", 5, config_of(2 * RANK))}
    model.register_adapters(large)
    right(model, tmp_path, ["large"])  # takes the room of two
    assert store.on_device == ("a3", "large") and store.stats().device_bytes == 3 * NBYTES
    model.register_adapters({"huge": write(tmp_path / "huge", 5, config_of(4 * RANK))})
    with pytest.raises(
        splice.NoRoomError, match=r"no room on the model for 'huge' \(12.3 kB\): the store's limits are 9.2 kB"
    ):
        model.set_adapter("huge")
    assert store.on_device == ("a3", "large")
    store.limits = splice.StoreLimits(device_bytes=2 * NBYTES)
    assert store.on_device == ("large",)


def test_wrong_limits() -> None:
    for wrong in ({"device_count": 0}, {"host_bytes": -1}, {"device_bytes": 1.5}, {"host_count": True}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}"):
            splice.StoreLimits(**wrong)  # type: ignore[arg-type]


def test_more_than_fit_are_refused(model: Any, folder: Path) -> None:
    store = store_of(model, folder, device_count=2)
    right(model, folder, ["a0", "a1"])
    with pytest.raises(
        splice.NoRoomError, match="3 registered adapters are asked for at once, and the store may have 2"
    ):
        run(model, bases.LLAMA.inputs(3), adapter_names=["a1", "a2", "a3"])
    store.pin("a0")
    with pytest.raises(
        splice.NoRoomError, match=r"for 'a2', 'a3' .*2 adapters.*cannot be evicted: 'a0' \(pinned\)\. Ask"
    ):
        run(model, bases.LLAMA.inputs(2), adapter_names=["a2", "a3"])
    with pytest.raises(ValueError, match=r"cannot be evicted: it is pinned. Call `unpin\('a0'\)`"):
        store.evict("a0")
    with pytest.raises(splice.NoRoomError):
        store.limits = splice.StoreLimits(device_bytes=0)
    assert store.on_device == ("a1", "a0") and store.limits.device_count == 2
    right(model, folder, ["a2"])
    assert store.on_device == ("a0", "a2")
    store.unpin("a0")
    right(model, folder, ["a3", "a4"])
    assert store.on_device == ("a3", "a4")


def test_what_is_active_merged_trained_or_changed_stays(model: Any, folder: Path) -> None:
    store = store_of(model, folder, device_count=1)
    inputs = bases.LLAMA.inputs(1)

    def refused(why: str) -> None:
        with pytest.raises(splice.NoRoomError, match=rf"cannot be evicted: 'a0' \({why}\)"):
            run(model, inputs, adapter_names=["a1"])
        with pytest.raises(ValueError, match=rf"adapter 'a0' cannot be evicted: it is {why}"):
            store.evict("a0")
        assert store.on_device == ("a0",)

    model.set_adapter("a0", inference_mode=True)
    refused("active")
    model.set_adapter("own", inference_mode=True)
    model.base_model.set_requires_grad("a0")
    refused("in training")
    model.base_model.set_requires_grad("a0", False)
    layer = model.base_model.adapted["model.layers.0.self_attn.q_proj"]
    layer.set_adapter("a0")
    model.base_model.set_requires_grad("a0", False)
    refused("active on single layers")
    model.set_adapter("own", inference_mode=True)
    right(model, folder, ["a1"])  # nothing of that is left
    right(model, folder, ["a0"])
    with torch.no_grad():
        parameters_of(model, "a0")[0].mul_(2)
    refused("changed since it was loaded")
    model.delete_adapter("a0")
    right(model, folder, ["a1"])
    store.limits = splice.StoreLimits(device_count=2)
    model.merge_adapter(["a4"])  # which is brought in
    store.limits = splice.StoreLimits(device_count=1)
    assert store.on_device == ("a4",)
    with pytest.raises(ValueError, match="there are merged adapters"):
        run(model, inputs, adapter_names=["a2"])
    with pytest.raises(ValueError, match="adapter 'a4' cannot be evicted: it is merged"):
        store.evict("a4")
    model.unmerge_adapter()
    right(model, folder, ["a2"])
    with pytest.raises(ValueError, match=r"'a3' is registered: `model.adapter_store.pin\('a3'\)` brings it in"):
        model.add_weighted_adapter(["own", "a3"], [1.0, 1.0], "sum", "linear")


def test_training_one_that_was_brought_in(model: Any, folder: Path) -> None:
    store = store_of(model, folder, device_count=1)
    model.train()
    model.set_adapter("a0")
    assert model.training  # bringing one in is no reason to leave training mode
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**bases.LLAMA.inputs(2)).logits.square().mean().backward()
    optimizer.step()
    model.set_adapter("own", inference_mode=True)
    with pytest.raises(splice.NoRoomError, match=r"'a0' \(changed since it was loaded\)"):
        model.set_adapter("a1")
    assert store.on_device == ("a0",) and model.active_adapters == ["own"]


def test_deleting_one(model: Any, folder: Path) -> None:
    store = store_of(model, folder)
    model.delete_adapter("a0")  # not on the model
    right(model, folder, ["a1"])
    model.delete_adapter("a1")
    assert store.names == tuple(NAMES[2:]) and store.on_device == () and store.stats().device_bytes == 0
    with pytest.raises(ValueError, match=r"a1; there are \['own'\]. 6 adapters are registered"):
        run(model, bases.LLAMA.inputs(1), adapter_names=["a1"])
    assert model.register_adapters({"a1": folder / "a1"}).names == ("a1",)
    right(model, folder, ["a1"])


def test_registering_again(model: Any, tmp_path: Path) -> None:
    """The files as they are now take the place of those that were; of the same ones nothing is loaded again."""
    store = store_of(model, {"x": write(tmp_path / "x", 1)}, host_count=9)
    right(model, tmp_path, ["x"])
    model.register_adapters({"x": tmp_path / "x"})
    assert store.on_device == ("x",) and store.stats().in_host == 1
    write(tmp_path / "x", 2)
    model.set_adapter("x", inference_mode=True)
    report = model.register_adapters({"x": tmp_path / "x"})
    assert report.failed["x"].endswith("is on the model and cannot go: it is active")
    model.set_adapter("own", inference_mode=True)
    model.register_adapters({"x": tmp_path / "x"})
    assert store.on_device == () and store.stats().in_host == 0
    right(model, tmp_path, ["x"])


@pytest.mark.parametrize("change", ["weights", "config", "gone", "other format"])
def test_files_that_changed_since(change: str, model: Any, tmp_path: Path) -> None:
    """They are refused, the model stays as it is, and what is there already goes on working."""
    store = store_of(model, {"x": write(tmp_path / "x", 1), "y": write(tmp_path / "y", 2)}, device_count=1)
    right(model, tmp_path, ["x"])
    weights = tmp_path / "x" / "adapter_model.safetensors"
    before = alone(tmp_path / "x", 1)
    if change == "weights":
        write(tmp_path / "x", 3)
        match = r"adapter 'x': .*adapter_\w+.\w+ has changed since it was registered. .*register_adapters\(\{'x'"
    elif change == "config":
        config_of(lora_alpha=1).save_pretrained(tmp_path / "x")
        match = "adapter_config.json has changed since it was registered"
    elif change == "gone":
        shutil.rmtree(tmp_path / "x")
        match = "Can't find|is gone|neither"
    else:
        torch.save({}, tmp_path / "x" / "adapter_model.bin")
        weights.unlink()
        match = "adapter_model.safetensors was there when it was registered, and is gone"
    assert_close(run(model, bases.LLAMA.inputs(1), adapter_names=["x"]), before)
    right(model, tmp_path, ["y"])
    with pytest.raises(splice.CheckpointError, match=match):
        run(model, bases.LLAMA.inputs(1), adapter_names=["x"])
    assert store.on_device == ("y",)


def test_one_that_does_not_fit_changes_nothing(model: Any, folder: Path, tmp_path: Path) -> None:
    broken = write(tmp_path / "broken", 1)
    save_file({"base_model.model.x": torch.zeros(2)}, broken / "adapter_model.safetensors")
    store = store_of(model, {"broken": broken, **{name: folder / name for name in NAMES}}, device_count=1)
    right(model, folder, ["a0"])
    modules = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(splice.AdapterMismatchError, match="broken.* does not fit this model"):
        model.set_adapter("broken")
    assert store.on_device == ("a0",) and model.active_adapters == ["own"]
    assert {name: type(module) for name, module in model.named_modules()} == modules
    right(model, folder, ["a0"])


@pytest.mark.parametrize(
    ("start", "step"), [(5, 257), pytest.param(0, 7, marks=pytest.mark.slow)], ids=["some lines", "every 7th line"]
)
@pytest.mark.parametrize("host", [None, 9], ids=["from disk", "by host memory"])
def test_an_interrupt_anywhere(host: int | None, start: int, step: int, model: Any, folder: Path) -> None:
    """Bringing in is whole or has not been, so is evicting, nothing stays in use or in a slot, and the next try works."""
    store = store_of(model, folder, device_count=1, host_count=host)
    model.slots(2, RANK)
    inputs = bases.LLAMA.inputs(2)
    fresh = {name: alone(folder / name, 2) for name in ("a0", "a1")}

    def back() -> None:
        model.set_adapter("own", inference_mode=True)
        store.pin("a0")
        store.unpin("a0")
        store._host.drop("a1")

    def bring() -> None:
        model.set_adapter("a1", inference_mode=True)

    for _ in range(2):  # what is imported or cached is so afterwards
        bring()
        back()
    for number in range(start, lines_of(bring), step):
        back()
        with suppress(Interrupted), at_line(number, interrupt) as where:
            bring()
        assert not any(name in store._uses for name in NAMES) and not store._waiting, where
        assert set(model.peft_config) == {"own", *store.on_device} == set(model.slots().numbers), where
        assert all(set(host.layers) == set(model.peft_config) for host in model.base_model.hosts.values()), where
        for name in store.on_device:
            assert_close(run(model, inputs, adapter_names=[name, "own"])[0], fresh[name][0])
        gc.enable()


# -- host memory, and ahead of time


def test_host_memory(model: Any, tmp_path: Path) -> None:
    """What was read stays there for the next time, and nobody writes to it."""
    folders = {name: write(tmp_path / name, seed) for seed, name in enumerate(NAMES[:4])}
    store = store_of(model, folders, device_count=1, host_count=2)
    for name in folders:
        right(model, tmp_path, [name])
    stats = store.stats()
    assert (stats.in_host, stats.host_evictions, stats.misses, stats.host_hits) == (2, 2, 4, 0)
    assert stats.host_bytes == 2 * NBYTES
    expected = alone(tmp_path / "a2", 1)
    shutil.rmtree(tmp_path / "a2")
    assert_close(run(model, bases.LLAMA.inputs(1), adapter_names=["a2"]), expected)
    assert store.stats().host_hits == 1
    with torch.no_grad():
        for parameter in parameters_of(model, "a2"):
            parameter.zero_()
    model.base_model.discard("a2")
    assert_close(run(model, bases.LLAMA.inputs(1), adapter_names=["a2"]), expected)
    store.limits = splice.StoreLimits(host_bytes=NBYTES)
    assert store.stats().in_host == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_host_memory_of_other_dtypes_and_formats(dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    peft = splice.PeftModel.from_pretrained(bases.LLAMA.build(dtype), folder / "a0", adapter_name="own")
    peft.save_pretrained(tmp_path / "bin", safe_serialization=False, selected_adapters=["own"])
    store = store_of(peft, {"x": folder / "a1", "bin": tmp_path / "bin" / "own"}, device_count=1, host_count=9)
    for _ in range(2):
        for name, place in (("x", folder / "a1"), ("bin", tmp_path / "bin" / "own")):
            fresh = splice.PeftModel.from_pretrained(bases.LLAMA.build(dtype), place)
            assert_close(
                run(peft, bases.LLAMA.inputs(1), adapter_names=[name]).float(),
                run(fresh, bases.LLAMA.inputs(1)).float(),
            )
    assert store.stats().host_hits == 2


def test_prefetching(model: Any, folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "broken", 1)
    save_file({"x": torch.zeros(1)}, tmp_path / "broken" / "adapter_model.safetensors")
    store = store_of(model, {"broken": tmp_path / "broken", **{name: folder / name for name in NAMES}}, device_count=3)
    seen: list[str] = []
    put = store._put
    store._put = lambda *args: (seen.append(threading.current_thread().name), put(*args))[1]  # type: ignore[method-assign]
    store.prefetch(["a1", "a2"]).result()
    assert store.on_device == ("a1", "a2") and all(name.startswith("splice-prefetch") for name in seen)
    right(model, folder, ["a1", "a2"])
    stats = store.stats()
    assert (stats.hits, stats.misses, stats.loads) == (2, 0, 2)
    for name in ("a1", "a2"):
        store.pin(name)
    future = store.prefetch(["a3", "a4", "a5"])  # one after the other in the one place that is left
    future.result()
    assert store.on_device == ("a1", "a2", "a5")
    with pytest.raises(splice.AdapterMismatchError):
        store.prefetch("broken").result()
    store.pin("a5")
    store.prefetch("a6").result()  # no room: nothing to worry about yet
    assert store.on_device == ("a1", "a2", "a5")


def test_prefetching_comes_as_far_as_host_memory(model: Any, folder: Path) -> None:
    store = store_of(model, folder, device_count=1, host_count=9)
    with in_a_call(model, ["a0"]):
        store.prefetch(["a1"]).result()
        assert store.on_device == ("a0",) and store.stats().in_host == 2
    right(model, folder, ["a1"])
    assert store.stats().host_hits == 1


def test_counters(model: Any, folder: Path) -> None:
    store = store_of(model, folder, device_count=2, host_count=9)
    assert str(store.stats()) == (
        "8 adapters registered: 0 on the model, 0.0 kB; 0 in host memory, 0.0 kB\n"
        "  asked for 0 times: 0 on the model, 0 in host memory, 0 on disk\n"
        "  0 loads; evicted: 0 from the model, 0 from host memory"
    )
    for names in (["a0", "a1"], ["a0"], ["a2"], ["a1"]):
        right(model, folder, names)
    stats = store.stats()
    assert stats[:11] == (8, 2, 2 * NBYTES, 3, 3 * NBYTES, 1, 1, 3, 2, 0, 4)
    assert 0 < stats.load_p50 <= stats.load_p99 < 5
    _, second, third = str(stats).splitlines()
    assert second == "  asked for 5 times: 1 on the model (20%), 1 in host memory, 3 on disk"
    assert third.startswith("  4 loads, p50 ") and third.endswith("evicted: 2 from the model, 0 from host memory")


# -- threads


class in_a_call:
    """Inside, a call of another thread is in progress."""

    def __init__(self, model: Any, names: Sequence[str] | None) -> None:
        self.model, self.names = model, names
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.failure: BaseException | None = None
        self.output: Any = None

    def _call(self) -> None:
        def stop(*_: Any) -> None:
            if threading.current_thread() is self.thread:
                self.inside.set()
                assert self.go_on.wait(20)

        hook = self.model.get_base_model().model.layers[0].register_forward_pre_hook(stop)
        try:
            inputs = bases.LLAMA.inputs(len(self.names or [1]))
            self.output = run(self.model, inputs, adapter_names=self.names)
        except BaseException as error:
            self.failure = error
        finally:
            hook.remove()
            self.inside.set()

    def __enter__(self) -> in_a_call:
        self.thread = threading.Thread(target=self._call)
        self.thread.start()
        assert self.inside.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self.thread.join(20)
        assert not self.thread.is_alive() and self.failure is None, self.failure


def started(function: Callable[..., Any], *args: Any) -> tuple[threading.Thread, list[Any]]:
    """A thread that calls the function, and where its result or error will be."""
    results: list[Any] = []

    def call() -> None:
        try:
            results.append(function(*args))
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    return thread, results


def test_an_adapter_in_use_stays_to_the_end_of_the_call(model: Any, folder: Path) -> None:
    store = store_of(model, folder, device_count=2)
    right(model, folder, ["a1"])
    with in_a_call(model, ["a0"]) as call:
        right(model, folder, ["a2"])  # a1 goes: it was used later, but nobody uses it
        assert store.on_device == ("a0", "a2")
        store.pin("a2")
        thread, results = started(run, model, bases.LLAMA.inputs(1))
        thread.join(20)
        waiting, results = started(lambda: right(model, folder, ["a3"]))
        deleting, deleted = started(model.delete_adapter, "a0")
        time.sleep(0.2)
        assert not results and not deleted and waiting.is_alive() and deleting.is_alive()
        assert "a0" in store.on_device
    for thread in (waiting, deleting):
        thread.join(20)
    assert results == [None] and deleted == [None], (results, deleted)
    assert_close(call.output, alone(folder / "a0", 1))
    assert set(store.on_device) <= {"a2", "a3"} and "a0" not in store


def test_a_call_keeps_the_adapter_that_was_active_when_it_began(model: Any, folder: Path) -> None:
    store = store_of(model, folder, device_count=2)
    model.set_adapter("a0", inference_mode=True)
    with in_a_call(model, None) as call:
        model.set_adapter("a1", inference_mode=True)
        with pytest.raises(splice.NoRoomError, match=r"cannot be evicted: 'a1' \(active\)"):
            run(model, bases.LLAMA.inputs(2), adapter_names=["a2", "a3"])
        assert store.on_device == ("a0", "a1")
    assert_close(call.output, alone(folder / "a0", 1))


def test_two_threads_load_one_adapter_once(model: Any, folder: Path) -> None:
    store = store_of(model, folder, host_count=9)
    threads = [started(lambda: right(model, folder, ["a1", "a2"])) for _ in range(4)]
    for thread, results in threads:
        thread.join(30)
        assert results == [None]
    stats = store.stats()
    assert stats.loads == 2 and stats.in_host == 2 and stats.hits + stats.misses + stats.host_hits == 8


def test_a_call_inside_a_call_does_not_wait_for_itself(model: Any, folder: Path) -> None:
    store_of(model, folder, device_count=1)
    seen: list[BaseException] = []

    def call_again(*_: Any) -> None:
        if not seen:
            seen.append(ValueError())
            with pytest.raises(splice.NoRoomError, match="used by calls that wait for others themselves") as raised:
                run(model, bases.LLAMA.inputs(1), adapter_names=["a1"])
            seen.append(raised.value)
            run(model, bases.LLAMA.inputs(1), adapter_names=["a0"])

    hook = model.get_base_model().model.layers[0].register_forward_pre_hook(call_again)
    run(model, bases.LLAMA.inputs(1), adapter_names=["a0"])
    hook.remove()
    assert len(seen) == 2
    right(model, folder, ["a1"])


def test_many_threads_with_little_room(model: Any, folder: Path) -> None:
    """Calls that need more than is left wait for one another, and none for ever."""
    store = store_of(model, folder, device_count=3)
    inputs = bases.LLAMA.inputs(3)
    calls = [random.Random(seed).sample(NAMES, 3) for seed in range(6)]
    fresh = {name: alone(folder / name, 3) for name in NAMES}

    def many(names: Sequence[str]) -> None:
        for turn in range(5):
            now = list(names[turn % 3 :])
            output = run(model, bases.LLAMA.inputs(3), adapter_names=[*now, *["own"] * (3 - len(now))])
            for row, name in enumerate(now):
                assert_close(output[row], fresh[name][row])

    threads = [started(many, names) for names in calls]
    for thread, results in threads:
        thread.join(60)
        assert results == [None], results
    assert len(store.on_device) <= 3 and inputs


# -- gradients


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_backward_needs_stays(checkpointing: bool, model: Any, folder: Path) -> None:
    store = store_of(model, folder, device_count=1)
    network = model.get_base_model()
    if checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
        network.train()
        for module in network.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()

    def gradient(before_backward: Callable[[], Any]) -> torch.Tensor:
        model.set_adapter("a0", inference_mode=True)
        embedded = network.get_input_embeddings()(bases.LLAMA.inputs(1)["input_ids"]).detach().requires_grad_()
        loss = model(inputs_embeds=embedded).logits.square().sum()
        model.set_adapter("own", inference_mode=True)
        before_backward()
        loss.backward()
        assert embedded.grad is not None
        return embedded.grad

    expected = gradient(lambda: None)

    def ask() -> None:
        with pytest.raises(splice.NoRoomError, match="needed by a backward that has not run yet"):
            model.set_adapter("a1")

    assert_close(gradient(ask), expected)
    gc.collect()
    model.set_adapter("a1", inference_mode=True)
    assert store.on_device == ("a1",)


def test_brought_in_by_a_call_in_inference_mode(model: Any, folder: Path) -> None:
    store_of(model, folder, host_count=9)
    with torch.inference_mode():
        model(**bases.LLAMA.inputs(1), adapter_names=["a0"])
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model.set_adapter("a0")
    model(**bases.LLAMA.inputs(1)).logits.sum().backward()


# -- slots, and other methods


def test_evicting_frees_a_slot_for_the_next(model: Any, folder: Path) -> None:
    store = store_of(model, folder)
    model.slots(3, RANK)
    for name in NAMES[:5]:
        right(model, folder, [name])
    assert store.on_device == ("a3", "a4") and not model.slots().outside
    assert in_slots(model, "a4") == 12 and store.stats().device_bytes == 0
    stacks = {id(host.stack) for host in model.base_model.hosts.values()}
    right(model, folder, ["a5", "a3"])
    assert {id(host.stack) for host in model.base_model.hosts.values()} == stacks
    assert model.slots().numbers.keys() == {"own", "a3", "a5"}
    right(model, folder, ["a5", "a6", "a7"])  # three at once: one of them beside the slots
    assert len(model.slots().numbers) == 3 and set(store.on_device) == {"a5", "a6", "a7"}
    assert store.stats().device_bytes == NBYTES
    store.limits = splice.StoreLimits(device_bytes=NBYTES // 2)
    with pytest.raises(splice.NoRoomError, match="no room on the model"):
        run(model, bases.LLAMA.inputs(3), adapter_names=["a1", "a2", "a3"])
    model.slots(0)
    assert store.stats().device_bytes == len(store.on_device) * NBYTES


def test_what_does_not_stack_is_beside_the_slots(model: Any, folder: Path, tmp_path: Path) -> None:
    doras = {f"d{seed}": write(tmp_path / f"d{seed}", seed, config_of(use_dora=True)) for seed in range(3)}
    store = store_of(model, {**doras, **{name: folder / name for name in NAMES}})
    model.slots(2, RANK)
    right(model, tmp_path, ["d0"])
    size = store.stats().device_bytes
    assert size > NBYTES and model.slots().numbers.keys() == {"own"}
    store.limits = splice.StoreLimits(device_bytes=2 * size)
    right(model, tmp_path, ["d1"])
    right(model, folder, ["a0"])
    right(model, tmp_path, ["d2"])
    assert store.on_device == ("d1", "a0", "d2")  # d0 made room: a0 takes none
    right(model, folder, ["a1"])
    assert store.on_device == ("d1", "d2", "a1") and in_slots(model, "a1") == 12


def test_adapters_of_other_layers(model: Any, tmp_path: Path) -> None:
    """A layer whose last adapter goes stays adapted, since others may be in the middle of calling it, until `unload`."""
    only = config_of(target_modules=["down_proj"])
    store = store_of(model, {"x": write(tmp_path / "x", 1, only), "y": write(tmp_path / "y", 2)}, device_count=1)
    original = bases.LLAMA.build()
    right(model, tmp_path, ["x"])
    right(model, tmp_path, ["y"])
    assert store.on_device == ("y",)
    assert_close(
        run(model, bases.LLAMA.inputs(2), adapter_names=["__base__", "own"])[0],
        run(original, bases.LLAMA.inputs(2))[0],
    )
    assert {status.name for status in model.get_layer_status()} == {
        f"model.{path}" for path, host in model.base_model.hosts.items() if host.layers
    }
    model.delete_adapter("own")
    network = model.unload()
    assert {name: type(m) for name, m in network.named_modules()} == {n: type(m) for n, m in original.named_modules()}
    assert all(p.requires_grad for p in network.parameters()) and not hasattr(network, "peft_config")


def test_the_base_stays_frozen_without_any_adapter(model: Any, folder: Path) -> None:
    store = store_of(model, folder)
    right(model, folder, ["a0"])
    model.delete_adapter("own")
    assert model.active_adapters == ["a0"]
    model.delete_adapter("a0")
    assert not model.peft_config and not any(p.requires_grad for p in model.parameters())
    right(model, folder, ["a1", "a2"])
    store.evict("a1")
    store.evict("a2")
    model.load_adapter(folder / "a3", "mine")
    model.set_adapter("mine")
    assert_close(run(model, bases.LLAMA.inputs(1)), alone(folder / "a3", 1))
    network = model.unload()
    assert all(p.requires_grad for p in network.parameters())


def test_a_copy_has_no_store(model: Any, folder: Path) -> None:
    store_of(model, folder)
    right(model, folder, ["a0"])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.base_model.store is None and list(twin.peft_config) == ["own", "a0"]
        assert_close(run(twin, bases.LLAMA.inputs(1), adapter_names=["a0"]), alone(folder / "a0", 1))
        assert twin.register_adapters({"a1": folder / "a1"}).names == ("a1",)
        right(twin, folder, ["a1"])


def test_a_mixed_model(folder: Path, tmp_path: Path) -> None:
    """Adapters of several methods, one of which does not stack."""
    ia3 = splice.get_peft_config({
        "peft_type": "IA3", "target_modules": list(bases.LLAMA.targets), "feedforward_modules": [], "task_type": "CAUSAL_LM",
    })  # fmt: skip
    write(tmp_path / "scale", 1, ia3)
    mixed: Any = splice.get_peft_model(bases.LLAMA.build(), config_of(), adapter_name="own", mixed=True).eval()
    store = store_of(mixed, {"scale": tmp_path / "scale", "a0": folder / "a0", "a1": folder / "a1"}, device_count=2)
    for name, place in (("scale", tmp_path), ("a0", folder), ("a1", folder), ("scale", tmp_path)):
        mixed.set_adapter(name, inference_mode=True)
        assert_close(run(mixed, bases.LLAMA.inputs(2)), alone(place / name, 2))
    assert len(store.on_device) == 2


# -- cost and memory


def work_among(count: int, outside: Path, one: Path) -> dict[str, int]:
    """Lines that each step runs on a model with so many adapters."""
    model: Any = splice.PeftModel.from_pretrained(bases.LLAMA.build(), outside, adapter_name="own")
    last, inputs = f"z{count}", bases.LLAMA.inputs(2)
    store = store_of(model, {f"z{number}": one for number in range(count + 3)})
    store.prefetch([f"z{number}" for number in range(count)]).result()
    store.limits = splice.StoreLimits(device_count=count)

    def disabled() -> None:
        with model.disable_adapter():
            pass

    steps: dict[str, Callable[[], Any]] = {
        "evict and load": lambda: run(model, inputs, adapter_names=[last, last]),
        "hit": lambda: run(model, inputs, adapter_names=[last, "z3"]),
        "load": lambda: model.load_adapter(one, "more"),
        "switch": lambda: model.set_adapter("z3", inference_mode=True),
        "train": lambda: model.set_adapter("more"),
        "train another": lambda: model.set_adapter("z3"),
        "disable": disabled,
        "delete": lambda: model.delete_adapter("more"),
        "delete a registered one": lambda: model.delete_adapter("z4"),
    }
    return {name: lines_run(step) for name, step in steps.items()}


def test_nothing_grows_with_the_number_of_adapters(outside: Path, tmp_path: Path) -> None:
    """Loading, switching, training, disabling, deleting, evicting: the same lines are run among 5 adapters and among 400."""
    one = write(tmp_path / "one", 1)
    few, many = work_among(5, outside, one), work_among(400, outside, one)
    assert {name: many[name] for name in few if abs(many[name] - few[name]) > 25} == {}, (few, many)


def test_evicted_adapters_leave_nothing_behind(model: Any, folder: Path) -> None:
    store = store_of(model, folder, device_count=2, host_count=1)
    for slots in (None, 4):
        model.slots(slots or 0, RANK)
        right(model, folder, ["a0", "a1"])
        layers = model.base_model.placed["a0"].values()
        refs = [weakref.ref(item) for item in (*layers, *parameters_of(model, "a0"))]
        del layers
        right(model, folder, ["a2", "a3"])
        gc.collect()
        assert not [ref for ref in refs if ref() is not None]
    assert store.stats().in_host == 1


def resident_memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Sixty adapters of three ranks, some of which do not stack."""
    for seed in range(60):
        rank = (2, 4, 8)[seed % 3]
        write(tmp_path / f"r{rank}/{seed}", seed, config_of(rank, use_dora=seed % 10 == 9))
    return tmp_path


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident memory from /proc")
def test_soak(model: Any, many: Path) -> None:
    """2,000 loads and evictions in random order, with calls from four threads: memory stays flat and outputs right."""
    store = store_of(model, many, device_count=10, host_count=15)
    model.slots(7, RANK)
    names, inputs = store.names, bases.LLAMA.inputs(4)
    fresh = {name: alone(many / name, 4) for name in names}
    wrong: list[BaseException] = []
    done = threading.Event()

    def call(seed: int) -> None:
        source = random.Random(seed)
        try:
            while not done.is_set():
                rows = source.sample(names, 2)
                rows = [*rows, source.choice(rows), source.choice(("own", "__base__"))]
                if seed % 2:
                    store.prefetch(source.sample(names, 2))
                output = run(model, inputs, adapter_names=rows)
                for row, name in enumerate(rows[:3]):
                    assert_close(output[row], fresh[name][row])
        except BaseException as error:
            wrong.append(error)
            done.set()

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    sizes: list[int] = []
    try:
        while not done.is_set() and store.stats().evictions < 2000:
            time.sleep(0.05)
            loads = store.stats().loads
            if loads >= 300 * (len(sizes) + 1):
                gc.collect()
                sizes.append(resident_memory())
    finally:
        done.set()
        for thread in threads:
            thread.join(60)
    assert not wrong, wrong[0]
    assert len(sizes) >= 5 and max(sizes[1:]) <= 1.05 * sizes[0], sizes
    store.prefetch([]).result()
    for name in names:
        output = run(model, bases.LLAMA.inputs(4), adapter_names=[name] * 4)
        assert_close(output, fresh[name])
    assert len(store.on_device) <= 10 and differ(fresh[names[0]], fresh[names[1]])
    assert store.stats().evictions >= 2000
