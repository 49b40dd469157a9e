"""LoRA's relatives that a field of its config asks for: what they compute, learn, merge and save is the reference's."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import splice
from splice.errors import PeftWarning
from tests import bases
from tests.bases import Base, run
from tests.comparing import (
    Snapshot,
    assert_close,
    assert_same_tensors,
    config_in,
    differ,
    load_both,
    parameters_of,
    state_of,
    tensors_in,
)
from tests.conftest import write_checkpoint

BLOCKS_A = {"use_bdlora": {"target_modules_bd_a": ["first", "_proj"], "nblocks": 2}}
BLOCKS_B = {"use_bdlora": {"target_modules_bd_b": ["first"], "nblocks": 2, "match_strict": False}}
VARIANTS: dict[str, tuple[dict[str, Any], tuple[Base, ...]]] = {
    "kasa": ({"kasa_config": {}}, (bases.LINEAR, bases.LLAMA)),
    "blocks of A": (BLOCKS_A, (bases.LINEAR, bases.LLAMA)),
    "blocks of B": (BLOCKS_B, (bases.LINEAR,)),
    "velora": ({"velora_config": {"num_groups": 4}}, (bases.LINEAR, bases.TRANSPOSED, bases.LLAMA)),
    "velora at random": ({"velora_config": {"num_groups": 3, "init_type": "random"}}, (bases.LINEAR,)),
    "velora once": ({"velora_config": {"num_groups": 4, "init_type": "batch_average_once"}}, (bases.LINEAR,)),
    "monteclora": ({"monteclora_config": {"num_samples": 3}}, (bases.LINEAR, bases.TRANSPOSED, bases.LLAMA)),
    "alora": ({"alora_invocation_tokens": [5, 6]}, (bases.LLAMA, bases.GPT2)),
}
CASES = [pytest.param(base, fields, id=f"{name}-{base}") for name, (fields, on) in VARIANTS.items() for base in on]
each = pytest.mark.parametrize(("base", "fields"), CASES)


def config(base: Base, fields: dict[str, Any], **changes: Any) -> dict[str, Any]:
    named = {"target_modules": [t for t in base.targets if not t.startswith("down")], "task_type": base.task}
    blocks = fields.get("use_bdlora")
    if blocks and blocks.get("match_strict", True) and not base.task:
        named["target_modules"] = ["first"]
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **named, **fields, **changes}


def inputs_of(base: Base) -> bases.Inputs:
    """Of language models: a row with an invocation, one with two of them, one with none."""
    if not base.task:
        return base.inputs(3)
    return {"input_ids": torch.tensor([[1, 5, 6, 7, 8, 9], [5, 6, 3, 5, 6, 4], [1, 2, 3, 4, 6, 5]])}


@each
def test_the_output_and_all_names(base: Base, fields: dict[str, Any], shared_checkpoint: Any, tmp_path: Path) -> None:
    folder = shared_checkpoint(base, config(base, fields))
    pair = load_both(base, folder, is_trainable=True)
    theirs, ours = (run(model.eval(), inputs_of(base)) for model in (pair.reference, pair.ours))
    assert_close(ours, theirs, factor=3)
    assert differ(ours, run(base.build(), inputs_of(base)))
    assert parameters_of(pair.ours) == parameters_of(pair.reference)
    assert set(state_of(pair.ours)) == set(state_of(pair.reference))
    pair.ours.save_pretrained(tmp_path)
    assert_same_tensors(tensors_in(tmp_path), tensors_in(folder))
    assert config_in(tmp_path) == config_in(folder)


@each
def test_off_the_base_is_whole(base: Base, fields: dict[str, Any], shared_checkpoint: Any) -> None:
    network = base.build()
    before, expected = Snapshot.of(network), run(network, inputs_of(base))
    model: Any = splice.PeftModel.from_pretrained(network, shared_checkpoint(base, config(base, fields)))
    with model.disable_adapter():
        assert torch.equal(run(model, inputs_of(base)), expected)
    before.assert_same(model.unload())


@each
def test_merged(base: Base, fields: dict[str, Any], shared_checkpoint: Any) -> None:
    model: Any = splice.PeftModel.from_pretrained(base.build(), shared_checkpoint(base, config(base, fields)))
    expected = run(model, inputs_of(base))
    if "alora_invocation_tokens" in fields:
        with pytest.raises(NotImplementedError, match="cannot be merged"):
            model.merge_adapter()
        return
    model.merge_adapter()
    assert_close(run(model, inputs_of(base)), expected, factor=10)
    model.unmerge_adapter()
    assert torch.equal(run(model, inputs_of(base)), expected)
    assert_close(run(model.merge_and_unload(), inputs_of(base)), expected, factor=10)


@each
def test_gradients_in_training(base: Base, fields: dict[str, Any], shared_checkpoint: Any) -> None:
    if "monteclora_config" in fields:
        pytest.skip("noise is drawn at every call")
    pair = load_both(base, shared_checkpoint(base, config(base, fields)), is_trainable=True)
    for _ in range(2):
        for model in (pair.reference, pair.ours):
            model.train()
            model.zero_grad()
            output = model(**inputs_of(base))
            (output.logits if base.task else output).square().mean().backward()
        theirs = {name: p.grad for name, p in pair.reference.named_parameters() if p.grad is not None}
        assert theirs
        for name, parameter in pair.ours.named_parameters():
            if name in theirs:
                assert_close(parameter.grad, theirs[name], factor=20)


@each
def test_a_new_one(base: Base, fields: dict[str, Any], tmp_path: Path) -> None:
    made = []
    for library in (peft, splice):
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = library.get_peft_model(base.build(), library.get_peft_config(config(base, fields)))
            model.save_pretrained(str(tmp_path / library.__name__))
        made.append(model)
    assert parameters_of(made[1]) == parameters_of(made[0])
    described = [{n: t.shape for n, t in tensors_in(tmp_path / lib).items()} for lib in ("peft", "splice")]
    assert described[1] == described[0]
    assert config_in(tmp_path / "splice") == config_in(tmp_path / "peft")


@each
def test_rows(base: Base, fields: dict[str, Any], shared_checkpoint: Any) -> None:
    """In one batch with plain LoRA and with the base alone."""
    model: Any = splice.PeftModel.from_pretrained(base.build(), shared_checkpoint(base, config(base, fields)))
    model.load_adapter(shared_checkpoint(base, config(base, {}), seed=1), "plain")
    inputs, names = inputs_of(base), ["default", "__base__", "plain"]
    mixed = run(model, inputs, adapter_names=names)
    for row, name in enumerate(names):
        one = {key: tensor[row : row + 1] for key, tensor in inputs.items()}
        if name != "__base__":
            model.set_adapter(name)
        alone = run(base.build() if name == "__base__" else model, one)
        assert_close(mixed[row : row + 1], alone, factor=3)


def test_what_training_adds_to_the_loss(shared_checkpoint: Any) -> None:
    base = bases.LINEAR
    for fields, name in (
        ({"kasa_config": {"beta": 0.3, "gamma": 0.2}}, "_get_kasa_loss"),
        ({"monteclora_config": {"num_samples": 3, "kl_loss_weight": 0.1, "use_entropy": True}}, "_get_monteclora_loss"),
    ):
        pair = load_both(base, shared_checkpoint(base, config(base, fields)), is_trainable=True)
        found = []
        for model in (pair.reference, pair.ours):
            model.train()
            found.append([getattr(model.base_model, name)(names) for names in (None, "default", ["default"], [])])
        assert torch.tensor(found[1]).tolist() == pytest.approx(torch.tensor(found[0]).tolist(), rel=1e-5)
        assert found[1][-1] == 0.0


def test_noise_in_training_alone(shared_checkpoint: Any) -> None:
    base = bases.LINEAR
    options = {"num_samples": 3, "sample_scaler": 0.3}
    folder = shared_checkpoint(base, config(base, {"monteclora_config": options}))
    model: Any = splice.PeftModel.from_pretrained(base.build(), folder, is_trainable=True)
    still = [run(model.eval(), base.inputs(3)) for _ in range(2)]
    assert torch.equal(*still)
    model.train()
    one, two = model(**base.inputs(3)), model(**base.inputs(3))
    assert differ(one, two)
    (one.sum() + model.base_model._get_monteclora_loss()).backward()
    learned = [p.grad for name, p in model.named_parameters() if "sampler" in name]
    assert len(learned) == 4
    assert all(grad is not None and bool(torch.isfinite(grad).all()) for grad in learned)


# -- aLoRA


def activated(shared_checkpoint: Any, **options: Any) -> Any:
    base = bases.LLAMA
    folder = shared_checkpoint(base, config(base, {"alora_invocation_tokens": [5, 6]}))
    return splice.PeftModel.from_pretrained(base.build(), folder, **options)


def test_before_the_invocation_the_base_answers(shared_checkpoint: Any) -> None:
    model, inputs = activated(shared_checkpoint), inputs_of(bases.LLAMA)
    changed = (run(model, inputs) - run(bases.LLAMA.build(), inputs)).abs().amax(-1) > 1e-6
    assert changed.tolist() == [[False, True, True, True, True, True], [False] * 3 + [True] * 3, [False] * 6]


@pytest.mark.parametrize("use_cache", [True, False])
def test_generated_tokens_are_those_of_forwards(use_cache: bool, shared_checkpoint: Any) -> None:
    model, ids = activated(shared_checkpoint), inputs_of(bases.LLAMA)["input_ids"][:2]
    found = model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=use_cache)
    offsets: list[int | None] = [5, 3]
    for _ in range(4):
        logits = model(input_ids=ids, alora_offsets=offsets).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        offsets = [offset + 1 for offset in offsets if offset is not None]
    assert torch.equal(found, ids)
    twice = model.generate(
        input_ids=ids[:, :6], max_new_tokens=2, do_sample=True, num_return_sequences=2, use_cache=use_cache
    )
    assert twice.shape[0] == 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_blocks_know_the_invocation(reentrant: bool, shared_checkpoint: Any) -> None:
    inputs = inputs_of(bases.LLAMA)
    grads = []
    for recomputed in (False, True):
        model = activated(shared_checkpoint, is_trainable=True).train()
        if recomputed:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.get_base_model().enable_input_require_grads()
        for _ in range(2):
            model.zero_grad()
            model(**inputs).logits.square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() != set()
    for name, grad in grads[0].items():
        assert_close(grads[1][name], grad)
    other = {"input_ids": inputs["input_ids"].flip(0)}
    with pytest.raises(ValueError, match="two forwards with other invocations before one backward"):
        (model(**inputs).logits.sum() + model(**other).logits.sum()).backward()


def test_refusals_of_alora(shared_checkpoint: Any) -> None:
    model, ids = activated(shared_checkpoint), inputs_of(bases.LLAMA)["input_ids"]
    with pytest.raises(ValueError, match="does not support beam search"):
        model.generate(input_ids=ids, num_beams=2, max_new_tokens=2)
    embedded = model.get_input_embeddings()(ids)
    with pytest.warns(PeftWarning, match="needs `input_ids`"):
        output = model(inputs_embeds=embedded).logits
    assert_close(output, run(bases.LLAMA.build(), {"input_ids": ids}))


# -- refusals


@pytest.mark.parametrize(
    ("base", "fields", "message"),
    [
        (bases.LINEAR, {"kasa_config": {}, "r": 8}, "KaSA leaves out 8 singular values of a weight that has 6"),
        (
            bases.TRANSPOSED,
            {"kasa_config": {}},
            "`kasa_config` cannot be used on a layer of the kind TRANSPOSED_LINEAR",
        ),
        (
            bases.EMBEDDING,
            {"alora_invocation_tokens": [1]},
            "`alora_invocation_tokens` cannot be used on a layer of the kind",
        ),
        (bases.CONV2D, {"velora_config": {}}, "`velora_config` cannot be used on a layer of the kind CONV2D"),
        (bases.LINEAR, {"use_bdlora": {"target_modules_bd_a": ["x"]}}, "neither .*bd_a nor .*bd_b.* matches it"),
        (
            bases.LINEAR,
            {"use_bdlora": {"target_modules_bd_a": ["first"], "target_modules_bd_b": ["fir"]}},
            "both match it",
        ),
        (
            bases.LINEAR,
            {"use_bdlora": {"target_modules_bd_a": ["first"], "nblocks": 4, "match_strict": False}},
            "cuts its input of 6 and the rank 2 into 4 blocks",
        ),
        (bases.LINEAR, {"use_dora": True, "kasa_config": {}}, "variant combination"),
    ],
    ids=str,
)
def test_what_is_refused(base: Base, fields: dict[str, Any], message: str) -> None:
    network = base.build()
    before = Snapshot.of(network)
    fields = {"peft_type": "LORA", "r": 2, "target_modules": list(base.targets), **fields}
    with pytest.raises(ValueError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        splice.get_peft_model(network, splice.get_peft_config(fields))
    before.assert_same(network)


def test_two_of_kasa_at_once_are_refused(shared_checkpoint: Any) -> None:
    base = bases.LINEAR
    folder = shared_checkpoint(base, config(base, {"kasa_config": {}}))
    model: Any = splice.PeftModel.from_pretrained(base.build(), folder)
    model.load_adapter(folder, "second")
    with pytest.raises(ValueError, match="each leaves singular values of the weight out"):
        model.base_model.set_adapter(["default", "second"])


# -- fields about layers that this base has not


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_flag_for_quantised_layers_changes_nothing_on_others(use_dora: bool, tmp_path: Path) -> None:
    """As in the reference, which pools the input of GPTQ layers alone."""
    config = {"r": 2, "target_modules": ["q_proj"], "use_dora": use_dora, "use_qalora": True, "qalora_group_size": 8}
    pair = load_both(bases.LLAMA, write_checkpoint(tmp_path, bases.LLAMA, config))
    pair.assert_equal()
    assert pair.ours.peft_config["default"].qalora_group_size == 8


def test_what_megatron_trained_loads_onto_plain_layers(tmp_path: Path) -> None:
    """Its fields say how parallel layers are split; the reference cannot load such an adapter without Megatron."""
    folder = write_checkpoint(tmp_path, bases.LLAMA, {"r": 2, "target_modules": ["q_proj"]})
    expected = run(splice.PeftModel.from_pretrained(bases.LLAMA.build(), folder), bases.LLAMA.inputs(3))
    fields = json.loads((folder / "adapter_config.json").read_text())
    fields |= {"megatron_config": {"tensor_model_parallel_size": 2}, "megatron_core": "megatron.core"}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(ImportError, match="megatron"):
        peft.PeftModel.from_pretrained(bases.LLAMA.build(), str(folder))
    model = splice.PeftModel.from_pretrained(bases.LLAMA.build(), folder)
    assert torch.equal(run(model, bases.LLAMA.inputs(3)), expected)
    assert model.peft_config["default"].megatron_config == fields["megatron_config"]
