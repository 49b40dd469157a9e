"""A checkpoint that does not fit is refused with one error that says what is wrong, and the model is untouched."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import splice
from splice.errors import AdapterMismatchError, PeftWarning, UnsupportedFeatureError
from tests import broken
from tests.broken import (
    Interrupted,
    Parts,
    at_line,
    by_reference,
    interrupt,
    lines_of,
    llama,
    load,
    output,
    parts,
    unchanged,
)

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def _without(p: Parts) -> Parts:
    return Parts({n: t for n, t in p.tensors.items() if n != f"{Q0}.lora_B.weight"}, p.config)


def _with(name: str, tensor: torch.Tensor) -> Callable[[Parts], Parts]:
    return lambda p: Parts({**p.tensors, name: tensor}, p.config)


def _config(**fields: Any) -> Callable[[Parts], Parts]:
    return lambda p: Parts(p.tensors, {**p.config, **fields})


def _each(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Parts], Parts]:
    return lambda p: Parts({n: change(t) for n, t in p.tensors.items()}, p.config)


def _renamed(rename: Callable[[str], str]) -> Callable[[Parts], Parts]:
    """Renamed alone, a checkpoint would load: one tensor is missing too."""
    return lambda p: _without(p).renamed(rename)


def _in_a_wrapper(name: str) -> str:
    return name.replace("model.model.layers", "model.language_model.layers")


REFUSED: dict[str, tuple[Callable[[Parts], Parts], list[str]]] = {
    "one tensor missing": (_without, ["missing", f"{Q0}.lora_B.weight", "7 of 8 tensors"]),
    "one tensor too many": (
        _with("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", torch.ones(4, 16)),
        ["unexpected", "layers.7.self_attn.q_proj", "there is no module", "the nearest is"],
    ),
    "a tensor named like a base weight": (
        _with("base_model.model.model.layers.0.self_attn.k_proj.weight", torch.ones(8, 16)),
        ["unexpected", "k_proj.weight", "never overwrites", "modules_to_save"],
    ),
    "no tensors": (lambda p: Parts({}, p.config), ["no tensors at all", "0 of 8", "missing"]),
    "names that look like paths": (
        _with("../../etc/passwd", torch.ones(1)),
        ["unexpected", "../../etc/passwd"],
    ),
    "integers": (_each(lambda t: t.int()), ["dtype I32", "a floating-point dtype", "adapters are floats"]),
    "a huge rank": (_config(r=100_000_000), ["(100000000,16)", "(4,16)", "rank 4", "the config says 100000000"]),
    "another rank": (_config(r=8), ["(4,16)", "(8,16)", "rank 4 and the config says 8", "rank_pattern"]),
    "one shape": (
        _with(f"{Q0}.lora_A.weight", torch.ones(5, 16)),
        [f"{Q0}.lora_A.weight", "(5,16) in the checkpoint, (4,16) here"],
    ),
    "a scalar": (_with(f"{Q0}.lora_A.weight", torch.tensor(1.0)), ["() in the checkpoint", "(4,16) here"]),
    "no prefix": (
        _renamed(lambda n: n.removeprefix("base_model.model.")),
        ["lack the prefix 'base_model.model.'", "0 of 8"],
    ),
    "another wrapper": (
        _renamed(_in_a_wrapper),
        ["language_model", "renamed or wrapped", "key_mapping={"],
    ),
    "adapter name inside": (
        _renamed(lambda n: n.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")),
        ["still carry the adapter name 'default'", "save_pretrained"],
    ),
    "ungathered": (_each(lambda t: torch.empty(0)), ["no elements", "ZeRO-3", "gathering"]),
    "a target too few": (
        lambda p: _config(target_modules=["q_proj"])(
            Parts({n: t for n, t in p.tensors.items() if "1.self_attn.v_proj" not in n}, p.config)
        ),
        ["unexpected", "exists, but the config's target_modules do not select it", "for some of"],
    ),
    "a target too many": (_config(target_modules=["q_proj", "v_proj", "k_proj"]), ["missing", "k_proj", "8 of 12"]),
    "a head that is not there": (
        _config(modules_to_save=["lm_head"]),
        ["missing", "base_model.model.lm_head.weight", "the head 'lm_head' differs"],
    ),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_refused_and_untouched(case: str, tmp_path: Path) -> None:
    change, said = REFUSED[case]
    folder = change(parts()).write(tmp_path)
    model = llama()
    with unchanged(model), pytest.raises(AdapterMismatchError) as caught:
        load(folder, model)
    message = str(caught.value)
    for words in (*said, "the model is unchanged", "LlamaForCausalLM", "leave out the rest, pass"):
        assert words in message
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_refused_beside_another_adapter(case: str, tmp_path: Path) -> None:
    """The adapter that is there keeps working, and a good one still loads afterwards."""
    change, _ = REFUSED[case]
    good = parts(seed=1).write(tmp_path / "good")
    bad = change(parts()).write(tmp_path / "bad")
    model = load(good)
    before = output(model)
    with unchanged(model), pytest.raises(AdapterMismatchError):
        model.load_adapter(bad, "bad")
    assert torch.equal(output(model), before)
    model.load_adapter(good, "again")
    model.set_adapter("again")
    assert torch.equal(output(model), before)


def test_the_tensors_of_another_method(tmp_path: Path) -> None:
    folder = _config(peft_type="PROMPT_TUNING", num_virtual_tokens=4)(parts()).write(tmp_path)
    model = llama()
    with (
        unchanged(model),
        pytest.raises(AdapterMismatchError, match="those of (ADALORA or )?LORA and the config says PROMPT"),
    ):
        warnings.simplefilter("ignore")
        splice.PeftModel.from_pretrained(model, folder)


def test_a_method_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of a later version of the reference."""
    folder = _config()(parts()).write(tmp_path)
    model = llama()
    splice.PeftConfig.from_pretrained(folder)
    monkeypatch.delitem(splice.config._CLASSES, splice.PeftType.LORA)
    with (
        unchanged(model),
        pytest.raises(KeyError, match="adapters of the method 'LORA' cannot be loaded by this version"),
    ):
        load(folder, model)


