"""Cartridges: where their tokens are divided, the prefill that they start from, and several of them as one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import splice
from tests.comparing import assert_close, assert_same_tensors, named, tensors_in

IDS = torch.tensor([[3, 5, 7, 9, 2, 4, 8, 1]])
TEXT = "c e g i b d h a"
_SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def llama(**fields: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**_SIZES, **fields})).eval()


def new(library: Any, frozen: int = 1, count: int = 4, network: Any = None, **fields: Any) -> Any:
    torch.manual_seed(3)
    config = library.CartridgeConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=count, num_frozen_tokens=frozen, **fields
    )
    return library.get_peft_model(llama() if network is None else network, config)


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """One token for each letter, "a" is 1; `template` is that of a chat."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, **{chr(97 + i): i + 1 for i in range(26)}}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    made.chat_template = template
    return made


CHAT = "{% for m in messages %}z {{ m['role'][0] }} {{ m['content'] }} y{% endfor %}"


def cache_of(network: Any, ids: torch.Tensor = IDS) -> Any:
    with torch.no_grad():
        return network(input_ids=ids, use_cache=True).past_key_values


def table_of(model: Any, name: str = "default") -> torch.Tensor:
    return splice.get_peft_model_state_dict(model, adapter_name=name)["prompt_embeddings"]


# -- the division


@pytest.mark.parametrize("frozen", [0, 1, 4])
def test_a_new_one_is_divided_as_in_the_reference(frozen: int, tmp_path: Path) -> None:
    ours, theirs = new(splice, frozen), new(peft, frozen)
    expected = {n: p for n, p in named(theirs) if "prompt_encoder" in n}
    found = {n: p for n, p in named(ours) if "prompt_encoder" in n}
    assert_same_tensors(found, expected)
    assert {n: p.requires_grad for n, p in found.items()} == {n: p.requires_grad for n, p in expected.items()}
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    encoders = [model.prompt_encoder["default"] for model in (ours, theirs)]
    assert torch.equal(*(encoder.embedding.weight for encoder in encoders))
    ours.save_pretrained(tmp_path)
    assert list(tensors_in(tmp_path)) == ["prompt_embeddings"]
    again = peft.PeftModel.from_pretrained(llama(), str(tmp_path))
    assert_close(again(input_ids=IDS).logits, ours(input_ids=IDS).logits)


def test_the_frozen_tokens_stay_what_they_are(tmp_path: Path) -> None:
    model = new(splice, 2)
    before = table_of(model).clone()
    model.save_pretrained(tmp_path)
    for trained in (model, splice.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)):
        optimizer = torch.optim.SGD(trained.parameters(), lr=1.0)
        trained(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        after = table_of(trained)
        assert torch.equal(after[:2], before[:2])
        assert not torch.isclose(after[2:], before[2:]).all(1).any()


def test_no_two_tensors_of_a_loaded_one_share_memory(tmp_path: Path) -> None:
    """Savers of other libraries leave out what does."""
    new(splice, 2).save_pretrained(tmp_path)
    model = splice.PeftModel.from_pretrained(llama(), tmp_path)
    parts = [p for n, p in model.named_parameters() if "prompt_encoder" in n]
    assert len({p.untyped_storage().data_ptr() for p in parts}) == len(parts) == 2


@pytest.mark.parametrize(
    ("frozen", "message"),
    [(-1, "`num_frozen_tokens` must be >= 0, got -1"), (5, "`num_frozen_tokens` must be <= `num_virtual_tokens`, got")],
)
def test_a_division_that_is_none_is_refused(frozen: int, message: str) -> None:
    for library in (peft, splice):
        with pytest.raises(ValueError, match=message):
            library.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_frozen_tokens=frozen)


# -- the same file as that of prefix tuning


