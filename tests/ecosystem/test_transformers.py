"""transformers' own methods for adapters, on a network that carries them without a PeftModel around it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.integrations import peft as mixin

from tests.ecosystem.both import seed_of
from tests.ecosystem.comparing import same
from tests.test_stacked_experts import MIXTRAL, QWEN, Old, adapter, close

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.arange(12).reshape(2, 6)
shows = pytest.mark.shows


def older_is_fine() -> None:
    """transformers asks for a release that the reference has not reached; what it needs is there."""
    mixin.MIN_PEFT_VERSION = "0.21.0"
    logging.getLogger("transformers").setLevel(logging.ERROR)


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, **options)).eval()


def bert() -> Any:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)).eval()


def out(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result = model(input_ids=IDS)
    return result["logits"] if "logits" in result else result["last_hidden_state"]


def fill(model: Any, key: object) -> None:
    """Values that nothing random has touched, for all that is trained."""
    generator = torch.Generator().manual_seed(seed_of(key))
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def trained(model: Any) -> list[str]:
    """By the base's own names, which the reference changes."""
    found = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return sorted(name.replace("base_layer.weight", "weight") for name in found)


def _lora(**options: Any) -> Callable[[], Any]:
    return lambda: peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **options})


# -- adapters of every method that acts on layers

CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "LoRA": (llama, _lora()),
    "LoRA with biases": (llama, _lora(lora_bias=True)),
    "LoRA and biases of the base": (
        lambda: llama(attention_bias=True),
        _lora(bias="all"),
    ),
    "LoRA on embeddings": (llama, _lora(target_modules=["embed_tokens", "q_proj"])),
    "LoRA with a copied head": (llama, _lora(modules_to_save=["lm_head"])),
    "LoRA with trained tokens": (llama, _lora(trainable_token_indices=[1, 3])),
    "LoRA with trained tokens, tied": (
        lambda: llama(tie_word_embeddings=True),
        _lora(trainable_token_indices=[1, 3]),
    ),
    "LoRA on a classifier": (
        bert,
        lambda: peft.LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"]),
    ),
    "LoRA on Conv1D": (
        gpt2,
        lambda: peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True),
    ),
    "IA3": (
        llama,
        lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "LoHa": (llama, lambda: peft.LoHaConfig(r=4, target_modules=["q_proj"])),
    "LoKr": (llama, lambda: peft.LoKrConfig(r=4, target_modules=["q_proj"])),
    "OFT": (llama, lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"])),
    "FourierFT": (llama, lambda: peft.FourierFTConfig(n_frequency=10, target_modules=["q_proj"])),
    "LN tuning": (llama, lambda: peft.LNTuningConfig(target_modules=["input_layernorm"])),
    "trainable tokens": (
        llama,
        lambda: peft.TrainableTokensConfig(token_indices=[1, 3], target_modules=["embed_tokens"]),
    ),
    "AdaLoRA": (
        llama,
        lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, tinit=1, tfinal=1, target_modules=["q_proj"]),
    ),
    # Where the reference does not find the magnitudes, and where it cannot save: see docs/differences.md.
    "DoRA": (llama, _lora(use_dora=True)),
    "LoRA on embeddings, tied": (
        lambda: llama(tie_word_embeddings=True),
        _lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    ),
}
OURS_ALONE = ("DoRA", "LoRA on embeddings, tied")


def told(model: Any, folder: str, base: torch.Tensor, **options: Any) -> dict[str, Any]:
    """What transformers says of a load, and what the model does with it."""
    info = model.load_adapter(folder, adapter_name="x", **options)
    result = {
        "output": out(model.eval()),
        "missing": sorted(info.missing_keys),
        "unexpected": sorted(info.unexpected_keys),
        "trained": trained(model),
    }
    model.disable_adapters()
    result["disabled"] = out(model) - base
    model.enable_adapters()
    result["enabled again"] = out(model)
    return result


def every_method(folder: str) -> dict[str, dict[str, Any]]:
    """Add each adapter, fill it, save it, and load it again by transformers and as a PeftModel."""
    older_is_fine()
    found: dict[str, dict[str, Any]] = {}
    for name in CASES:
        found[name] = {}
        try:
            one_method(name, str(Path(folder) / name), found[name])
        except (KeyError, RuntimeError) as error:
            found[name]["error"] = str(error)
    return found


