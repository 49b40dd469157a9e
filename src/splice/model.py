"""PeftModel: the facade people call. Each method checks its arguments and hands over to the part that does the work."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import nn

from splice.base.foreign_models import key_renaming
from splice.checkpoint.card import write_card
from splice.checkpoint.publishing import Publication, publish
from splice.checkpoint.types import TaskType
from splice.config import PeftConfig
from splice.errors import PeftWarning, warn
from splice.loading.creating import new_adapter
from splice.loading.in_memory import checkpoint_from
from splice.loading.load import Loaded, LoadResult, load_into, load_new
from splice.loading.options import LoadOptions
from splice.loading.remaking import remake
from splice.loading.report import LoadReport
from splice.loading.saving import facts_of, save
from splice.many_adapters import ManyAdapters
from splice.model_attributes import ModelViews
from splice.surgery.calls import call_network
from splice.surgery.dequantising import dequantised
from splice.surgery.slot_rows import SlotRows
from splice.surgery.tuner import Tuner
from splice.surgery.undo import Undo, whole_or_undone
from splice.tuner_commands import combine

# The classes of PeftModels by their task. `tasks.py` defines them, and each enters itself.
_CLASSES: dict[TaskType, type[PeftModel]] = {}

T = TypeVar("T")


def classes_by_task() -> dict[TaskType, type[PeftModel]]:
    """The class of a PeftModel for each task."""
    return _CLASSES


class PeftModel(ManyAdapters, ModelViews):
    """A base model with adapters.

    The base model is changed in place and reversibly: its layers stay the same objects with the same parameters, and
    take on subclasses of their own classes while an adapter is on them. All names are those of the tree of modules: the
    base's tensors keep theirs, and an adapter's stand on the layer it adapts (`...q_proj.lora_A.<adapter>.weight`).

    Args:
        model: the base model.
        peft_config: config of a first, new adapter.
        adapter_name: its name in memory; any non-empty string.
        autocast_adapter_dtype: hold adapters of half-precision bases in float32.
        low_cpu_mem_usage: leave the new tensors on the meta device, to be loaded.

    Raises:
        NoMatchingPeftModuleError: the config selects nothing.
        ValueError: the config cannot be applied to a layer that it selects.
    """

    # The task that the class is for; None for any.
    task: ClassVar[TaskType | None] = None
    # Methods that the base model must have, for a task.
    needs: ClassVar[tuple[str, ...]] = ()
    # Whether its adapters may be of several methods.
    mixes_methods: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.task is not None:
            _CLASSES.setdefault(cls.task, cls)

    @classmethod
    def class_for(cls, config: PeftConfig) -> type[PeftModel]:
        """The class of a PeftModel with this config: by its task type, else this one. A mixed model is for any task."""
        return cls if cls.mixes_methods or config.task_type is None else _CLASSES[TaskType(config.task_type)]

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        unwrap = self._wrap(model)
        tuner = self.base_model
        undo = Undo(tuner)
        undo.at_last(unwrap)
        try:
            tuner.check_new(adapter_name)
            plan, built = new_adapter(tuner, peft_config, self.heads, autocast_adapter_dtype, low_cpu_mem_usage)
            tuner.commit(adapter_name, peft_config, built, freeze_base=True, plan=plan)
            tuner.selection.set([adapter_name])
            tuner.set_requires_grad(adapter_name, not peft_config.inference_mode)
        except BaseException:
            undo.run()
            raise

    def _wrap(self, model: nn.Module) -> Callable[[], None]:
        """Become the facade of `model`, which is not changed; the result makes this one the facade no longer."""
        if isinstance(model, PeftModel):
            raise ValueError(
                f"the given model is a PeftModel already, with the adapters {list(model.peft_config)}. Add another one with "
                "`model.load_adapter(path, adapter_name=...)` or `model.add_adapter(...)`; or start again from "
                "`model.unload()`."
            )
        for name in self.needs:
            getattr(model, name)
        nn.Module.__init__(self)
        self.base_model = Tuner.of(model)
        # What the last load did; None before the first.
        self.load_report: LoadReport | None = None
        # The network may have been another facade's, which goes on being its own if what comes now fails.
        tuner = self.base_model
        mixed, tuner.mixes_methods = tuner.mixes_methods, self.mixes_methods
        leave = tuner.stand_in(self._modules)

        def unwrap() -> None:
            tuner.mixes_methods = mixed
            leave()

        return unwrap

    # -- loading

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str] | None = None,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        strict: bool = True,
        tensors: Mapping[str, torch.Tensor] | None = None,
        **kwargs: object,
    ) -> PeftModel:
        """Load a trained adapter onto `model`, which is changed in place. If anything fails, it is as it was.

        Args:
            model: the base model.
            model_id: folder of a checkpoint, or its id on the Hub.
            adapter_name: the adapter's name in memory; any non-empty string.
            is_trainable: load it for further training. Otherwise it is frozen and the whole model is in eval mode.
            config: used instead of the checkpoint's own; it is not changed.
            autocast_adapter_dtype: hold adapters of half-precision bases in float32. Otherwise in the base's dtype.
            ephemeral_gpu_offload: recorded in the config's `runtime_config`.
            low_cpu_mem_usage: accepted for compatibility: no load initialises what it is about to overwrite.
            key_mapping: regular expression -> replacement for the checkpoint's names, behind the prefix.
            strict: refuse a checkpoint that does not fit to the last tensor. False: warn and load what fits.
            tensors: the adapter's tensors under their names in a checkpoint, in place of `model_id`; with `config`. They
                are copied, and the dict is not changed.
            **kwargs: `subfolder`, `ignore_mismatched_sizes`, `torch_device`, `resize_vocabulary` (give the base the number of
                tokens that the checkpoint was trained with, as `resize_token_embeddings` does), and options of
                `huggingface_hub.hf_hub_download` (`revision`, `token`, `cache_dir`, `local_files_only`...).

        Returns:
            A PeftModel of the class that the config's `task_type` names, with the adapter active.

        Raises:
            CheckpointError: (a ValueError) the checkpoint cannot be found or read.
            AdapterMismatchError: (a RuntimeError) it does not fit this model.
            NoMatchingPeftModuleError: (a ValueError) its config selects nothing in this model.
            UnknownMethodError: (a KeyError) its `peft_type` is not known.
        """
        options = LoadOptions(
            adapter_name,
            is_trainable,
            autocast_adapter_dtype,
            ephemeral_gpu_offload,
            key_mapping,
            strict,
            kwargs,
            time.perf_counter(),
        )
        mapping = key_mapping if key_mapping is not None else key_renaming(model)
        checkpoint = checkpoint_from(model_id, tensors, config, options, mapping)
        # Past `__init__`, which would make a new adapter.
        peft_model: PeftModel = object.__new__(cls.class_for(checkpoint.config))
        unwrap = peft_model._wrap(model)
        tuner = peft_model.base_model
        undo = Undo(tuner)
        undo.at_last(unwrap)
        try:
            loaded = load_new(tuner, checkpoint, options, peft_model.heads, True, undo)
            tuner.selection.set([adapter_name])
            peft_model._after_load(loaded, is_trainable, undo.modules)
            return peft_model
        except BaseException:
            undo.run()
            raise

    def load_adapter(
        self,
        model_id: str | os.PathLike[str] | None,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        strict: bool = True,
        config: PeftConfig | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
        **kwargs: object,
    ) -> LoadResult:
        """Load one more adapter, which does not become active; or new weights into the adapter of that name.

        Arguments as in `from_pretrained`; with `tensors`, `model_id` is None. Weights for an adapter that exists are
        loaded in place, without a `config`: its own, its flags and its tensors as objects stay (a trainer's optimizer goes
        on holding them).

        Returns:
            `missing_keys` and `unexpected_keys`; both are empty unless `strict=False`.

        Raises:
            ValueError: the new adapter cannot stand beside the present ones; and all that `from_pretrained` raises.
        """
        options = LoadOptions(
            adapter_name,
            is_trainable,
            autocast_adapter_dtype,
            ephemeral_gpu_offload,
            key_mapping,
            strict,
            kwargs,
            time.perf_counter(),
        )
        return whole_or_undone(
            self.base_model,
            lambda undo: self._load_adapter(model_id, options, config, tensors, key_mapping, undo),
        )

    def _load_adapter(
        self,
        model_id: str | os.PathLike[str] | None,
        options: LoadOptions,
        config: PeftConfig | None,
        tensors: Mapping[str, torch.Tensor] | None,
        key_mapping: Mapping[str, str] | None,
        undo: Undo,
    ) -> LoadResult:
        tuner, adapter_name = self.base_model, options.adapter_name
        present = tuner.peft_config.get(adapter_name)
        if present is not None and config is not None:
            raise ValueError(
                f"adapter {adapter_name!r} is there already and keeps its config: leave out `config` to load new weights "
                "into it, or call `delete_adapter` first"
            )
        checkpoint = checkpoint_from(model_id, tensors, config, options, key_mapping, present)
        undo.at_last(partial(vars(self).update, load_report=self.load_report, training=self.training))
        if present is not None:
            loaded = load_into(tuner, checkpoint, options, undo)
        else:
            loaded = load_new(tuner, checkpoint, options, self.heads, tuner.is_bare, undo)
        self._after_load(loaded, options.is_trainable, undo.modules)
        return loaded.result

    def _after_load(self, loaded: Loaded, is_trainable: bool, modules: Mapping[str, nn.Module]) -> None:
        self.load_report = loaded.report
        self.base_model.awaits_call = True
        if not is_trainable:
            self.base_model.eval_network(modules.values())
            self.training = False

    # -- creating, saving

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Put one more new adapter on the model, frozen and not active. Nothing else changes its flags.

        Raises:
            ValueError: the name is taken, the method is another one, or the config cannot be applied.
        """
        tuner = self.base_model

        def add(_: Undo) -> None:
            tuner.check_new(adapter_name)
            first = tuner.is_bare
            plan, built = new_adapter(tuner, peft_config, self.heads, autocast_adapter_dtype, low_cpu_mem_usage)
            tuner.commit(adapter_name, peft_config, built, freeze_base=first, plan=plan)

        whole_or_undone(tuner, add)

    def remake_adapter(self, adapter_name: str, config: PeftConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put an adapter with this config and these tensors in the place of the one of that name, active if that is.

        Args:
            adapter_name: of the adapter that is there.
            config: of the new one; the object is kept.
            tensors: all of its tensors, by their names in a checkpoint; they are copied.

        Raises:
            ValueError: there is no such adapter, it is merged, or the tensors are not those of the config.
        """
        remake(self.base_model, adapter_name, config, tensors, self.heads)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: object,
    ) -> None:
        """Write adapters to disk; "default" into the folder itself, every other one into a subfolder of its name.

        Each file is written beside the old one and then takes its name: a crash leaves the old checkpoint or the new.

        Args:
            save_directory: made if needed; files in it that are not the adapter's are left alone.
            safe_serialization: write safetensors; otherwise `.bin`.
            selected_adapters: names of the adapters to save; all, if None.
            save_embedding_layers: "auto" adds the base's embeddings where they are targets or were resized; True always
                does, False never.
            is_main_process: whether this process writes. The others take part in gathering the tensors.
            path_initial_model_for_weight_conversion: a folder with the adapter as it was right after an initialisation that
                took something out of the base (PiSSA, OLoRA, CorDA, LoRA-GA); what is written is plain LoRA of twice the
                rank, for the unchanged base.
            **kwargs: `state_dict`, a full state dict of this model to take the tensors from (trainers gather it).

        Raises:
            ValueError: `save_directory` is a file, or an adapter is unknown.
        """
        save(
            self.base_model,
            save_directory,
            safe_serialization,
            selected_adapters,
            save_embedding_layers,
            is_main_process,
            cast("Mapping[str, torch.Tensor] | None", kwargs.get("state_dict")),
            path_initial_model_for_weight_conversion,
        )
        if kwargs.get("push_to_hub"):
            text = (
                "`save_pretrained` writes to disk and has done so; to publish the adapter, call `push_to_hub(repo_id)`."
            )
            warn(text, PeftWarning)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write the README.md of a repository into a folder, or bring the one there up to date; what it says stays."""
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_card(folder, facts_of(self.base_model))

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
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
    ) -> str:
        """Upload what `save_pretrained` writes, as one commit. What else is in the repository stays.

        Args:
            repo_id: "user/name", or "name" in one's own namespace; made if it is not there.
            commit_message: title of the commit.
            commit_description: its text.
            private: whether a repository that is made now is private.
            token: of the Hub; True or None for the one that is stored on this machine.
            revision: branch, made if it is not there.
            create_pr: propose the commit rather than make it.
            max_shard_size: accepted for compatibility: an adapter is one file.
            tags: added to those of the model card.
            safe_serialization: as in `save_pretrained`.
            selected_adapters: as in `save_pretrained`.
            save_embedding_layers: as in `save_pretrained`.

        Returns:
            The URL of the commit, as `huggingface_hub.CommitInfo`.

        Raises:
            As `save_pretrained`, before anything is asked of the Hub; huggingface_hub.errors.HfHubHTTPError: it refuses.
        """

        def write(folder: Path) -> None:
            self.save_pretrained(folder, safe_serialization, selected_adapters, save_embedding_layers)

        target = Publication(
            repo_id, commit_message, commit_description, private, token, revision, create_pr, tags or ()
        )
        return publish(target, "model", write, self.create_or_update_model_card)

    # -- what is active

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make this adapter the only active one, and the only trainable one unless `inference_mode`.

        Its cost depends on nothing but this adapter.

        Raises:
            ValueError: there is no such adapter.
        """
        if not isinstance(adapter_name, str):
            raise TypeError(
                f"adapter_name is one name, got {adapter_name!r}; several: `model.base_model.set_adapter([...])`"
            )
        self.base_model.set_adapter(adapter_name, inference_mode)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model computes what the base model does."""
        with self.base_model.disable_adapter():
            yield

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off and forget it; its layers become what they were if it was their last.

        Raises:
            ValueError: there is no such adapter, or it is merged.
        """
        self.base_model.delete_adapter(adapter_name)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Combine adapters into a new one, frozen and not active.

        Args:
            adapters: their names.
            weights: one for each, what its update is multiplied with.
            adapter_name: the name of the new one; if it is taken, nothing happens, as in the reference.
            combination_type: the way to combine them; the record of their method knows which there are.
            svd_rank: rank of the new adapter, of ways that end in a decomposition; the largest of theirs, if None.
            svd_clamp: quantile at which the factors are cut off after a decomposition; None for no cut.
            svd_full_matrices: accepted for compatibility.
            svd_driver: torch's method for the decomposition on CUDA; its own choice, if None.
            density: share of the values that is kept, of ways that prune.
            majority_sign_method: how TIES elects a sign: "total" by the sum of the values, "frequency" by their number.

        Raises:
            ValueError: an adapter is unknown, the combination is, or the adapters cannot be combined that way.
            UnsupportedFeatureError: adapters of their method have no sum.
        """
        combine(
            self.base_model,
            adapters,
            weights,
            adapter_name,
            combination_type,
            svd_rank,
            svd_clamp,
            svd_full_matrices,
            svd_driver,
            density,
            majority_sign_method,
        )

    # -- merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add these adapters (the active ones, if None) to the base's weights, until `unmerge_adapter`.

        Args:
            adapter_names: their names.
            safe_merge: refuse values that are not finite.

        Raises:
            NotImplementedError: an adapter cannot be merged on one of its layers. Nothing has changed.
            ValueError: merging these alone would change the output, or `safe_merge` found values that are not finite.
        """
        self.base_model.merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Give the base's weights their values back, to the byte."""
        self.base_model.unmerge_adapter()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dequantize: bool = False,
    ) -> nn.Module:
        """The base model with these adapters in its weights (see `merge_adapter`) and no others. This object is done with.

        With `dequantize` its weights are dense ones afterwards, where they were quantised: nothing is rounded a second time.
        """
        with dequantised(self.base_model, dequantize):
            return self.base_model.merge_and_unload(progressbar, safe_merge, adapter_names)

    def unload(self) -> nn.Module:
        """The base model as it was before the first adapter came. This object is done with."""
        return self.base_model.unload()

    # -- calling

    def forward(self, *args: Any, adapter_names: Sequence[str] | SlotRows | None = None, **kwargs: Any) -> Any:
        """Call the base model with the active adapters, or with one adapter for each row of the batch.

        Args:
            *args: passed on.
            adapter_names: one adapter name for each row; "__base__" for none.
            **kwargs: passed on.
        """
        output = self._call(self.get_base_model().__call__, adapter_names, False, *args, **kwargs)
        # Asked first: in a decode step a call less, and nearly no adapter has such a term.
        return self.base_model.with_loss_terms(output) if self.base_model.loss_terms else output

    def generate(self, *args: Any, adapter_names: Sequence[str] | SlotRows | None = None, **kwargs: Any) -> Any:
        """Call the base model's `generate`; `adapter_names` as in `forward`."""
        generate = cast(Callable[..., Any], self.get_base_model().generate)
        return self._call(generate, adapter_names, True, *args, **kwargs)

    def _call(
        self,
        function: Callable[..., T],
        adapter_names: Sequence[str] | SlotRows | None,
        generates: bool,
        *args: object,
        **kwargs: object,
    ) -> T:
        return call_network(self.base_model, function, args, kwargs, adapter_names, generates, self.training)

    def unused_layers(self) -> list[str]:
        """Paths of adapted layers that no call has reached since their adapter came: loaded is not yet applied."""
        return self.base_model.unused_layers()

    def get_base_model(self) -> nn.Module:
        """The base model itself."""
        return self.base_model.model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not there before __init__, as while unpickling
                raise
            return getattr(self.base_model, name)
