"""Adapter configs: inert dataclasses, how they are read from `adapter_config.json` and written back."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

from splice.checkpoint.cleaning import check_kinds, cleaned
from splice.checkpoint.fields import UnknownFields, read_fields
from splice.checkpoint.foreign import what_config
from splice.checkpoint.format import CONFIG_NAME, FORMAT_VERSION
from splice.checkpoint.publishing import Publication, publish
from splice.checkpoint.source import Source
from splice.checkpoint.types import PeftType, TaskType
from splice.discovery import find_methods
from splice.errors import CheckpointError, FieldTypeError, PeftWarning, UnknownMethodError, warn


class TargetRule(NamedTuple):
    """Which modules of a base model a config selects. `kinds/matching.py` applies it, `kinds/targets.py` fills it in."""

    # Names at the end of paths, or one regular expression for whole paths, or "all-linear". None for the method's defaults.
    target_modules: set[str] | list[str] | str | None = None
    # Which of those are left out, said in the same way. None for none of them.
    exclude_modules: set[str] | list[str] | str | None = None
    # Indices of the layers (counted from 0) in which modules are selected. None for all layers.
    layers_to_transform: list[int] | int | None = None
    # Name of the list that these indices count in ("layers", "h"). None for the first number in a path, whatever it counts.
    layers_pattern: list[str] | str | None = None
    # Modules that are copied, trained and saved whole, by names at the end of paths. None for none.
    modules_to_save: list[str] | None = None
    # Parameters that are adapted without a layer of their own, by names at the end of paths. None for none.
    target_parameters: list[str] | None = None
    # How many of the targets are adapted, counted from the last one. None for all.
    last: int | None = None


C = TypeVar("C", bound="PeftConfig")

# The config classes of the methods, by `peft_type`. Each enters itself when it is defined, so that a method is one file and
# stands in no list.
_CLASSES: dict[PeftType, type[PeftConfig]] = {}
# The same by names of long ago.
_FORMER: dict[str, type[PeftConfig]] = {}


@dataclass
class PeftConfig:
    """Fields that every adapter config has, in the order of the reference's constructor.

    Raises:
        ValueError: `task_type` is not a `TaskType`.
    """

    # What the base model is for, which selects the class of the PeftModel; None for a plain PeftModel.
    task_type: TaskType | str | None = None
    # The method. A class that belongs to one sets it, whatever it is given.
    peft_type: PeftType | str | None = None
    # The base model's class and the module that it is from, for adapters without a task; None where the task tells it.
    auto_mapping: dict[str, str] | None = None
    # The version of the format that the config was written in; None becomes the present one.
    peft_version: str | None = None
    # Folder or Hub id of the base model. None is filled in when an adapter is made or saved.
    base_model_name_or_path: str | None = None
    # Revision of the base model on the Hub, not of the adapter; None for the newest.
    revision: str | None = None
    # Whether an adapter that is made from the config is frozen. Files always say true, so that a load freezes it.
    inference_mode: bool = False

    # The `peft_type` of its checkpoints; a class that says one is found by it. None where a class is only built upon.
    method: ClassVar[PeftType | None] = None
    # Names that earlier versions wrote as `peft_type` of what are its checkpoints.
    former_names: ClassVar[frozenset[str]] = frozenset()
    # Whether the method acts on the network's input or cache and not on its layers. Other libraries ask configs for it.
    is_prompt_learning: ClassVar[bool] = False
    # Whether it is the method of that name, which programs tell from all others.
    is_adaption_prompt: ClassVar[bool] = False
    # Fields that live in memory only: they are neither written nor read.
    runtime_fields: ClassVar[frozenset[str]] = frozenset({"runtime_config"})
    # Fields that older files have and that mean nothing to the config any more; a reading of the method may ask for them.
    legacy_fields: ClassVar[frozenset[str]] = frozenset()
    # Fields with values for single layers, by patterns of their paths -> the field with the value of all others.
    pattern_fields: ClassVar[Mapping[str, str]] = MappingProxyType({})
    # The field with the rank of every layer's update; empty where updates have none, or where no field says it.
    rank_field: ClassVar[str] = ""
    # What every layer's update is multiplied with: the first of these fields, divided by the sum of the others; empty where
    # that is 1, or where more is needed.
    scale_fields: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        name = cls.method
        if name in {base.method for base in cls.__mro__[1:] if issubclass(base, PeftConfig)}:
            return  # a class that is only built upon, or somebody's own variant of a method's config
        # A module that is imported anew defines its class once more, under the same name: that is no second method.
        if name is not None and _CLASSES.setdefault(name, cls).__qualname__ != cls.__qualname__:
            raise KeyError(f"{cls.__qualname__}: {name} is taken, by {_CLASSES[name].__module__}")
        _FORMER.update(dict.fromkeys(cls.former_names, cls))

    def __post_init__(self) -> None:
        if self.method is not None:
            self.peft_type = self.method
        if self.peft_version is None:
            self.peft_version = FORMAT_VERSION
        if self.task_type is not None and self.task_type not in list(TaskType):
            raise ValueError(
                f"Invalid task type: {self.task_type!r}. Must be one of the following task types: "
                f"{', '.join(member.value for member in TaskType)}"
            )

    @classmethod
    def check_file(cls, fields: Mapping[str, object], place: str) -> None:
        """Look at what a config file says, and leaves out, before it becomes a config.

        Raises:
            CheckpointError: the tensors of such an adapter mean something else today.
        """

    def target_rule(self) -> TargetRule:
        """The modules this config selects: none, unless a method says otherwise."""
        return TargetRule()

    def layer_ranges(self) -> list[list[int]] | None:
        """The ranges of the base's layers that such an adapter is put on, one after the other; None for each layer once."""
        return None

    def trained_biases(self) -> str:
        """Which biases of the base the adapter trains: "none", "all", or those of its targets ("<method>_only")."""
        return "none"

    def computed(self) -> dict[str, object]:
        """Fields that change the output of a trained adapter and that the shapes of its tensors do not tell, with values.

        What is the same for whoever only computes with the adapter has the same value here. Of fields with values for single
        layers (`pattern_fields`) the one for all others is enough.
        """
        return {}

    def to_dict(self) -> dict[str, Any]:
        """All serialisable fields; sets stay sets. `type(config)(**config.to_dict())` is the same config."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in self.runtime_fields}

    def to_json(self, auto_mapping: dict[str, str] | None = None) -> str:
        """The text of `adapter_config.json`: sorted keys, indent 2, `inference_mode` always true."""
        fields = self.to_dict() | {"inference_mode": True}
        if auto_mapping is not None:
            fields["auto_mapping"] = auto_mapping
        return json.dumps(fields, indent=2, sort_keys=True, default=_jsonable)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: object) -> None:
        """Write `adapter_config.json` into `save_directory`, which is made if needed.

        Raises:
            AssertionError: `save_directory` is a file.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise AssertionError(f"{folder} is a file; save_pretrained needs a directory")
        folder.mkdir(parents=True, exist_ok=True)
        # The one keyword that the reference understands; others it lets pass, and callers send them along.
        mapping = cast("dict[str, str] | None", kwargs.get("auto_mapping_dict"))
        (folder / CONFIG_NAME).write_text(self.to_json(mapping), encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ) -> str:
        """Upload `adapter_config.json`, as one commit; arguments as in `PeftModel.push_to_hub`."""
        # `max_shard_size` is of the signature that all libraries share; a config is never divided.
        target = Publication(
            repo_id, commit_message, commit_description, private, token, revision, create_pr, tags or ()
        )
        return publish(target, "config", self.save_pretrained, lambda folder: None)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: object
    ) -> PeftConfig:
        """Read the config of a checkpoint, as the class that its `peft_type` names.

        Args:
            pretrained_model_name_or_path: a local folder or a Hub id.
            subfolder: folder inside it.
            **kwargs: options of `huggingface_hub.hf_hub_download`; others are ignored.

        Raises:
            CheckpointError: (a ValueError) there is no readable `adapter_config.json`.
            UnknownMethodError: (a KeyError) `peft_type` names no known method.
        """
        source = Source.from_options(pretrained_model_name_or_path, subfolder=subfolder, options=kwargs)
        return parse_config(source.config_text(), str(source.config_place))

    @classmethod
    def from_peft_type(cls, **kwargs: object) -> PeftConfig:
        """A config of the method that `peft_type` names, else of this class, with these fields.

        Raises:
            UnknownMethodError: (a KeyError) there is no such method.
            TypeError: it has no such field.
        """
        named = kwargs.get("peft_type")
        make: Callable[..., PeftConfig] = cls if named is None else class_of(named, "the given fields")
        return make(**kwargs)

    @classmethod
    def check_kwargs(cls, **kwargs: object) -> dict[str, object]:
        """The fields as they are given: the constructor checks them."""
        return kwargs

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: object) -> dict[str, Any]:
        """The raw fields of a config file; `kwargs` are ignored."""
        return read_fields(Path(path_json_file).read_bytes(), str(path_json_file))