@pytest.mark.parametrize("projected", [False, True], ids=["table", "projected"])
@pytest.mark.parametrize("library", [peft, splice], ids=lambda library: library.__name__)
def test_a_prefix_is_served_as_a_cartridge(library: Any, projected: bool, tmp_path: Path, recwarn: Any) -> None:
    torch.manual_seed(3)
    config = library.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=projected)
    library.get_peft_model(llama(), config).save_pretrained(str(tmp_path))
    expected = splice.PeftModel.from_pretrained(llama(), tmp_path)(input_ids=IDS).logits
    _rewrite(tmp_path, peft_type="CARTRIDGE", num_frozen_tokens=3)
    recwarn.clear()
    served = splice.PeftModel.from_pretrained(llama(), tmp_path)
    assert [str(w.message) for w in recwarn if "unexpected fields" in str(w.message)] == []
    assert torch.equal(served(input_ids=IDS).logits, expected)
    assert served.prompt_encoder["default"].frozen_embedding.shape[0] == 3


def test_a_cartridge_is_served_as_a_prefix(tmp_path: Path, recwarn: Any) -> None:
    model = new(splice, 2)
    model.save_pretrained(tmp_path)
    _rewrite(tmp_path, peft_type="PREFIX_TUNING")
    recwarn.clear()
    served = splice.PeftModel.from_pretrained(llama(), tmp_path)
    assert [str(w.message) for w in recwarn if "unexpected fields" in str(w.message)] == []
    assert torch.equal(served(input_ids=IDS).logits, model(input_ids=IDS).logits)


def _rewrite(folder: Path, **changes: Any) -> None:
    place = folder / "adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **changes}))


# -- starting from a prefill


def _methods(library: Any) -> list[Any]:
    fields = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    return [
        library.CartridgeConfig(**fields, num_frozen_tokens=2),
        library.CartridgeConfig(**fields, num_frozen_tokens=0),
        library.PrefixTuningConfig(**fields),
    ]


@pytest.mark.parametrize("index", range(3), ids=["cartridge", "none frozen", "prefix"])
def test_from_a_cache_it_is_what_the_reference_makes_of_it(index: int) -> None:
    tables = []
    for library in (splice, peft):
        model: Any = library.get_peft_model(llama(), _methods(library)[index])
        given = library.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache_of(llama()))
        tables += [given, library.get_peft_model_state_dict(model)["prompt_embeddings"]]
    assert all(torch.equal(tables[0], table) for table in tables)
    # The first four tokens of the text are there, though only the last four are given.
    ours: Any = splice.get_peft_model(llama(), _methods(splice)[index])
    splice.initialize_kv_prefix_from_past_key_values(ours, past_key_values=cache_of(llama()), num_virtual_tokens=4)
    assert_close(ours(input_ids=IDS[:, 4:]).logits, llama()(input_ids=IDS).logits[:, 4:])


@pytest.mark.parametrize("index", range(3), ids=["cartridge", "none frozen", "prefix"])
@pytest.mark.parametrize(
    ("template", "options"),
    [
        (None, {}),
        (None, {"max_length": 5}),
        (CHAT, {}),
        (CHAT, {"max_length": 5, "num_virtual_tokens": 4}),
        (CHAT, {"use_chat_template": False}),
    ],
    ids=str,
)
def test_from_a_text_it_is_what_the_reference_makes_of_it(
    index: int, template: str | None, options: dict[str, Any]
) -> None:
    tables = []
    for library in (splice, peft):
        model: Any = library.get_peft_model(llama(), _methods(library)[index])
        library.initialize_kv_prefix_from_text(model, tokenizer(template), text=TEXT, **options)
        tables.append(library.get_peft_model_state_dict(model)["prompt_embeddings"])
    assert_close(*tables)


