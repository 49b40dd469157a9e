"""Whoever puts another forward in the place of an adapted one: the adapters act as they do in the reference."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import splice
from tests.comparing import assert_close

IDS = torch.tensor([[2, 6, 8, 4], [5, 7, 9, 3]])
CONFIGS = {
    "prompt": ("PromptTuningConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}),
    "prefix": ("PrefixTuningConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}),
    "lora": ("LoraConfig", {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}),
}
every = pytest.mark.parametrize("method", CONFIGS)
on_call = pytest.mark.parametrize("method", ["prompt", "prefix"])


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


def adapted(library: Any, method: str) -> Any:
    name, fields = CONFIGS[method]
    model = library.get_peft_model(base(), getattr(library, name)(**fields))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.manual_seed(len(name))
            parameter.data.copy_(0.3 * torch.randn(parameter.shape))
    return model.eval()


def patch(network: nn.Module, factor: float, seen: list[Any]) -> None:
    """As trl does it: a function that knows the forward which was there, and is bound to the network."""
    before = network.forward

    @functools.wraps(type(network).forward)
    def patched(self: nn.Module, *args: Any, scaled: bool = True, **kwargs: Any) -> Any:
        seen.append(kwargs.get("inputs_embeds"))
        output = before(*args, **kwargs)
        output.logits = output.logits * (factor if scaled else 1.0)
        return output

    network.forward = types.MethodType(patched, network)


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, **options).logits
    return found


@every
def test_as_in_the_reference(method: str) -> None:
    """Once, twice one over the other, and taken off in the order in which they came."""
    found = []
    for library in (splice, peft):
        model, seen = adapted(library, method), []
        network = model.get_base_model()
        results = [logits(model)]
        first = network.forward
        patch(network, 2.0, seen)
        results += [logits(model), logits(model, scaled=False)]
        second = network.forward
        patch(network, 3.0, seen)
        results += [logits(model)]
        with model.disable_adapter():
            results += [logits(model)]
        network.forward = second
        results += [logits(model)]
        network.forward = first
        results += [logits(model)]
        found.append((results, [item is not None for item in seen]))
    (ours, we_saw), (theirs, they_saw) = found
    for mine, reference in zip(ours, theirs):
        assert_close(mine, reference)
    assert we_saw == they_saw
    assert_close(ours[1], 2 * ours[0])
    assert_close(ours[3], 6 * ours[0])


@on_call
def test_gradients_arrive(method: str) -> None:
    gradients = []
    for library in (splice, peft):
        model = adapted(library, method).train()
        patch(model.get_base_model(), 2.0, [])
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    ours, theirs = gradients
    assert set(ours) == set(theirs)
    for name in ours:
        assert_close(ours[name], theirs[name])


def _fused(self: Any, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """A loss of its own, past the forward that was there: the sum of what the labels get."""
    hidden = self.model(**{name: value for name, value in kwargs.items() if value is not None})[0]
    scores = nn.functional.linear(hidden, self.lm_head.weight).log_softmax(-1)
    kept = labels != -100
    return scores.gather(-1, labels.clamp(min=0)[..., None])[..., 0][kept].sum()


@every
def test_one_that_steps_around_what_was_there(method: str) -> None:
    """The prompt stands in front of the input and of the labels all the same."""
    found = []
    for library in (splice, peft):
        model = adapted(library, method)
        network = model.get_base_model()
        network.forward = types.MethodType(_fused, network)
        loss = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS)
        loss.backward()
        found.append((loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (ours, our_gradients), (theirs, their_gradients) = found
    assert_close(ours, theirs)
    assert set(our_gradients) == set(their_gradients)
    for name in our_gradients:
        assert_close(our_gradients[name], their_gradients[name])


@on_call
def test_rows_with_adapters_of_their_own(method: str) -> None:
    model = adapted(splice, method)
    name, fields = CONFIGS[method]
    model.add_adapter("other", getattr(splice, name)(**fields))
    expected = []
    for adapter in ("other", "default"):
        model.set_adapter(adapter)
        expected.append(logits(model))
    patch(model.get_base_model(), 2.0, [])
    rows = logits(model, adapter_names=["other", "default"])
    assert_close(rows, 2 * torch.stack([expected[0][0], expected[1][1]]))
    model.delete_adapter("default")
    assert_close(logits(model), 2 * expected[0])


class _Counting(ModelHook):
    calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


@every
def test_hooks_of_accelerate_come_and_go(method: str) -> None:
    model, hook = adapted(splice, method), _Counting()
    network, expected = model.get_base_model(), logits(model)
    add_hook_to_module(network, hook)
    assert_close(logits(model), expected)
    patch(network, 2.0, [])
    assert_close(logits(model), 2 * expected)
    assert hook.calls == 2
    remove_hook_from_module(network)
    assert_close(logits(model), expected)
    assert hook.calls == 2


@every
def test_unloaded_the_patch_goes_on_with_the_base(method: str) -> None:
    plain = logits(base())
    model = adapted(splice, method)
    patch(model.get_base_model(), 2.0, [])
    mine = model.get_base_model().forward
    network = model.unload()
    assert type(network) is LlamaForCausalLM
    assert_close(logits(network), 2 * plain)
    kept = mine if method == "lora" else mine.__wrapped__
    assert network.forward == kept
    del network.forward
    assert_close(logits(network), plain)


@every
def test_put_on_again_the_patch_is_called_once(method: str) -> None:
    model = adapted(splice, method)
    expected = logits(model)
    patch(model.get_base_model(), 2.0, [])
    name, fields = CONFIGS[method]
    again = splice.get_peft_model(model.unload(), getattr(splice, name)(**fields)).eval()
    for parameter, value in zip(again.parameters(), adapted(splice, method).parameters()):
        parameter.data.copy_(value)
    assert_close(logits(again), 2 * expected)


@on_call
def test_a_copy_has_its_own_adapters(method: str) -> None:
    model = adapted(splice, method)
    network = model.get_base_model()
    network.forward = functools.partial(_halved, network)
    expected = logits(model)
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert_close(logits(other), expected)


def _halved(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
    output = type(network).forward(network, *args, **kwargs)
    output.logits = output.logits / 2
    return output


@on_call
def test_a_compiled_forward(method: str) -> None:
    model = adapted(splice, method)
    expected = logits(model)
    network = model.get_base_model()
    network.forward = torch.compile(network.forward, backend="eager")
    assert_close(logits(model), expected)


@on_call
def test_what_it_takes_is_told(method: str) -> None:
    """`generate` checks its arguments by the signature."""
    model = adapted(splice, method)
    expected = model.generate(input_ids=IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    patch(model.get_base_model(), 2.0, [])
    found = model.generate(input_ids=IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(input_ids=IDS, max_new_tokens=3, nonsense=1)


def _doubled(before: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *args: 2 * before(*args)


def test_of_a_layer_the_whole_forward_is_replaced() -> None:
    """There the reference's own forward is what is replaced, adapters and all."""
    results = []
    for library in (splice, peft):
        model = adapted(library, "lora")
        layers = [layer.self_attn.q_proj for layer in model.get_base_model().model.layers]
        layers[0].forward = _doubled(layers[0].forward)
        layers[1].forward = lambda x: torch.zeros(*x.shape[:-1], 16)
        results.append(logits(model))
    assert_close(results[0], results[1])


