"""Merging into the files of a base: the very bytes that the loaded model gives, or a refusal before anything is written."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
)

import splice
from splice.base.embeddings import scales_while_tied
from splice.errors import CheckpointError, PeftError, UnsupportedFeatureError
from splice.loading.on_disk import writing
from splice.loading.on_disk.merging import Progress
from splice.merging_files import merge_files
from tests import bases
from tests.bases import run
from tests.comparing import assert_close
from tests.samples import Case, plain_cases
from tests.warm import warm

SHARD = "40KB"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def assert_same_files(one: Path, other: Path) -> None:
    """Both hold the same tensors, to the byte, and the index of the first tells where each is."""
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    for name, tensor in second.items():
        assert first[name].dtype == tensor.dtype and torch.equal(first[name], tensor), name
    index = (
        json.loads((one / "model.safetensors.index.json").read_text()) if len(list(one.glob("*.json"))) > 2 else None
    )
    if index is not None and "weight_map" in index:
        assert index["weight_map"].keys() == first.keys()
        for name, shard in index["weight_map"].items():
            assert name in load_file(one / shard)
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in first.values())


def tiny(tied: bool = False, **fields: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
        **fields,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def saved(model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    model.to(dtype).save_pretrained(folder, max_shard_size=SHARD)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def trained(
    base: Path, config: Any, folder: Path, dtype: torch.dtype = torch.float32, auto: Any = AutoModelForCausalLM
) -> Path:
    model = splice.get_peft_model(auto.from_pretrained(base, dtype=dtype), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return folder


def in_memory(base: Path, adapter: Path, folder: Path, dtype: Any = "auto", auto: Any = AutoModelForCausalLM) -> Path:
    model = splice.PeftModel.from_pretrained(auto.from_pretrained(base, dtype=dtype), adapter)
    model.merge_and_unload().save_pretrained(folder, max_shard_size=SHARD)
    return folder


def cases() -> list[Case]:
    return [case for case in plain_cases(bases.LLAMA, bases.TIED) if case.sample.merges]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_files_are_those_of_the_merged_model(case: Case, shared_checkpoint: Any, tmp_path: Path) -> None:
    adapter = shared_checkpoint(case.base, case.config())
    model = splice.PeftModel.from_pretrained(case.base.build(), adapter)
    layers = [layer for layers in model.base_model.placed.values() for layer in layers.values()]
    if not all(layer.mergeable for layer in layers):
        pytest.skip("cannot be merged")
    case.base.build().save_pretrained(tmp_path / "base", max_shard_size=SHARD)
    model.merge_and_unload().save_pretrained(tmp_path / "memory", max_shard_size=SHARD)
    written = merge_files(tmp_path / "base", [adapter], tmp_path / "out")
    assert written.changed
    assert_same_files(tmp_path / "out", tmp_path / "memory")


CONFIGS = {
    "dora": splice.LoraConfig(target_modules=["q_proj", "down_proj", "embed_tokens"], use_dora=True),
    "head": splice.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "embedding_copied": splice.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "both_ends": splice.LoraConfig(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True),
    "one_end": splice.LoraConfig(target_modules=["lm_head"]),
    "token_rows": splice.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    "norms": splice.LNTuningConfig(target_modules=["input_layernorm"]),
}


@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.float32), (True, torch.bfloat16)], ids=["untied", "tied"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_heads_and_ties(name: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    base = saved(tiny(tied), tmp_path / "base", dtype)
    adapter = trained(base, CONFIGS[name].__class__(**CONFIGS[name].to_dict()), tmp_path / "adapter", dtype)
    merge_files(base, [adapter], tmp_path / "out")
    reference = in_memory(base, adapter, tmp_path / "memory")
    assert_same_files(tmp_path / "out", reference)
    inputs = torch.arange(10)[None]
    one, other = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (tmp_path / "out", reference)
    )
    assert torch.equal(one(inputs).logits, other(inputs).logits)
    assert one.config.tie_word_embeddings == other.config.tie_word_embeddings
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert not list(tmp_path.glob(".*"))


def test_what_is_scaled_because_embeddings_are_tied_is_scaled_when_they_are_not(tmp_path: Path) -> None:
    """T5, in memory and on disk, of a config that transformers 4 wrote."""
    network = bases.T5.build()
    network.save_pretrained(tmp_path / "base")
    written = json.loads((tmp_path / "base" / "config.json").read_text())
    written = {
        name: value for name, value in written.items() if name not in ("scale_decoder_outputs", "tie_word_embeddings")
    }
    (tmp_path / "base" / "config.json").write_text(json.dumps(written))
    config = splice.LoraConfig(target_modules=["q"], modules_to_save=["lm_head"], task_type="SEQ_2_SEQ_LM")
    model: Any = splice.get_peft_model(network, config).eval()
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")
    expected = run(model, bases.T5.inputs(3))
    shared = network.shared.weight.clone()
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        merged = model.merge_and_unload()
    assert_close(run(merged, bases.T5.inputs(3)), expected)
    assert torch.equal(merged.shared.weight, shared)
    merged.save_pretrained(tmp_path / "memory")
    assert_close(run(type(merged).from_pretrained(tmp_path / "memory").eval(), bases.T5.inputs(3)), expected)
    if scales_while_tied(merged):
        with pytest.raises(
            UnsupportedFeatureError, match="T5ForConditionalGeneration multiplies what goes into its head"
        ):
            merge_files(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
        assert not [*tmp_path.glob("out"), *tmp_path.glob(".*")]
    else:
        merge_files(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
        assert_close(run(type(merged).from_pretrained(tmp_path / "out").eval(), bases.T5.inputs(3)), expected)


def test_another_dtype_is_that_of_a_model_loaded_so(tmp_path: Path) -> None:
    base = saved(tiny(), tmp_path / "base")
    adapter = trained(base, splice.LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    merge_files(base, [adapter], tmp_path / "out", dtype=torch.bfloat16)
    assert_same_files(tmp_path / "out", in_memory(base, adapter, tmp_path / "memory", torch.bfloat16))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_several_adapters_and_weights(tmp_path: Path) -> None:
    base = saved(tiny(), tmp_path / "base")
    one = trained(base, splice.LoraConfig(target_modules=["q_proj"]), tmp_path / "one")
    two = trained(base, splice.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), tmp_path / "two")
    merge_files(base, [one, two], tmp_path / "both")
    model = splice.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), one, "one")
    model.load_adapter(two, "two")
    model.base_model.set_adapter(["one", "two"])
    model.merge_and_unload().save_pretrained(tmp_path / "memory")
    assert_same_files(tmp_path / "both", tmp_path / "memory")

    merge_files(base, [one, two], tmp_path / "weighed", weights=[0.25, 2.0])
    model = splice.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), one, "one")
    model.load_adapter(two, "two")
    model.add_weighted_adapter(["one", "two"], [0.25, 2.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    model.merge_and_unload().save_pretrained(tmp_path / "memory of weighed")
    assert_same_files(tmp_path / "weighed", tmp_path / "memory of weighed")
    with pytest.raises(PeftError, match="there are 2 adapters and 1 weights: give one weight for each adapter"):
        merge_files(base, [one, two], tmp_path / "none", weights=[1.0])


def test_files_of_a_network_without_its_head(tmp_path: Path) -> None:
    """Such files name their tensors without the prefix; the head comes with the adapter."""
    torch.manual_seed(0)
    base = tmp_path / "base"
    LlamaModel(tiny().config).save_pretrained(base, max_shard_size=SHARD)
    config = splice.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
    adapter = trained(base, config, tmp_path / "adapter", auto=AutoModelForSequenceClassification)
    merge_files(base, [adapter], tmp_path / "out")
    reference = in_memory(base, adapter, tmp_path / "memory", auto=AutoModelForSequenceClassification)
    inputs = torch.arange(10)[None]
    one, other = (AutoModelForSequenceClassification.from_pretrained(f) for f in (tmp_path / "out", reference))
    assert torch.equal(one(inputs).logits, other(inputs).logits)
    assert one.config.architectures == other.config.architectures == ["LlamaForSequenceClassification"]
    assert one.config.id2label == other.config.id2label


def test_a_head_with_more_labels_than_the_base_says(tmp_path: Path) -> None:
    """How many there are follows from the adapter; the merged model says so too."""
    base = saved(tiny(), tmp_path / "base")
    network = AutoModelForSequenceClassification.from_pretrained(base, num_labels=5)
    model = splice.get_peft_model(network, splice.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    merge_files(base, [tmp_path / "adapter"], tmp_path / "out")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert merged.config.num_labels == 5
    assert torch.equal(merged.score.weight, model.base_model.model.score.modules_to_save["default"].weight)


def test_what_is_joined_while_it_loads(tmp_path: Path) -> None:
    """transformers stacks the experts of these files; beside them all merges, in them nothing."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=64,
    )
    base = saved(MixtralForCausalLM(config), tmp_path / "base")
    adapter = trained(base, splice.LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    merge_files(base, [adapter], tmp_path / "out")
    assert_same_files(tmp_path / "out", in_memory(base, adapter, tmp_path / "memory"))
    stacked = any("experts.gate_up_proj" in name for name, _ in MixtralForCausalLM(config).named_parameters())
    if stacked and not any("experts.gate_up_proj" in name for name in tensors_of(base)):
        names = ["mlp.experts.gate_up_proj"]
        adapter = trained(base, splice.LoraConfig(target_modules=[], target_parameters=names), tmp_path / "experts")
        with pytest.raises(UnsupportedFeatureError, match=r"in parts .* call `merge_and_unload` instead"):
            merge_files(base, [adapter], tmp_path / "none")
        assert not (tmp_path / "none").exists()


# -- refusals


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    base = saved(tiny(), tmp_path / "base")
    adapter = trained(base, splice.LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match=r"out exists already, and nothing there is overwritten"):
        merge_files(base, [adapter], tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "kept"
    (tmp_path / "out" / "mine").unlink()
    merge_files(base, [adapter], tmp_path / "out")
    assert tensors_of(tmp_path / "out")


def test_what_is_no_base(tmp_path: Path) -> None:
    base = saved(tiny(), tmp_path / "base")
    adapter = trained(base, splice.LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter")

    quantised = saved(tiny(), tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}})
    )
    with pytest.raises(UnsupportedFeatureError, match=r"stored quantised \(bitsandbytes\)"):
        merge_files(quantised, [adapter], tmp_path / "out")

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text(json.dumps(config))
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedFeatureError, match=r"there is pytorch_model.bin. Load the model and save it"):
        merge_files(pickled, [adapter], tmp_path / "out")

    (tmp_path / "empty").mkdir()
    with pytest.raises(splice.CheckpointError, match=r"config.json cannot be read"):
        merge_files(tmp_path / "empty", [adapter], tmp_path / "out")

    (base / sorted(p.name for p in base.glob("*.safetensors"))[1]).unlink()
    with pytest.raises(splice.CheckpointError, match=r"index.json names .*, and there is no such file"):
        merge_files(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_files_that_lack_a_tensor(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny().save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    adapter = trained(base, splice.LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(splice.CheckpointError, match=r"the files lack 'model.norm.weight'"):
        merge_files(base, [adapter], tmp_path / "out")


def test_an_adapter_that_is_no_change_of_weights(tmp_path: Path) -> None:
    base = saved(tiny(), tmp_path / "base")
    config = splice.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapter = trained(base, config, tmp_path / "adapter")
    with pytest.raises((NotImplementedError, UnsupportedFeatureError)):
        merge_files(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- cut short


SCRIPT = """
import sys, os, pathlib, signal, time
import splice.loading.on_disk.merging as merging
from splice.merging_files import merge_files
stop, count = int(sys.argv[4]), 0
def advance(size):
    global count
    count += 1
    if count == stop:
        # Files are finished by another thread, when they are on the disk.
        work = pathlib.Path(sys.argv[3]).parent
        while stop == 20 and not any(path.suffix == ".safetensors" for path in work.glob(".out.merging/*")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
merge_files(sys.argv[1], [sys.argv[2]], sys.argv[3], progress=merging.Progress(lambda left, all: None, advance))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_merges_leave_nothing_and_go_on(tmp_path: Path) -> None:
    base = saved(tiny(), tmp_path / "base")
    adapter = trained(base, splice.LoraConfig(target_modules="all-linear"), tmp_path / "adapter")
    out = tmp_path / "out"
    script = tmp_path / "merge.py"
    script.write_text(textwrap.dedent(SCRIPT))
    for stop in (1, 9, 20):
        ended = warm(script, base, adapter, out, str(stop))
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert not out.exists()
    written = merge_files(base, [adapter], out)
    assert written.resumed
    assert_same_files(out, in_memory(base, adapter, tmp_path / "memory"))
    assert not list(tmp_path.glob(".*"))


def test_a_merge_that_was_killed_in_its_last_step_leaves_a_note_until_the_next(tmp_path: Path) -> None:
    base = saved(tiny(), tmp_path / "base")
    adapter = trained(base, splice.LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    merge_files(base, [adapter], tmp_path / "out")
    note = tmp_path / ".out.merging.json"
    note.write_text("{}")
    with pytest.raises(FileExistsError, match="nothing there is overwritten"):
        merge_files(base, [adapter], tmp_path / "out")
    assert not note.exists()


def test_what_was_finished_of_another_merge_is_not_taken(tmp_path: Path) -> None:
    base = saved(tiny(), tmp_path / "base")
    one = trained(base, splice.LoraConfig(target_modules=["q_proj"]), tmp_path / "one")
    two = trained(base, splice.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "two")
    script = tmp_path / "merge.py"
    script.write_text(textwrap.dedent(SCRIPT))
    warm(script, base, one, tmp_path / "out", "10")
    assert (tmp_path / ".out.merging").exists()
    shutil.rmtree(one)
    two.rename(one)  # told by what it holds, not by where it lies
    assert not merge_files(base, [one], tmp_path / "out").resumed
    assert_same_files(tmp_path / "out", in_memory(base, one, tmp_path / "memory"))


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is locked there")
def test_two_merges_into_one_place(tmp_path: Path) -> None:
    base = saved(tiny(), tmp_path / "base")
    adapter = trained(base, splice.LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    script = tmp_path / "merge.py"
    script.write_text(textwrap.dedent(SCRIPT.replace("os.kill(os.getpid(), signal.SIGKILL)", "signal.pause()")))
    with subprocess.Popen([sys.executable, script, base, adapter, tmp_path / "out", "5"]) as other:
        try:
            until = time.monotonic() + 120
            while not list((tmp_path / ".out.merging").glob("*")) and time.monotonic() < until:
                time.sleep(0.1)
            with pytest.raises(PeftError, match="another process is merging into"):
                merge_files(base, [adapter], tmp_path / "out")
        finally:
            os.kill(other.pid, signal.SIGKILL)
    merge_files(base, [adapter], tmp_path / "out")


def wide(folder: Path, dtype: torch.dtype) -> Path:
    """A base whose weights are large enough to be merged a few rows at a time."""
    config = LlamaConfig(
        hidden_size=544, intermediate_size=600, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    torch.manual_seed(0)
    network: Any = LlamaForCausalLM(config).to(dtype)
    network.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_weights_are_merged_row_by_row(
    dtype: torch.dtype, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, streamed, before = wide(tmp_path / "base", dtype), [], torch.get_num_threads()
    config = splice.LoraConfig(r=5, lora_alpha=7, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    adapter = trained(base, config, tmp_path / "adapter", dtype)
    stream = writing.stream
    monkeypatch.setattr(writing, "stream", lambda found, progress: streamed.extend(found) or stream(found, progress))
    torch.set_num_threads(threads)
    try:
        written = merge_files(base, [adapter], tmp_path / "out")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert {each.piece.key.split(".")[-2] for each in streamed} == set(config.target_modules or ())
    assert written.changed == len(streamed) == 4
    assert_same_files(tmp_path / "out", in_memory(base, adapter, tmp_path / "in memory"))
    # Where more than one product is added, or values are read in another dtype, a layer is worked out as a whole.
    streamed.clear()
    merge_files(base, [adapter, adapter], tmp_path / "both")
    merge_files(base, [adapter], tmp_path / "other", dtype=torch.float16)
    assert streamed == []


def test_a_base_that_is_cut_off_while_it_is_merged(tmp_path: Path) -> None:
    base = wide(tmp_path / "base", torch.float32)
    adapter = trained(base, splice.LoraConfig(target_modules=["q_proj", "v_proj"]), tmp_path / "adapter")
    (weights,) = base.glob("*.safetensors")
    progress = Progress(lambda left, size: os.truncate(weights, 100_000), lambda size: None)
    with pytest.raises(CheckpointError, match=r"was cut off while it was read"):
        merge_files(base, [adapter], tmp_path / "out", progress=progress)
    assert not (tmp_path / "out").exists()


def test_as_many_threads_compute_afterwards_as_before(tmp_path: Path) -> None:
    base = saved(tiny(), tmp_path / "base")
    adapter = trained(base, splice.LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    before, during = torch.get_num_threads(), set()

    def advance(size: int) -> None:
        during.add(torch.get_num_threads())
        if (tmp_path / "whole").exists():
            raise KeyboardInterrupt

    torch.set_num_threads(3)
    try:
        progress = Progress(lambda left, size: None, advance)
        merge_files(base, [adapter], tmp_path / "whole", progress=progress)
        assert (min(during), torch.get_num_threads()) == (2, 3), "one is left to the writing"
        with pytest.raises(KeyboardInterrupt):
            merge_files(base, [adapter], tmp_path / "stopped", progress=progress)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


# -- a base that is large


def write_large(folder: Path, layers: int) -> Any:
    """A bfloat16 Llama of 7 billion's widths in eight shards of zeros, which take no room on a disk; and its outline."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        vocab_size=32000,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        network = LlamaForCausalLM(config)
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    names, weight_map = list(shapes), {}
    count = -(-len(names) // 8)
    for number in range(8):
        file, begin, fields = f"model-{number + 1:05d}-of-00008.safetensors", 0, {}
        for name in names[number * count : (number + 1) * count]:
            size = 2 * math.prod(shapes[name])
            fields[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, begin + size]}
            begin, weight_map[name] = begin + size, file
        text = json.dumps(fields).encode()
        with open(folder / file, "wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.truncate(8 + len(text) + begin)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return network


# Not by `getrusage`: its peak has that of the process in it that started this one.
LARGE = """
import re, sys
from splice.merging_files import merge_files
merge_files(sys.argv[1], [sys.argv[2]], sys.argv[3])
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted otherwise elsewhere")
@pytest.mark.timeout(1800)
def test_six_gigabytes_in_one(tmp_path: Path) -> None:
    """The whole process, with torch and transformers in it, stays below a gigabyte."""
    network = write_large(tmp_path / "base", layers=14)
    config = splice.LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    model = splice.get_peft_model(network, config, low_cpu_mem_usage=True)
    tensors = {k: torch.randn(v.shape) * 0.01 for k, v in splice.get_peft_model_state_dict(model).items()}
    model.peft_config["default"].save_pretrained(tmp_path / "adapter")
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    arguments = [sys.executable, "-c", LARGE, tmp_path / "base", tmp_path / "adapter", tmp_path / "out"]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=1500)
    assert int(ended.stdout) < 1000
    a = tensors["base_model.model.model.layers.5.mlp.up_proj.lora_A.weight"]
    b = tensors["base_model.model.model.layers.5.mlp.up_proj.lora_B.weight"]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.5.mlp.up_proj.weight"
    with safe_open(tmp_path / "out" / index[name], "pt") as file:
        assert torch.equal(file.get_tensor(name), (0.5 * (b @ a)).to(torch.bfloat16))