def one_method(name: str, place: str, result: dict[str, Any]) -> None:
    build, config = CASES[name]
    model = build()
    base = out(model)
    model.add_adapter(config(), "mine")
    result.update(trained=trained(model), active=model.active_adapters())
    fill(model, name)
    result["output"] = out(model)
    result["state dict"] = sorted(model.get_adapter_state_dict())
    model.save_pretrained(place)
    result["files"] = sorted(path.name for path in Path(place).iterdir())
    result["loaded"] = told(build(), place, base)
    result["to train on"] = told(build(), place, base, is_trainable=True)
    result["by PeftModel"] = out(peft.PeftModel.from_pretrained(build(), place))


# -- what is done with several adapters, and by other ways


def several(folder: str) -> dict[str, Any]:
    older_is_fine()
    place = Path(folder)
    result: dict[str, Any] = {}
    for name, rank in (("a", 2), ("b", 4)):
        model = llama()
        model.add_adapter(peft.LoraConfig(r=rank, target_modules=["q_proj"], init_lora_weights=False), "default")
        fill(model, name)
        model.save_pretrained(place / name)
    model = llama()
    model.load_adapter(str(place / "a"), adapter_name="a")
    result["one"] = out(model)
    model.load_adapter(str(place / "b"), adapter_name="b", is_trainable=True)
    result["active after the second"], result["two"] = model.active_adapters(), out(model.eval())
    result["trained after the second"] = trained(model)
    model.set_adapter("a")
    result["a"], result["trained with a"] = out(model), trained(model)
    model.set_adapter(["a", "b"])
    result["both"], result["active"] = out(model), model.active_adapters()
    for what, act in {
        "saving two": lambda: model.save_pretrained(place / "two"),
        "a name that is there": lambda: model.load_adapter(str(place / "a"), adapter_name="a"),
        "no such name": lambda: model.set_adapter("c"),
        "deleting no such name": lambda: model.delete_adapter("c"),
    }.items():
        try:
            act()
        except ValueError as error:
            result[what] = str(error)
    result["state dict of b"] = dict(model.get_adapter_state_dict("b"))
    model.delete_adapter("b")
    result["deleted"], result["left"] = out(model), sorted(model.peft_config)
    model.delete_adapter("a")
    result["bare"], result["config"] = out(model), hasattr(model, "peft_config")
    result["parameters"] = sorted(name.replace("base_layer.", "") for name, _ in model.named_parameters())
    model.load_adapter(str(place / "b"), adapter_name="a")
    result["again"] = out(model)
    return result