def test_a_layers_patch_outlives_its_adapters() -> None:
    model = adapted(splice, "lora")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.forward = _doubled(layer.forward)
    network = model.unload()
    x = torch.randn(2, 16)
    assert_close(layer(x), 2 * nn.functional.linear(x, layer.weight))
    assert type(network.model.layers[0].self_attn.q_proj) is nn.Linear


@pytest.mark.parametrize(
    "fields", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}], ids=str
)
def test_the_weight_that_a_layers_own_new_forward_reads(fields: dict[str, Any]) -> None:
    """Of a copied head the copy's, as trl's heads in float32 take for granted; of a layer with LoRA on it the base's."""
    found = []
    for library in (splice, peft):
        config = library.LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **fields})
        model = library.get_peft_model(base(), config).eval()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.manual_seed(len(name))
                parameter.data.copy_(0.3 * torch.randn(parameter.shape))
        head = model.get_base_model().lm_head
        head.forward = functools.partial(_with_weight_of, head)
        results = [model(input_ids=IDS).logits]
        results[0].sum().backward()
        gradients = [p.grad for n, p in model.named_parameters() if "lm_head" in n and p.requires_grad]
        with model.disable_adapter():
            results.append(logits(model))
        found.append([*results, *(g for g in gradients if g is not None)])
    assert len(found[0]) == len(found[1])
    for mine, reference in zip(*found):
        assert_close(mine, reference, factor=10)


def _with_weight_of(head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(hidden, head.weight)
