"""LoRA on torch's own attention: what it computes, beside adapters of its own output projection, and how it goes away."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import splice
from splice.base.layers import LayerKind
from tests import bases
from tests.bases import Base, run
from tests.comparing import (
    Snapshot,
    assert_close,
    assert_same_tensors,
    config_in,
    differ,
    load_both,
    named,
    parameters_of,
    state_of,
    tensors_in,
    trainable_names,
)


class AttentionNet(nn.Module):
    """Attention between two linear layers; `options` are those of the attention."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        return self.head(x + self.mha(x, x, x, need_weights=False)[0])


def _floats(rows: int) -> bases.Inputs:
    return {"x": torch.randn(rows, 5, 8, generator=bases.generator())}


def _base(name: str, make: Any, target: str = "mha") -> Base:
    return Base(name, make, _floats, frozenset({LayerKind.ATTENTION}), (target,))


PLAIN = _base("attention", AttentionNet)
NO_BIAS = _base("attention without biases", lambda: AttentionNet(bias=False))
ENCODER = _base("encoder", bases.EncoderNet, "self_attn")
each = pytest.mark.parametrize("base", [PLAIN, NO_BIAS], ids=str)
everywhere = pytest.mark.parametrize("base", [PLAIN, NO_BIAS, ENCODER], ids=str)


def config(base: Base, **changes: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": list(base.targets), **changes}


OPTIONS = {
    "plain": {},
    "patterns": {"rank_pattern": {"mha": 2}, "alpha_pattern": {"mha": 5}, "use_rslora": True},
    "with a linear layer": {"target_modules": ["mha", "first"]},
    "biases of targets": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "dropout": {"lora_dropout": 0.5},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_it_is_what_the_reference_computes(option: str, shared_checkpoint: Any) -> None:
    pair = load_both(PLAIN, shared_checkpoint(PLAIN, config(PLAIN, **OPTIONS[option])), is_trainable=True)
    assert differ(pair.assert_equal(), run(PLAIN.build(), _floats(3)))
    # Biases of the base that the adapter brings its own of are kept beside them.
    own = {name: tensor for name, tensor in parameters_of(pair.ours).items() if "original_module" not in name}
    assert own == parameters_of(pair.reference)
    assert set(pair.reference.state_dict()) <= set(state_of(pair.ours))


@each
def test_gradients(base: Base, shared_checkpoint: Any) -> None:
    """The output projection has twice its update, and the gradient of one."""
    pair = load_both(base, shared_checkpoint(base, config(base, bias="lora_only")), is_trainable=True)
    found = []
    for model in (pair.reference, pair.ours):
        model.train()(**_floats(3)).square().sum().backward()
        found.append({name: p.grad for name, p in named(model) if p.grad is not None})
    assert set(found[1]) == set(found[0]) == trainable_names(pair.ours)
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, factor=20)


@everywhere
def test_merged(base: Base, shared_checkpoint: Any) -> None:
    """In place, back again, and for good; also where torch's fused kernel reads the weights."""
    model = splice.PeftModel.from_pretrained(base.build(), shared_checkpoint(base, config(base)))
    before = run(model, _floats(3))
    assert differ(before, run(base.build(), _floats(3)))
    assert not model.unused_layers()
    model.merge_adapter()
    assert_close(run(model, _floats(3)), before)
    model.unmerge_adapter()
    assert torch.equal(run(model, _floats(3)), before)
    for training in (True, False):
        with torch.enable_grad():
            assert_close(model.train(training)(**_floats(3)).detach(), before)
    assert_close(run(model.merge_and_unload(), _floats(3)), before)


@each
def test_several_adapters(base: Base, shared_checkpoint: Any) -> None:
    folders = [
        shared_checkpoint(base, config(base)),
        shared_checkpoint(base, config(base, r=2, use_rslora=True), seed=1),
    ]
    pair = load_both(base, *folders)
    one = pair.assert_equal()
    pair.each(lambda model: model.set_adapter("second"))
    assert differ(pair.assert_equal(), one)
    pair.each(lambda model: model.base_model.set_adapter(["default", "second"]))
    both = pair.assert_equal()
    pair.ours.merge_adapter()
    assert_close(run(pair.ours, _floats(3)), both)
    pair.ours.unmerge_adapter()
    assert torch.equal(run(pair.ours, _floats(3)), both)
    with pytest.raises((TypeError, ValueError), match="mha"):
        pair.ours(**_floats(3), adapter_names=["default", "second", "__base__"])


@pytest.mark.parametrize("first_off", ["default", "second"])
@pytest.mark.parametrize("order", [0, 1])
@everywhere
def test_beside_an_adapter_of_the_output_projection(
    base: Base, order: int, first_off: str, shared_checkpoint: Any
) -> None:
    """Both make the attention another class, and either may go first."""
    network = base.build()
    before, output = Snapshot.of(network), run(network, _floats(3))
    whole, part = config(base), config(base, target_modules=["out_proj"], lora_alpha=9)
    folders = [shared_checkpoint(base, whole), shared_checkpoint(base, part, seed=1)]
    alone = [run(splice.PeftModel.from_pretrained(base.build(), folder), _floats(3)) for folder in folders]
    folders, alone = (folders[::-1], alone[::-1]) if order else (folders, alone)
    model = splice.PeftModel.from_pretrained(network, folders[0])
    model.load_adapter(folders[1], "second")
    model.base_model.set_adapter(["default", "second"])
    both = run(model, _floats(3))
    assert all(differ(both, other) for other in (*alone, output))
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(clone, _floats(3)), both)
        clone.merge_adapter()
        assert_close(run(clone, _floats(3)), both)
        before.assert_same(clone.unload(), same_objects=False)
    model.delete_adapter(first_off)
    assert_close(run(model, _floats(3)), alone[1] if first_off == "default" else alone[0])
    with model.disable_adapter():
        assert_close(run(model, _floats(3)), output)
    model.unload()
    before.assert_same(network)
    assert torch.equal(run(network, _floats(3)), output)


