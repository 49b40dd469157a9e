"""LoRA+, LoRA-FA and the Riemannian optimizer beside the reference's: groups, and the tensors after some steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import peft.optimizers
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import splice
from tests.comparing import assert_close

IDS = torch.tensor([[2, 6, 8, 4], [5, 7, 9, 3]])
Library = Any


def _of(library: Library) -> Any:
    """Where a library has its optimizers."""
    return peft.optimizers if library is peft else library


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).to(dtype)


def opt() -> nn.Module:
    """With biases and layer norms."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "word_embed_proj_dim": 16}
    return OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=2, max_position_embeddings=16))


LORA: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (llama, {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}),
    "rslora": (llama, {"target_modules": ["q_proj"], "use_rslora": True}),
    "embeddings": (llama, {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["norm", "lm_head"]}),
    "tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
    "norms and biases": (
        opt,
        {"target_modules": ["q_proj"], "modules_to_save": ["final_layer_norm"], "bias": "lora_only"},
    ),
    "all biases": (opt, {"target_modules": ["q_proj"], "bias": "all"}),
    "dora": (llama, {"target_modules": ["q_proj"], "use_dora": True}),
    "bias of B": (llama, {"target_modules": ["q_proj"], "lora_bias": True}),
}
# What LoRA-FA of the reference leaves untrained, though it requires gradients.
UNTRAINED = {"dora": "lora_magnitude_vector", "bias of B": "lora_B.default.bias"}


def adapted(library: Library, case: str, name: str = "default", **options: Any) -> Any:
    make, fields = LORA[case]
    config = library.LoraConfig(**{"r": 4, "lora_alpha": 8, **fields})
    return filled(library.get_peft_model(make(), config, adapter_name=name, **options))


def filled(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.manual_seed(len(name))
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
            if ".lora_" in name:  # drawn in another order
                parameter.data.copy_(0.2 * torch.randn(parameter.shape))
    return model


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 3) -> dict[str, torch.Tensor]:
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def groups(model: Any, optimizer: torch.optim.Optimizer) -> list[Any]:
    names = {id(p): name for name, p in model.named_parameters()}
    found = []
    for group in optimizer.param_groups:
        options = {key: value for key, value in group.items() if key not in ("params", "names")}
        found.append((options, sorted(names[id(p)] for p in group["params"])))
    return found


def in_reference(groups: list[Any]) -> list[Any]:
    """With the reference's name for a bias of a layer that all biases are trained of."""
    return [(options, [name.replace(".base_layer.bias", ".bias") for name in names]) for options, names in groups]


def trains_alike(case: str, make: Callable[[Any, Any], Any], cls: type) -> None:
    """The optimizer that `make(library, model)` gives, of the class `cls`, has the same groups in both and trains alike."""
    found = []
    for library in (splice, peft):
        model = adapted(library, case)
        optimizer = make(_of(library), model)
        assert isinstance(optimizer, cls)
        told = in_reference(groups(model, optimizer))
        found.append((told, train(model, optimizer)))
    (ours, our_tensors), (theirs, their_tensors) = found
    assert ours == theirs
    for mine, reference in zip(sorted(our_tensors), sorted(their_tensors)):
        assert_close(our_tensors[mine], their_tensors[reference])


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("case", LORA)
def test_loraplus(case: str, cls: Any) -> None:
    options = {"lr": 1e-2, "loraplus_lr_ratio": 4.0, "loraplus_lr_embedding": 1e-3, "loraplus_weight_decay": 0.1}
    trains_alike(case, lambda library, model: library.create_loraplus_optimizer(model, cls, **options), cls)
    assert type(splice.create_loraplus_optimizer(adapted(splice, case), cls, **options)) is cls


def test_loraplus_has_the_references_defaults() -> None:
    for library in (splice, peft):
        model = adapted(library, "embeddings")
        optimizer = _of(library).create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-2, loraplus_lr_ratio=2.0)
        assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
            (1e-2, 0),
            (1e-6, 0),
            (2e-2, 0),
            (2e-2, 0),
        ]
    with pytest.raises(TypeError, match="nonsense"):
        splice.create_loraplus_optimizer(model, torch.optim.SGD, lr=1.0, loraplus_lr_ratio=2.0, nonsense=1)


