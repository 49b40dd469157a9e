"""`splice inspect`: what it says of adapters of every method, what it finds wrong, and what it costs."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import splice
from splice.checkpoint.format import FORMAT_VERSION
from splice.checkpoint.outline import outline_of
from splice.cli.known import known, known_methods
from splice.cli.opened import open_adapter
from splice.cli.summary import look_into
from splice.cli.values import problems_of_values
from tests import bases
from tests.broken import CONFIG, SAFETENSORS, Parts, edited, load, parts
from tests.cli import EXAMPLE, run, run_json
from tests.comparing import tensors_in
from tests.hub import Hub
from tests.samples import Case, kind_cases, network_cases, option_cases

# One base for each kind of layer, and for methods that act on the call of a network one that has all they ask for.
CASES = [*kind_cases(), *option_cases(bases.LINEAR), *network_cases(bases.LLAMA)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_wrong_with_what_the_reference_writes(case: Case, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(case.base, case.config())
    summary = look_into(open_adapter(str(folder)))
    assert [problem.text for problem in (*summary.problems, *problems_of_values(summary)) if problem.serious] == []
    tensors = tensors_in(folder)
    assert summary.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert {name for layer in summary.layers for name in layer.names.values()} == set(tensors), "each is told of once"


ON_LAYERS = [*kind_cases(), *option_cases(bases.LINEAR)]


@pytest.mark.parametrize("case", ON_LAYERS, ids=str)
def test_ranks_and_scales_are_those_of_the_layers(case: Case, shared_checkpoint: Any) -> None:
    folder = shared_checkpoint(case.base, case.config())
    model: Any = splice.PeftModel.from_pretrained(case.base.build(), folder)
    layers = model.base_model.placed["default"]
    # Of methods with an outline the whole of the update is held elsewhere; AdaLoRA's layers divide once more.
    has_outline = outline_of(case.method.name.value) is not None
    for told in (layer for layer in look_into(open_adapter(str(folder))).layers if layer.own):
        layer = layers.get(told.path)
        rank, scale = getattr(layer, "r", None), getattr(layer, "scale", None)
        if told.rank is not None and rank is not None:
            assert told.rank == rank
        if told.rank is not None and told.scale is not None and not has_outline:
            assert told.scale == pytest.approx(scale)


def test_every_method_with_a_rank_says_it() -> None:
    """Where a config has an `r` and no rank is told, it is none: it counts blocks or entries, or is another network's."""
    with_r = {name for name in known_methods() if "r" in known(name).fields}  # type: ignore[union-attr]
    silent = {name for name in with_r if outline_of(name) is None and not known(name).rank}  # type: ignore[union-attr]
    assert silent == {"ADAMSS", "OFT", "SHADOW", "SHIRA"}


def test_what_it_says_of_an_adapter() -> None:
    ran = run("inspect", EXAMPLE)
    assert (ran.code, ran.err) == (0, "")
    for line in (
        "method      LORA: Adds to a weight the product",
        "base        examples/skills/base, for CAUSAL_LM",
        "parameters  34,816 in F32",
        "options     lora_alpha=16, r=4",
        "28 layers",
        "down_proj, gate_proj, up_proj  rank 4, scale 4  4 x 1,536 parameters",
        "no problems found",
    ):
        assert line in ran.out


def test_the_same_for_programs(tmp_path: Path) -> None:
    folder = parts(lora_alpha=12, use_rslora=True, rank_pattern={"v_proj": 2}).write(tmp_path)
    code, told = run_json("inspect", folder, "--values")
    assert code == 0
    assert told["method"] == "LORA" and told["tensors"] == 8 and told["dtypes"] == {"F32": 8}
    ranks = {module["path"]: (module["layers"], module["rank"], module["scale"]) for module in told["modules"]}
    assert ranks == {
        "model.layers.{0,1}.self_attn.q_proj": (2, 4, 6.0),
        "model.layers.{0,1}.self_attn.v_proj": (2, 2, pytest.approx(12 / 2**0.5)),
    }
    assert told["options"] == {"r": 4, "lora_alpha": 12, "use_rslora": True, "rank_pattern": {"v_proj": 2}}
    assert told["problems"] == told["notes"] == []


