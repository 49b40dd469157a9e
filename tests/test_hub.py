"""The Hub over real HTTP: what is fetched, from which commit, with which token, and what happens when it goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from packaging.version import Version

import splice
from tests.broken import BIN, CONFIG, SAFETENSORS, Parts, by_reference, llama, load, output, parts, unchanged
from tests.hub import TOKEN, Hub

LORA = "someone/lora"


def files(made: Parts, tmp_path: Path, as_bin: bool = False) -> dict[str, bytes]:
    folder = made.write(tmp_path / f"written{len(list(tmp_path.iterdir()))}", as_bin=as_bin)
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def plain(seed: int, tmp_path: Path) -> torch.Tensor:
    """The output with the adapter of this seed, loaded from a folder."""
    return output(load(parts(seed=seed).write(tmp_path / f"plain{seed}")))


def refused(message: str, place: str = LORA, **options: Any) -> None:
    model = llama()
    with unchanged(model), pytest.raises(splice.CheckpointError, match=message):
        load(place, model, **options)


# -- which files, of which commit


def test_revisions_and_a_subfolder(hub: Hub, tmp_path: Path) -> None:
    """A branch, a commit's id, a folder inside; and nothing is asked twice."""
    repository = hub.repository(LORA)
    first = repository.commit(files(parts(seed=1), tmp_path))
    inside = {f"in/side/{name}": content for name, content in files(parts(seed=3), tmp_path).items()}
    repository.commit({**files(parts(seed=2), tmp_path), **inside})
    repository.commit(files(parts(seed=4), tmp_path), branch="dev")
    for options, seed in (
        ({}, 2),
        ({"revision": "dev"}, 4),
        ({"revision": first}, 1),
        ({"subfolder": "in/side"}, 3),
        ({"subfolder": "in/side/", "revision": "main"}, 3),
    ):
        assert torch.equal(output(load(LORA, **options)), plain(seed, tmp_path)), options
    hub.requests.clear()
    assert torch.equal(output(load(LORA, revision=first)), plain(1, tmp_path))
    assert hub.requests == []
    load(LORA)
    assert [line.partition(" ")[0] for line in hub.requests] == ["HEAD", "HEAD"]  # one file, and where it lies
    assert len(splice.load_peft_weights(LORA, revision="dev")) == 8
    assert splice.PeftConfig.from_pretrained(LORA, subfolder="in/side").r == 4


@pytest.mark.parametrize("where", ["cache_dir", "local_dir"])
def test_config_and_weights_are_of_one_commit(where: str, hub: Hub, tmp_path: Path) -> None:
    """Somebody pushes a new adapter, of another rank, between the two requests."""
    repository = hub.repository(LORA)
    repository.commit(files(parts(seed=1), tmp_path))
    newer = files(parts(seed=2, r=8), tmp_path)

    def push_before(line: str) -> None:
        if line == f"HEAD /{LORA}/resolve/main/{SAFETENSORS}" or ".safetensors" in line:
            hub.before = lambda line: None
            repository.commit(newer)

    hub.before = push_before
    # A folder named as those of the cache are must not be mistaken for one.
    model = load(LORA, **{where: tmp_path / "snapshots" / "mine"})
    assert len(repository.commits) == 2
    assert torch.equal(output(model), plain(1, tmp_path))
    assert load(LORA).peft_config["default"].r == 8


def test_weights_given_a_config_are_found_whatever_their_format(hub: Hub, tmp_path: Path) -> None:
    hub.repository(LORA).commit({BIN: files(parts(seed=1), tmp_path, as_bin=True)[BIN]})
    config = splice.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    for options in ({}, {"local_files_only": True}):
        assert torch.equal(output(load(LORA, config=config, **options)), plain(1, tmp_path))
        assert len(splice.load_peft_weights(LORA, **options)) == 8


# -- who may see it