def test_nothing_large_is_allocated_for_a_huge_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _config(r=100_000_000)(parts()).write(tmp_path)
    sizes: list[int] = []
    real = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: sizes.append(real(*a, **{**k, "device": "meta"}).numel()) or real(*a, **k)
    )
    with pytest.raises(AdapterMismatchError):
        load(folder)
    assert max(sizes, default=0) < 10_000


def test_the_message_is_grouped_and_names_both_bases(tmp_path: Path) -> None:
    made = parts(network=llama(layers=8))
    made.config["base_model_name_or_path"] = "someone/their-base"
    with pytest.raises(AdapterMismatchError) as caught:
        load(made.write(tmp_path), llama(layers=2))
    message = str(caught.value)
    assert "layers.{2..7}.self_attn.q_proj.lora_A.weight (6)" in message
    assert "'someone/their-base'" in message
    assert len(message.splitlines()) < 20
    assert len(caught.value.unexpected) == 24


def test_a_resized_vocabulary(tmp_path: Path) -> None:
    folder = parts(network=llama(vocabulary=48), target_modules=["embed_tokens"]).write(tmp_path)
    with pytest.raises(AdapterMismatchError, match="vocabulary was resized.*resize_token_embeddings"):
        load(folder)


def test_another_number_of_labels(tmp_path: Path) -> None:
    made = parts(network=broken.bert(labels=5), target_modules=["query"], task_type="SEQ_CLS")
    with pytest.raises(AdapterMismatchError, match="the head 'classifier' has another size: .*number of labels"):
        load(made.write(tmp_path), broken.bert(labels=3))


