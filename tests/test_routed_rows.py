"""Mixed batches where layers get tokens and not rows: flattened batches, routers, shared experts, and experts.

Right where it can be told which token belongs to which row; refused in words where a router has sorted them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import splice
from splice.base.routing import gets_sorted_tokens
from splice.selection import BASE
from tests import bases
from tests.comparing import assert_close
from tests.samples import Case, plain_cases

IDS = torch.randint(3, 40, (4, 5), generator=torch.Generator().manual_seed(0))
NAMES = ["first", BASE, "second", "first"]
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip
T5_SIZES = {
    "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_sparse_encoder_layers": 1,
    "num_decoder_layers": 2, "num_sparse_decoder_layers": 1, "num_heads": 2, "num_experts": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "expert_capacity": 64, "dropout_rate": 0.0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
OPT = {
    "vocab_size": 40, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "word_embed_proj_dim": 16, "pad_token_id": 1, "bos_token_id": None,
    "eos_token_id": None, "dropout": 0.0,
}  # fmt: skip
JET = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 8,
    "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip
QWEN = {**SIZES, **EXPERTS, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**SIZES, **LOCAL}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", QWEN),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**SIZES, **EXPERTS}),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {**SIZES, **LOCAL}),
    "jetmoe": ("JetMoeForCausalLM", "JetMoeConfig", JET),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT),
    "switch": ("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", T5_SIZES),
}


@cache
def _prototype(name: str) -> Any:
    import transformers

    model, config, fields = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = getattr(transformers, model)(getattr(transformers, config)(**fields)).eval()
        for parameter in network.parameters():  # transformers starts routers and experts near zero
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
    return network


def with_two(network: nn.Module, fields: dict[str, Any]) -> Any:
    """A model with the adapters "first" and "second", whose values are no small ones."""
    import copy

    torch.manual_seed(0)
    model, config = None, splice.get_peft_config(fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("first", "second"):
            own = copy.deepcopy(config)
            if model is None:
                model = splice.get_peft_model(network, own, adapter_name=name)
            else:
                model.add_adapter(name, own)
        assert model is not None
        tensors = [
            t
            for name in ("first", "second")
            for t in splice.get_peft_model_state_dict(model, adapter_name=name).values()
        ]
    for tensor in tensors:
        if tensor.is_floating_point():  # others are indices
            tensor.data.copy_(torch.randn(tensor.shape))
    return model.eval()


def of(name: str, **fields: Any) -> Any:
    import copy

    return with_two(copy.deepcopy(_prototype(name)), {**LORA, **fields})


def logits(model: Any, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    more = {"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more, **options).logits.detach()


def alone(model: Any, name: str, function: Callable[[], torch.Tensor]) -> torch.Tensor:
    if name == BASE:
        with model.disable_adapter():
            return function()
    model.set_adapter(name)
    return function()


LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
PARAMETERS = {"target_modules": []}
TOLD: dict[str, tuple[str, dict[str, Any]]] = {
    "a flattened batch": ("opt", {"target_modules": ["fc1", "fc2", "q_proj"]}),
    "the last of two layers that get one": ("opt", {"target_modules": ["fc2"]}),
    "a shared expert": ("qwen2_moe", {"target_modules": ["gate_proj", "up_proj", "down_proj", "shared_expert_gate"]}),
    "the last layer of a shared expert": ("qwen2_moe", {"target_modules": ["down_proj"]}),
    "attention beside experts": ("mixtral", {"target_modules": ["q_proj", "v_proj"]}),
    "routers": ("jetmoe", {"target_modules": ["layer"]}),
    "routers of an encoder-decoder": ("switch", {"target_modules": ["classifier", "q", "wi_0"]}),
    "all experts as parameters": ("mixtral", {**PARAMETERS, "target_parameters": ["experts.gate_up_proj"]}),
    "two parameters of all experts": (
        "olmoe", {**PARAMETERS, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "experts and a shared one": (
        "qwen2_moe", {"target_modules": ["down_proj"], "target_parameters": ["experts.down_proj"]},
    ),
    "experts of another model": ("granitemoe", {**PARAMETERS, "target_parameters": ["experts.down_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("what", TOLD)
@torch.no_grad()
def test_each_row_has_its_own(what: str) -> None:
    name, fields = TOLD[what]
    model = of(name, **fields)
    found = logits(model, adapter_names=NAMES)
    for row, adapter in enumerate(NAMES):
        expected = alone(model, adapter, lambda row=row: logits(model, IDS[row : row + 1]))
        assert_close(found[row : row + 1], expected, factor=30)
    assert not torch.allclose(found, logits(model.get_base_model(), IDS), atol=1e-2)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"use_cache": False}, {"num_beams": 3, "use_cache": False}], ids=str
)
@pytest.mark.parametrize("what", [what for what in TOLD if "encoder" not in what])
@torch.no_grad()
def test_generated_rows(what: str, options: dict[str, Any]) -> None:
    """Beams as well: of a batch with a row for each beam, of which some layers see the tokens."""
    name, fields = TOLD[what]
    model = of(name, **fields)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **options}
    found = model.generate(input_ids=IDS, adapter_names=NAMES, **options)
    for adapter in dict.fromkeys(NAMES):
        expected = alone(model, adapter, lambda: model.generate(input_ids=IDS, **options))
        rows = [row for row, own in enumerate(NAMES) if own == adapter]
        assert torch.equal(found[rows], expected[rows]), adapter


# -- what cannot be told


class Block(nn.Module):
    """A router and some experts, each of which is called with the tokens that were chosen for it, the best first."""

    def __init__(self, name: str, count: int = 2) -> None:
        super().__init__()
        self.router = nn.Linear(8, count)
        self.name = name
        self.add_module(
            name, nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(count))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        scores = self.router(flat).softmax(-1)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.get_submodule(self.name)):
            chosen = (scores.argmax(-1) == index).nonzero().flatten()
            chosen = chosen[scores[chosen, index].argsort(descending=True)]
            out[chosen] = expert(flat[chosen])
        return out.view(x.shape)


class Routed(nn.Module):
    """A network of such blocks."""

    def __init__(self, name: str = "experts") -> None:
        super().__init__()
        self.first, self.moe, self.head = nn.Linear(8, 8), Block(name), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.moe(torch.tanh(self.first(x))))


@pytest.mark.parametrize("case", plain_cases(bases.LINEAR), ids=str)
@pytest.mark.parametrize("name", ["experts", "local_experts", "moe_experts"])
@torch.no_grad()
def test_layers_in_experts_are_refused_and_all_others_right(case: Case, name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 8)
    model = with_two(Routed(name), case.config(inference_mode=True, target_modules=rf".*{name}\.\d\.[02]|first"))
    one = model(x, adapter_names=["first"] * 4)  # all rows are alike, and so are all tokens
    assert_close(one, alone(model, "first", lambda: model(x)), factor=30)
    assert_close(model(x, adapter_names=[BASE] * 4), alone(model, BASE, lambda: model(x)))
    for names in (NAMES, ["first"] * 3 + [BASE]):
        with pytest.raises(ValueError, match=rf"'moe\.{name}\.0\.0' is inside an expert.*sorted"):
            model(x, adapter_names=names)
    # The router has two outputs, and some methods take no rank above that.
    rank = {"r": 2} if case.config().get("r") == 3 else {}
    model = with_two(Routed(name), case.config(inference_mode=True, target_modules=["first", "router"], **rank))
    found = model(x, adapter_names=NAMES)
    for row, adapter in enumerate(NAMES):
        own = [other for other in range(len(NAMES)) if not case.sample.row_by_row and NAMES[other] == adapter] or [row]
        expected = alone(model, adapter, lambda own=own: model(x[own]))
        assert_close(found[row], expected[own.index(row)], factor=30)


@torch.no_grad()
def test_experts_that_are_not_called_so() -> None:
    """Then the counts do not agree, as a rule, and that is refused too."""
    torch.manual_seed(0)
    model = with_two(Routed("branches"), {**LORA, "target_modules": r".*branches\.\d\.[02]"})
    for rows in range(2, 8):
        x, names = torch.randn(rows, 5, 8), ["first", "second"] + ["first"] * (rows - 2)
        with pytest.raises(ValueError, match=rf"moe\.branches.*number of inputs, but got {rows} and"):
            model(x, adapter_names=names)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "experts that are layers": ("switch", {"target_modules": ["wi", "wo"]}, r"expert_0.wi' is inside an expert"),
    "one layer for all experts": (
        "jetmoe", {**PARAMETERS, "target_parameters": ["mlp.input_linear.weight"]}, r"mlp.input_linear' is inside an expert",
    ),
    "routers that give several things": (
        "mixtral", {**PARAMETERS, "target_parameters": ["gate.weight"]}, "take one tensor and give one tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_told_is_refused(what: str) -> None:
    name, fields, text = REFUSED[what]
    model = of(name, **fields)
    for call in (logits, lambda model, **options: model.generate(input_ids=IDS, max_new_tokens=2, **options)):
        with pytest.raises((ValueError, TypeError), match=text):
            call(model, adapter_names=NAMES)
    if name == "switch":
        found = logits(model, adapter_names=["second"] * 4)
        assert_close(found, alone(model, "second", lambda: logits(model)), factor=30)


PATHS = {
    "model.layers.0.mlp.experts.3.gate_proj": True,
    "encoder.mlp.experts.expert_0.wi": True,
    "block_sparse_moe.experts.0.w1": True,
    "layers.1.expert": True,
    "deepspeed_moe.experts.deepspeed_experts.0.up": True,
    "model.layers.0.mlp.experts": False,
    "model.layers.0.mlp.shared_expert.down_proj": False,
    "model.layers.0.mlp.shared_experts.up_proj": False,
    "model.layers.0.mlp.shared_expert_gate": False,
    "model.layers.0.mlp.expert_gate": False,
    "self_attention.experts.router.layer": False,
    "mlp.router.classifier": False,
    "model.layers.0.self_attn.q_proj": False,
}


@pytest.mark.parametrize("path", PATHS)
def test_which_layers_get_sorted_tokens(path: str) -> None:
    assert gets_sorted_tokens(path) is PATHS[path]


# -- aLoRA, which asks for the position as well


@torch.no_grad()
def test_invocations_in_a_flattened_batch_and_in_experts() -> None:
    ids = torch.tensor([[3, 5, 6, 7, 8], [3, 4, 7, 5, 6], [3, 4, 7, 8, 9], [5, 6, 7, 8, 9]])
    fields = {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}
    for name, targets in (("opt", ["fc1", "fc2"]), ("qwen2_moe", r".*shared_expert\..*_proj")):
        model = of(name, target_modules=targets, **fields)
        plain, found = logits(model.get_base_model(), ids), logits(model, ids)
        changed = (plain - found).abs().amax(-1) > 1e-4
        assert changed.tolist() == [[0, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0] * 5, [1] * 5]
        for row in range(4):
            assert_close(found[row : row + 1], logits(model, ids[row : row + 1]), factor=30)
        mixed = logits(model, ids, adapter_names=NAMES)
        for row, adapter in enumerate(NAMES):
            expected = alone(model, adapter, lambda model=model, row=row: logits(model, ids[row : row + 1]))
            assert_close(mixed[row : row + 1], expected, factor=30)
        generated = model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        again = model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=False)
        assert torch.equal(generated, again)