def test_the_text_is_read_by_the_base_alone_and_without_dropout() -> None:
    """The reference runs the model as it is: what dropout leaves out of a prefill is gone for good."""
    model = new(splice, network=llama(attention_dropout=0.5)).train()
    model.add_adapter("other", splice.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    splice.initialize_kv_prefix_from_text(model, tokenizer(), text=TEXT, adapter_name="other")
    expected = splice.prompt_embeddings_from_past_key_values(cache_of(llama()), num_virtual_tokens=3)
    assert_close(table_of(model, "other"), expected)
    assert model.active_adapter == "default"
    assert all(module.training for module in model.get_base_model().modules())


def test_a_template_without_system_messages_is_not_used() -> None:
    refusing = "{{ raise_exception('System role not supported') }}"
    models = [new(splice), new(splice)]
    with pytest.warns(UserWarning, match="takes no system message .System role not supported.; the text is taken"):
        splice.initialize_kv_prefix_from_text(models[0], tokenizer(refusing), text=TEXT)
    splice.initialize_kv_prefix_from_text(models[1], tokenizer(), text=TEXT)
    assert torch.equal(*map(table_of, models))


@pytest.mark.parametrize("count", [4, 7], ids=["within the window", "beyond it"])
def test_a_long_text_on_layers_with_a_window_starts_at_its_first_tokens(count: int) -> None:
    """Their own cache holds the last tokens alone, which the reference takes for the first ones."""
    torch.manual_seed(0)
    network = MistralForCausalLM(MistralConfig(**_SIZES, sliding_window=6)).eval()
    expected = network(input_ids=IDS).logits[:, count:]
    model = new(splice, network=network, count=count)
    splice.initialize_kv_prefix_from_text(model, tokenizer(), text=TEXT)
    assert_close(model(input_ids=IDS[:, count:]).logits, expected)
    with model.disable_adapter():
        whole = cache_of(model)
    with pytest.raises(ValueError, match="has seen 8 tokens and holds 5: the first ones are gone"):
        splice.prompt_embeddings_from_past_key_values(whole, num_virtual_tokens=4)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION"])
def test_the_end_of_a_text_behind_a_cartridge_of_its_beginning_is_the_text(task: str) -> None:
    torch.manual_seed(0)
    classes = {
        "CAUSAL_LM": LlamaForCausalLM,
        "SEQ_CLS": LlamaForSequenceClassification,
        "FEATURE_EXTRACTION": LlamaModel,
    }
    network = classes[task](LlamaConfig(**_SIZES)).eval()
    whole = network(input_ids=IDS)[0]
    model = splice.get_peft_model(network, splice.CartridgeConfig(task_type=task, num_virtual_tokens=4)).eval()
    splice.initialize_kv_prefix_from_text(model, tokenizer(), text=TEXT)
    found = model(input_ids=IDS[:, 4:])[0]
    assert_close(found, whole if task == "SEQ_CLS" else whole[:, 4:])


def test_a_network_without_a_cache_is_refused() -> None:
    sizes = {name: size for name, size in _SIZES.items() if name != "num_key_value_heads"}
    config = splice.CartridgeConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4)
    model = splice.get_peft_model(BertModel(BertConfig(**sizes)), config)
    with pytest.raises(ValueError, match="BertModel returns no cache; give `past_key_values` instead of a text"):
        splice.initialize_kv_prefix_from_text(model, tokenizer(), text=TEXT)


def _pair(heads: int = 2, length: int = 5, dim: int = 4, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, heads, length, dim)


@pytest.mark.parametrize("kind", [tuple, list])
def test_pairs_of_tensors_are_a_cache(kind: type) -> None:
    key, value = torch.tensor([[[[1.0], [3.0]], [[2.0], [4.0]]]]), torch.tensor([[[[5.0], [7.0]], [[6.0], [8.0]]]])
    given = kind([kind([key, value])])
    for library in (splice, peft):
        table = library.prompt_embeddings_from_past_key_values(given, num_virtual_tokens=2)
        assert table.tolist() == [[1, 2, 5, 6], [3, 4, 7, 8]]


@pytest.mark.parametrize(
    ("cache", "error", "message"),
    [
        ((), ValueError, "Empty `past_key_values`"),
        (None, TypeError, "Unsupported `past_key_values` type"),
        (((_pair()[0], _pair()[0]),), ValueError, "Expected key/value tensors with rank 4, got key.ndim=3"),
        (((_pair(batch=2), _pair(batch=2)),), ValueError, "single-sequence prefill .batch=1.. Got batch=2"),
        (((_pair(length=3), _pair(length=3)),), ValueError, "Need at least 4 cached tokens, got 3"),
        (((_pair(), _pair()), (_pair(1), _pair(1))), ValueError, "Inconsistent head shapes across layers"),
        (((_pair(), _pair(dim=2)),), ValueError, "Inconsistent head"),
    ],
)
def test_what_is_no_prefill_is_refused_as_in_the_reference(cache: Any, error: type[Exception], message: str) -> None:
    for library in (splice, peft):
        with pytest.raises(error, match=message):
            library.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=4)


