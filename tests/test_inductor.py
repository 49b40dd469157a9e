"""What torch's own compiler makes of adapters: it goes on where the tracers that other tests use end."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule

import splice
from splice.base.layers import LayerKind
from splice.selection import BASE
from tests.bases import Base, conv1d_of_transformers
from tests.comparing import assert_close, differ
from tests.samples import Case, plain_cases


class Flat(nn.Module):
    """Layers of vectors in two dimensions, as the tokens of experts and what pooling leaves are."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.first, self.second, self.head = make(12, 16), make(16, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(torch.tanh(self.first(x))))


def _base(name: str, make: Any, kind: LayerKind) -> Base:
    return Base(name, lambda: Flat(make), lambda rows: {"x": torch.randn(rows, 12)}, frozenset({kind}))


BASES = (
    _base("flat", nn.Linear, LayerKind.LINEAR),
    _base("flat_transposed", conv1d_of_transformers, LayerKind.TRANSPOSED_LINEAR),
)
SUMS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


# Those that have to be told something at each call are asked through the PeftModel, which is more than one graph.
@pytest.mark.parametrize("case", [case for case in plain_cases(*BASES) if not case.sample.call], ids=str)
def test_no_sum_in_a_graph_scales_what_it_adds(case: Case, shared_checkpoint: Any) -> None:
    """Where that is a product of two matrices, the compiler of torch 2.13 forgets what it is scaled with."""
    torch._dynamo.reset()
    scaled, nodes = [], 0

    def look(graph: GraphModule, inputs: Any) -> Any:
        nonlocal nodes
        nodes += len(graph.graph.nodes)
        scaled.extend(node for node in graph.graph.nodes if node.target in SUMS and node.kwargs.get("alpha", 1) != 1)
        return graph.forward

    model: Any = splice.PeftModel.from_pretrained(case.base.build(), shared_checkpoint(case.base, case.config()))
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend=aot_autograd(fw_compiler=look))
    with torch.no_grad():
        inputs = case.base.inputs(3)
        assert_close(compiled(**inputs), model(**inputs))
    assert nodes and not scaled


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("names", [None, ["two", BASE, "one", "two"]], ids=["one", "mixed"])
def test_it_computes_what_is_computed_without_it(names: list[str] | None) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    base = BASES[0]
    config = splice.LoraConfig(r=4, lora_alpha=32, target_modules=["first", "second"], init_lora_weights=False)
    model: Any = splice.get_peft_model(base.build(), config, "one")
    model.add_adapter("two", config)
    model.eval()
    options: Any = {} if names is None else {"adapter_names": names}
    with torch.no_grad():
        inputs = base.inputs(4)
        expected = model(**inputs, **options)
        assert differ(expected, base.build()(**inputs))
        assert_close(torch.compile(model, fullgraph=True)(**inputs, **options), expected)
