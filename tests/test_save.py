"""Saving: the layout on disk, what the reference makes of it, and that a crash leaves the old checkpoint or the new one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import splice
from splice.checkpoint.incoming import INCOMING_CONFIG
from tests import broken
from tests.broken import by_reference, in_fork, llama, load, output, parts


def two_adapters(tmp_path: Path) -> Any:
    model = load(parts().write(tmp_path / "a"))
    model.load_adapter(parts(seed=1).write(tmp_path / "b"), "other.one")
    return model


def test_the_layout(tmp_path: Path) -> None:
    """ "default" goes into the folder itself, any other into a subfolder of its name; other files stay."""
    model, out = two_adapters(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "optimizer.pt").write_bytes(b"kept")
    model.save_pretrained(out)
    files = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    own = ["adapter_config.json", "adapter_model.safetensors"]
    assert files == sorted(["README.md", *own, *(f"other.one/{name}" for name in own), "optimizer.pt"])
    with safe_open(out / broken.SAFETENSORS, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    assert json.loads((out / broken.CONFIG).read_text())["inference_mode"] is True


@pytest.mark.parametrize("as_bin", [False, True])
def test_the_reference_loads_what_is_saved(as_bin: bool, tmp_path: Path) -> None:
    model = two_adapters(tmp_path)
    model.save_pretrained(tmp_path / "out", safe_serialization=not as_bin)
    torch.testing.assert_close(output(by_reference(tmp_path / "out")), output(model))
    model.set_adapter("other.one")
    torch.testing.assert_close(output(by_reference(tmp_path / "out" / "other.one")), output(model))


def test_ten_steps_saved_and_loaded_again_are_the_same_to_the_bit(tmp_path: Path) -> None:
    model = load(parts().write(tmp_path / "a"), is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(12).reshape(2, 6) + 1
    for _ in range(10):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "trained")
    assert torch.equal(output(load(tmp_path / "trained")), output(model))
    assert not torch.equal(output(load(tmp_path / "a")), output(model))


def test_which_adapters_and_which_process(tmp_path: Path) -> None:
    model, out = two_adapters(tmp_path), tmp_path / "out"
    model.save_pretrained(out, is_main_process=False)
    assert not out.exists() or not any(p.is_file() for p in out.rglob("*"))
    model.save_pretrained(out, selected_adapters=["other.one"])
    assert not (out / broken.CONFIG).exists()
    assert (out / "other.one" / broken.CONFIG).exists()
    with pytest.raises(ValueError, match=r"\['nobody'\] cannot be saved: the model has \['default', 'other.one'\]"):
        model.save_pretrained(out, selected_adapters=["nobody"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        model.save_pretrained(tmp_path / "file")


@pytest.mark.parametrize("names", ["ours", "the base's"])
def test_a_state_dict_that_a_trainer_gathered(names: str, tmp_path: Path) -> None:
    model = load(parts().write(tmp_path / "a"))
    source = model if names == "ours" else torch.nn.ModuleDict({"base_model": model.base_model})
    gathered = {name: tensor * 2 for name, tensor in source.state_dict().items()}
    model.save_pretrained(tmp_path / "out", state_dict=gathered)
    saved, own = broken.tensors_in(tmp_path / "out"), splice.get_peft_model_state_dict(model)
    assert all(torch.equal(saved[name], own[name] * 2) for name in own)
    with pytest.raises(KeyError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "none", state_dict={})


def test_tensors_without_elements_warn(tmp_path: Path) -> None:
    model = load(parts().write(tmp_path / "a"))
    next(iter(broken.adapter_tensors(model).values())).data = torch.empty(0)
    with pytest.warns(splice.PeftWarning, match="ZeRO-3 or FSDP, gather the parameters"):
        model.save_pretrained(tmp_path / "out")


# -- a crash


def _steps(save: Callable[[], None], monkeypatch: pytest.MonkeyPatch, stop_before: int | None) -> int:
    """Run `save`, and end the process before its `stop_before`-th call that changes the disk; returns their number."""
    count = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == stop_before:
                os._exit(9)
            count += 1
            return real(*args, **kwargs)

        return call

    import safetensors.torch

    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(Path, "write_text", counted(Path.write_text))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    monkeypatch.setattr(safetensors.torch, "save_file", counted(safetensors.torch.save_file))
    save()
    monkeypatch.undo()
    return count


def test_a_crash_at_any_step_leaves_the_old_checkpoint_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two differ in their config (alpha) and in their weights, so a mixture would show."""
    old = load(parts(lora_alpha=8).write(tmp_path / "old"))
    new = load(parts(seed=1, lora_alpha=16).write(tmp_path / "new"))
    wanted = {"old": output(old), "new": output(new)}
    out = tmp_path / "out"
    total = _steps(lambda: new.save_pretrained(tmp_path / "rehearsal"), monkeypatch, None)
    assert total > 6
    seen = []
    for step in range(total + 1):
        old.save_pretrained(out)
        code = in_fork(lambda step=step: _steps(lambda: new.save_pretrained(out), monkeypatch, step))
        assert code == (9 if step < total else 0)
        found = output(load(out))
        seen.append(next(name for name, expected in wanted.items() if torch.equal(found, expected)))
    assert seen == sorted(seen, key=["old", "new"].index)
    assert set(seen) == {"old", "new"}
    old.save_pretrained(out)
    assert torch.equal(output(load(out)), wanted["old"])


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(parts().write(tmp_path / "a"))
    model.save_pretrained(tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path / "out")
    after = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir() if p.name != INCOMING_CONFIG}
    assert after == before


# -- a repository of the Hub, from its cache


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub with two commits of one repository, and no network."""
    import socket

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repo = tmp_path / "cache" / "models--someone--lora"
    for seed, commit in enumerate(("a" * 40, "b" * 40)):
        parts(seed=seed).write(repo / "snapshots" / commit)
        parts(seed=seed + 7).write(repo / "snapshots" / commit / "inside")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("b" * 40)
    (repo / "refs" / "v1").write_text("a" * 40)
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("options", "seed"),
    [({}, 1), ({"revision": "v1"}, 0), ({"revision": "a" * 40}, 0), ({"subfolder": "inside"}, 8)],
    ids=str,
)
def test_a_hub_id_without_network(options: dict[str, Any], seed: int, cached: Path, tmp_path: Path) -> None:
    model = load("someone/lora", cache_dir=cached, **options)
    assert torch.equal(output(model), output(load(parts(seed=seed).write(tmp_path / "same"))))


def test_config_and_weights_come_from_one_commit(cached: Path, tmp_path: Path) -> None:
    from splice.checkpoint.source import Source

    source = Source.from_options("someone/lora", None, {"cache_dir": cached})
    source.config_text()
    (cached / "models--someone--lora" / "refs" / "main").write_text("a" * 40)
    assert "b" * 40 in str(source.weights())


def test_what_the_cache_lacks(cached: Path) -> None:
    model = llama()
    with (
        broken.unchanged(model),
        pytest.raises(ValueError, match=r"'adapter_config.json' at 'someone/else'. It is not in the cache"),
    ):
        load("someone/else", model, cache_dir=cached)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json'"):
        load("someone/lora", cache_dir=cached, subfolder="nowhere")