@pytest.mark.parametrize("name", ["lora_B", "bias", "lora_embedding_A"])
def test_loraplus_does_not_go_by_the_names_of_adapters(name: str) -> None:
    groups_of = []
    for adapter in ("default", name):
        model = adapted(splice, "plain", adapter)
        optimizer = splice.create_loraplus_optimizer(model, torch.optim.SGD, lr=1.0, loraplus_lr_ratio=2.0)
        groups_of.append(
            [(o, [n.replace(f".{adapter}.", ".") for n in names]) for o, names in groups(model, optimizer)]
        )
    assert groups_of[0] == groups_of[1]


def test_loraplus_says_that_a_decay_is_not_used() -> None:
    model = adapted(splice, "plain")
    with pytest.warns(splice.PeftWarning, match="Pass `loraplus_weight_decay`"):
        splice.create_loraplus_optimizer(model, torch.optim.SGD, lr=1.0, loraplus_lr_ratio=2.0, weight_decay=0.1)


@pytest.mark.parametrize("case", LORA)
def test_lorafa(case: str) -> None:
    found = []
    for library in (splice, peft):
        model = adapted(library, case)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = _of(library).create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2, weight_decay=0.1)
        after = train(model, optimizer)
        found.append({n: t for n, t in after.items() if UNTRAINED.get(case, "nothing") not in n})
        assert not any("lora_A" in name for name in after)
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        if library is splice:
            assert moved == set(after)
            assert not model.training or not any(
                p.requires_grad for n, p in model.named_parameters() if "embedding_A" in n
            )
    ours, theirs = found
    theirs = {
        name: tensor for name, tensor in theirs.items() if "lora_embedding_A" not in name
    }  # it does not move there
    if case in UNTRAINED:  # one that is trained here has its effect on the others
        return
    assert len(ours) == len(theirs)
    for mine, reference in zip(sorted(ours), sorted(theirs)):
        assert_close(ours[mine], theirs[reference])


def test_lorafa_trains_what_is_no_factor_by_adamw() -> None:
    """The reference leaves DoRA's magnitude and the bias of B as they are, in silence."""
    model = adapted(splice, "dora")
    magnitude = next(n for n, p in model.named_parameters() if p.requires_grad and "magnitude" in n)
    before = model.get_parameter(magnitude).detach().clone()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer = splice.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    optimizer.step()
    twin = nn.Parameter(before.clone())
    twin.grad = model.get_parameter(magnitude).grad
    torch.optim.AdamW([twin], lr=1e-2, eps=1e-6 / 0.001**0.5, weight_decay=0).step()
    # AdamW of torch has its eps behind the correction.
    assert_close(model.get_parameter(magnitude), twin)


def test_lorafa_of_two_adapters_follows_the_selection() -> None:
    model = adapted(splice, "plain")
    model.add_adapter("other", splice.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    optimizer = splice.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    for name in ("default", "other"):
        model.set_adapter(name)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        train(model, optimizer, steps=1)
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {n for n in before if f"lora_B.{name}." in n}


def test_lorafa_on_a_convolution_projects_with_its_kernel() -> None:
    torch.manual_seed(0)
    model = splice.get_peft_model(
        nn.Sequential(nn.Conv2d(3, 4, 3)),
        splice.LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights=False),
    )
    a, b = (next(p for n, p in model.named_parameters() if part in n) for part in ("lora_A", "lora_B"))
    before = b.detach().clone()
    optimizer = splice.create_lorafa_optimizer(model, r=2, lora_alpha=4, lr=1e-2)
    model(torch.randn(2, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    flat = a.detach().reshape(2, -1)
    inverse = torch.linalg.inv(flat @ flat.T)
    projected = (b.grad.reshape(4, 2) @ inverse / 4).reshape(b.shape)
    # The first step of AdamW goes by the sign.
    assert_close(b.detach(), before - 1e-2 * projected.sign(), factor=50)


def test_lorafa_refuses_what_it_cannot_do() -> None:
    model = adapted(splice, "plain")
    with pytest.raises(ValueError, match=r"`use_rslora=True` was passed .* \['default'\] say otherwise"):
        splice.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2, use_rslora=True)
    assert any("lora_A" in n and p.requires_grad for n, p in model.named_parameters())
    with pytest.warns(FutureWarning, match="deprecated"):
        splice.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2, use_rslora=False)
    other = splice.get_peft_model(llama(), splice.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="did not find any LoRA layer"):
        splice.create_lorafa_optimizer(other, r=4, lora_alpha=8, lr=1e-2)
    with pytest.raises(ValueError, match="lr and eps must be at least 0"):
        splice.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=-1.0)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("case", LORA)
