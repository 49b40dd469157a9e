"""Where a checkpoint comes from: a local folder or a Hub id becomes local files, all of one commit."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from splice.config import CONFIG_NAME
from splice.errors import CheckpointError

SAFETENSORS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"


@dataclass
class Source:
    """A checkpoint's place. Nothing is fetched before it is asked for.

    Attributes:
        location: the folder or Hub id, as the caller gave it.
        subfolder: folder inside it.
        options: options for `huggingface_hub.hf_hub_download`.
        commit: the commit of a Hub repository that the first file came from; all others are asked of the same one.
    """

    location: str
    subfolder: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None

    @classmethod
    def from_options(
        cls, location: str | os.PathLike[str], subfolder: str | None, options: Mapping[str, Any]
    ) -> Source:
        """Keep those of `options` that a download understands; the others are not for us and are ignored."""
        if options.get("use_auth_token") and not options.get("token"):
            options = {**options, "token": options["use_auth_token"]}
        return cls(os.fspath(location), subfolder, {k: v for k, v in options.items() if k in _download_options()})

    @property
    def folder(self) -> Path:
        """The local folder, where the location is one."""
        return Path(self.location, self.subfolder) if self.subfolder else Path(self.location)

    @property
    def is_local(self) -> bool:
        return Path(self.location).is_dir()

    @property
    def config_place(self) -> str:
        return str(self.folder / CONFIG_NAME) if self.is_local else f"{CONFIG_NAME} of {self.location}"

    def config_text(self) -> bytes:
        """The bytes of `adapter_config.json`; those of a save that a crash cut off between its two files.

        Raises:
            CheckpointError: it cannot be found, and the message says what is there instead.
        """
        from splice.saving import finished_config

        path = self._file(CONFIG_NAME)
        if path is None:
            raise CheckpointError(f"Can't find '{CONFIG_NAME}' at '{self._shown_place()}'.{self._found_instead()}")
        weights = path.parent / SAFETENSORS_NAME
        return finished_config(path, weights)

    def weights(self) -> Path:
        """The file of the tensors; safetensors is preferred where both exist.

        Raises:
            CheckpointError: there is neither.
        """
        for name in (SAFETENSORS_NAME, BIN_NAME):
            path = self._file(name)
            if path is not None:
                return path
        raise CheckpointError(
            f"'{self._shown_place()}' has an {CONFIG_NAME} but neither {SAFETENSORS_NAME} nor {BIN_NAME}: the adapter's "
            f"weights are missing.{self._found_instead()}"
        )

    def _shown_place(self) -> str:
        return str(self.folder) if self.is_local or not self.subfolder else f"{self.location}/{self.subfolder}"

    def _file(self, name: str) -> Path | None:
        if self.is_local or _looks_like_a_path(self.location):
            path = self.folder / name
            return path if path.exists() else None
        return self._download(name)

    def _download(self, name: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        options = dict(self.options)
        if self.commit is not None:
            options["revision"] = self.commit
        if self.subfolder:
            options["subfolder"] = str(PurePosixPath(self.subfolder))
        try:
            path = Path(hf_hub_download(self.location, name, **options))
        except LocalEntryNotFoundError as error:
            # Offline: a file that the cache lacks may still exist on the Hub, so this is only "not found" for the
            # second of two names.
            if self.commit is not None:
                return None
            raise CheckpointError(
                f"Can't find '{name}' of '{self.location}' in the cache, and the Hub cannot be reached: {error}"
            ) from error
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise CheckpointError(f"Can't find '{name}' at '{self._shown_place()}': {error}") from error
        self.commit = self.commit or _commit_of(path)
        return path

    def _found_instead(self) -> str:
        if not self.is_local:
            if _looks_like_a_path(self.location):
                return " There is no such folder."
            return ""
        if not self.folder.is_dir():
            return f" There is no folder {self.subfolder!r} in '{self.location}'."
        inside = sorted(p.parent.relative_to(self.folder).as_posix() for p in self.folder.glob(f"*/{CONFIG_NAME}"))
        if inside:
            return f" There are checkpoints in its subfolders: {', '.join(inside[:5])}; pass one as `subfolder`."
        names = sorted(p.name for p in self.folder.iterdir())
        return f" The folder holds: {', '.join(names[:8]) or 'nothing'}."


def _looks_like_a_path(location: str) -> bool:
    """Whether a location that is no folder was meant as one: Hub ids have at most one slash and no dots in front."""
    return (
        location.startswith((".", "/", "~", "\\")) or location.count("/") > 1 or (os.sep != "/" and os.sep in location)
    )


def _commit_of(path: Path) -> str | None:
    """The commit of a file in the Hub's cache, which keeps every commit in a folder of its name under `snapshots`."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def _download_options() -> set[str]:
    from huggingface_hub import hf_hub_download

    return set(inspect.signature(hf_hub_download).parameters) - {"repo_id", "filename", "subfolder"}