def test_a_private_repository(hub: Hub, tmp_path: Path) -> None:
    hub.repository(LORA, private=True).commit(files(parts(seed=1), tmp_path))
    refused(f"Can't find '{CONFIG}' at '{LORA}': there is no such repository, or it is private and the token")
    refused("there is no such repository, or it is private", token="hf_wrong")
    hub.requests.clear()
    hub.tokens.clear()
    assert torch.equal(output(load(LORA, token=TOKEN)), plain(1, tmp_path))
    for line, token in zip(hub.requests, hub.tokens):
        assert token == (None if line.startswith("GET /large") else TOKEN), line
    assert splice.PeftConfig.from_pretrained(LORA, use_auth_token=TOKEN).r == 4
    refused("there is no such repository", subfolder="elsewhere")


# -- without the network


def test_the_second_load_needs_no_network(hub: Hub, tmp_path: Path) -> None:
    hub.repository(LORA).commit({f"in/{n}": c for n, c in files(parts(seed=1), tmp_path).items()})
    load(LORA, subfolder="in")
    hub.requests.clear()
    assert torch.equal(output(load(LORA, subfolder="in", local_files_only=True)), plain(1, tmp_path))
    assert hub.requests == []
    refused(f"Can't find '{CONFIG}' at '{LORA}/other'.*not in the cache", subfolder="other", local_files_only=True)
    assert hub.requests == []


_OFFLINE = """
import socket, sys
import splice
from tests.broken import by_reference, load, output
def refuse(*args): raise SystemExit("the network was used")
socket.socket.connect = socket.getaddrinfo = refuse
assert output(load("someone/lora", subfolder="in")).equal(output(load(sys.argv[1])))
try:
    by_reference("someone/lora", subfolder="in")
except Exception as error:
    print("the reference:", error)
"""


