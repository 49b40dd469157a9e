"""What each task class adds: the arguments that its models are called with, the heads it saves, and what generating needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch  # by this name: it is what torch 2.6 looks for here where it compiles a `forward` of this file
from torch import nn

from splice.checkpoint.types import TaskType
from splice.config import PeftConfig
from splice.errors import warn
from splice.kinds.adapters import LoadsFirst, register_first_load
from splice.kinds.network import network_layers
from splice.loading.creating import adopt_base
from splice.mixed import PeftMixedModel
from splice.model import PeftModel as PeftModel  # from here on with all of its classes known
from splice.surgery.slot_rows import SlotRows

# Each class spells its arguments out, in the reference's order: scripts pass them by position, and other libraries read the
# names off the signature. One `forward(*args, **kwargs)` for all would say neither.


class _TaskModel(PeftModel):
    """Calls the base model by the names of its arguments; what is None is left out."""

    def _forward(
        self, names: Sequence[str] | SlotRows | None, given: Mapping[str, object], more: Mapping[str, object]
    ) -> Any:
        # Left out, and not passed as None: few networks have all of these parameters.
        arguments = {name: value for name, value in {**given, **more}.items() if value is not None}
        if "position_ids" in arguments:
            around = network_layers(self.base_model)
            names_now = self.base_model.selection.current().names
            if any(around[name].drops_positions for name in names_now if name in around):
                warn("Position ids are not supported with virtual tokens among the inputs. They are ignored.")
        return super().forward(adapter_names=names, **arguments)


class _LabelledModel(_TaskModel):
    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        *,
        adapter_names: Sequence[str] | SlotRows | None = None,
        **kwargs: object,
    ) -> Any:
        """Call the base model; see `PeftModel.forward` for `adapter_names`.

        With virtual tokens among the embedded inputs (prompt tuning and its like) the output is as many tokens longer, and
        labels of single tokens get as many times -100 in front.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
            "task_ids": task_ids,
        }
        return self._forward(adapter_names, given, kwargs)


class PeftModelForCausalLM(_LabelledModel):
    """A PeftModel of a decoder that continues its input."""

    task = TaskType.CAUSAL_LM
    needs: ClassVar[tuple[str, ...]] = ("prepare_inputs_for_generation",)


class PeftModelForSeq2SeqLM(_TaskModel):
    """A PeftModel of an encoder-decoder."""

    task = TaskType.SEQ_2_SEQ_LM
    needs: ClassVar[tuple[str, ...]] = ("prepare_inputs_for_generation",)

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        *,
        adapter_names: Sequence[str] | SlotRows | None = None,
        **kwargs: object,
    ) -> Any:
        """Call the base model; see `PeftModel.forward` for `adapter_names`."""
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "decoder_inputs_embeds": decoder_inputs_embeds,
            "labels": labels,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
            "task_ids": task_ids,
        }
        return self._forward(adapter_names, given, kwargs)

    def generate(self, *args: object, adapter_names: Sequence[str] | SlotRows | None = None, **kwargs: object) -> Any:
        """Call the base model's `generate`.

        Virtual tokens in the encoder's input need `input_ids` by that name.
        """
        around = next(iter(network_layers(self.base_model).values()), None)
        own = cast("Callable[..., Any]", self.get_base_model().generate)
        generate = own if around is None else around.generate_of(self.base_model)
        return self._call(generate, adapter_names, True, *args, **kwargs)


class PeftModelForSequenceClassification(_LabelledModel):
    """A PeftModel that labels sequences; its head is trained, saved and loaded with the adapter."""

    task = TaskType.SEQ_CLS
    heads: ClassVar[tuple[str, ...]] = ("classifier", "score")


class PeftModelForTokenClassification(_LabelledModel):
    """A PeftModel that labels tokens; its head is trained, saved and loaded with the adapter."""

    task = TaskType.TOKEN_CLS
    heads: ClassVar[tuple[str, ...]] = ("classifier", "score")


class PeftModelForQuestionAnswering(_TaskModel):
    """A PeftModel that marks spans; its head is trained, saved and loaded with the adapter."""

    task = TaskType.QUESTION_ANS
    heads: ClassVar[tuple[str, ...]] = ("qa_outputs",)

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        *,
        adapter_names: Sequence[str] | SlotRows | None = None,
        **kwargs: object,
    ) -> Any:
        """Call the base model; see `PeftModel.forward` for `adapter_names`.

        With virtual tokens among the embedded inputs, `start_positions` and `end_positions` count from the first of
        these: adapters are trained so.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "start_positions": start_positions,
            "end_positions": end_positions,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
            "task_ids": task_ids,
        }
        return self._forward(adapter_names, given, kwargs)


class PeftModelForFeatureExtraction(_TaskModel):
    """A PeftModel that gives hidden states."""

    task = TaskType.FEATURE_EXTRACTION

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: torch.Tensor | None = None,
        *,
        adapter_names: Sequence[str] | SlotRows | None = None,
        **kwargs: object,
    ) -> Any:
        """Call the base model; see `PeftModel.forward` for `adapter_names`."""
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
            "task_ids": task_ids,
        }
        return self._forward(adapter_names, given, kwargs)


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Put a new, untrained adapter on `model`, which is changed in place.

    Args:
        model: the base model.
        peft_config: what to put on it. The object is kept, and resolved values (default targets, the base's name) are
            written into it: callers rely on reading them there.
        adapter_name: the adapter's name in memory.
        mixed: give a PeftMixedModel, whose adapters may be of several methods.
        autocast_adapter_dtype: hold adapters of half-precision bases in float32.
        revision: revision of the base model, recorded in the config.
        low_cpu_mem_usage: leave the new tensors on the meta device, to be loaded.

    Raises:
        NoMatchingPeftModuleError: the config selects nothing.
        ValueError: the config cannot be applied to a layer that it selects.
    """
    # The one place beside a load where a config of the caller's is written to: the reference does, and scripts read it there.
    adopt_base(peft_config, model, revision)
    cls = PeftMixedModel if mixed else PeftModel.class_for(peft_config)
    return cls(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


register_first_load(cast(LoadsFirst, PeftModel.from_pretrained))