def test_an_empty_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="Empty `past_key_values`"):
        splice.prompt_embeddings_from_past_key_values(DynamicCache(), num_virtual_tokens=1)
    with pytest.raises(ValueError, match="`num_virtual_tokens` should be a positive integer, got 0"):
        splice.prompt_embeddings_from_past_key_values(cache_of(llama()), num_virtual_tokens=0)


def _t5(_: Any) -> Any:
    network = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    )
    config = splice.CartridgeConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)
    return splice.get_peft_model(network, config)


def _prefix(model: Any) -> Any:
    fields = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    return splice.get_peft_model(llama(), splice.PrefixTuningConfig(**fields, prefix_projection=True))


def _embedded(model: Any) -> Any:
    return splice.get_peft_model(llama(), splice.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def _lora(model: Any) -> Any:
    return splice.get_peft_model(llama(), splice.LoraConfig(task_type="CAUSAL_LM"))


def _empty(model: Any) -> Any:
    config = splice.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    return splice.get_peft_model(llama(), config, low_cpu_mem_usage=True)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda model: model, {"adapter_name": "x"}, KeyError, "no adapter 'x'; there are"),
        (lambda model: llama(), {}, ValueError, "must be a PeftModel with an adapter of prefix tuning or a cartridge"),
        (
            lambda model: model,
            {"num_virtual_tokens": 3},
            ValueError,
            "`num_virtual_tokens` is 3, and the adapter has 4",
        ),
        (_prefix, {}, ValueError, "not supported for prefix tuning with `prefix_projection=True`"),
        (_embedded, {}, ValueError, "must be a CARTRIDGE or PREFIX_TUNING adapter .got .*PROMPT_TUNING"),
        (_lora, {}, ValueError, "must be a CARTRIDGE or PREFIX_TUNING adapter .got .*LORA"),
        (_t5, {}, ValueError, "layer 2 l modulo the number of layers"),
        (_empty, {}, ValueError, "on the meta device; load it first"),
    ],
)
def test_what_cannot_start_from_a_prefill_is_refused(
    make: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make(new(splice))
    with pytest.raises(error, match=message):
        splice.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache_of(llama()), **options)
    with pytest.raises(error, match=message):
        splice.initialize_kv_prefix_from_text(model, tokenizer(), text=TEXT, **options)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (((_pair(), _pair()),) * 3, "has 3 layers with 2 heads, and the adapter is for 2 layers with 2"),
        (((_pair(1, dim=8), _pair(1, dim=8)),) * 2, "has 2 layers with 1 heads"),  # which the reference takes
        (((_pair(dim=8), _pair(dim=8)),) * 2, "Invalid `prompt_embeddings` shape. Expected .4, 32., .* got .4, 64."),
    ],
)
def test_the_cache_of_another_network_is_refused(cache: Any, message: str) -> None:
    model = new(splice)
    before = table_of(model).clone()
    with pytest.raises(ValueError, match=message):
        splice.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
    assert torch.equal(table_of(model), before)


def test_a_text_that_is_too_short_is_refused() -> None:
    for text in ("a b c", ""):
        with pytest.raises(ValueError, match=r"Need at least 4 cached tokens, got \d"):
            splice.initialize_kv_prefix_from_text(new(splice), tokenizer(), text=text)


def test_the_encoder_takes_a_table() -> None:
    models, table = [new(library) for library in (splice, peft)], torch.randn(4, 32)
    for model in models:
        model.prompt_encoder["default"].load_prompt_embeddings(table)
        assert torch.equal(model.prompt_encoder["default"].embedding.weight, table)
        with pytest.raises(ValueError, match="Invalid `prompt_embeddings` shape"):
            model.prompt_encoder["default"].load_prompt_embeddings(table[:3])


# -- several as one