def test_a_process_that_is_offline(hub: Hub, tmp_path: Path) -> None:
    """By way of the environment alone. The reference does not find the weights of a subfolder that is in the cache."""
    folder = parts(seed=1).write(tmp_path / "plain")
    hub.repository(LORA).commit({f"in/{n}": c for n, c in files(parts(seed=1), tmp_path).items()})
    load(LORA, subfolder="in")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_ENDPOINT": hub.url}
    program = [sys.executable, "-W", "ignore", "-c", _OFFLINE, str(folder)]
    done = subprocess.run(program, env={**os.environ, **offline}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the reference: Cannot find the requested files in the disk cache" in done.stdout


# -- what goes wrong on the way


@pytest.mark.skipif(Version(huggingface_hub.__version__) < Version("1"), reason="huggingface_hub resumes it from 1 on")
def test_a_connection_that_breaks_is_resumed(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100)
    hub.repository(LORA).commit(files(parts(seed=1), tmp_path))
    hub.break_after = 1000
    assert torch.equal(output(load(LORA)), plain(1, tmp_path))
    assert hub.ranges == [None, "bytes=1000-"]


def test_a_transfer_that_fails_leaves_nothing_behind(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub answers, and the place where it keeps large files does not."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.repository(LORA).commit(files(parts(seed=1), tmp_path))

    def gone(line: str) -> None:
        if line.startswith("GET /large"):
            raise ConnectionResetError

    hub.before = gone
    refused(f"Can't find '{SAFETENSORS}' at '{LORA}'")
    hub.before = lambda line: None
    assert torch.equal(output(load(LORA)), plain(1, tmp_path))


def test_a_repository_of_something_else(hub: Hub, tmp_path: Path) -> None:
    """What is there is named."""
    made = files(parts(), tmp_path)
    hub.repository(LORA).commit({CONFIG: made[CONFIG], "model.safetensors": made[SAFETENSORS]})
    refused(f"neither {SAFETENSORS} nor {BIN}.*The repository holds: {CONFIG}, model.safetensors")
    hub.repository("someone/base").commit({"config.json": b"{}"})
    refused(f"Can't find '{CONFIG}' at 'someone/base'. The repository holds: config.json", "someone/base")
    hub.repository("someone/many").commit({f"step-{i}/{n}": c for i in (1, 2) for n, c in made.items()})
    refused("checkpoints in its subfolders: step-1, step-2; pass one as `subfolder`", "someone/many")
    refused("the repository has no such `revision`", revision="v9")


def test_the_hub_is_lost_between_the_two_files(hub: Hub, tmp_path: Path) -> None:
    """The weights are not called missing where nobody could be asked."""
    repository = hub.repository(LORA)
    repository.commit({CONFIG: files(parts(), tmp_path)[CONFIG]})
    splice.PeftConfig.from_pretrained(LORA)
    refused(f"Can't find {SAFETENSORS} or {BIN} of '{LORA}'.*not in the cache", local_files_only=True)


def test_a_local_folder_asks_nobody(hub: Hub, tmp_path: Path) -> None:
    model = load(parts(seed=1).write(tmp_path / "a"))
    model.save_pretrained(tmp_path / "b")
    assert hub.requests == []


# -- pushing

CARD = "README.md"


def test_an_adapter_is_pushed_and_loaded_again(hub: Hub, tmp_path: Path) -> None:
    """Into a repository that is made for it, in one commit."""
    model = load(parts(seed=1).write(tmp_path / "a"))
    url = model.push_to_hub(LORA, private=True, token=TOKEN, tags=["mine"], commit_message="Begin")
    repository = hub.repositories[LORA]
    assert repository.private and len(repository.commits) == 2  # the empty one of a new repository, and ours
    assert url.commit_url == f"{hub.url}/{LORA}/commit/{repository.branches['main']}"
    assert set(repository.files()) == {".gitattributes", CONFIG, SAFETENSORS, CARD}
    assert b"- mine\n" in repository.files()[CARD] and b"library_name: peft" in repository.files()[CARD]
    assert torch.equal(output(load(LORA, token=TOKEN)), plain(1, tmp_path))
    (tmp_path / "pushed").mkdir()
    for name in (CONFIG, SAFETENSORS):
        (tmp_path / "pushed" / name).write_bytes(repository.files()[name])
    torch.testing.assert_close(output(by_reference(tmp_path / "pushed")), plain(1, tmp_path))


def test_what_is_in_the_repository_stays(hub: Hub, tmp_path: Path) -> None:
    written = b"---\nlicense: mit\ntags:\n- theirs\n---\n# Written by hand\n"
    repository = hub.repository(LORA)
    repository.commit({CARD: written, "notes.txt": b"mine", ".gitattributes": b""})
    model = load(parts(seed=1).write(tmp_path / "a"))
    model.load_adapter(parts(seed=2).write(tmp_path / "b"), "other")
    model.push_to_hub(LORA, token=TOKEN, tags=["mine"])
    found = repository.files()
    assert found["notes.txt"] == b"mine"
    card = found[CARD].decode()
    assert "# Written by hand" in card and "license: mit" in card
    assert card.index("- theirs") < card.index("- lora") < card.index("- mine")
    assert torch.equal(output(load(LORA, subfolder="other")), plain(2, tmp_path))
    again = len(repository.commits)
    model.push_to_hub(LORA, token=TOKEN, selected_adapters=["default"], safe_serialization=False)
    assert len(repository.commits) == again + 1 and BIN in repository.files()


def test_a_card_on_the_hub_that_cannot_be_read_stays(hub: Hub, tmp_path: Path) -> None:
    """And the adapter is pushed all the same."""
    written = b"---\ntags: [unclosed\n---\n# Theirs\n"
    repository = hub.repository(LORA)
    repository.commit({CARD: written})
    model = load(parts(seed=1).write(tmp_path / "a"))
    with pytest.warns(splice.PeftWarning, match="README.md cannot be read, so it is left as it is"):
        model.push_to_hub(LORA, token=TOKEN, tags=["mine"])
    assert repository.files()[CARD] == written
    assert torch.equal(output(load(LORA)), plain(1, tmp_path))


def test_pushed_to_a_branch(hub: Hub, tmp_path: Path) -> None:
    repository = hub.repository(LORA)
    repository.commit({".gitattributes": b"", CARD: b"# Main\n"})
    load(parts(seed=1).write(tmp_path / "a")).push_to_hub(LORA, token=TOKEN, revision="dev")
    assert set(repository.files()) == {".gitattributes", CARD}
    assert b"# Main" in repository.files("dev")[CARD]
    assert torch.equal(output(load(LORA, revision="dev")), plain(1, tmp_path))


@pytest.mark.parametrize("revision", [None, "dev"])
def test_pushed_as_a_pull_request(revision: str | None, hub: Hub, tmp_path: Path) -> None:
    """It becomes a reference of its own; the branch that it is meant for is neither made nor moved.

    `huggingface_hub` 2 refuses one that is meant for another branch than the main one.
    """
    repository = hub.repository(LORA)
    repository.commit({".gitattributes": b"", CARD: b"# Main\n"})
    repository.commit({CARD: b"# Dev\n"}, "dev", parent=True)
    before = dict(repository.branches)
    model = load(parts(seed=1).write(tmp_path / "a"))
    url, refusal = None, ""
    try:
        url = model.push_to_hub(LORA, token=TOKEN, revision=revision, create_pr=True)
    except ValueError as error:
        refusal = str(error)
    assert not any("/branch/" in request for request in hub.requests)
    if url is None:
        assert revision is not None and "`create_pr=True` with `revision='dev'`" in refusal
        assert repository.branches == before
        return
    pull = repository.branches.pop("refs/pr/1")
    assert repository.branches == before and url.commit_url.endswith(f"/commit/{pull}")
    assert url.pr_url == f"{hub.url}/{LORA}/discussions/1"
    assert (b"# Dev" if revision else b"# Main") in repository.commits[pull][CARD]
    assert torch.equal(output(load(LORA, revision=pull)), plain(1, tmp_path))


def test_a_pull_request_for_a_branch_that_is_not_there(hub: Hub, tmp_path: Path) -> None:
    from huggingface_hub.errors import RevisionNotFoundError

    repository = hub.repository(LORA)
    repository.commit({".gitattributes": b""})
    model = load(parts(seed=1).write(tmp_path / "a"))
    with pytest.raises(RevisionNotFoundError):
        model.push_to_hub(LORA, token=TOKEN, revision="dev", create_pr=True)
    assert set(repository.branches) == {"main"} and len(repository.commits) == 1


def test_pushed_to_a_pull_request_that_is_there(hub: Hub, tmp_path: Path) -> None:
    """Its reference is no branch that could be made."""
    repository = hub.repository(LORA)
    repository.branches["refs/pr/1"] = repository.commit({".gitattributes": b""})
    load(parts(seed=1).write(tmp_path / "a")).push_to_hub(LORA, token=TOKEN, revision="refs/pr/1")
    assert not any("/branch/" in request for request in hub.requests)
    assert set(repository.files()) == {".gitattributes"}
    assert torch.equal(output(load(LORA, revision=repository.branches["refs/pr/1"])), plain(1, tmp_path))


def test_a_config_is_pushed_by_itself(hub: Hub, tmp_path: Path) -> None:
    splice.LoraConfig(r=5, target_modules=["q_proj"]).push_to_hub(LORA, token=TOKEN)
    assert set(hub.repositories[LORA].files()) == {".gitattributes", CONFIG}
    assert splice.PeftConfig.from_pretrained(LORA).r == 5


def test_a_push_that_cannot_be(hub: Hub, tmp_path: Path) -> None:
    """What is wrong with the model is said before anything is asked of the Hub; without the right token nothing comes."""
    from huggingface_hub.errors import HfHubHTTPError

    model = load(parts(seed=1).write(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"Adapters \['none'\] cannot be saved"):
        model.push_to_hub(LORA, token=TOKEN, selected_adapters=["none"])
    assert hub.requests == []
    with pytest.raises(HfHubHTTPError, match="401"):
        model.push_to_hub(LORA, token="hf_wrong")
    assert hub.repositories == {}
