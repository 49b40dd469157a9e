"""EVA: LoRA whose A starts at the main directions of what each layer sees, with ranks where they explain most.

Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", arXiv 2410.07170, section 3. The inputs
of each layer are decomposed batch by batch until the directions settle. The directions of all layers compete for the ranks:
those that explain the largest share of the variance of their layer get them. B starts at zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from splice.base.layers import LayerKind, kind_of
from splice.checkpoint.keys import PREFIX
from splice.discovery import public
from splice.errors import PeftWarning, warn
from splice.kinds.adapters import Adapters, Remakes, adapters_on, layers_of
from splice.kinds.layer import AdapterLayer
from splice.kinds.targets import targets_of
from splice.methods.lora.config import LoraConfig
from splice.methods.lora.eva_directions import (
    Collector,
    Forward,
    PrepareLayerInputs,
    PrepareModelInputs,
    decomposed,
    options_of,
    ranks_of,
)
from splice.methods.lora.inits import EVA
from splice.methods.lora.layers import LowRank, OnLinear

_LINEAR = (LayerKind.LINEAR, LayerKind.TRANSPOSED_LINEAR)


def forward_fn_dict(model: Any, inputs: Any) -> object:
    """`model(**inputs)`."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: LoraConfig) -> torch.Tensor:
    """The (row, position) of every token that counts, (n, 2): no padding, and with `use_label_mask` none without a label.

    Raises:
        ValueError: the inputs are no dict with `input_ids`.
    """
    if not isinstance(model_input, Mapping) or "input_ids" not in model_input:
        raise ValueError(
            "When using `prepare_model_inputs_fn_language_modeling` inputs must be a dictionary with `input_ids`; pass "
            "`prepare_model_inputs_fn=None` or one of your own"
        )
    ids, options = model_input["input_ids"], options_of(peft_config)
    mask = model_input.get("attention_mask")
    counts = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if options.use_label_mask and model_input.get("labels") is not None:
        counts = counts & (model_input["labels"] != options.label_mask_value)
    return counts.nonzero()


def prepare_layer_inputs_fn_language_modeling(
    layer_input: Any, model_input: torch.Tensor, layer_name: str
) -> torch.Tensor:
    """The tokens of a layer's input (batch, tokens, in) that count, (n, in)."""
    x: torch.Tensor = layer_input[0] if isinstance(layer_input, tuple) else layer_input
    return x[model_input.T.unbind()]


def _all_rows(layer_input: Any, model_input: Any, layer_name: str) -> torch.Tensor:
    x: torch.Tensor = layer_input[0] if isinstance(layer_input, tuple) else layer_input
    return x.reshape(-1, x.shape[-1])


@torch.no_grad()
@public
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Forward | None = forward_fn_dict,
    prepare_model_inputs_fn: PrepareModelInputs | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: (
        PrepareLayerInputs | Mapping[str, PrepareLayerInputs | None] | None
    ) = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, torch.Tensor]:
    """The A that EVA gives to each linear target, (rank, in), by its path; the ranks are those that it has earned.

    Args:
        model: a PeftModel, whose paths begin with `base_model.model.` then, or a network without adapters.
        dataloader: batches; it is gone through as often as needed.
        peft_config: of the adapter. None for that of the adapter `adapter_name` of a PeftModel.
        forward_fn: calls the model with a batch; None for `model(**batch)`.
        prepare_model_inputs_fn: makes of a batch what the next one needs; None to hand the batch on.
        prepare_layer_inputs_fn: makes of a layer's input the rows (n, in) that count; one function, or one for each path, or
            None for all rows.
        adapter_name: see `peft_config`.
        gather_distributed_inputs: whether the inputs of all processes count.
        show_progress_bar: whether to show how many layers have settled.

    Raises:
        ValueError: there is no config, no data, or too little of it.
    """
    adapters = adapters_on(model)
    if peft_config is None:
        if adapters is None:
            raise ValueError("peft_config is required if model is not a PeftModel")
        peft_config = cast(LoraConfig, adapters.peft_config[adapter_name])
    prefix, targets = _targets(model, adapters, adapter_name, peft_config)
    layer_fns: dict[str, PrepareLayerInputs] = {}
    for path in targets:
        chosen = prepare_layer_inputs_fn
        if isinstance(chosen, Mapping):
            chosen = chosen.get(prefix + path, chosen.get(path))
        layer_fns[path] = chosen or _all_rows
    collect = Collector(model, targets, layer_fns, forward_fn or forward_fn_dict, gather_distributed_inputs)
    collect.prepare = prepare_model_inputs_fn
    groups = decomposed(collect, dataloader, peft_config, show_progress_bar)
    ranks, found = ranks_of(groups, targets, peft_config), {}
    for path in targets:
        group = next((group for group in groups if path in group.paths), None)
        if group is not None:
            a = group.pca.components[: ranks[path]]
            if options_of(peft_config).whiten:
                a = a / group.pca.singular_values[: ranks[path], None].sqrt()
            found[prefix + path] = a.clone()
    return found


