"""SHADOW beside the reference: a small network whose state goes along with the hidden states."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import splice
from tests import bases
from tests.bases import VOCABULARY, Base, Inputs, run
from tests.comparing import Snapshot, assert_close, assert_same_tensors, config_in, differ, load_both, tensors_in
from tests.samples import SAMPLES

SAMPLE = SAMPLES[splice.PeftType.SHADOW]
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _of(family: str, **options: Any) -> Callable[[], nn.Module]:
    """A network of transformers by the front of its classes."""

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{family}Config")(**{**SMALL, **options})
        model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
        return model

    return make


def _base(name: str, make: Callable[[], nn.Module]) -> Base:
    return Base(name, make, bases.LLAMA.inputs, task="CAUSAL_LM", generates=True)


DEEP = _base("llama_deep", _of("Llama", num_key_value_heads=1, initializer_range=0.2))
GEMMA2 = _base("gemma2", _of("Gemma2", num_key_value_heads=1, head_dim=8, sliding_window=4, initializer_range=0.2))
QWEN3 = _base("qwen3", _of("Qwen3", num_key_value_heads=1, head_dim=8, initializer_range=0.2))
NEOX = _base("gpt_neox", _of("GPTNeoX", rotary_pct=0.5, initializer_range=0.2, hidden_dropout=0.0))
OPT = _base("opt", _of("OPT", ffn_dim=24, word_embed_proj_dim=16, dropout=0.0, init_std=0.2))
FAMILIES = [bases.LLAMA, bases.GPT2, DEEP, GEMMA2, QWEN3, NEOX, OPT]
every = pytest.mark.parametrize("base", FAMILIES, ids=str)


def fields(base: Base, **changes: Any) -> dict[str, Any]:
    return {"peft_type": "SHADOW", "task_type": base.task, **SAMPLE.config, **changes}


def padded(base: Base) -> Inputs:
    inputs = base.inputs(3)
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :2] = mask[2, :4] = 0
    return {**inputs, "attention_mask": mask}


def losses(model: Any, inputs: Inputs) -> tuple[float, float]:
    """The loss of the model, and that of the shadow network."""
    output = model(**inputs, labels=inputs["input_ids"])
    return output.loss.item(), output.shadow_loss.item()


@every
def test_the_output_is_that_of_the_reference(base: Base, shared_checkpoint: Any) -> None:
    """Each of two adapters, none, one deleted; the losses; generated too, greedily and by beams, padded on the left."""
    folders = shared_checkpoint(base, fields(base)), shared_checkpoint(base, fields(base), seed=1)
    pair = load_both(base, *folders)
    before, inputs = pair.assert_equal(), padded(base)
    bare = run(base.build(), base.inputs(3))
    assert differ(before, bare)
    assert_close(run(pair.ours, inputs), run(pair.reference, inputs))
    assert losses(pair.ours, inputs) == pytest.approx(losses(pair.reference, inputs), rel=1e-5)
    assert pair.ours.base_model.last_shadow_loss.item() == pytest.approx(losses(pair.ours, inputs)[1])
    for beams in (1, 2):
        options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
        # With this version of transformers the reference's shadow network forgets what it has seen between the steps.
        expected = pair.reference.generate(**inputs, **options, use_cache=False)
        assert torch.equal(pair.ours.generate(**inputs, **options), expected)
        assert torch.equal(pair.ours.generate(**inputs, **options, use_cache=False), expected)
    pair.each(lambda model: model.set_adapter("second"))
    assert differ(pair.assert_equal(), before)
    with pair.ours.disable_adapter():
        assert torch.equal(run(pair.ours, base.inputs(3)), bare)
    for clone in (copy.deepcopy(pair.ours), pickle.loads(pickle.dumps(pair.ours))):
        assert torch.equal(run(clone, base.inputs(3)), run(pair.ours, base.inputs(3)))
    pair.ours.set_adapter("default")
    pair.ours.delete_adapter("second")
    assert torch.equal(run(pair.ours, base.inputs(3)), before)


@every
@pytest.mark.parametrize("option", ["", *SAMPLE.options])
def test_a_new_one_is_trained_saved_and_loaded_as_in_the_reference(base: Base, option: str, tmp_path: Path) -> None:
    if base is not DEEP and option == "narrow" and base is not bases.GPT2:
        pytest.skip("sizes are the config's business, and two kinds of them are enough")
    found, trained, inputs = [], dict[str, list[str]](), base.inputs(3)
    own = SAMPLE.options.get(option, {})
    for library in (peft, splice):
        torch.manual_seed(4)
        config = library.get_peft_config(fields(base, shadow_dropout=0.0, **own))
        model = library.get_peft_model(base.build(), config)
        trained[library.__name__] = sorted(name for name, p in model.named_parameters() if p.requires_grad)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            output = model(**inputs, labels=inputs["input_ids"])
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            found += [output.loss.item(), output.shadow_loss.item()]
        found.append(sum(p.grad is None for p in model.parameters() if p.requires_grad))
        model.save_pretrained(str(tmp_path / library.__name__))
    assert trained["splice"] == trained["peft"]
    assert found[7:] == pytest.approx(found[:7], rel=1e-4)
    ours, theirs = tensors_in(tmp_path / "splice"), tensors_in(tmp_path / "peft")
    assert sorted(ours) == sorted(theirs)
    for name, tensor in ours.items():
        assert_close(tensor, theirs[name])
    assert config_in(tmp_path / "splice") == config_in(tmp_path / "peft")
    reference = peft.PeftModel.from_pretrained(base.build(), str(tmp_path / "splice"))
    assert_close(run(reference, inputs), run(model.eval(), inputs))
    again = splice.PeftModel.from_pretrained(base.build(), tmp_path / "splice", is_trainable=True)
    assert sorted(name for name, p in again.named_parameters() if p.requires_grad) == trained["splice"]


# -- what training and generating ask for


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("base", [DEEP, bases.GPT2], ids=str)
def test_blocks_that_compute_themselves_again(base: Base, reentrant: bool) -> None:
    """The gradients are those without, of the reference and of ours, also where two forwards come before a backward."""
    found = []
    for library, again in ((peft, False), (splice, False), (splice, True)):
        torch.manual_seed(0)
        config = library.get_peft_config(fields(base, init_weights=False, shadow_dropout=0.0))
        model = library.get_peft_model(base.build(), config).train()
        if again:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        calls = [model(**inputs, labels=inputs["input_ids"]).loss for inputs in (base.inputs(2), base.inputs(3))]
        for loss in calls:
            loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        found.append({n.replace(".base_layer.", "."): grad for n, grad in grads.items()})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, grad in other.items():
            assert_close(grad, found[0][name])


def test_a_checkpoint_around_blocks_with_their_adapters_is_refused() -> None:
    """torch's own wrapper computes the adapter again too, and the state is gone by then."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing as apply
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model = splice.get_peft_model(DEEP.build(), splice.get_peft_config(fields(DEEP))).train()
    apply(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    assert any(isinstance(module, CheckpointWrapper) for module in model.modules())
    with pytest.raises(ValueError, match="a backward computes the block again.*gradient_checkpointing_enable"):
        model(**DEEP.inputs(2), labels=DEEP.inputs(2)["input_ids"]).loss.backward()


@pytest.fixture
def loaded(shared_checkpoint: Any) -> Any:
    """A llama with three blocks, and an adapter on each."""
    return splice.PeftModel.from_pretrained(DEEP.build(), shared_checkpoint(DEEP, fields(DEEP)))


def _cache_of(output: Any) -> Any:
    return output["cache"] if "cache" in output else output["past_key_values"]


@torch.no_grad()
def test_steps_with_a_cache_are_the_whole(loaded: Any) -> None:
    """Also with a cache of the caller's own, embedded input, outputs without names, and a copy of a cache."""
    from transformers import DynamicCache

    ids = DEEP.inputs(2)["input_ids"]
    whole, mine = loaded(input_ids=ids).logits, DynamicCache()
    embedded = loaded.get_input_embeddings()(ids)
    first = loaded(input_ids=ids[:, :3], past_key_values=mine, return_dict=False)
    assert any(item is mine for item in first)
    kept = copy.deepcopy(mine)
    for cache in (mine, kept):
        step = loaded(inputs_embeds=embedded[:, 3:5], past_key_values=cache)
        last = loaded(input_ids=ids[:, 5:], past_key_values=_cache_of(step))
        assert_close(torch.cat([first[0], step.logits, last.logits], 1), whole)
    mine.crop(-2)
    assert_close(loaded(input_ids=ids[:, 4:], past_key_values=mine).logits, whole[:, 4:])


@torch.no_grad()
def test_caches_that_the_shadow_network_knows_nothing_of_are_refused(loaded: Any) -> None:
    ids = DEEP.inputs(2)["input_ids"]
    with loaded.disable_adapter():
        cache = _cache_of(loaded(input_ids=ids, use_cache=True))
    with pytest.raises(ValueError, match="holds 6 tokens.*'default' has seen 0 of them.*Begin with an empty cache"):
        loaded(input_ids=ids, past_key_values=cache)
    with pytest.raises(ValueError, match="StaticCache has no room.*leave out `cache_implementation`"):
        loaded.generate(input_ids=ids, cache_implementation="static", max_new_tokens=2)


@torch.no_grad()
def test_embedded_input_is_generated_from(loaded: Any) -> None:
    ids = DEEP.inputs(2)["input_ids"]
    embedded = loaded.get_input_embeddings()(ids)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        loaded.generate(inputs_embeds=embedded, **options), loaded.generate(input_ids=ids, **options)[:, 6:]
    )