@dataclass
class PromptLearningConfig(PeftConfig):
    """What the methods that act on a model's input or cache share; nulls are filled from the base model."""

    # How many tokens are put in front of the input; it has to be given.
    num_virtual_tokens: int | None = None
    # Numbers per token: the hidden size of the base or, where tokens are keys and values, heads times the size of a head.
    token_dim: int | None = None
    # 2 for an encoder-decoder whose halves have tokens of their own, 1 for any other network.
    num_transformer_submodules: int | None = None
    # Heads of one attention layer; where they share keys and values, of those.
    num_attention_heads: int | None = None
    # Layers of the base.
    num_layers: int | None = None
    # Modules that are copied, trained and saved whole, by names at the end of paths. None for none.
    modules_to_save: list[str] | None = None

    # So do all of these methods: they act on the input or the cache.
    is_prompt_learning: ClassVar[bool] = True

    def target_rule(self) -> TargetRule:
        return TargetRule(modules_to_save=self.modules_to_save)


class ReadConfig(NamedTuple):
    """A config as it was read."""

    # The config.
    config: PeftConfig
    # Fields of long ago that still say something, and that no config has any more.
    legacy: Mapping[str, object] = MappingProxyType({})
    # A line for each value that was spelled in another way.
    notes: tuple[str, ...] = ()