def test_what_wrote_it_and_on_which_base(tmp_path: Path) -> None:
    """The card that a trainer writes tells the versions, the file the base."""
    model = load(parts().write(tmp_path / "first"))
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "README.md").write_text(
        "# x\n\n### Framework versions\n\n- PEFT 0.18.0\n- TRL: 0.25.1\n- Transformers: 5.1.0\n"
    )
    _, told = run_json("inspect", tmp_path / "saved")
    assert told["written_by"] == {
        "peft format": FORMAT_VERSION, "PEFT": "0.18.0", "TRL": "0.25.1", "Transformers": "5.1.0",
    }  # fmt: skip
    assert told["base_fingerprint"] == {"architecture": "LlamaForCausalLM", "count": 4, "quantization": None}


def _nan(adapter: Parts) -> None:
    next(iter(adapter.tensors.values()))[1, 2] = torch.nan


def _zero(adapter: Parts) -> None:
    for name in adapter.tensors:
        if "layers.0" in name and "lora_B" in name:
            adapter.tensors[name].zero_()


def _half(adapter: Parts) -> None:
    del adapter.tensors[next(name for name in adapter.tensors if "lora_B" in name)]


def _strange(adapter: Parts) -> None:
    adapter.tensors["lora_unet_down_blocks.lora_down.weight"] = torch.ones(2, 2)


def _codes(adapter: Parts) -> None:
    adapter.tensors[next(iter(adapter.tensors))] = torch.ones(4, 16, dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "fields", "said"),
    [
        (_nan, {}, "1 tensor with values that are NaN or infinite: base_model.model.model.layers.0"),
        (_zero, {}, "2 layers have a tensor that is zero, and so change nothing: model.layers.0.self_attn.q_proj"),
        (_half, {}, "1 layer with a part of the tensors alone: model.layers.0.self_attn.q_proj (no lora_B.weight)"),
        (_strange, {}, "1 tensor is not named as adapters name theirs: lora_unet_down_blocks.lora_down.weight"),
        (_codes, {}, "1 tensor of whole numbers"),
        (
            None,
            {"r": 8},
            "4 layers of another rank than the config says: model.layers.0.self_attn.q_proj (rank 4, not 8)",
        ),
        (None, {"turbo": True}, "the config sets fields that nobody knows here: turbo=True"),
        (None, {"peft_type": "TURBO"}, "'TURBO' is no method that is known here: known are ADALORA"),
    ],
)
def test_what_is_wrong_is_named(
    change: Callable[[Parts], None] | None, fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    adapter = parts()
    if change is not None:
        change(adapter)
    adapter.config.update(fields)
    code, told = run_json("inspect", adapter.write(tmp_path), "--values")
    assert code == 1
    assert [problem for problem in told["problems"] if said in problem], told["problems"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"turbo": False}, "fields that nobody knows here, all of them switched off: turbo"),
        ({"target_modules": ["q_proj", "v_proj", "fc9"]}, "targets that its file has nothing for: fc9"),
        ({"peft_version": "9.1"}, "written by version 9.1 of the format"),
    ],
)
def test_what_is_not_wrong_is_a_note(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    code, told = run_json("inspect", edited(parts().write(tmp_path), **fields))
    assert code == 0 and told["problems"] == []
    assert [note for note in told["notes"] if said in note], told["notes"]


def test_a_pickle_is_told_apart_and_read(tmp_path: Path) -> None:
    _, expected = run_json("inspect", parts().write(tmp_path / "safe"), "--values")
    code, told = run_json("inspect", parts().write(tmp_path / "bin", as_bin=True), "--values")
    assert code == 0 and told["file"]["pickle"] is True
    assert told["modules"] == expected["modules"]
    assert told["notes"] == [
        "the weights are a pickle; saved again they are a safetensors file, which cannot run code."
    ]


def test_a_payload_is_named_and_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    folder = parts().write(tmp_path / "bin", as_bin=True)
    torch.save({"base_model.model.x.lora_A.weight": torch.ones(2), "y": Payload()}, folder / "adapter_model.bin")
    code, told = run_json("inspect", folder, "--values")
    assert code == 1
    assert "the weights are a pickle that asks for posix.system: loading it plainly runs them." in told["problems"]
    assert not (tmp_path / "ran").exists()


def test_names_cannot_write_on_the_terminal(tmp_path: Path) -> None:
    adapter = parts().renamed(lambda name: name.replace("layers.0", "layers.\x1b[31m0"))
    ran = run("inspect", adapter.write(tmp_path))
    assert "\x1b" not in ran.out and r"\x1b[31m0" in ran.out


@pytest.mark.parametrize("name", [CONFIG, SAFETENSORS, "adapter_model.bin"])
def test_a_file_in_place_of_its_folder(name: str, tmp_path: Path) -> None:
    folder = parts().write(tmp_path, as_bin=name.endswith(".bin"))
    assert run_json("inspect", folder / name)[1]["tensors"] == 8


def test_an_adapter_of_the_hub(tmp_path: Path, hub: Hub) -> None:
    commit = hub.repository("someone/adapter").commit(parts().write(tmp_path / "sub" / "inner"))
    options = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1,localhost"}
    code, told = run_json("inspect", "someone/adapter", **options, HF_HUB_DISABLE_XET="1")
    assert (code, told["file"]["commit"], told["tensors"]) == (0, commit, 8)
    ran = run("inspect", "someone/nothing", **options)
    assert ran.code == 1 and "there is no such repository" in ran.err


def _no_config(folder: Path) -> Path:
    (folder / CONFIG).unlink()
    return folder / SAFETENSORS


def _kohya(folder: Path) -> Path:
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, folder / "x.safetensors")
    (folder / CONFIG).unlink()
    return folder / "x.safetensors"


