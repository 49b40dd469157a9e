"""Weights that cannot be read: what needs them is refused before anything changes, and all else works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import splice
from splice.base.layers import LayerKind
from tests import bases
from tests.bases import run
from tests.comparing import Snapshot, differ
from tests.samples import Case, plain_cases


class Int8Linear(nn.Linear):
    """A linear layer that keeps rounded numbers, and a scale for each output."""

    def __init__(self, of: nn.Linear) -> None:
        super().__init__(of.in_features, of.out_features)
        scale = of.weight.detach().abs().amax(1, keepdim=True) / 127
        self._set_codes(torch.round(of.weight.detach() / scale).to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(of.bias.detach().clone())

    def _set_codes(self, codes: torch.Tensor) -> None:
        self.weight = nn.Parameter(codes, requires_grad=False)

    def codes(self) -> torch.Tensor:
        return self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.codes() * self.scale, self.bias)


class PackedLinear(Int8Linear):
    """Keeps them in another shape and a floating dtype, as 4-bit layers may."""

    def _set_codes(self, codes: torch.Tensor) -> None:
        self.weight = nn.Parameter(codes.float().reshape(-1, 1), requires_grad=False)

    def codes(self) -> torch.Tensor:
        return self.weight.view(self.out_features, self.in_features)


class Int8Embedding(nn.Embedding):
    """An embedding that keeps rounded numbers."""

    def __init__(self, of: nn.Embedding) -> None:
        super().__init__(of.num_embeddings, of.embedding_dim)
        self.weight = nn.Parameter((of.weight.detach() * 40).to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.embedding(x, self.weight) / 40


class BufferLinear(Int8Linear):
    """Keeps them in no parameter at all."""

    def _set_codes(self, codes: torch.Tensor) -> None:
        del self.weight
        self.register_buffer("qweight", codes)

    def codes(self) -> torch.Tensor:
        return self.qweight


class OthersParameter(nn.Parameter):
    """One of a library that packs weights, whatever dtype it tells."""

    __module__ = "bitsandbytes.nn.modules"


class OthersLinear(Int8Linear):
    """Keeps a parameter of that class."""

    def _set_codes(self, codes: torch.Tensor) -> None:
        self.weight = OthersParameter(codes.float(), requires_grad=False)


STORED = {cls.__name__: cls for cls in (Int8Linear, PackedLinear, BufferLinear, OthersLinear)}
stored = pytest.mark.parametrize("cls", STORED.values(), ids=STORED)
# Those that copy a layer whole copy its codes too.
LINEAR = [case for case in plain_cases(bases.LINEAR) if not case.method.exclusive]
linear = pytest.mark.parametrize(
    "case", [c for c in LINEAR if not c.method.layers[LayerKind.LINEAR].reads_weight], ids=str
)
reading = pytest.mark.parametrize(
    "case", [c for c in LINEAR if c.method.layers[LayerKind.LINEAR].reads_weight], ids=str
)


def packed(cls: Callable[[nn.Linear], nn.Module]) -> Any:
    network = bases.LINEAR.build()
    network.first, network.second = cls(network.first), cls(network.second)
    return network.eval()


@stored
@linear
def test_what_needs_no_weight_works(case: Case, cls: Any, shared_checkpoint: Any) -> None:
    """It gives what it gives on a plain layer with the same weight."""
    model = splice.PeftModel.from_pretrained(packed(cls), shared_checkpoint(case.base, case.config()))
    plain = bases.LINEAR.build()
    for layer in (plain.first, plain.second):
        same = Int8Linear(layer)
        layer.weight.data = same.weight * same.scale
    expected = splice.PeftModel.from_pretrained(plain, shared_checkpoint(case.base, case.config()))
    inputs = case.base.inputs(3)
    torch.testing.assert_close(run(model, inputs), run(expected, inputs))
    assert differ(run(model, inputs), run(packed(cls), inputs))


@stored
@linear
def test_merging_is_refused_before_anything_changes(case: Case, cls: Any, shared_checkpoint: Any) -> None:
    """Also where the first layer could be merged, and for one layer alone."""
    if not case.sample.merges:
        pytest.skip("there is nothing to merge")
    network = packed(cls)
    network.first = bases.LINEAR.build().first
    model = splice.PeftModel.from_pretrained(network, shared_checkpoint(case.base, case.config()))
    before, output = Snapshot.of(network), run(model, case.base.inputs(3))
    if "weight" not in model.base_model.placed["default"]["second"].changed_names:  # what it needs can be written
        model.merge_adapter()
        torch.testing.assert_close(run(model, case.base.inputs(3)), output)
        model.unmerge_adapter()
        before.assert_same(network)
        return
    for merge in (model.merge_adapter, model.merge_and_unload, network.second.merge):
        with pytest.raises(NotImplementedError, match="second") as raised:
            merge()
        assert cls.__name__ in str(raised.value)
        assert "without quantisation" in str(raised.value)
        before.assert_same(network)
        assert not model.base_model.merged
        assert torch.equal(run(model, case.base.inputs(3)), output)


NEEDING = {
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


@pytest.mark.parametrize("fields", NEEDING.values(), ids=NEEDING)
@stored
def test_what_computes_with_the_weight_is_refused(cls: Any, fields: Any, checkpoint: Any) -> None:
    """When it is loaded, when it is made, and beside another adapter."""
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["second"], **fields}
    folder = checkpoint(bases.LINEAR, config)
    network = packed(cls)
    before = Snapshot.of(network)
    with pytest.raises(splice.UnsupportedFeatureError, match="second") as raised:
        splice.PeftModel.from_pretrained(network, folder)
    assert cls.__name__ in str(raised.value)
    assert "without quantisation" in str(raised.value)
    before.assert_same(network)
    with pytest.raises(splice.UnsupportedFeatureError, match="second"):
        splice.get_peft_model(network, splice.get_peft_config(config))
    before.assert_same(network)
    model = splice.get_peft_model(network, splice.LoraConfig(r=2, target_modules=["first"]))
    output, now = run(model, bases.LINEAR.inputs(3)), Snapshot.of(network)
    with pytest.raises(splice.UnsupportedFeatureError, match="second"):
        model.load_adapter(folder, "other")
    now.assert_same(network)
    assert torch.equal(run(model, bases.LINEAR.inputs(3)), output)


@stored
@reading
def test_a_method_that_computes_with_the_weight_is_refused(case: Case, cls: Any, shared_checkpoint: Any) -> None:
    network = packed(cls)
    before = Snapshot.of(network)
    with pytest.raises(splice.UnsupportedFeatureError, match="first.*without quantisation") as raised:
        splice.PeftModel.from_pretrained(network, shared_checkpoint(case.base, case.config()))
    assert cls.__name__ in str(raised.value)
    with pytest.raises(splice.UnsupportedFeatureError, match="first.*without quantisation"):
        splice.get_peft_model(network, splice.get_peft_config(case.config()))
    before.assert_same(network)


def test_rows_of_tokens_need_the_weight_of_a_layer_with_a_forward_of_its_own(checkpoint: Any) -> None:
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1], "target_modules": ["second"]}
    folder = checkpoint(bases.EMBEDDING, config)
    network = bases.EMBEDDING.build()
    network.second = Int8Embedding(network.second)
    before = Snapshot.of(network)
    with pytest.raises(splice.UnsupportedFeatureError, match="second.*Int8Embedding"):
        splice.PeftModel.from_pretrained(network, folder)
    before.assert_same(network)


STARTING = {
    "mica": {"init_lora_weights": "mica"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
}


@pytest.mark.parametrize("fields", STARTING.values(), ids=STARTING)
@stored
def test_a_new_adapter_that_starts_from_the_weight_is_refused(cls: Any, fields: Any) -> None:
    network = packed(cls)
    config = splice.get_peft_config({"peft_type": "LORA", "r": 2, "target_modules": ["second"], **fields})
    with pytest.raises(splice.UnsupportedFeatureError, match="second"):
        splice.get_peft_model(network, config)
    assert type(network.second) is cls
