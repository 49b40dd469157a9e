"""Where checkpoints come from: folders, and repositories of the Hub by way of their cache, all of one commit."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import splice
from splice.checkpoint.source import Source
from tests import broken
from tests.broken import BIN, CONFIG, SAFETENSORS, in_fork, llama, load, output, parts, unchanged

OLD, NEW = "a" * 40, "b" * 40


def same_as(seed: int, tmp_path: Path) -> torch.Tensor:
    """The output with the adapter of this seed, loaded the plain way."""
    return output(load(parts(seed=seed).write(tmp_path / f"same{seed}")))


# -- folders


class _PathLike:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


SPELLINGS: dict[str, Callable[[Path], Any]] = {
    "str": str,
    "Path": lambda path: path,
    "os.PathLike": _PathLike,
    "trailing slash": lambda path: f"{path}/",
    "with dots": lambda path: path / ".." / path.name,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_local_folder(spelling: str, tmp_path: Path) -> None:
    place = SPELLINGS[spelling](parts(seed=3).write(tmp_path / "adapter"))
    assert torch.equal(output(load(place)), same_as(3, tmp_path))
    assert len(splice.load_peft_weights(place)) == 8
    assert splice.PeftConfig.from_pretrained(place).r == 4


@pytest.mark.parametrize("place", ["adapter", "./adapter", "deep/er/adapter", "../here/adapter", "one/two"])
def test_a_relative_folder(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that exists is meant, also where its path could be an id of the Hub."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    parts(seed=3).write(Path(place))
    assert torch.equal(output(load(place)), same_as(3, tmp_path))


def test_a_linked_folder(tmp_path: Path) -> None:
    parts(seed=3).write(tmp_path / "adapter")
    (tmp_path / "link").symlink_to(tmp_path / "adapter")
    assert torch.equal(output(load(tmp_path / "link")), same_as(3, tmp_path))


@pytest.mark.parametrize("subfolder", ["inside", "inside/deeper", "inside/"])
def test_a_subfolder(subfolder: str, tmp_path: Path) -> None:
    parts(seed=1).write(tmp_path / "all")
    parts(seed=2).write(tmp_path / "all" / subfolder)
    model = load(tmp_path / "all", subfolder=subfolder)
    assert torch.equal(output(model), same_as(2, tmp_path))
    model.load_adapter(tmp_path / "all", "outer")
    model.load_adapter(tmp_path / "all", "inner", subfolder=subfolder)
    model.set_adapter("outer")
    assert torch.equal(output(model), same_as(1, tmp_path))
    model.set_adapter("inner")
    assert torch.equal(output(model), same_as(2, tmp_path))
    assert len(splice.load_peft_weights(tmp_path / "all", subfolder=subfolder)) == 8
    assert splice.PeftConfig.from_pretrained(tmp_path / "all", subfolder=subfolder).r == 4


def test_the_adapters_name_is_no_folder(tmp_path: Path) -> None:
    parts(seed=1).write(tmp_path / "all")
    parts(seed=2).write(tmp_path / "all" / "other")
    assert torch.equal(output(load(tmp_path / "all", adapter_name="other")), same_as(1, tmp_path))


def _refused(place: Any, message: str, **options: Any) -> None:
    model = llama()
    with unchanged(model), pytest.raises(splice.CheckpointError, match=message) as caught:
        load(place, model, **options)
    assert isinstance(caught.value, ValueError)


def test_a_subfolder_that_is_not_there(tmp_path: Path) -> None:
    """The folder above is never taken instead."""
    parts().write(tmp_path)
    _refused(tmp_path, "Can't find 'adapter_config.json'.*no folder 'wrong' in", subfolder="wrong")


def test_a_folder_of_checkpoints(tmp_path: Path) -> None:
    for name in ("checkpoint-200", "checkpoint-100"):
        parts().write(tmp_path / name)
    _refused(tmp_path, "Can't find 'adapter_config.json'.*checkpoint-100, checkpoint-200; pass one as `subfolder`")


def test_a_folder_with_very_many_checkpoints(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"checkpoint-{number:03}").mkdir()
        (tmp_path / f"checkpoint-{number:03}" / CONFIG).write_text("{}")
    with pytest.raises(splice.CheckpointError) as caught:
        load(tmp_path)
    assert len(str(caught.value)) < 600


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("")
    _refused(tmp_path, "Can't find 'adapter_config.json'.*The folder holds: config.json, model.safetensors")


def test_an_empty_folder(tmp_path: Path) -> None:
    _refused(tmp_path, "Can't find 'adapter_config.json'.*The folder holds: nothing")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (parts().write(tmp_path) / SAFETENSORS).unlink()
    message = f"neither {SAFETENSORS} nor {BIN}.*weights are missing.*The folder holds: {CONFIG}"
    _refused(tmp_path, message)
    with pytest.raises(ValueError, match=f"neither {SAFETENSORS} nor {BIN}"):
        splice.load_peft_weights(tmp_path)


def test_weights_that_trainers_name_otherwise(tmp_path: Path) -> None:
    """What is there is named, so that the mistake can be seen."""
    folder = parts().write(tmp_path)
    (folder / SAFETENSORS).rename(folder / "model.safetensors")
    _refused(folder, "neither.*The folder holds: adapter_config.json, model.safetensors")


@pytest.mark.parametrize("place", ["/nowhere/at/all", "./nowhere", "../nowhere", "~/nowhere", "a/b/c/d"])
def test_a_folder_that_does_not_exist(place: str, no_network: None) -> None:
    _refused(place, "Can't find 'adapter_config.json' at .*There is no such folder")


def test_a_file_in_place_of_a_folder(tmp_path: Path, no_network: None) -> None:
    file = parts().write(tmp_path) / SAFETENSORS
    _refused(file, "Can't find 'adapter_config.json'")


def test_a_config_that_is_a_folder(tmp_path: Path) -> None:
    folder = parts().write(tmp_path)
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()
    _refused(folder, CONFIG)


def test_a_git_lfs_pointer_in_place_of_the_config(tmp_path: Path) -> None:
    folder = parts().write(tmp_path)
    (folder / CONFIG).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 700\n")
    _refused(folder, "adapter_config.json.*Git LFS pointer")


@pytest.mark.parametrize("place", [None, 3, b"bytes", ["list"]], ids=str)
def test_what_is_no_place(place: Any) -> None:
    model = llama()
    with unchanged(model), pytest.raises((TypeError, ValueError)):
        load(place, model)


# -- the Hub


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any use of the network is a failure that nothing catches."""

    class Used(BaseException):
        pass

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise Used

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of the Hub with a repository `someone/lora` of two commits, as huggingface_hub lays it out."""
    root = tmp_path / "cache"
    repo = root / "models--someone--lora"
    for seed, commit in ((1, OLD), (2, NEW)):
        _cached(repo, commit, "", seed)
        _cached(repo, commit, "inside", seed + 10)
    (repo / "refs" / "pr").mkdir(parents=True)
    for name, commit in (("main", NEW), ("v1", OLD), ("pr/1", OLD)):
        (repo / "refs" / name).write_text(commit)
    return root


def _cached(repo: Path, commit: str, subfolder: str, seed: int, as_bin: bool = False) -> None:
    """Put a checkpoint there as links to blobs, which is what a download leaves."""
    folder = repo / "snapshots" / commit / subfolder
    parts(seed=seed).write(folder, as_bin=as_bin)
    (repo / "blobs").mkdir(exist_ok=True)
    for file in list(folder.iterdir()):
        if file.is_file() and not file.is_symlink():
            blob = repo / "blobs" / f"{seed}{file.name}"
            file.rename(blob)
            file.symlink_to(os.path.relpath(blob, folder))


@pytest.fixture(params=["local_files_only", "HF_HUB_OFFLINE"])
def offline(
    request: pytest.FixtureRequest, cache: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> Iterator[dict[str, Any]]:
    """The two ways to say so; gives the options of a load."""
    if request.param == "HF_HUB_OFFLINE":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        return {"cache_dir": cache}
    return {"cache_dir": cache, "local_files_only": True}


@pytest.mark.parametrize(
    ("options", "seed"),
    [
        ({}, 2),
        ({"revision": "v1"}, 1),
        ({"revision": "refs/pr/1"}, 1),
        ({"revision": OLD}, 1),
        ({"revision": None}, 2),
        ({"subfolder": "inside"}, 12),
        ({"subfolder": "inside/"}, 12),
        ({"subfolder": "inside", "revision": "v1"}, 11),
        ({"token": False}, 2),
        ({"torch_dtype": "auto", "device_map": None, "trust_remote_code": True}, 2),
    ],
    ids=str,
)
def test_a_repository_without_network(
    options: dict[str, Any], seed: int, offline: dict[str, Any], tmp_path: Path
) -> None:
    if options.get("revision") == "refs/pr/1":
        repo = tmp_path / "cache" / "models--someone--lora" / "refs"
        (repo / "refs" / "pr").mkdir(parents=True)
        (repo / "refs" / "pr" / "1").write_text(OLD)
    model = load("someone/lora", **offline, **options)
    assert torch.equal(output(model), same_as(seed, tmp_path))
    model.load_adapter("someone/lora", "again", **offline, **options)
    model.set_adapter("again")
    assert torch.equal(output(model), same_as(seed, tmp_path))
    own = {k: v for k, v in options.items() if k in ("revision", "subfolder")}
    assert splice.PeftConfig.from_pretrained("someone/lora", **offline, **own).r == 4
    tensors = splice.load_peft_weights("someone/lora", **offline, **own)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in parts(seed=seed).tensors.items())


def test_the_cache_of_the_environment(cache: Path, tmp_path: Path, no_network: None) -> None:
    """In a process of its own, since huggingface_hub reads the environment when it is imported."""
    import subprocess
    import sys

    same_as(2, tmp_path)
    program = (
        "import splice, socket\n"
        "from tests.broken import load, output\n"
        "def refuse(*a, **k): raise SystemExit('the network was used')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        f"assert output(load('someone/lora')).equal(output(load({str(tmp_path / 'same2')!r})))\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_only_a_pickle_in_the_cache(offline: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    repo = cache / "models--someone--old"
    _cached(repo, OLD, "", 5, as_bin=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(OLD)
    assert torch.equal(output(load("someone/old", **offline)), same_as(5, tmp_path))


def test_an_id_without_a_user(offline: dict[str, Any], cache: Path, tmp_path: Path) -> None:
    (cache / "models--someone--lora").rename(cache / "models--lora")
    assert torch.equal(output(load("lora", **offline)), same_as(2, tmp_path))


def test_config_and_weights_are_of_one_commit(
    offline: dict[str, Any], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The branch moves on while the checkpoint is being loaded."""
    config_text = Source.config_text

    def moving(self: Source) -> bytes:
        text = config_text(self)
        (cache / "models--someone--lora" / "refs" / "main").write_text(OLD)
        return text

    monkeypatch.setattr(Source, "config_text", moving)
    assert torch.equal(output(load("someone/lora", **offline)), same_as(2, tmp_path))
    assert torch.equal(output(load("someone/lora", **offline)), same_as(1, tmp_path))


