"""Code that reads a layer's weight instead of calling the layer: what is put on the layer takes effect all the same."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import splice
from splice.base.layers import LayerKind
from splice.kinds.registry import all_methods
from splice.surgery.unmade import Unmade
from tests import bases
from tests.bases import Base, run
from tests.comparing import assert_close, differ
from tests.samples import Case, everywhere

METHODS = [method for method in everywhere(all_methods().values()) if LayerKind.LINEAR in method.layers]
methods = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name.value)


def _times(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return x @ layer.weight.t() + layer.bias


class ByAFunction(bases.WeightReader):
    """The weight is read by a function that belongs to no module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _times(self.first, self.second(x))


class FromAbove(nn.Module):
    """The weight is read by a module further up, which asks the layer for its dtype as well."""

    def __init__(self) -> None:
        super().__init__()
        self.below = bases.WeightReader()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.below.first.weight.dtype)
        return F.linear(self.below.second(x), self.below.first.weight, self.below.first.bias)


class AsksForDtypes(bases.WeightReader):
    """Calls both layers, and asks one for its dtype before."""

    asked: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.asked = self.first.weight
        return self.first(self.second(x).to(self.asked.dtype))


def _base(make: Callable[[], nn.Module]) -> Base:
    return Base("reader", make, lambda rows: {"x": torch.randn(rows, 6, generator=bases.generator())}, frozenset())


READERS = [_base(bases.WeightReader), _base(ByAFunction), _base(FromAbove)]
readers = pytest.mark.parametrize("base", READERS, ids=["its parent", "a function", "from above"])


def adapted(base: Base, method: Any, checkpoint: Any, **changes: Any) -> Any:
    config = Case(method, base).config(target_modules=["first"], **changes)
    return splice.PeftModel.from_pretrained(base.build(), checkpoint(base, config), is_trainable=True).eval()


@readers
@methods
def test_adapted_is_merged(base: Base, method: Any, checkpoint: Any) -> None:
    """Also with gradients, copied, in a graph, and after another weight was put in by `functional_call`."""
    model, inputs = adapted(base, method, checkpoint), base.inputs(3)
    expected = run(copy.deepcopy(model).merge_and_unload(), inputs)
    assert differ(expected, run(base.build(), inputs))
    assert_close(run(model, inputs), expected)
    assert_close(run(pickle.loads(pickle.dumps(model)), inputs), expected)
    assert model.unused_layers() == []
    output = model(**inputs)
    assert_close(output.detach(), expected)
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        assert torch.equal(run(model, inputs), run(base.build(), inputs))
    tensors = {name: tensor * 1.5 for name, tensor in model.named_parameters() if tensor.requires_grad}
    with torch.no_grad():
        assert differ(torch.func.functional_call(model, tensors, kwargs=inputs), expected)
    model.merge_adapter()
    assert_close(run(model, inputs), expected)


@readers
def test_in_one_graph(base: Base, checkpoint: Any) -> None:
    torch._dynamo.reset()
    model = adapted(base, METHODS[0], checkpoint)
    network, inputs = model.get_base_model(), base.inputs(3)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    assert_close(run(compiled, inputs), run(network, inputs))
    with model.disable_adapter():
        assert_close(run(compiled, inputs), run(base.build(), inputs))


@methods
def test_others_read_the_bases_weight(method: Any, checkpoint: Any) -> None:
    """Outside of a call, and while another thread's call reads the adapted one."""
    base = READERS[0]
    model = adapted(base, method, checkpoint)
    layer = model.get_base_model().first
    own, seen = layer._parameters["weight"], []
    if any(adapter.stands_in for adapter in layer.splice_host.layers.values()):
        pytest.skip("what it puts there is the layer's weight")
    assert layer.weight is own
    inside, go_on = threading.Event(), threading.Event()

    def pause(*_: Any) -> None:
        inside.set()
        go_on.wait(20)

    model.get_base_model().second.register_forward_hook(pause)
    thread = threading.Thread(target=lambda: seen.append(run(model, base.inputs(2))))
    thread.start()
    inside.wait(20)
    assert layer.weight is own
    go_on.set()
    thread.join()
    assert differ(seen[0], run(base.build(), base.inputs(2)))
    assert dict(model.get_base_model().named_parameters())["first.weight"] is own


@methods
def test_a_weight_that_is_asked_for_its_dtype_is_not_made(method: Any, checkpoint: Any) -> None:
    base = _base(AsksForDtypes)
    model = adapted(base, method, checkpoint)
    inputs = base.inputs(3)
    merged = run(copy.deepcopy(model).merge_and_unload(), inputs)
    output, asked = run(model, inputs), model.get_base_model().asked
    assert isinstance(asked, Unmade) and asked._made is None
    assert_close(output, merged, factor=3)
    mixed = run(model, inputs, adapter_names=["default", "__base__", "default"])
    assert_close(mixed[::2], output[::2], factor=3)
    assert_close(mixed[1], run(base.build(), inputs)[1], factor=3)