@torch.no_grad()
def test_embedded_input_needs_a_network_as_wide(shared_checkpoint: Any) -> None:
    model = splice.PeftModel.from_pretrained(DEEP.build(), shared_checkpoint(DEEP, fields(DEEP, **SAMPLE.small)))
    embedded = model.get_input_embeddings()(DEEP.inputs(2)["input_ids"])
    with pytest.raises(ValueError, match="`inputs_embeds` have 16 features, and the shadow network takes 8"):
        model(inputs_embeds=embedded)


@torch.no_grad()
def test_the_part_of_a_network_that_holds_the_blocks_may_be_called(loaded: Any) -> None:
    """As in the reference; a block by itself has no state to go by."""
    inputs = padded(DEEP)
    hidden = loaded(**inputs, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(loaded.get_base_model().model(**inputs).last_hidden_state, hidden)
    positional = loaded.get_base_model().model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    assert torch.equal(positional, hidden)
    with pytest.raises(ValueError, match=r"model.layers.0: .*cannot be called by itself"):
        loaded.get_base_model().model.layers[0](hidden)


# -- several adapters


@torch.no_grad()
def test_rows_with_adapters_of_their_own(shared_checkpoint: Any) -> None:
    """Also where these are on other blocks, and while generating by beams."""
    model = splice.PeftModel.from_pretrained(DEEP.build(), shared_checkpoint(DEEP, fields(DEEP)))
    some = fields(DEEP, **SAMPLE.small, target_modules=["model.layers.1", "model.layers.2"])
    model.load_adapter(shared_checkpoint(DEEP, some, seed=1), "second")
    alone, inputs = {}, padded(DEEP)
    for name in ("default", "second"):
        model.set_adapter(name)
        alone[name] = run(model, inputs)
    with model.disable_adapter():
        alone["__base__"] = run(model, inputs)
    names = ["second", "__base__", "default"]
    mixed = run(model, inputs, adapter_names=names)
    assert_close(mixed, torch.stack([alone[name][row] for row, name in enumerate(names)]))
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    generated = model.generate(**inputs, **options, adapter_names=names)
    for row, name in ((0, "second"), (2, "default")):
        model.set_adapter(name)
        assert torch.equal(model.generate(**inputs, **options)[row], generated[row])


def test_each_adapter_is_on_blocks_of_its_own(shared_checkpoint: Any) -> None:
    """The reference goes wrong where two are on different blocks; one alone it gets right."""
    ranges = {"first": ["model.layers.0", "model.layers.1"], "middle": ["1"], "last": ["layers.1", "layers.2"]}
    folders = {n: shared_checkpoint(DEEP, fields(DEEP, target_modules=named)) for n, named in ranges.items()}
    ours = splice.PeftModel.from_pretrained(DEEP.build(), folders["first"], "first")
    for name in ("middle", "last"):
        ours.load_adapter(folders[name], name)
    for name, folder in folders.items():
        theirs = peft.PeftModel.from_pretrained(DEEP.build(), str(folder))
        ours.set_adapter(name)
        assert_close(run(ours, DEEP.inputs(3)), run(theirs, DEEP.inputs(3)))
    with pytest.raises(ValueError, match="Only one adapter can be set at a time.*a state of its own"):
        ours.base_model.set_adapter(["first", "last"])


def test_names_that_are_numbers_take_nothing_from_other_files(shared_checkpoint: Any, tmp_path: Path) -> None:
    """Every key of a file holds "default", and those of layers 0 and 1 stay in it."""
    folder = shared_checkpoint(DEEP, fields(DEEP))
    model = splice.PeftModel.from_pretrained(DEEP.build(), folder)
    for number in ("0", "1"):
        model.load_adapter(folder, number)
    model.save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "0", tmp_path / "1"):
        assert_same_tensors(tensors_in(place), tensors_in(folder))
    assert "base_model.shadow_backbone.0.norm.weight" in dict(model.named_parameters())
    theirs = peft.PeftModel.from_pretrained(DEEP.build(), str(tmp_path / "1"))
    assert_close(run(theirs, DEEP.inputs(2)), run(model, DEEP.inputs(2)))