def test_riemannian(case: str, cls: Any) -> None:
    options = {"lr": 1e-2, "reg": 0.05, "weight_decay": 0.1}
    trains_alike(case, lambda library, model: library.create_riemannian_optimizer(model, cls, **options), cls)


def test_riemannian_in_half_precision() -> None:
    gradients = []
    for library in (splice, peft):
        config = library.LoraConfig(r=4, target_modules=["q_proj"])
        model = filled(library.get_peft_model(llama(torch.bfloat16), config, autocast_adapter_dtype=False))
        optimizer = _of(library).create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-2)
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient.dtype is torch.bfloat16
        assert_close(gradient, gradients[1][name])


def test_riemannian_refuses_what_it_cannot_do() -> None:
    model = adapted(splice, "plain")
    optimizer = splice.create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-2)
    with pytest.raises(ValueError, match="does not support closures"):
        optimizer.step(lambda: 0.0)
    model.set_requires_grad("default", False)
    for other in (model, llama()):
        with pytest.raises(ValueError, match="did not find any trainable lora_A/lora_B"):
            splice.create_riemannian_optimizer(other, torch.optim.SGD, lr=1e-2)


def test_a_copy_of_a_riemannian_optimizer_is_one() -> None:
    model = adapted(splice, "plain")
    optimizer = splice.create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    copy.deepcopy(optimizer).step()
    assert all(not torch.equal(p.grad, plain[n]) for n, p in model.named_parameters() if n in plain)


class Experts(nn.Module):
    """E matrices in one parameter, (E, out, in)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("eoi,bi->beo", self.weight, x)


@pytest.mark.parametrize("which", ["lorafa", "riemannian"])
def test_each_expert_is_treated_by_its_own_factors(which: str) -> None:
    """As if the others were not there: three models of one expert take the same steps."""
    torch.manual_seed(0)
    network, x = nn.ModuleDict({"experts": Experts()}), torch.randn(6, 4)
    config = splice.LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=["experts.weight"])
    model = filled(splice.get_peft_model(network, config))
    singles = []
    for expert in range(3):
        single = nn.ModuleDict({"experts": nn.Linear(4, 5, bias=False)})
        single.experts.weight.data.copy_(network.experts.weight[expert])
        singles.append(splice.get_peft_model(single, splice.LoraConfig(r=2, lora_alpha=4, target_modules=["experts"])))
        layer, of = singles[-1].base_model.model.experts, model.base_model.model.experts
        layer.lora_A["default"].weight.data.copy_(of.lora_A["default"].weight.reshape(3, 2, 4)[expert])
        layer.lora_B["default"].weight.data.copy_(of.lora_B["default"].weight.reshape(5, 2, 3)[..., expert])
    for each in (model, *singles):
        if which == "lorafa":
            optimizer = splice.create_lorafa_optimizer(each, r=2, lora_alpha=4, lr=1e-2)
        else:
            optimizer = splice.create_riemannian_optimizer(each, torch.optim.SGD, lr=1e-2)
        each.base_model.model.experts(x).square().sum().backward()
        optimizer.step()
    b = model.base_model.model.experts.lora_B["default"].weight.reshape(5, 2, 3)
    for expert, single in enumerate(singles):
        assert_close(b[..., expert], single.base_model.model.experts.lora_B["default"].weight)


def test_the_state_of_lorafa_is_saved_and_loaded() -> None:
    whole, first = adapted(splice, "plain"), adapted(splice, "plain")
    make = splice.create_lorafa_optimizer
    expected = train(whole, make(whole, r=4, lora_alpha=8, lr=1e-2), steps=4)
    optimizer = make(first, r=4, lora_alpha=8, lr=1e-2)
    train(first, optimizer, steps=2)
    second = adapted(splice, "plain")
    second.load_state_dict(first.state_dict())
    again = make(second, r=4, lora_alpha=8, lr=1e-2)
    again.load_state_dict(optimizer.state_dict())
    for name, tensor in train(second, again, steps=2).items():
        assert torch.equal(tensor, expected[name])


def test_they_are_found_by_name() -> None:
    names = {name for name in vars(peft.optimizers) if name.startswith("create_")}
    assert names <= set(dir(splice))