def test_weights_are_not_taken_from_another_commit(offline: dict[str, Any], cache: Path) -> None:
    (cache / "models--someone--lora" / "snapshots" / NEW / SAFETENSORS).unlink()
    model = llama()
    with (
        unchanged(model),
        pytest.raises(splice.CheckpointError, match=f"Can't find {SAFETENSORS} or {BIN} of 'someone/lora'. It is not"),
    ):
        load("someone/lora", model, **offline)


@pytest.mark.parametrize(
    ("place", "options"),
    [
        ("someone/else", {}),
        ("nobody", {}),
        ("someone/lora", {"revision": "v2"}),
        ("someone/lora", {"revision": "c" * 40}),
        ("someone/lora", {"subfolder": "outside"}),
    ],
    ids=str,
)
def test_what_the_cache_lacks(place: str, options: dict[str, Any], offline: dict[str, Any]) -> None:
    model = llama()
    with unchanged(model), pytest.raises(splice.CheckpointError, match="Can't find 'adapter_config.json'") as caught:
        load(place, model, **offline, **options)
    assert place in str(caught.value)
    if "revision" not in options:
        with pytest.raises(ValueError, match=f"(?s)Can't find .*{place}"):
            splice.load_peft_weights(place, **offline, subfolder="elsewhere")


