"""The two libraries, the base models they are measured on, and the checkpoints they load."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Import names. Neither is imported before it is used: a process that measures one does not hold the other.
REFERENCE = "peft"
SPLICE = "splice"
LIBRARIES = (REFERENCE, SPLICE)

LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama(layers: int, hidden: int, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Llama of transformers with random weights, in the proportions of the 7B model but for its small vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=256,
        max_position_embeddings=128,
    )
    with device:  # drawn where it stays: a large one takes long on a CPU
        model: nn.Module = LlamaForCausalLM(config)
    return model.eval().to(dtype)


def in_four_bits(model: nn.Module) -> nn.Module:
    """The same model with its linear layers in nf4 of bitsandbytes, but for the head, as transformers loads one."""
    bnb = import_module("bitsandbytes")
    found = [(p, name, layer) for p in model.modules() for name, layer in p.named_children() if name != "lm_head"]
    for parent, name, layer in found:
        if isinstance(layer, nn.Linear):
            bias = layer.bias is not None
            new = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias, compute_dtype=layer.weight.dtype, quant_type="nf4"
            )
            new.load_state_dict(layer.state_dict(), strict=False)
            new.weight = new.weight.to(layer.weight.device)  # which quantises
            setattr(parent, name, new.eval())
    return model.requires_grad_(False)


def linears(count: int, width: int, device: torch.device) -> nn.Sequential:
    """Nothing but square linear layers, one after the other."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count))).eval().to(device)


def write_checkpoint(base: nn.Module, folder: Path, targets: Sequence[str], rank: int) -> Path:
    """Have the reference write a LoRA checkpoint for a copy of `base`; no tensor of it is zero, as after training."""
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets)}
    return write_checkpoint_of(base, folder, fields)


def write_checkpoint_of(base: nn.Module, folder: Path, fields: Mapping[str, Any], library: str = REFERENCE) -> Path:
    """The same for any method; `fields` are those of its config, and `library` is the one that writes it."""
    writer = import_module(library)
    model = writer.get_peft_model(copy.deepcopy(base), writer.get_peft_config(dict(fields)))
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    return folder


def load(library: str, base: nn.Module, checkpoint: Path, **options: Any) -> Any:
    """`PeftModel.from_pretrained` of one of the libraries."""
    return import_module(library).PeftModel.from_pretrained(base, checkpoint, **options)
