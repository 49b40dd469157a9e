"""Files of a repository on the Hub, fetched into its cache. `huggingface_hub` is imported when the first one is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

from splice.errors import CheckpointError

# Arguments of `hf_hub_download`, from the caller's own: that function says what they may be, and checks them.
_Arguments: TypeAlias = dict[str, Any]


def fetched_folder(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder in the cache with those files of a repository whose names fit one of the patterns.

    Raises:
        CheckpointError: it cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:
        raise CheckpointError(f"{repository} is no folder, and cannot be fetched from the Hub: {error}") from error


class Found(NamedTuple):
    """The answer to a request for one file."""

    # Where it lies now; None if the repository does not have it.
    path: Path | None
    # The commit that it is of; None where that cannot be told.
    commit: str | None = None
    # The error, where the file is not in the cache and nobody could be asked whether it exists. It is handed on and not
    # raised: whoever asks for one of two files goes on to the second.
    unreachable: Exception | None = None


def download(repository: str, name: str, options: Mapping[str, object], commit: str | None) -> Found:
    """Fetch one file, or find it in the cache.

    Args:
        repository: its id on the Hub.
        name: the file's path in it, with "/".
        options: arguments for `huggingface_hub.hf_hub_download`; what that does not know is ignored.
        commit: ask for the file of this commit, whatever revision `options` name.

    Raises:
        CheckpointError: the repository or the revision is not there or not ours to see, or the transfer failed.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    arguments = _understood(options)
    if commit is None and arguments.get("local_dir") and not arguments.get("local_files_only"):
        commit = _commit_now(repository, name, arguments)
    if commit is not None:
        arguments["revision"] = commit
    folder, _, file = name.rpartition("/")
    if arguments.get("local_files_only") and not arguments.get("local_dir"):
        return _in_cache(repository, name, arguments, commit)
    try:
        path = Path(hf_hub_download(repository, file, subfolder=folder or None, **arguments))
    except LocalEntryNotFoundError as error:  # of both kinds, so it comes first
        return Found(None, commit, error)
    except EntryNotFoundError:
        return Found(None, commit)
    except Exception as error:
        # Of which library the error of a broken connection is, depends on the version of huggingface_hub.
        raise CheckpointError(f"Can't find '{file}' at '{_place(repository, folder)}': {_cause(error)}") from error
    return Found(path, commit or _commit_of(path, name))


def _in_cache(repository: str, name: str, arguments: _Arguments, commit: str | None) -> Found:
    """Look a file up in the cache, without any use of the network."""
    # Not by `hf_hub_download(local_files_only=True)`, which may send a request for other things than the file.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        folder, _, file = name.rpartition("/")
        raise CheckpointError(f"Can't find '{file}' at '{_place(repository, folder)}': {_cause(error)}") from error
    where = {key: arguments[key] for key in ("cache_dir", "revision", "repo_type") if arguments.get(key) is not None}
    found = try_to_load_from_cache(repository, name, **where)
    if isinstance(found, str):
        return Found(Path(found), commit or _commit_of(Path(found), name))
    if found is not None:  # the Hub said once that there is no such file
        return Found(None, commit)
    return Found(None, commit, LocalEntryNotFoundError(f"{name} of {repository} is not in the cache"))


def listing(repository: str, options: Mapping[str, object], commit: str | None) -> list[str]:
    """The names of the files in a repository; for a message, so nothing if they cannot be had."""
    from huggingface_hub import HfApi

    arguments = _understood(options)
    # Whatever happens here, an error is being told already, and that one matters.
    try:
        api = HfApi(endpoint=arguments.get("endpoint"), token=arguments.get("token"))
        return sorted(api.list_repo_files(repository, revision=commit or arguments.get("revision")))
    except Exception:
        return []


def _understood(options: Mapping[str, object]) -> _Arguments:
    """Those of the caller's options that `hf_hub_download` has parameters for."""
    from huggingface_hub import hf_hub_download

    # Asked of its signature and not of a list here, which would have to follow every release of huggingface_hub.
    known = set(inspect.signature(hf_hub_download).parameters) - {"repo_id", "filename", "subfolder"}
    arguments = {key: value for key, value in options.items() if key in known}
    # What older releases of huggingface_hub call `token`.
    if options.get("use_auth_token") and not arguments.get("token"):
        arguments["token"] = options["use_auth_token"]
    return arguments


def _commit_now(repository: str, name: str, arguments: _Arguments) -> str | None:
    """The commit that a revision stands for: a download into a folder of the caller's does not tell it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    endpoint = arguments.get("endpoint")
    url = hf_hub_url(repository, name, revision=arguments.get("revision"), endpoint=endpoint)
    try:
        return get_hf_file_metadata(url, token=arguments.get("token")).commit_hash
    except Exception:
        return None  # the download itself meets the same trouble, and reports it or finds the file in the folder


def _commit_of(path: Path, name: str) -> str | None:
    """The commit of a file in the Hub's cache, which keeps each one's files under `snapshots/<commit>/`."""
    root = path.parents[len(PurePosixPath(name).parts) - 1]
    return root.name if root.parent.name == "snapshots" else None


def _place(repository: str, folder: str) -> str:
    return f"{repository}/{folder}" if folder else repository


def _cause(error: Exception) -> str:
    """What is wrong and what to do about it, before what the Hub's own client says."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        hint = "access to the repository must be asked for on its page, and a token passed as `token=`. "
    elif isinstance(error, RepositoryNotFoundError):
        hint = "there is no such repository, or it is private and the token (`token=`) is missing or wrong. "
    elif isinstance(error, RevisionNotFoundError):
        hint = "the repository has no such `revision`. "
    else:
        hint = ""
    return f"{hint}({error})" if hint else str(error)