def parse_config(text: bytes, place: str) -> PeftConfig:
    """Make the config of a checkpoint. Fields that its class does not know are left out with a warning.

    A field that this version knows and cannot honour is the business of the method's own check
    (`Method.check`), which refuses it: there, the effect on the output is known.
    """
    return read_config(text, place).config


def read_config(text: bytes, place: str) -> ReadConfig:
    """As `parse_config`, together with old fields, and with notes on values that are read otherwise than they are written."""
    fields = read_fields(text, place)
    if "peft_type" not in fields:
        what = what_config(fields)
        raise CheckpointError(f"{place} has no 'peft_type': it does not say which kind of adapter this is.{what}")
    # Then everything that a file may have and should not, before the config is made: its constructor would only say that it
    # got an unexpected keyword argument.
    config_class = class_of(fields["peft_type"], place)
    config_class.check_file(fields, place)
    known = {f.name for f in dataclasses.fields(config_class) if f.init} - config_class.runtime_fields
    old = {k: v for k, v in fields.items() if k in config_class.legacy_fields}
    unknown = UnknownFields({k: v for k, v in fields.items() if k not in known and k not in old})
    if unknown.values:
        warn(_unknown_fields_message(unknown, config_class, fields, place), PeftWarning)
    values, notes = cleaned({k: v for k, v in fields.items() if k in known}, config_class)
    try:
        check_kinds(values, config_class)
        make: Callable[..., PeftConfig] = config_class
        return ReadConfig(make(**values), old, tuple(notes))
    # Of the same classes: callers of the reference catch these.
    except TypeError as error:
        raise FieldTypeError(f"{place}: {error}") from error
    except ValueError as error:
        raise type(error)(f"{place}: {error}") from error


def _unknown_fields_message(unknown: UnknownFields, cls: type, fields: Mapping[str, object], place: str) -> str:
    text = (
        f"{place}: unexpected fields {sorted(unknown.values)} for {cls.__name__} are ignored "
        f"(written by version {fields.get('peft_version')}, this is {FORMAT_VERSION})."
    )
    if unknown.switched_on:
        text += (
            f" Of these, {unknown.switched_on} are switched on: if they change what the adapter computes, "
            "the output is not what was trained; a newer version may support them."
        )
    return text


def _jsonable(value: object) -> list[object]:
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)  # sorted, so that the same config is the same file
    raise TypeError(f"{type(value).__name__} cannot be written to {CONFIG_NAME}: {value!r}")


def class_of(peft_type: object, place: str) -> type[PeftConfig]:
    """The config class of a method; `place` says where its name was read, for the message.

    Raises:
        CheckpointError: (a ValueError) the name is no string.
        UnknownMethodError: (a KeyError) there is no such method.
    """
    find_methods()
    if not isinstance(peft_type, str):
        some = next(iter(_CLASSES)).value
        raise CheckpointError(f"{place}: peft_type is {peft_type!r}; it must be a string such as {some!r}")
    if peft_type in _CLASSES:
        return _CLASSES[PeftType(peft_type)]
    if peft_type in _FORMER:
        return _FORMER[peft_type]
    known = ", ".join(sorted(member.value for member in _CLASSES))
    if peft_type.upper() in list(PeftType) and peft_type.upper() not in _CLASSES:
        raise UnknownMethodError(
            f"{place}: adapters of the method {peft_type.upper()!r} cannot be loaded by this version of splice yet. It can "
            f"load those of {known}."
        )
    text = f"{place}: unknown peft_type {peft_type!r}; known are {known}."
    if peft_type.upper() in _CLASSES:
        text += f" Did you mean {peft_type.upper()!r}?"
    raise UnknownMethodError(text)


def all_classes() -> Mapping[PeftType, type[PeftConfig]]:
    """The config class of every method, by its `peft_type`."""
    find_methods()
    return MappingProxyType(_CLASSES)


def get_peft_config(config_dict: Mapping[str, object]) -> PeftConfig:
    """The config object of `config_dict["peft_type"]`; unknown fields are a TypeError, as in any constructor."""
    make: Callable[..., PeftConfig] = class_of(config_dict["peft_type"], "the given dict")
    return make(**config_dict)


def copy_config(config: C, **changes: object) -> C:
    """An independent copy with `changes`: neither shares containers with the other."""
    # Not `dataclasses.replace`: it calls the constructor, whose checks and warnings have had their say, and it loses what
    # other libraries have set on the object.
    clone = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(clone, name, value)
    return clone