def test_the_proposed_key_mapping_works(tmp_path: Path) -> None:
    made = parts()
    with pytest.raises(AdapterMismatchError) as caught:
        load(REFUSED["another wrapper"][0](made).write(tmp_path / "renamed"))
    proposed = str(caught.value).partition("key_mapping=")[2].partition("}")[0] + "}"
    model = load(made.renamed(_in_a_wrapper).write(tmp_path / "all"), key_mapping=eval(proposed))
    assert torch.equal(output(model), output(load(made.write(tmp_path / "straight"))))


def test_an_initialisation_that_no_checkpoint_determines_is_refused(tmp_path: Path) -> None:
    folder = _config(init_lora_weights="corda")(parts()).write(tmp_path)
    with warnings.catch_warnings(), pytest.raises(UnsupportedFeatureError, match="corda.*path_initial_model_for"):
        warnings.simplefilter("ignore")
        splice.PeftModel.from_pretrained(llama(), folder)


@pytest.mark.parametrize("init", ["lora_ga", "pissa_niter_4"])
def test_initialisations_that_leave_a_doubt_are_named(init: str, tmp_path: Path) -> None:
    with pytest.warns(PeftWarning, match=f"initialised with '{init}'"):
        splice.PeftModel.from_pretrained(llama(), _config(init_lora_weights=init)(parts()).write(tmp_path))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"r": "4"}, ValueError, "`r` should be a positive integer"),
        ({"r": None}, ValueError, "`r` should be a positive integer"),
        ({"r": 0}, ValueError, "`r` should be a positive integer"),
        ({"peft_type": "lora"}, KeyError, "Did you mean 'LORA'"),
        ({"peft_type": "SUPERLORA"}, KeyError, "unknown peft_type 'SUPERLORA'"),
        ({"peft_type": 3}, ValueError, "must be a string"),
        ({"task_type": "PREDICT_LOTTERY"}, ValueError, "Invalid task type: 'PREDICT_LOTTERY'"),
        (
            {"target_modules": ["wq", "wv"]},
            splice.NoMatchingPeftModuleError,
            r"\['wq', 'wv'\] not found in the base model",
        ),
        ({"bias": "some"}, NotImplementedError, "bias='some'"),
    ],
    ids=str,
)
def test_configs_that_are_wrong(fields: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    folder = _config(**fields)(parts()).write(tmp_path)
    model = llama()
    with unchanged(model), pytest.raises(error, match=message):
        load(folder, model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[1, 2]", "an adapter config is an object"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"{}", "no 'peft_type'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1", "Git LFS pointer"),
    ],
    ids=str,
)
def test_config_files_that_are_damaged(text: bytes, message: str, tmp_path: Path) -> None:
    folder = parts().write(tmp_path)
    (folder / broken.CONFIG).write_bytes(text)
    with pytest.raises(splice.CheckpointError, match=message):
        load(folder)


def test_places_that_hold_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json'.*no such folder"):
        load(tmp_path / "nowhere")
    parts().write(tmp_path / "inside")
    with pytest.raises(ValueError, match=r"checkpoints in its subfolders: inside; pass one as `subfolder`"):
        load(tmp_path)
    with pytest.raises(ValueError, match="no folder 'outside'"):
        load(tmp_path, subfolder="outside")
    assert load(tmp_path, subfolder="inside").load_report.placed == 8
    (tmp_path / "inside" / broken.SAFETENSORS).unlink()
    with pytest.raises(ValueError, match=r"neither adapter_model.safetensors nor adapter_model.bin.*The folder holds"):
        load(tmp_path / "inside")


