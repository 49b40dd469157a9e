"""Registering adapters: their configs and the headers of their files are read, and nothing is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

from splice.checkpoint.format import CONFIG_NAME, SAFETENSORS_NAME
from splice.checkpoint.header import check_header
from splice.checkpoint.incoming import preferred_weights
from splice.checkpoint.keys import renamed
from splice.checkpoint.source import Source
from splice.checkpoint.tensors import SafetensorsFile, open_weights
from splice.config import ReadConfig, read_config
from splice.errors import CheckpointError, UnsupportedFeatureError
from splice.kinds.reading import Checkpoint
from splice.kinds.registry import method_of
from splice.loading.load import without_collections
from splice.loading.options import LoadOptions
from splice.selection import BASE

# A folder with adapters below it, or name -> folder or Hub id.
Places: TypeAlias = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]

# Failures that the text of a report shows.
_SHOWN = 20


class Registered(NamedTuple):
    """`str(report)`: "registered 9,999 adapters in 3.2 s, 1 could not be", with a line for each that could not.

    Attributes:
        names: the adapters that are registered now, of those that were given.
        failed: name -> why it is not.
        seconds: how long it took.
    """

    names: tuple[str, ...]
    failed: Mapping[str, str]
    seconds: float

    def __str__(self) -> str:
        bad = f", {len(self.failed):,} could not be" if self.failed else ""
        adapters = f"{len(self.names):,} {'adapter' if len(self.names) == 1 else 'adapters'}"
        lines = [f"registered {adapters} in {self.seconds:.1f} s{bad}"]
        lines += [f"  {name!r}: {why}" for name, why in list(self.failed.items())[:_SHOWN]]
        if len(self.failed) > _SHOWN:
            lines.append(f"  and {len(self.failed) - _SHOWN} more, see `failed`")
        return "\n".join(lines)


class Stamp(NamedTuple):
    """What tells that a file has changed."""

    # In bytes.
    size: int
    # When it was written, in nanoseconds.
    modified: int
    # Which file it is: a save puts another one in the place of the old.
    inode: int

    @classmethod
    def of(cls, file: Path | int) -> Stamp:
        """Of a file, by path or by an open descriptor."""
        found = os.stat(file)
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)


@dataclass(frozen=True, eq=False)
class Entry:
    """A registered adapter: all that is known of it before it is loaded."""

    # Its name.
    name: str
    # Where it is. On the Hub it knows the commit that the config is of, and the weights will be.
    source: Source
    # Its config.
    read: ReadConfig
    # Its files as they were; empty of one on the Hub, where a commit does not change.
    stamps: Mapping[Path, Stamp]
    # Of its loads.
    options: LoadOptions

    def is_same_as(self, other: Entry) -> bool:
        """Whether it is of the same files as another one, unchanged, and loaded in the same way."""
        places = [(e.source.location, e.source.subfolder, e.source.commit) for e in (self, other)]
        ways = [(e.options.autocast, e.options.key_mapping, e.options.strict) for e in (self, other)]
        return places[0] == places[1] and ways[0] == ways[1] and self.stamps == other.stamps

    def open(self) -> Checkpoint:
        """Open the weights, as they were when the adapter was registered.

        Raises:
            CheckpointError: they cannot be found or read, or have changed since, or the config has.
        """
        path = Path(self.source.weights())
        if self.stamps:
            self._check_unchanged()
            if path not in self.stamps:
                raise CheckpointError(
                    f"adapter {self.name!r}: {path} was not there when it was registered.{self._mend}"
                )
        weights = open_weights(path)
        if isinstance(weights, SafetensorsFile) and self.stamps.get(path, now := Stamp.of(weights.descriptor)) != now:
            self._refuse(path)
        mapping = self.options.key_mapping
        names = renamed(weights.entries, mapping) if mapping else {name: name for name in weights.entries}
        return Checkpoint(self.read.config, weights, names, self.read.legacy, self.read.notes)

    def _check_unchanged(self) -> None:
        for path, before in self.stamps.items():
            if not path.exists():
                raise CheckpointError(f"adapter {self.name!r}: {path} was there when it was registered, and is gone")
            if Stamp.of(path) != before:
                self._refuse(path)

    def _refuse(self, path: Path) -> None:
        raise CheckpointError(f"adapter {self.name!r}: {path} has changed since it was registered.{self._mend}")

    @property
    def _mend(self) -> str:
        return f" To have it as it is now: `model.register_adapters({{{self.name!r}: {self.source.location!r}}})`."


def entry_of(name: str, place: str | os.PathLike[str], options: LoadOptions) -> Entry:
    """Read what there is to know of an adapter.

    Raises:
        CheckpointError: (a ValueError) it cannot be found or read.
        UnknownMethodError: (a KeyError) its `peft_type` is not known.
        UnsupportedFeatureError: it is not one that can come and go.
        ValueError: no adapter can have this name.
    """
    if not isinstance(name, str) or not name or name == BASE:
        raise ValueError(f"the name of an adapter must be a non-empty string other than {BASE!r}, got {name!r}")
    source = Source.from_options(place, options.extra.get("subfolder"), options.extra)
    stamps: dict[Path, Stamp] = {}
    is_local = source.is_local
    if is_local:
        # Before they are read: what is written meanwhile is found to have changed.
        stamps = {
            p: Stamp.of(p) for p in (source.folder / CONFIG_NAME, preferred_weights(source.folder)) if p and p.exists()
        }
    read = read_config(source.config_text(), source.config_place)
    method = method_of(read.config)
    if method.experts is not None or read.config.layer_ranges() is not None:
        what = "stands on other adapters" if method.experts is not None else "changes which layers the network has"
        raise UnsupportedFeatureError(
            f"{source.config_place}: an adapter that {what} cannot come and go. Load it with `model.load_adapter`."
        )
    if is_local:
        weights = source.weights()
        if weights.name == SAFETENSORS_NAME:
            check_header(weights)
    return Entry(name, source, read, stamps, options._replace(adapter_name=name))


def places_of(adapters: Places) -> Mapping[str, str | os.PathLike[str]]:
    """Name -> folder or Hub id of the adapters that somebody gives: those below a folder, or a dict as it is.

    Raises:
        CheckpointError: there is no such folder, or no adapter in it.
    """
    if isinstance(adapters, Mapping):
        return adapters
    root = Path(adapters)
    if not root.is_dir():
        raise CheckpointError(
            f"there is no folder {str(adapters)!r}. One adapter, or one on the Hub, is registered with its name: "
            f"`model.register_adapters({{'name': {str(adapters)!r}}})`."
        )
    found = {_name_of(folder, root): folder for folder in _folders(root)}
    if not found:
        raise CheckpointError(f"no folder below {root} has an {CONFIG_NAME}: there are no adapters")
    return found


def _name_of(folder: Path, root: Path) -> str:
    """The path below `root`, with slashes; of `root` itself its own name."""
    return folder.relative_to(root).as_posix() if folder != root else root.resolve().name


def _folders(root: Path) -> Iterator[Path]:
    """The folders with a config, in the order of their names; hidden ones are not entered, and links are followed once."""
    seen: set[str] = set()
    for folder, inside, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            inside.clear()
            continue
        seen.add(real)
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        if CONFIG_NAME in files:
            yield Path(folder)


@without_collections()
def register(adapters: Places, options: LoadOptions) -> tuple[dict[str, Entry], dict[str, str]]:
    """Read what there is to know of each; those that could be read, and why the others could not, by name.

    Raises:
        CheckpointError: there is no such folder, or no adapter in it.
    """
    entries: dict[str, Entry] = {}
    failed: dict[str, str] = {}
    for name, place in places_of(adapters).items():
        try:
            entries[name] = entry_of(name, place, options)
        except Exception as error:  # one that is bad, in whatever way, is no reason not to have the others
            failed[name] = f"{type(error).__name__}: {error}"
    return entries, failed
