"""How `loftq.safetensors` was made: what the reference makes of one weight, in which it rounds with bitsandbytes on a GPU.

Not run by the tests; needs `pip install bitsandbytes==0.50.2 scipy`. The reference moves weights to "cuda"; without one that
is read as "cpu" here, where bitsandbytes rounds in the same way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import torch
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode

CASES = [(4, 1), (4, 3), (8, 1), (8, 2)]
SHAPE, RANK = (24, 64), 4


def _on_cpu(value: Any) -> Any:
    return "cpu" if isinstance(value, (str, torch.device)) and str(value).startswith("cuda") else value


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*map(_on_cpu, args), **{name: _on_cpu(value) for name, value in (kwargs or {}).items()})


def main() -> None:
    move = bitsandbytes.nn.Params4bit.to
    bitsandbytes.nn.Params4bit.to = lambda self, *args, **kwargs: move(self, *map(_on_cpu, args), **kwargs)
    torch.manual_seed(0)
    weight = torch.randn(SHAPE)
    tensors = {"weight": weight}
    for bits, rounds in CASES:
        network = nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0]))
        network[0].weight.data.copy_(weight)
        options = peft.LoftQConfig(loftq_bits=bits, loftq_iter=rounds)
        config = peft.LoraConfig(r=RANK, target_modules=["0"], init_lora_weights="loftq", loftq_config=options)
        with OnCpu():
            layer: Any = peft.get_peft_model(network, config).base_model.model[0]
        found = {"base": layer.base_layer, "A": layer.lora_A["default"], "B": layer.lora_B["default"]}
        tensors |= {f"{bits}.{rounds}.{name}": module.weight.detach().clone() for name, module in found.items()}
    save_file(tensors, Path(__file__).with_name("loftq.safetensors"))


if __name__ == "__main__":
    main()