# -- files and flags


@pytest.mark.parametrize("spelled", ["", ".other"], ids=["no name", "another name"])
def test_files_without_the_word_that_stands_for_a_name(spelled: str, shared_checkpoint: Any, tmp_path: Path) -> None:
    """The reference reads none of their tensors, and says nothing."""
    folder = shared_checkpoint(DEEP, fields(DEEP))
    found = {name.replace(".default.", f"{spelled}."): tensor for name, tensor in tensors_in(folder).items()}
    save_file(found, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((Path(folder) / "adapter_config.json").read_text())
    model = splice.PeftModel.from_pretrained(DEEP.build(), tmp_path)
    expected = splice.PeftModel.from_pretrained(DEEP.build(), folder)
    assert torch.equal(run(model, DEEP.inputs(2)), run(expected, DEEP.inputs(2)))


def test_low_cpu_mem_usage(shared_checkpoint: Any) -> None:
    """The reference fails; a new adapter is left on the meta device until it is loaded."""
    folder = shared_checkpoint(DEEP, fields(DEEP))
    plain = splice.PeftModel.from_pretrained(DEEP.build(), folder)
    model = splice.PeftModel.from_pretrained(DEEP.build(), folder, low_cpu_mem_usage=True)
    assert torch.equal(run(model, DEEP.inputs(2)), run(plain, DEEP.inputs(2)))
    empty = splice.get_peft_model(DEEP.build(), splice.get_peft_config(fields(DEEP)), low_cpu_mem_usage=True)
    assert all(p.is_meta for name, p in empty.named_parameters() if "shadow" in name)
    splice.set_peft_model_state_dict(empty, tensors_in(folder), low_cpu_mem_usage=True)
    assert torch.equal(run(empty.eval(), DEEP.inputs(2)), run(plain, DEEP.inputs(2)))


def test_what_is_frozen_is_frozen(shared_checkpoint: Any) -> None:
    """Where the reference leaves the shadow network in training: after a load for inference, and while switched off."""
    folder = shared_checkpoint(DEEP, fields(DEEP))
    model = splice.PeftModel.from_pretrained(DEEP.build(), folder)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.base_model.shadow_backbone["default"].modules())
    model = splice.PeftModel.from_pretrained(DEEP.build(), folder, is_trainable=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("shadow" in name for name in trained)
    with model.disable_adapter():
        assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("default", False)
    assert not any(p.requires_grad for p in model.parameters())


def test_half_precision(shared_checkpoint: Any) -> None:
    """What is on blocks is in float32, the shadow network in the base's dtype; saved so, the reference reads it."""
    folder = shared_checkpoint(DEEP, fields(DEEP))
    pair = load_both(DEEP, folder, dtype=torch.bfloat16)
    own = {
        name.split("shadow_")[1].split(".")[0]: p.dtype for name, p in pair.ours.named_parameters() if "shadow" in name
    }
    assert own.pop("backbone") is torch.bfloat16
    assert set(own.values()) == {torch.float32}
    assert_close(run(pair.ours, DEEP.inputs(3)), run(pair.reference, DEEP.inputs(3)))
    assert losses(pair.ours, DEEP.inputs(3)) == pytest.approx(losses(pair.reference, DEEP.inputs(3)), rel=1e-2)


def test_the_base_is_what_it_was(shared_checkpoint: Any) -> None:
    network = DEEP.build()
    before, output = Snapshot.of(network), run(network, DEEP.inputs(3))
    model = splice.PeftModel.from_pretrained(network, shared_checkpoint(DEEP, fields(DEEP)))
    model.load_adapter(shared_checkpoint(DEEP, fields(DEEP), seed=1), "second")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="merge"):
            merge()
    model.delete_adapter("second")
    assert model.unload() is network
    before.assert_same(network)
    assert torch.equal(run(network, DEEP.inputs(3)), output)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 0}, "`r` should be a positive integer value but the value passed is 0"),
        ({"shadow_dropout": 1.5}, "`shadow_dropout` is a probability, 0 to 1, and got 1.5"),
        ({"shadow_model": "user/other", "shadow_hidden_size": 8}, "`shadow_hidden_size`: sizes of a shadow network"),
        ({"target_modules": ["layers.0", "layers.2"]}, "blocks that stand one behind the other.*without gaps"),
        ({"target_modules": ["q_proj"]}, "blocks that stand one behind the other.*no layers inside of blocks"),
        ({"target_modules": "model.layers.0.mlp"}, "blocks that stand one behind the other"),
        ({"target_modules": ["layers"], "layers_to_transform": [1]}, "not found in the base model"),
    ],
)
def test_configs_that_are_wrong(changes: dict[str, Any], said: str) -> None:
    network = DEEP.build()
    before = Snapshot.of(network)
    with pytest.raises(ValueError, match=said):
        splice.get_peft_model(network, splice.get_peft_config(fields(DEEP, **changes)))
    before.assert_same(network)