def other_ways(folder: str) -> dict[str, Any]:
    """From memory, from a pickle, hotswapped, onto the backbone alone, by the folder's name."""
    older_is_fine()
    place = Path(folder)
    llama().save_pretrained(place / "base")
    for name in ("a", "b"):
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(place / "base"), _lora(r=2)())
        fill(model, name)
        model.save_pretrained(str(place / name))
    model.save_pretrained(str(place / "pickle"), safe_serialization=False)
    result: dict[str, Any] = {}
    tensors = peft.utils.load_peft_weights(str(place / "a"))
    for what, given in {
        "with the prefix": tensors,
        "without": {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()},
    }.items():
        model = llama()
        model.load_adapter(peft_config=_lora(r=2)(), adapter_state_dict=given, low_cpu_mem_usage=True)
        result[f"from memory {what}"] = out(model.eval())
    model = llama()
    model.load_adapter(str(place / "pickle"), use_safetensors=False)
    result["pickle"] = out(model)
    model = llama()
    model.enable_peft_hotswap(target_rank=2)
    model.load_adapter(str(place / "a"), adapter_name="default")
    result["before"] = out(model)
    model.load_adapter(str(place / "b"), adapter_name="default")
    result["hotswapped"] = out(model)
    model = AutoModelForCausalLM.from_pretrained(place / "a")
    result["by the adapter's folder"] = out(model)
    result["its config"] = sorted(model.peft_config), model.active_adapters(), trained(model)
    result["the backbone"] = out(AutoModel.from_pretrained(place / "a"))
    model = AutoModelForCausalLM.from_pretrained(place / "a", dtype=torch.bfloat16)
    result["dtypes"] = sorted({str(parameter.dtype) for parameter in model.parameters()})
    words = Tokenizer(WordLevel({f"t{index}": index for index in range(40)}, unk_token="t0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0").save_pretrained(place / "base")
    written = pipeline("text-generation", model=str(place / "a"), max_new_tokens=4, do_sample=False, device="cpu")
    result["pipeline"] = written("t3 t4 t5")
    return result


def training(folder: str) -> dict[str, Any]:
    """Steps of training on an adapter that transformers added, and with recomputed blocks."""
    older_is_fine()
    result: dict[str, Any] = {}
    for what in ("plain", "reentrant", "not reentrant"):
        model = llama()
        model.add_adapter(_lora(modules_to_save=["lm_head"])())
        fill(model, "training")
        if what != "plain":
            model.gradient_checkpointing_enable({"use_reentrant": what == "reentrant"})
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for _ in range(3):
            loss = model.train()(input_ids=IDS, labels=IDS).loss
            loss.backward()
            losses.append(float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad()
        result[what] = losses
    model.save_pretrained(Path(folder) / "trained")
    again = llama()
    again.load_adapter(str(Path(folder) / "trained"))
    result["saved"] = out(again) - out(model.eval())
    return result


def all_of_it(folder: str) -> dict[str, Any]:
    place = Path(folder)
    scenarios = (every_method, several, other_ways, training)
    return {scenario.__name__: scenario(str(place / scenario.__name__)) for scenario in scenarios}


@shows("transformers", "`add_adapter`, `save_pretrained`, `load_adapter`, `disable_adapters`, `enable_adapters`")
@pytest.mark.parametrize("name", [name for name in CASES if name not in OURS_ALONE])
def test_every_method_as_in_the_reference(name: str, here: dict[str, Any], there: dict[str, Any]) -> None:
    found, other = here["every_method"][name], there["every_method"][name]
    for loaded in ("loaded", "to train on"):
        assert not found[loaded]["disabled"].any()
        if name == "LoRA and biases of the base":  # which the reference trains in place: they stay, and stay trained
            found[loaded] = {**found[loaded], **{key: other[loaded][key] for key in ("disabled", "trained")}}
    same(found, other)
    assert found["loaded"]["output"].sub(found["output"]).abs().max() == 0
    assert found["by PeftModel"].sub(found["output"]).abs().max() == 0
    assert found["loaded"]["output"].sub(out(CASES[name][0]())).abs().max() > 1e-5


@shows("transformers", "adapters of DoRA, and on tied embeddings, which the reference does not load whole")
@pytest.mark.parametrize("name", OURS_ALONE)
def test_what_the_reference_cannot_save_or_load(name: str, here: dict[str, Any], there: dict[str, Any]) -> None:
    found, other = here["every_method"][name], there["every_method"][name]
    same(found["output"], other["output"])
    for loaded in ("loaded", "to train on"):
        assert torch.equal(found[loaded]["output"], found["output"])
        assert found[loaded]["missing"] == found[loaded]["unexpected"] == []
    assert "error" in other or other["loaded"]["missing"] != []


@shows("transformers", "what the reference saved by `model.save_pretrained`")
@pytest.mark.parametrize("name", [name for name in CASES if name != "LoRA on embeddings, tied"])
def test_what_the_reference_saved(name: str, place: Path, there: dict[str, Any]) -> None:
    model, folder = CASES[name][0](), str(place / "reference" / "every_method" / name)
    model.load_adapter(folder)
    same(out(model), there["every_method"][name]["output"])


@shows("transformers", "`hotswap=` of an adapter of another rank or scale: refused, with the call that does it")
def test_an_adapter_of_another_rank_or_scale_is_not_put_over_one_that_stays_as_it_is(tmp_path: Path) -> None:
    """transformers leaves the scale as it was, and tells of a rank when it has written."""
    other = {
        "rank": {"r": 4},
        "alpha": {"lora_alpha": 1},
        "alpha of one layer": {"alpha_pattern": {"0.self_attn.q_proj": 9}},
    }
    for name, options in {"one": {}, "two": {}, **other}.items():
        trained = peft.get_peft_model(llama(), _lora(**{"r": 2, **options})())
        fill(trained, name)
        trained.save_pretrained(str(tmp_path / name))
    model = llama()
    model.load_adapter(str(tmp_path / "one"), adapter_name="mine")
    before = out(model)
    for name in other:
        with pytest.raises(
            ValueError, match=r"(r|lora_alpha)( of '.*q_proj')? is .* there and .* here.*hotswap_adapter"
        ):
            model.load_adapter(str(tmp_path / name), adapter_name="mine", hotswap=True)
        assert torch.equal(out(model), before)
    model.load_adapter(str(tmp_path / "two"), adapter_name="mine", hotswap=True)
    for name in ("two", *other):
        if name != "two":
            peft.utils.hotswap.hotswap_adapter(model, str(tmp_path / name), "mine")
        fresh = llama()
        fresh.load_adapter(str(tmp_path / name))
        same(out(model), out(fresh))


def test_layers_that_are_tied_share_their_tensors_after_a_load() -> None:
    model = CASES["LoRA on embeddings, tied"][0]()
    model.load_adapter(
        peft_config=CASES["LoRA on embeddings, tied"][1](), is_trainable=True,
        adapter_state_dict={"model.embed_tokens.lora_embedding_B": torch.ones(16, 4)},
    )  # fmt: skip
    ends = model.model.embed_tokens.lora_embedding_B.default, model.lm_head.lora_A.default.weight
    assert torch.equal(ends[1], torch.ones(4, 16))
    assert ends[0].data_ptr() == ends[1].data_ptr()
    rows = llama(tie_word_embeddings=True)
    rows.load_adapter(
        peft_config=_lora(trainable_token_indices=[1, 3])(), is_trainable=True,
        adapter_state_dict={"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 16)},
    )  # fmt: skip
    ends = rows.model.embed_tokens.token_adapter.trainable_tokens_delta, rows.lm_head.token_adapter
    assert ends[0].default is ends[1].trainable_tokens_delta.default
    assert ends[0].default.requires_grad


@shows("transformers", "an adapter for a mixture of experts from before release 5")
@pytest.mark.parametrize("old", [MIXTRAL, QWEN], ids=["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("what", ["all", "down alone", "ranks", "rslora"])
def test_experts_that_were_layers(old: Old, what: str, tmp_path: Path) -> None:
    first, second, down = old.parts
    names = {"q_proj", "gate", first, second, down} if what != "down alone" else {"q_proj", down}
    ranks = {first: 3, down: 5} if what == "ranks" else None
    folder, expected = adapter(old, names, tmp_path, ranks, use_rslora=what == "rslora")
    model = old.build()
    info = model.load_adapter(str(folder), adapter_name="a.b")
    assert not info.missing_keys and not info.unexpected_keys
    close(model, expected)
    model.save_pretrained(tmp_path / "again")
    again = old.build()
    again.load_adapter(str(tmp_path / "again"))
    close(again, expected)


def test_an_expert_that_is_missing_is_an_error(tmp_path: Path) -> None:
    folder, _ = adapter(MIXTRAL, {"w1", "w2", "w3"}, tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.0.block_sparse_moe.experts.1.w3.lora_B.weight"]
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        MIXTRAL.build().load_adapter(str(folder))


@shows("transformers", "several adapters: `set_adapter`, `active_adapters`, `get_adapter_state_dict`, `delete_adapter`")
def test_several_adapters(here: dict[str, Any], there: dict[str, Any]) -> None:
    same(here["several"], there["several"])


@shows(
    "transformers",
    "adapters from memory, from a pickle, hotswapped; `AutoModel.from_pretrained`, `pipeline` of a folder",
)
def test_other_ways_to_an_adapter(here: dict[str, Any], there: dict[str, Any]) -> None:
    found = here["other_ways"]
    same(found, there["other_ways"])
    assert torch.equal(found["from memory without"], found["by the adapter's folder"])
    assert not torch.equal(found["hotswapped"], found["before"])
    assert torch.equal(found["hotswapped"], found["pickle"])


@shows("transformers", "training on an added adapter, with gradient checkpointing too")
def test_training(here: dict[str, Any], there: dict[str, Any]) -> None:
    found = here["training"]
    same(found, there["training"])
    assert found["plain"][-1] < found["plain"][0]
    same(found["reentrant"], found["plain"])
