"""Where a checkpoint comes from: a local folder or a Hub id becomes local files, all of one commit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from splice.checkpoint.download import download, listing
from splice.checkpoint.format import BIN_NAME, CONFIG_NAME, SAFETENSORS_NAME
from splice.checkpoint.incoming import finished_config
from splice.errors import CheckpointError


@dataclass(eq=False, repr=False)
class Source:
    """A checkpoint's place. Nothing is fetched before it is asked for."""

    # The folder or Hub id, as the caller gave it.
    location: str
    # A folder inside it, where the checkpoint lies; None for the location itself.
    subfolder: str | None = None
    # What the caller passed on; a download takes from it what `huggingface_hub.hf_hub_download` understands.
    options: Mapping[str, object] = field(default_factory=dict)
    # The commit of the Hub repository that the first file came from; all others are asked of the same one. Otherwise a push
    # between two downloads would give the config of one adapter and the weights of another.
    commit: str | None = None
    # Why the last file could not be asked for, where the Hub could not be reached and the cache lacks it.
    unreachable: Exception | None = None

    @classmethod
    def from_options(
        cls, location: str | os.PathLike[str], subfolder: str | None, options: Mapping[str, object]
    ) -> Source:
        """The source that the arguments of a load name. `options` may hold more than a download understands."""
        return cls(os.fspath(location), subfolder, dict(options))

    @cached_property
    def folder(self) -> Path:
        """The local folder, where the location is one."""
        return Path(self.location, self.subfolder) if self.subfolder else Path(self.location)

    @property
    def is_local(self) -> bool:
        """Whether the location is a folder of this machine; one that is comes before a repository of the same name."""
        return Path(self.location).is_dir()

    @property
    def config_place(self) -> str:
        """Where the config is, for messages."""
        return str(self.folder / CONFIG_NAME) if self.is_local else f"{CONFIG_NAME} of {self.location}"

    def config_text(self) -> bytes:
        """The bytes of `adapter_config.json`; those of a save that a crash cut off between its two files.

        Raises:
            CheckpointError: it cannot be found, and the message says what is there instead.
        """
        path = self._file(CONFIG_NAME)
        if path is None:
            raise CheckpointError(f"Can't find '{CONFIG_NAME}' at '{self._shown_place()}'.{self._why_not()}")
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder, not a file")
        return finished_config(path)

    def weights(self) -> Path:
        """The file of the tensors; safetensors is preferred where both exist.

        Raises:
            CheckpointError: there is neither.
        """
        for name in (SAFETENSORS_NAME, BIN_NAME):
            path = self._file(name)
            if path is not None:
                return path
        if self.unreachable is not None:
            raise CheckpointError(
                f"Can't find {SAFETENSORS_NAME} or {BIN_NAME} of '{self._shown_place()}'.{self._why_not()}"
            ) from self.unreachable
        raise CheckpointError(
            f"'{self._shown_place()}' has an {CONFIG_NAME} but neither {SAFETENSORS_NAME} nor {BIN_NAME}: the adapter's "
            f"weights are missing.{self._why_not()}"
        )

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a file of this name beside it. On the Hub it is fetched; what cannot be is not there."""
        return self._file(name) is not None

    def fetched(self, name: str) -> Path | None:
        """The file of this name beside the checkpoint, likewise; None where there is none."""
        return self._file(name)

    def _shown_place(self) -> str:
        return str(self.folder) if self.is_local or not self.subfolder else f"{self.location}/{self.subfolder}"

    @property
    def _on_disk(self) -> bool:
        # A path with a typing error is no question for the Hub: it would answer that the repository may be private.
        return self.is_local or looks_like_a_path(self.location)

    def _file(self, name: str) -> Path | None:
        if self._on_disk:
            path = self.folder / name
            return path if path.exists() else None
        # One file at a time: a snapshot of the repository may hold the checkpoints of a whole training.
        inside = str(PurePosixPath(self.subfolder or "", name))
        found = download(self.location, inside, self.options, self.commit)
        self.unreachable = found.unreachable
        self.commit = self.commit or found.commit
        return found.path

    def _why_not(self) -> str:
        """What is there instead, as a sentence with a space in front."""
        if self.is_local:
            return self._found_instead()
        if self._on_disk:
            return " There is no such folder."
        if self.unreachable is not None:
            return f" It is not in the cache, and the Hub was not asked or cannot be reached: {self.unreachable}"
        names = listing(self.location, self.options, self.commit)
        folders = sorted(str(PurePosixPath(n).parent) for n in names if PurePosixPath(n).name == CONFIG_NAME)
        others = [f for f in folders if f not in (".", self.subfolder)]
        if others and CONFIG_NAME not in names:
            return f" There are checkpoints in its subfolders: {', '.join(others[:5])}; pass one as `subfolder`."
        return f" The repository holds: {', '.join(names[:8])}." if names else ""

    def _found_instead(self) -> str:
        if not self.folder.is_dir():
            return f" There is no folder {self.subfolder!r} in '{self.location}'."
        inside = sorted(p.parent.relative_to(self.folder).as_posix() for p in self.folder.glob(f"*/{CONFIG_NAME}"))
        if inside:
            return f" There are checkpoints in its subfolders: {', '.join(inside[:5])}; pass one as `subfolder`."
        names = sorted(p.name for p in self.folder.iterdir())
        return f" The folder holds: {', '.join(names[:8]) or 'nothing'}."


def looks_like_a_path(location: str) -> bool:
    """Whether a location that is no folder was meant as one: Hub ids have at most one slash and no dots in front."""
    return (
        location.startswith((".", "/", "~", "\\")) or location.count("/") > 1 or (os.sep != "/" and os.sep in location)
    )