@each
def test_saved_again(base: Base, shared_checkpoint: Any, tmp_path: Any) -> None:
    folder = shared_checkpoint(base, config(base))
    splice.PeftModel.from_pretrained(base.build(), folder).save_pretrained(tmp_path)
    assert_same_tensors(tensors_in(tmp_path), tensors_in(folder))
    assert config_in(tmp_path) == config_in(folder)


def test_a_new_adapter_changes_nothing_yet() -> None:
    model = splice.get_peft_model(PLAIN.build(), splice.LoraConfig(r=2, target_modules=["mha"]))
    assert_close(run(model, _floats(3)), run(PLAIN.build(), _floats(3)))
    model(**_floats(3)).sum().backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, shared_checkpoint: Any) -> None:
    pair = load_both(PLAIN, shared_checkpoint(PLAIN, config(PLAIN)), dtype=dtype)
    inputs = {"x": _floats(3)["x"].to(dtype)}
    assert_close(run(pair.ours, inputs), run(pair.reference, inputs))
    assert parameters_of(pair.ours) == parameters_of(pair.reference)


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (_base("other keys", lambda: AttentionNet(kdim=8, vdim=6)), {}, "dimension of queries"),
        (PLAIN, {"target_modules": ["mha", "out_proj"]}, "adapts it along with itself"),
        (PLAIN, {"use_dora": True}, "use_dora"),
        (PLAIN, {"lora_bias": True}, "lora_bias"),
    ],
    ids=str,
)
def test_what_it_cannot_be_put_on(base: Base, changes: dict[str, Any], message: str) -> None:
    network = base.build()
    before = Snapshot.of(network)
    with pytest.raises(ValueError, match=message):
        splice.get_peft_model(network, splice.LoraConfig(**{**config(base, **changes), "peft_type": None}))
    before.assert_same(network)