def _cut_off(folder: Path) -> Path:
    (folder / SAFETENSORS).write_bytes((folder / SAFETENSORS).read_bytes()[:-5])
    return folder


def _no_json(folder: Path) -> Path:
    (folder / CONFIG).write_text("{")
    return folder


def _deep_json(folder: Path) -> Path:
    (folder / CONFIG).write_text("[" * 100_000)
    return folder


def _no_pickle(folder: Path) -> Path:
    (folder / SAFETENSORS).rename(folder / "adapter_model.bin")
    return folder


def _old_pickle(folder: Path) -> Path:
    (folder / SAFETENSORS).unlink()
    torch.save({"x": torch.ones(2)}, folder / "adapter_model.bin", _use_new_zipfile_serialization=False)
    return folder


def _odd_pickle(folder: Path) -> Path:
    (folder / SAFETENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"x": 1}))
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: folder / "nothing", "There is no such folder"),
        (_no_config, "has no adapter_config.json beside it, without which nobody knows what its tensors mean."),
        (_kohya, "Probably the tensors are named as kohya's sd-scripts"),
        (_cut_off, "damaged"),
        (_no_json, "is not valid JSON"),
        (_deep_json, "is not valid JSON"),
        (_no_pickle, "damaged, or no file that `torch.save` wrote"),
        (_old_pickle, "a pickle of torch before 1.6"),
        (_odd_pickle, "damaged, or no file that `torch.save` wrote"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_sentence(
    change: Callable[[Path], Path], said: str, tmp_path: Path
) -> None:
    place = change(parts().write(tmp_path))
    ran = run("inspect", place)
    assert (ran.code, ran.out) == (1, "")
    assert said in ran.err and ran.err.count("\n") == 1
    code, told = run_json("inspect", place)
    assert code == 1 and said in told["error"]


@pytest.mark.slow
def test_a_gigabyte_costs_less_than_a_third_of_a_second(tmp_path: Path) -> None:
    folder = parts().write(tmp_path)
    _sparse(folder / SAFETENSORS, 1 << 30)
    # Told by the process itself: what others measure of it counts the process that it was forked from.
    code = """
import atexit, re, sys, time
atexit.register(lambda: print(time.process_time(), re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
from splice.cli.main import main
sys.argv[0] = "splice"
main()
"""
    costs = []
    for _ in range(3):
        told = subprocess.run(
            [sys.executable, "-c", code, "inspect", str(folder), "--json"], capture_output=True, text=True, check=True
        ).stdout
        seconds, kilobytes = told.splitlines()[-1].split()
        # Seconds of the processor, since other work on this machine says nothing; next to nothing is read.
        costs.append(float(seconds))
        assert int(kilobytes) < 60_000
    assert min(costs) < 0.3


def _sparse(path: Path, size: int) -> None:
    """A file of this many bytes of LoRA weights, all of them holes."""
    layers, width = 32, 4096
    rank = size // (layers * 2 * 2 * width * 2)
    header, offset = {}, 0
    for layer in range(layers):
        for module in ("q_proj", "v_proj"):
            for suffix, shape in (("lora_A", [rank, width]), ("lora_B", [width, rank])):
                name = f"base_model.model.model.layers.{layer}.self_attn.{module}.{suffix}.weight"
                end = offset + rank * width * 2
                header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
                offset = end
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + offset)
    edited(path.parent, r=rank)


def test_torch_is_not_imported(tmp_path: Path) -> None:
    """A `torch` that cannot be imported comes first on the path."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    ran = run("inspect", EXAMPLE, "--values", PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert ran.code == 0, ran.err