@readers
def test_rows_of_their_own_are_refused_where_the_weight_is_read(base: Base, checkpoint: Any) -> None:
    model = adapted(base, METHODS[0], checkpoint)
    output = run(model, base.inputs(2))
    with pytest.raises(ValueError, match=r"first: its weight is read by its parent, so rows"):
        run(model, base.inputs(2), adapter_names=["default", "__base__"])
    assert torch.equal(run(model, base.inputs(2)), output)


def test_what_is_no_change_of_the_weight_is_refused(checkpoint: Any) -> None:
    base = READERS[0]
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["first"], "alora_invocation_tokens": [1]}
    model = splice.PeftModel.from_pretrained(base.build(), checkpoint(base, config))
    with pytest.raises(NotImplementedError, match=r"first: adapter 'default' .* only read"):
        run(model, base.inputs(2))


def test_what_cannot_be_applied_to_a_weight_is_refused_where_somebody_computes_with_it_alone(checkpoint: Any) -> None:
    """Also while there are gradients, which code in C++ would not find: for those it is worked out as soon as it is read."""
    base = _base(AsksForDtypes)
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["first"], "alora_invocation_tokens": [1]}
    model = splice.PeftModel.from_pretrained(base.build(), checkpoint(base, config), is_trainable=True)
    model(**base.inputs(2))
    with pytest.raises(NotImplementedError, match=r"first: adapter 'default' .* only read"):
        model.get_base_model().asked + 1
    # Who looks through the class finds the attribute, as of any other class.
    assert "weight" in {
        name for name, value in inspect.getmembers(type(model.get_base_model().first)) if value is not None
    }


def test_an_unmade_tensor_is_made_once_and_by_use_alone() -> None:
    calls = []

    def make() -> torch.Tensor:
        calls.append(1)
        return torch.ones(2, 3)

    tensor = Unmade(torch.zeros(2, 3), make)
    assert (tensor.dtype, tensor.device.type, tuple(tensor.shape), tensor.size(1)) == (torch.float32, "cpu", (2, 3), 3)
    assert tensor.is_floating_point()
    assert not tensor.requires_grad
    assert isinstance(tensor, torch.Tensor)
    assert calls == []
    assert torch.equal(torch.zeros(1, 2) @ tensor, torch.zeros(1, 3))
    assert torch.equal(tensor[0], torch.ones(3))
    assert tensor.data_ptr()
    assert calls == [1]