@pytest.mark.parametrize("place", ["", "a b", "user/na me", "user/--x", "user/x.", "üser/lora"])
def test_what_is_neither_a_folder_nor_an_id(place: str, offline: dict[str, Any]) -> None:
    model = llama()
    with unchanged(model), pytest.raises(splice.CheckpointError, match="Can't find 'adapter_config.json'"):
        load(place, model, **offline)


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Online, and nobody answers: what is cached loads, what is not is refused in one sentence."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")

    def run() -> None:
        model = load("someone/lora", cache_dir=cache, endpoint="http://127.0.0.1:9")
        assert torch.equal(output(model), same_as(2, tmp_path))
        with pytest.raises(splice.CheckpointError, match="'someone/else'"):
            load("someone/else", cache_dir=cache, endpoint="http://127.0.0.1:9")

    assert in_fork(run) == 0


def test_options_of_a_download_reach_it_and_others_do_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder, seen = parts().write(tmp_path), []

    def download(repo_id: str, filename: str, *, subfolder: Any = None, revision: Any = None, token: Any = None,
                 cache_dir: Any = None, force_download: bool = False, local_files_only: bool = False) -> str:  # fmt: skip
        seen.append((repo_id, filename, subfolder, revision, token, cache_dir, force_download, local_files_only))
        return str(folder / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    load("someone/lora", revision="v1", token="t", cache_dir="c", subfolder="s", force_download=True, r=16, foo="bar")
    assert [row[1] for row in seen] == [CONFIG, SAFETENSORS]
    assert all(row == ("someone/lora", row[1], "s", "v1", "t", "c", True, False) for row in seen)
    seen.clear()
    load("someone/lora", use_auth_token="old")
    assert all(row[4] == "old" for row in seen)


def test_the_file_wins_over_the_arguments(tmp_path: Path) -> None:
    model = load(parts().write(tmp_path), r=16, lora_alpha=99, target_modules=["k_proj"])
    assert model.peft_config["default"].r == 4
    assert model.peft_config["default"].lora_alpha == 8
    assert model.load_report.placed == 8


def test_the_config_object_wins_over_the_file(tmp_path: Path) -> None:
    """Then the file is not even needed."""
    folder = parts().write(tmp_path)
    (folder / CONFIG).unlink()
    config = splice.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    ours = output(load(folder, config=config))
    import peft

    reference = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    torch.testing.assert_close(ours, output(broken.by_reference(folder, config=reference)))