def saved(folder: Path, seed: int, count: int, frozen: int = 1, **fields: Any) -> str:
    model = new(splice, frozen, count, **fields)
    torch.manual_seed(seed)
    model.prompt_encoder["default"].load_prompt_embeddings(torch.randn(count, 32))
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_several_become_one_as_in_the_reference(safe: bool, tmp_path: Path) -> None:
    paths = [saved(tmp_path / "a", 1, 4, 2), saved(tmp_path / "b", 2, 3), saved(tmp_path / "c", 3, 2)]
    models = []
    for library in (splice, peft):
        out = tmp_path / library.__name__
        library.compose_cartridge_adapters(paths, output_path=out, safe_serialization=safe)
        models.append(splice.PeftModel.from_pretrained(llama(), out))
    ours, theirs = models
    assert_same_tensors(splice.get_peft_model_state_dict(ours), splice.get_peft_model_state_dict(theirs))
    assert ours.peft_config["default"].to_dict() == theirs.peft_config["default"].to_dict()
    assert ours.peft_config["default"].num_frozen_tokens == 2
    assert table_of(ours).shape[0] == 9
    again = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "splice"))
    assert_close(again(input_ids=IDS).logits, ours(input_ids=IDS).logits)


def test_the_result_may_take_the_place_of_a_part(tmp_path: Path) -> None:
    first, second = saved(tmp_path / "a", 1, 4), saved(tmp_path / "b", 2, 3)
    expected = torch.cat([tensors_in(Path(path))["prompt_embeddings"] for path in (first, second)])
    splice.compose_cartridge_adapters([first, second], output_path=first)
    assert torch.equal(tensors_in(Path(first))["prompt_embeddings"], expected)


def _of_a_prefix(folder: Path) -> None:
    config = splice.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    splice.get_peft_model(llama(), config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"task_type": "FEATURE_EXTRACTION"},
            "Incompatible CARTRIDGE configs for attribute 'task_type': .* has 'CAUSAL_LM'",
        ),
        ({"token_dim": 9}, "attribute 'token_dim'"),
        ({"num_layers": 3}, "attribute 'num_layers'"),
        ({"num_attention_heads": 7}, "attribute 'num_attention_heads'"),
        ({"num_transformer_submodules": 2}, "attribute 'num_transformer_submodules'"),
        ({"num_virtual_tokens": 5}, "has 3 rows, and the config says num_virtual_tokens=5"),
        (_of_a_prefix, "is not a CARTRIDGE adapter .got .*PREFIX_TUNING"),
        (shutil.rmtree, "Can't find 'adapter_config.json'"),
    ],
)
def test_what_does_not_go_together_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    first, second = saved(tmp_path / "a", 1, 4), saved(tmp_path / "b", 2, 3)
    if isinstance(change, dict):
        _rewrite(tmp_path / "b", **change)
    else:
        change(tmp_path / "b")
    with pytest.raises(ValueError, match=message):
        splice.compose_cartridge_adapters([first, second], output_path=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_are_refused(count: int, tmp_path: Path) -> None:
    paths: Sequence[str] = [saved(tmp_path / "a", 1, 4)][:count]
    with pytest.raises(ValueError, match="Need at least 2 adapters to compose"):
        splice.compose_cartridge_adapters(paths, output_path=tmp_path / "out")


def test_modules_that_are_saved_whole_stay_where_they_are_the_same(tmp_path: Path) -> None:
    """The reference drops them, and its result lacks what its config names."""
    first = saved(tmp_path / "a", 1, 4, modules_to_save=["lm_head"])
    second = saved(tmp_path / "b", 2, 3, modules_to_save=["lm_head"])
    splice.compose_cartridge_adapters([first, second], output_path=tmp_path / "out")
    head = "base_model.lm_head.weight"
    assert torch.equal(tensors_in(tmp_path / "out")[head], tensors_in(tmp_path / "a")[head])
    third = saved(tmp_path / "c", 3, 3)
    with pytest.raises(ValueError, match=f"differ in {head}: a module that is saved whole cannot be put together"):
        splice.compose_cartridge_adapters([first, third], output_path=tmp_path / "other")
    assert not (tmp_path / "other").exists()