def test_copied_into_another_process(checkpoint: Any, tmp_path: Any) -> None:
    """There the classes of adapted layers are made anew."""
    model = splice.get_peft_model(nn.Sequential(nn.Linear(4, 4)), splice.LoraConfig(target_modules=["0"], bias="all"))
    with torch.no_grad():
        model.get_base_model()[0].bias.add_(1)
    x = torch.randn(2, 4)
    torch.save((model, x, run(model, {"input": x})), tmp_path / "model.pt")
    code = (
        "import sys, torch, splice; m, x, y = torch.load(sys.argv[1], weights_only=False); "
        "assert torch.equal(m(input=x), y); m.disable_adapter_layers(); assert not torch.equal(m(input=x), y)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, tmp_path / "model.pt"], check=True)


# -- models of transformers that do so

TINY = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
STATE = {"vocab_size": 40, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
AUDIO = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "conv_dim": (8, 8),
    "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
TDNN = {"tdnn_dim": (8, 8), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 8}
LFM2 = {"num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]}
NEXT = {
    "num_key_value_heads": 1, "head_dim": 8, "linear_num_value_heads": 2, "linear_num_key_heads": 1,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1,
    "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
JAMBA = {
    "num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1, "use_mamba_kernels": False, "mamba_d_state": 4,
    "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
}  # fmt: skip
DEBERTA = {
    "relative_attention": True, "position_buckets": 4, "pos_att_type": ["c2p", "p2c"], "norm_rel_ebd": "layer_norm",
}  # fmt: skip
LORA = splice.LoraConfig(r=2, lora_alpha=64, init_lora_weights=False)
LOHA = splice.LoHaConfig(r=2, alpha=8, init_weights=False)
# Model, options of its config, what is adapted there, how. LoRA on grouped convolutions is no change of their weight.
FOREIGN: dict[str, tuple[str, dict[str, Any], Any, splice.PeftConfig]] = {
    "Mamba": ("MambaForCausalLM", STATE, ["dt_proj"], LORA),
    "Mamba, convolution": ("MambaForCausalLM", STATE, ["dt_proj", "conv1d"], LOHA),
    "FalconMamba": ("FalconMambaForCausalLM", STATE, ["dt_proj", "conv1d"], LOHA),
    "Jamba": ("JambaForCausalLM", TINY | JAMBA, ["dt_proj", "conv1d"], LOHA),
    "WavLM": ("WavLMModel", {**AUDIO, "num_buckets": 8}, ["q_proj", "k_proj", "v_proj", "out_proj"], LORA),
    "XVector": ("Wav2Vec2ForXVector", AUDIO | TDNN, ["kernel"], LORA),
    "Qwen3Next": ("Qwen3NextForCausalLM", TINY | NEXT, ["conv1d"], LOHA),
    "LFM2": ("Lfm2ForCausalLM", TINY | LFM2, r".*conv\.conv", LOHA),
    "DeBERTa": ("DebertaV2Model", TINY | DEBERTA, ["rel_embeddings"], LORA),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_models_of_transformers(name: str) -> None:
    model_class, options, targets, config = FOREIGN[name]
    cls = getattr(transformers, model_class)
    torch.manual_seed(0)
    network = cls(cls.config_class(**options)).eval()
    audio = {"input_values": torch.randn(2, 1000)}
    inputs = audio if "conv_dim" in options else {"input_ids": torch.randint(1, 30, (2, 6))}

    def output(model: Any) -> torch.Tensor:
        return model(**inputs)[0]

    with torch.no_grad():
        before = output(network)
    config = copy.copy(config)
    config.target_modules = targets
    model = splice.get_peft_model(network, config).eval()
    trained = output(model)
    trained.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        frozen = output(model)
        with model.disable_adapter():
            assert torch.allclose(output(model), before, atol=1e-6)
        merged = output(model.merge_and_unload())
    assert (merged - before).abs().max() > 1e-6
    difference = float((merged - before).abs().max())
    for found in (trained.detach(), frozen):
        assert float((found - merged).abs().max()) < 1e-3 * difference + 1e-6


# -- a copy in the place of a layer, and trained rows


def _llama(tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


HEADS = {
    "copy": (False, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "copy of a tied head": (True, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "rows": (False, {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [1, 5]}}),
    "rows of tied layers": (True, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}),
}


def _changed(model: Any) -> Any:
    """With other values in the copy or rows than the base has."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.add_(torch.arange(parameter.numel()).reshape(parameter.shape) * 1e-3)
    return model


@pytest.mark.parametrize("case", HEADS)
def test_the_heads_weight_is_the_selected_adapters(case: str) -> None:
    """As in the reference: what a fused loss multiplies with, by any of the ways to it, and with gradients."""
    tied, options = HEADS[case]
    theirs = _changed(peft.get_peft_model(_llama(tied), peft.LoraConfig(r=2, **options)))
    ours = _changed(splice.get_peft_model(_llama(tied), splice.LoraConfig(r=2, **options)))
    found = []
    for model in (theirs, ours):
        hidden = torch.ones(1, 16)
        for weight in (model.lm_head.weight, model.get_output_embeddings().weight):
            model.zero_grad()
            F.linear(hidden, weight).square().sum().backward()
        grads = [p.grad for n, p in model.named_parameters() if "modules_to_save" in n or "tokens_delta" in n]
        assert [grad for grad in grads if grad is not None and grad.any()]
        with model.disable_adapter():
            disabled = model.get_base_model().lm_head.weight.detach()
        found.append((weight.detach(), disabled, [grad for grad in grads if grad is not None]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][1], _llama(tied).lm_head.weight)
    assert all(torch.allclose(a, b) for a, b in zip(found[0][2], found[1][2]))
    state = ours.get_base_model().state_dict()
    assert torch.equal(state["lm_head.weight"], found[1][1])
    copied = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    assert torch.equal(copied.lm_head.weight, found[1][0])


@pytest.mark.parametrize("case", HEADS)
def test_the_heads_weight_by_thread_and_adapter(case: str) -> None:
    tied, options = HEADS[case]
    model = _changed(splice.get_peft_model(_llama(tied), splice.LoraConfig(r=2, **options)))
    model.add_adapter("second", splice.LoraConfig(r=2, **options))
    first, base = model.lm_head.weight.detach(), _llama(tied).lm_head.weight
    model.set_adapter("second")
    assert torch.equal(model.lm_head.weight, base)
    model.set_adapter("default")
    assert torch.equal(model.lm_head.weight, first)
    seen: list[torch.Tensor] = []
    with model.base_model.selection.for_this_call(splice.selection.NOTHING):
        assert torch.equal(model.lm_head.weight, base)
        thread = threading.Thread(target=lambda: seen.append(model.lm_head.weight.detach()))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], first)


def test_a_fused_loss_compiled_in_one_graph() -> None:
    torch._dynamo.reset()
    tied, options = HEADS["copy"]
    model = _changed(splice.get_peft_model(_llama(tied), splice.LoraConfig(r=2, **options))).eval()
    network, hidden = model.get_base_model(), torch.ones(1, 16)
    fused = torch.compile(lambda x: F.linear(x, network.lm_head.weight), fullgraph=True, backend="eager")
    assert torch.allclose(fused(hidden), network.lm_head(hidden))
    with model.disable_adapter():
        assert torch.allclose(fused(hidden), network.lm_head(hidden))


def test_dispatching_after_a_load_moves_the_bases_own_weight() -> None:
    """accelerate reads a tensor as an attribute, and puts what it read back elsewhere."""
    import accelerate

    tied, options = HEADS["copy"]
    model = _changed(splice.get_peft_model(_llama(tied), splice.LoraConfig(r=2, **options))).eval()
    copied = model.lm_head.weight.detach().clone()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    inputs = {"input_ids": torch.randint(1, 30, (2, 6))}
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(model.lm_head.weight, copied)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(**inputs).logits, _llama(tied).eval()(**inputs).logits)