def test_networks_without_a_list_of_blocks(shared_checkpoint: Any) -> None:
    """Theirs have to be named; then they can be shadowed."""
    config = {"peft_type": "SHADOW", "r": 3, "init_weights": False}
    with pytest.raises(ValueError, match="BertModel has no list of blocks.*name the blocks to adapt"):
        splice.get_peft_model(bases.BERT.build(), splice.get_peft_config(config))
    found = []
    for library in (peft, splice):
        torch.manual_seed(0)
        named = library.get_peft_config({**config, "target_modules": r".*encoder\.layer\.\d+"})
        found.append(run(library.get_peft_model(bases.BERT.build(), named).eval(), bases.BERT.inputs(2)))
    assert_close(*found)


# -- tasks, and where shadow networks come from


def _labels(count: int, kind: str = "single") -> Base:
    from transformers import LlamaForSequenceClassification

    def make() -> nn.Module:
        network: nn.Module = LlamaForSequenceClassification(
            copy.deepcopy(DEEP.build().config).from_dict({**DEEP.build().config.to_dict(), "num_labels": count})
        )
        return network

    return Base(f"llama_{count}_{kind}", make, bases.LLAMA.inputs, task="SEQ_CLS")


LABELS = {
    "one of three": (3, torch.tensor([0, 2, 1])),
    "a number": (1, torch.tensor([0.5, -1.0, 2.0])),
    "any of three": (3, torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]])),
}