def test_wrong_arguments(tmp_path: Path) -> None:
    folder = parts().write(tmp_path)
    model = llama()
    with unchanged(model):
        with pytest.raises(ValueError, match="must be a PeftConfig"):
            load(folder, model, config={"r": 4})
        for name in ("", "__base__"):
            with pytest.raises(ValueError, match="adapter_name must be a non-empty string"):
                load(folder, model, adapter_name=name)
    loaded = load(folder, model)
    with unchanged(loaded):
        with pytest.raises(ValueError, match=r"is a PeftModel already, with the adapters \['default'\].*load_adapter"):
            load(folder, loaded)
        with pytest.raises(ValueError, match="'default' already exists"):
            load(folder, model)


# -- files that are not safe or not whole


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_a_pickle_is_never_run(form: str, tmp_path: Path) -> None:
    folder = parts().write(tmp_path / "adapter")
    (folder / broken.SAFETENSORS).unlink()
    payload = {"a": _Payload(tmp_path / "pwned")}
    if form == "plain":
        (folder / broken.BIN).write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, folder / broken.BIN, _use_new_zipfile_serialization=form == "zip")
    with warnings.catch_warnings(), pytest.raises(pickle.UnpicklingError, match="nothing of it was run"):
        warnings.simplefilter("ignore")  # torch warns of the protocol first
        splice.PeftModel.from_pretrained(llama(), folder)
    assert not (tmp_path / "pwned").exists()


def test_safetensors_is_preferred_to_a_pickle(tmp_path: Path) -> None:
    folder = parts().write(tmp_path)
    parts(seed=1).write(tmp_path, as_bin=True)
    assert torch.equal(output(load(folder)), output(load(parts().write(tmp_path / "alone"))))


def test_a_bin_file(tmp_path: Path) -> None:
    straight = output(load(parts().write(tmp_path / "safe")))
    assert torch.equal(output(load(parts().write(tmp_path / "bin", as_bin=True))), straight)
    cut = parts().write(tmp_path / "cut", as_bin=True) / broken.BIN
    cut.write_bytes(cut.read_bytes()[:500])
    with pytest.raises(splice.CheckpointError, match="damaged"):
        load(cut.parent)
    torch.save([1, 2], cut)
    with pytest.raises(splice.CheckpointError, match="holds a list; an adapter is a dict of tensors"):
        load(cut.parent)


def test_loaded_tensors_own_their_memory(tmp_path: Path) -> None:
    """In a process of its own: a mapped file that is cut off would end it by a signal."""
    folder = parts().write(tmp_path)

    def run() -> None:
        model = load(folder)
        before = output(model)
        file = folder / broken.SAFETENSORS
        size = file.stat().st_size
        with open(file, "r+b") as handle:
            handle.write(b"\xff" * size)
            handle.truncate(0)
        file.unlink()
        assert torch.equal(output(model), before)

    assert broken.in_fork(run) == 0


def test_no_two_loaded_tensors_share_memory(tmp_path: Path) -> None:
    tensors = list(broken.adapter_tensors(load(parts().write(tmp_path))).values())
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors) == 8
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)


# -- waived, and interrupted


@pytest.mark.parametrize("case", ["one tensor missing", "one tensor too many"], ids=str)
def test_not_strict_warns_and_loads_what_the_reference_loads(case: str, tmp_path: Path) -> None:
    folder = REFUSED[case][0](parts()).write(tmp_path)
    with pytest.warns(PeftWarning, match="missing adapter keys|unexpected keys"):
        model = splice.PeftModel.from_pretrained(llama(), folder, strict=False)
    torch.testing.assert_close(output(model), output(by_reference(folder)))


def test_sizes_that_differ_can_be_ignored(tmp_path: Path) -> None:
    folder = REFUSED["one shape"][0](parts()).write(tmp_path)
    with pytest.warns(PeftWarning, match="sizes differ"):
        model = splice.PeftModel.from_pretrained(llama(), folder, ignore_mismatched_sizes=True)
    assert model.load_report.placed == 7