def _targets(
    model: nn.Module, adapters: Adapters | None, name: str, config: LoraConfig
) -> tuple[str, dict[str, nn.Module]]:
    """What stands before paths in the result, and the linear layers that are looked at."""
    if adapters is not None:
        own = layers_of(adapters, [name], OnLinear)
        return PREFIX if adapters.model is not model else "", {path: layer.base for path, layer in own.items()}
    return "", {path: layer for path, layer in targets_of(config, model).items() if kind_of(layer) in _LINEAR}


@torch.no_grad()
@public
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, torch.Tensor] | None = None,
    forward_fn: Forward | None = forward_fn_dict,
    prepare_model_inputs_fn: PrepareModelInputs | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: (
        PrepareLayerInputs | Mapping[str, PrepareLayerInputs | None] | None
    ) = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Start an adapter as EVA says: its A, the ranks of its layers, and in its config the layers by their whole paths.

    Its tensors become new objects, so call it before an optimizer is made. A layer that earns no rank loses the adapter.

    Args:
        model: a PeftModel.
        dataloader: see `get_eva_state_dict`, as of all other arguments. None with `eva_state_dict`.
        eva_state_dict: what `get_eva_state_dict` gave. None to work it out.
        forward_fn: calls the model with a batch.
        prepare_model_inputs_fn: makes of a batch what the next one needs.
        prepare_layer_inputs_fn: makes of a layer's input the rows that count.
        adapter_name: the adapter that is started; its config has `init_lora_weights="eva"`.
        gather_distributed_inputs: whether the inputs of all processes count.
        show_progress_bar: whether to show how many layers have settled.

    Raises:
        ValueError: the model or the adapter is another one, several adapters are active, or there is too little data.
    """
    adapters = adapters_on(model)
    if adapters is None or adapters.model is model:
        raise ValueError("model must be a PeftModel")
    config = adapters.peft_config.get(adapter_name)
    if not isinstance(config, LoraConfig) or config.init_lora_weights != EVA:
        raise ValueError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    if len(adapters.selection.active) > 1:
        raise ValueError("`initialize_lora_eva_weights` currently only works with a single active adapter")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model, dataloader, None, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
            gather_distributed_inputs, show_progress_bar,
        )  # fmt: skip
    start = {name.removeprefix(PREFIX): tensor for name, tensor in eva_state_dict.items()}
    layers = layers_of(adapters, [adapter_name], AdapterLayer)
    _check_start(start, layers)
    tensors, changed = _tensors(layers, start), _fields(config, layers, start)
    before = {name: getattr(config, name) for name in changed}
    # The config object stays the caller's own, who reads the ranks there, as in the reference.
    vars(config).update(changed)
    try:
        cast(Remakes, model).remake_adapter(adapter_name, config, tensors)
    except BaseException:
        vars(config).update(before)
        raise


def _check_start(start: Mapping[str, torch.Tensor], layers: Mapping[str, AdapterLayer]) -> None:
    for path, a in start.items():
        layer = layers.get(path)
        if not isinstance(layer, OnLinear):
            raise ValueError(f"eva_state_dict has a tensor for {path}, where the adapter is on no linear layer")
        if a.dim() != 2 or a.shape[1] != layer.a.shape[1]:
            raise ValueError(f"eva_state_dict has {tuple(a.shape)} for {path}, which needs (rank, {layer.a.shape[1]})")
    if start and not any(len(a) for a in start.values()):
        raise ValueError("eva_state_dict leaves every layer without a rank")
    others = [path for path, layer in layers.items() if isinstance(layer, LowRank) and path not in start]
    if others:
        text = (
            "the following layers were initialized with init_lora_weights=True because they were not found in the eva "
            f"state_dict: {others}. EVA is for linear layers that the data reaches."
        )
        warn(text, PeftWarning)


def _fields(
    config: LoraConfig, layers: Mapping[str, AdapterLayer], start: Mapping[str, torch.Tensor]
) -> dict[str, object]:
    """Fields of the config: the layers by their whole paths, and the ranks that they earned."""
    own = {p: layer for p, layer in layers.items() if isinstance(layer, LowRank) and (p not in start or len(start[p]))}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, layer in own.items():
        rank = len(start[path]) if path in start else layer.r
        alpha = layer.lora_alpha
        if options_of(config).adjust_scaling_factors and rank != layer.r:
            alpha = alpha * rank / layer.r
        # A key means every path with this end; where there is another one, it is anchored to the whole path.
        key = f"^{path}" if any(other.endswith(f".{path}") for other in own) else path
        ranks.update({key: rank} if rank != config.r else {})
        alphas.update({key: alpha} if alpha != config.lora_alpha else {})
    return {"target_modules": list(own), "rank_pattern": ranks, "alpha_pattern": alphas}


def _tensors(layers: Mapping[str, AdapterLayer], start: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All tensors of the adapter as it starts, by their keys."""
    found = {}
    for path, layer in layers.items():
        for suffix, tensor in layer.file_form.to_file(layer, dict(layer.named_slots())):
            if path in start and not len(start[path]):
                continue
            value = tensor.detach()
            if path in start and isinstance(layer, OnLinear) and suffix in layer.factor_names:
                is_a = suffix == layer.factor_names[0]
                value = start[path].to(value) if is_a else value.new_zeros(value.shape[0], len(start[path]))
            found[layer.names.key(path, suffix)] = value
    return found