@pytest.mark.parametrize("kind", LABELS)
def test_sequences_are_labelled(kind: str, tmp_path: Path) -> None:
    """By a head that is saved with the adapter, and the shadow network's own copy of it."""
    count, labels = LABELS[kind]
    base, found = _labels(count, kind), []
    inputs = padded(base)
    for library in (peft, splice):
        torch.manual_seed(0)
        config = library.get_peft_config(fields(base, init_weights=False, shadow_dropout=0.0))
        model = library.get_peft_model(base.build(), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(2):
            output = model(**inputs, labels=labels)
            output.loss.backward()
            optimizer.step()
            found += [output.loss.item(), output.shadow_loss.item()]
        model.save_pretrained(str(tmp_path / library.__name__))
    assert found[4:] == pytest.approx(found[:4], rel=1e-4)
    assert sorted(tensors_in(tmp_path / "splice")) == sorted(tensors_in(tmp_path / "peft"))
    theirs = peft.PeftModel.from_pretrained(base.build(), str(tmp_path / "splice"))
    again = splice.PeftModel.from_pretrained(base.build(), tmp_path / "splice")
    assert_close(run(theirs, inputs), run(again, inputs))
    last = again(**inputs, labels=labels).shadow_loss
    assert last.item() == pytest.approx(theirs(**inputs, labels=labels).shadow_loss.item(), rel=1e-4)


@pytest.mark.parametrize("weight", [0.0, -1.0, 0.5])
def test_the_weight_of_the_loss(weight: float, shared_checkpoint: Any) -> None:
    pair = load_both(DEEP, shared_checkpoint(DEEP, fields(DEEP, auxiliary_loss_weight=weight)))
    assert losses(pair.ours, padded(DEEP)) == pytest.approx(losses(pair.reference, padded(DEEP)), rel=1e-5)
    assert pair.ours.base_model.last_shadow_loss is not None
    pair.ours(**DEEP.inputs(2))
    assert pair.ours.base_model.last_shadow_loss is None


def _pretrained(folder: Path, projected: bool) -> str:
    """A trained network of eight features; maybe as one that was trained as a shadow."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(**{**SMALL, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1})
    torch.manual_seed(1)
    LlamaModel(config).save_pretrained(folder)
    if projected:
        tensors = {f"shadow_model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
        tensors["shadow_hidden_projection.weight"] = torch.randn(16, 8)
        save_file(tensors, folder / "model.safetensors")
        said = {"model_type": "causal_lm_with_hidden_projection", "shadow_model_config": config.to_dict()}
        (folder / "config.json").write_text(json.dumps(said))
    return str(folder)


@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])
def test_a_trained_network_is_the_shadow(projected: bool, tmp_path: Path) -> None:
    place, found = _pretrained(tmp_path / "network", projected), []
    for library in (peft, splice):
        torch.manual_seed(0)
        config = library.get_peft_config(fields(DEEP, shadow_model=place, init_weights=False))
        model = library.get_peft_model(DEEP.build(), config)
        trained = sorted(name for name, p in model.named_parameters() if p.requires_grad)
        model.eval().save_pretrained(str(tmp_path / library.__name__))
        found.append((run(model, padded(DEEP)), trained, sorted(tensors_in(tmp_path / library.__name__))))
    assert_close(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]
    again = splice.PeftModel.from_pretrained(DEEP.build(), tmp_path / "peft")
    assert_close(run(again, padded(DEEP)), found[0][0])
    Path(place, "config.json").unlink()
    with pytest.raises(OSError, match="there is no config.json in a folder of this name.*Its architecture is needed"):
        splice.PeftModel.from_pretrained(DEEP.build(), tmp_path / "peft")


def test_a_trained_network_for_another_base(tmp_path: Path) -> None:
    place = _pretrained(tmp_path, projected=True)
    network = bases.GPT2.build()
    tensors = load_file(tmp_path / "model.safetensors")
    for given, said in ((torch.ones(3, 8), r"\(3, 8\), and \(16, 8\) leads from"), (None, "its weights lack")):
        tensors.pop("shadow_hidden_projection.weight", None)
        save_file(
            {**tensors, **({} if given is None else {"shadow_hidden_projection.weight": given})},
            tmp_path / "model.safetensors",
        )
        with pytest.raises(ValueError, match=said):
            splice.get_peft_model(network, splice.get_peft_config(fields(DEEP, shadow_model=place)))


# -- the shadow network alone


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("option", ["", "narrow", "own_embeddings"])
def test_the_shadow_network_by_itself(option: str, copied: bool, shared_checkpoint: Any) -> None:
    pair = load_both(DEEP, shared_checkpoint(DEEP, fields(DEEP, **SAMPLE.options.get(option, {}))))
    ours, theirs = (model.base_model.unload_shadow(copy=copied).eval() for model in (pair.ours, pair.reference))
    inputs = padded(DEEP)
    assert sorted(ours.state_dict()) == sorted(theirs.state_dict())
    assert_close(ours(**inputs).logits, theirs(**inputs).logits)
    labels = inputs["input_ids"]
    assert ours(**inputs, labels=labels).loss.item() == pytest.approx(theirs(**inputs, labels=labels).loss.item())
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(ours.generate(**inputs, **options), ours.generate(**inputs, **options, use_cache=False))
    if copied:
        clone = pickle.loads(pickle.dumps(ours))
        assert torch.equal(clone(**inputs).logits, ours(**inputs).logits)
    owned = {p.data_ptr() for p in pair.ours.parameters()}
    assert all((p.data_ptr() in owned) is not copied for p in ours.parameters())
    with pytest.raises(ValueError, match="No shadow backbone found for adapter 'other'"):
        pair.ours.base_model.unload_shadow("other")


def test_the_shadow_network_of_labels_by_itself(shared_checkpoint: Any) -> None:
    base = _labels(3)
    pair = load_both(base, shared_checkpoint(base, fields(base)))
    ours, theirs = (model.base_model.unload_shadow().eval() for model in (pair.ours, pair.reference))
    assert_close(ours(**padded(base)).logits, theirs(**padded(base)).logits)