def test_unknown_fields_warn_and_say_what_is_switched_on(tmp_path: Path) -> None:
    folder = _config(use_quantum=True, quantum_off=False, peft_version="99.0")(parts()).write(tmp_path)
    with pytest.warns(
        PeftWarning, match=r"\['quantum_off', 'use_quantum'\].*99.0.*\{'use_quantum': True\} are switched on"
    ):
        model = splice.PeftModel.from_pretrained(llama(), folder)
    assert model.load_report.placed == 8


def test_a_config_with_missing_fields(tmp_path: Path) -> None:
    made = parts(r=8, lora_alpha=8)
    made.config = {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]}
    torch.testing.assert_close(output(load(made.write(tmp_path))), output(by_reference(tmp_path)))


@pytest.mark.parametrize("beside", [False, True], ids=["first adapter", "second adapter"])
def test_an_interrupt_at_any_line_leaves_the_model_as_it_was(beside: bool, tmp_path: Path) -> None:
    folder = parts().write(tmp_path)
    load(folder)  # whose lines are more, as the first one fills caches
    model: nn.Module = load(folder, adapter_name="there") if beside else llama()

    def run() -> None:
        model.load_adapter(folder, "new", is_trainable=True) if beside else load(folder, model, is_trainable=True)

    total = lines_of(run)
    model.delete_adapter("new") if beside else splice.get_layer_status(model) and model.__dict__["splice_tuner"][
        0
    ].unload()
    before = broken.picture(model)
    for number in range(0, total, 97):
        try:
            with at_line(number, interrupt):
                run()
        except Interrupted:
            broken.assert_unchanged(before, model)
        else:
            pytest.fail(f"line {number} of {total} was not reached")


def test_new_weights_for_an_adapter_that_is_there(tmp_path: Path) -> None:
    """As trainers resume: the tensors stay the same objects, so an optimizer goes on holding them."""
    first, second = parts().write(tmp_path / "a"), parts(seed=1).write(tmp_path / "b")
    model = load(first, is_trainable=True)
    held = broken.adapter_tensors(model)
    result = model.load_adapter(second, "default", is_trainable=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert all(now is then for now, then in zip(broken.adapter_tensors(model).values(), held.values()))
    assert all(t.requires_grad for t in held.values())
    assert torch.equal(output(model), output(load(second)))
    bad = _without(parts()).write(tmp_path / "bad")
    with unchanged(model), pytest.raises(AdapterMismatchError):
        model.load_adapter(bad, "default")


def test_the_callers_config_is_not_changed(tmp_path: Path) -> None:
    folder = parts().write(tmp_path)
    config = splice.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    before = json.dumps(config.to_dict(), default=sorted)
    model = load(folder, config=config)
    assert json.dumps(config.to_dict(), default=sorted) == before
    assert model.peft_config["default"] is not config
    assert splice.get_layer_status(model)[0].enabled


def test_the_load_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "splice"):
        model = load(parts().write(tmp_path))
    assert str(model.load_report).startswith("default: 8 of 8 tensors on 4 layers, ")
    assert str(model.load_report).endswith(" ms")
    assert caplog.messages == [str(model.load_report)]


def test_a_file_that_is_no_safetensors_file(tmp_path: Path) -> None:
    folder = parts().write(tmp_path)
    file = folder / broken.SAFETENSORS
    content = file.read_bytes()
    for bad, message in (
        (content[:-300], "damaged"),
        (content + bytes(64), "damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer.*git lfs pull"),
        (b"", "damaged"),
    ):
        file.write_bytes(bad)
        with pytest.raises(splice.CheckpointError, match=message):
            load(folder)
    torch.save({"a": torch.ones(1)}, file)
    with pytest.raises(splice.CheckpointError, match=r"PyTorch pickle.*rename it to adapter_model.bin"):
        load(folder)
    file.unlink()
    file.mkdir()
    with pytest.raises(splice.CheckpointError, match="is a folder"):
        load(folder)
    file.rmdir()
    save_file({}, file)
    with pytest.raises(AdapterMismatchError, match="no tensors at all"):
        load(folder)
