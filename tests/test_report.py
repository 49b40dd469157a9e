"""What a load says: one line when it is done, and when it is refused one error that names everything and the likely mend."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import splice
from splice.errors import AdapterMismatchError
from splice.loading.report import LoadReport, grouped
from tests import broken
from tests.broken import PREFIX, Around, Parts, edited, llama, load, output, parts, unchanged

Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"


def refusal(made: Parts, tmp_path: Path, network: Any = None, **options: Any) -> AdapterMismatchError:
    """The error of loading `made`; the model is as it was."""
    model = llama() if network is None else network
    with unchanged(model), pytest.raises(AdapterMismatchError) as caught:
        load(made.write(tmp_path), model, **options)
    return caught.value


def advice(error: AdapterMismatchError) -> list[str]:
    """The sentences that say what to do."""
    return [
        line.strip().removeprefix("Likely: ") for line in str(error).splitlines() if line.strip().startswith("Likely: ")
    ]


# -- another prefix, in either direction

NETWORKS: dict[str, Callable[[], Any]] = {
    "as it was": llama,
    "inside another": lambda: Around(llama(), "language_model"),
    "inside two others": lambda: Around(Around(llama(), "language_model"), "model"),
    "without its head": lambda: llama().model,
}


def loaded(made: Parts, folder: Path, network: Any = None, **options: Any) -> tuple[Any, list[str]]:
    """The model with all of `made` on it, and the notes of its load report."""
    model: Any = splice.PeftModel.from_pretrained(
        llama() if network is None else network, made.write(folder), **options
    )
    ours = [t for _, t in sorted(splice.get_peft_model_state_dict(model).items())]
    theirs = [t for _, t in sorted(made.tensors.items())]
    assert model.load_report.placed == model.load_report.expected == len(theirs)
    assert all(any(a.shape == b.shape and bool((a == b).all()) for a in ours) for b in theirs)
    return model, list(model.load_report.notes)


@pytest.mark.parametrize("now", NETWORKS)
@pytest.mark.parametrize("then", NETWORKS)
def test_a_base_that_was_wrapped_or_unwrapped_since(then: str, now: str, tmp_path: Path) -> None:
    made = parts(network=NETWORKS[then](), task_type=None)
    _, notes = loaded(made, tmp_path, NETWORKS[now]())
    assert len(notes) == (then != now)
    assert all(note.startswith("4 layers of the checkpoint begin with ") for note in notes), notes


RENAMED: dict[str, Callable[[str], str]] = {
    "another word in front": lambda n: n.replace("model.layers", "transformer.layers", 1),
    "another word for the layers": lambda n: n.replace("layers", "h"),
    "a word less": lambda n: n.removeprefix("model."),
    "a word more": lambda n: n.replace("layers", "decoder.layers"),
    "upper case": lambda n: n.replace("layers", "Layers"),
}


@pytest.mark.parametrize("what", RENAMED)
def test_a_base_whose_modules_were_renamed(what: str, tmp_path: Path) -> None:
    made = parts()
    renamed = Parts({PREFIX + RENAMED[what](n.removeprefix(PREFIX)): t for n, t in made.tensors.items()}, made.config)
    model, notes = loaded(renamed, tmp_path / "renamed")
    assert len(notes) == 1
    assert torch.equal(output(model), output(load(made.write(tmp_path / "straight"))))


@pytest.mark.parametrize("word", ["attention", "attn", "self_attention"])
def test_a_block_that_was_renamed(word: str, tmp_path: Path) -> None:
    made = parts()
    model, notes = loaded(made.renamed(lambda name: name.replace("self_attn", word)), tmp_path / "renamed")
    assert word in notes[0]
    assert "self_attn" in notes[0]
    assert torch.equal(output(model), output(load(made.write(tmp_path / "straight"))))


PREFIXES: dict[str, Callable[[str], str]] = {
    "none": lambda n: n.removeprefix(PREFIX),
    "half of it": lambda n: n.replace(PREFIX, "base_model.", 1),
    "the other half": lambda n: n.replace(PREFIX, "model.", 1),
    "twice": lambda n: PREFIX + n,
    "diffusers'": lambda n: n.replace(PREFIX, "transformer.", 1),
    "torch.compile's": lambda n: "_orig_mod." + n,
    "data parallel": lambda n: "module." + n,
}


@pytest.mark.parametrize("what", PREFIXES)
def test_names_with_another_prefix(what: str, tmp_path: Path) -> None:
    made = parts()
    model, notes = loaded(made.renamed(PREFIXES[what]), tmp_path / "renamed")
    assert notes
    assert torch.equal(output(model), output(load(made.write(tmp_path / "straight"))))


# -- other causes, each with its sentence


def _raw_names(name: str, adapter: str = "default") -> str:
    return re.sub(r"(lora_[AB])\.", rf"\1.{adapter}.", name)


@pytest.mark.parametrize("adapter", ["default", "mine", "trained"])
def test_adapter_names_inside_the_keys(adapter: str, tmp_path: Path) -> None:
    """Whatever the name was: it stands between the parts of a key that would fit."""
    made = parts()
    model, notes = loaded(made.renamed(lambda name: _raw_names(name, adapter)), tmp_path / "raw")
    assert any(f"the adapter name '{adapter}' stands inside the names: left out" in note for note in notes)
    assert torch.equal(output(model), output(load(made.write(tmp_path / "straight"))))


def test_a_typo_in_a_path(tmp_path: Path) -> None:
    made = parts()
    name = f"{Q0}.lora_A.weight"
    made.tensors[name.replace("q_proj", "q_porj")] = made.tensors.pop(name)
    error = refusal(made, tmp_path)
    assert (
        "there is no module 'model.layers.0.self_attn.q_porj'; the nearest is 'model.layers.0.self_attn.q_proj'"
        in str(error)
    )
    assert error.missing == [name]


def test_modules_that_are_there_and_not_targets(tmp_path: Path) -> None:
    """The tensors say which layers were trained, whatever became of the config."""
    made = parts()
    made.config["target_modules"] = ["q_proj"]
    _, notes = loaded(made, tmp_path)
    assert any("v_proj" in note and "target_modules" in note for note in notes)


@pytest.mark.parametrize(("trained", "said"), [(4, 8), (8, 4), (16, 2), (1, 64)])
def test_another_rank(trained: int, said: int, tmp_path: Path) -> None:
    made = parts(r=trained)
    made.config["r"] = said
    error = refusal(made, tmp_path)
    assert f"the tensors have rank {trained} and the config says {said}" in str(error)
    assert "rank_pattern" in str(error)
    assert len(error.mismatched) == 8
    made.config["r"] = trained
    assert load(made.write(tmp_path)).load_report.placed == 8


def test_another_rank_in_some_layers(tmp_path: Path) -> None:
    made = parts(rank_pattern={"v_proj": 2})
    made.config["rank_pattern"] = {}
    error = refusal(made, tmp_path)
    assert "the tensors have rank 2 and the config says 4" in str(error)
    assert "4 of 8 tensors" in str(error)


def test_a_narrower_base_is_not_another_rank(tmp_path: Path) -> None:
    """All tensors have another width: no rank in the config would mend that."""
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=2, pad_token_id=0)
    )  # fmt: skip
    error = refusal(parts(network=wide), tmp_path)
    assert "(4,32) in the checkpoint, (4,16) here" in str(error)
    assert "the tensors have rank" not in str(error)


@pytest.mark.parametrize(
    "options", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}], ids=str
)
@pytest.mark.parametrize("trained", [48, 39])
def test_a_resized_vocabulary(trained: int, options: dict[str, Any], tmp_path: Path) -> None:
    made = parts(network=llama(vocabulary=trained), **options)
    error = refusal(made, tmp_path)
    assert "vocabulary was resized" in str(error)
    assert "resize_token_embeddings" in str(error)
    model = llama()
    model.resize_token_embeddings(trained, mean_resizing=False)
    load(tmp_path, model)


def test_a_head_of_another_size(tmp_path: Path) -> None:
    made = parts(network=broken.bert(labels=5), target_modules=["query"], task_type="SEQ_CLS")
    error = refusal(made, tmp_path, broken.bert(labels=3))
    assert "the head 'classifier' has another size" in str(error)
    assert "number of labels" in str(error)
    load(tmp_path, broken.bert(labels=5))


def test_a_base_without_the_head(tmp_path: Path) -> None:
    """Trained for classification, loaded on a model that generates."""
    made = parts()
    made.tensors[f"{PREFIX}score.weight"] = torch.ones(3, 16)
    made.config.update(task_type="SEQ_CLS", modules_to_save=["score"])
    error = refusal(made, tmp_path)
    assert "the head 'score'" in str(error)
    assert "SEQ_CLS" in str(error)
    assert "class" in str(error)


def test_a_checkpoint_without_the_head(tmp_path: Path) -> None:
    made = parts(network=broken.bert(), target_modules=["query"], task_type="SEQ_CLS")
    made.tensors = {name: tensor for name, tensor in made.tensors.items() if "classifier" not in name}
    error = refusal(made, tmp_path, broken.bert())
    assert "the head 'classifier'" in str(error)
    assert sorted(error.missing) == [f"{PREFIX}classifier.bias", f"{PREFIX}classifier.weight"]


def test_tensors_that_were_not_gathered(tmp_path: Path) -> None:
    made = parts()
    error = refusal(Parts({n: torch.empty(0) for n in made.tensors}, made.config), tmp_path)
    assert "8 tensors have no elements" in advice(error)[0]
    assert "ZeRO-3" in advice(error)[0]


def test_tensors_of_another_method(tmp_path: Path) -> None:
    made = parts()
    tensors = {"prompt_embeddings": torch.ones(4, 16)}
    error = refusal(Parts(tensors, made.config), tmp_path)
    assert re.search("the tensors are those of .*PROMPT_TUNING.* and the config says LORA", str(error))


METHODS_OF_OTHERS = {
    "IA3": "ia3_l", "LOHA": "hada_w1_a", "LOKR": "lokr_w1", "VERA": "vera_lambda_b", "OFT": "oft_R.weight",
    "FOURIERFT": "fourierft_spectrum",
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS_OF_OTHERS)
def test_tensors_of_other_methods(method: str, tmp_path: Path) -> None:
    """They are told by their names, which every method's tensors begin with."""
    tensors = {f"{Q0}.{METHODS_OF_OTHERS[method]}": torch.ones(16)}
    error = refusal(Parts(tensors, parts().config), tmp_path)
    assert method in str(error)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool], ids=str)
def test_tensors_of_integers(dtype: torch.dtype, tmp_path: Path) -> None:
    made = parts()
    error = refusal(Parts({n: t.to(dtype) for n, t in made.tensors.items()}, made.config), tmp_path)
    assert "quantised" in str(error)
    assert "adapters are floats" in str(error)
    assert len(error.mismatched) == 8


def test_no_tensors(tmp_path: Path) -> None:
    error = refusal(Parts({}, parts().config), tmp_path)
    assert "the file holds no tensors at all" in advice(error)[0]
    assert len(error.missing) == 8


def test_a_head_that_no_config_names(tmp_path: Path) -> None:
    """Of the size that the base's has: it was trained, and is loaded as if `modules_to_save` named it."""
    made = parts()
    made.tensors[f"{PREFIX}lm_head.weight"] = torch.ones(40, 16)
    model, notes = loaded(made, tmp_path)
    assert any("lm_head" in note and "modules_to_save" in note for note in notes)
    assert model.peft_config["default"].modules_to_save == ["lm_head"]


def test_a_whole_model_in_place_of_an_adapter(tmp_path: Path) -> None:
    """Weights of the base itself, under its own names."""
    tensors = dict(llama().state_dict())
    error = refusal(Parts(tensors, parts().config), tmp_path)
    assert "0 of 8 tensors" in str(error)
    assert "base model" in advice(error)[0]
    assert len(str(error).splitlines()) < 30


def test_the_most_likely_cause_comes_first_and_no_cause_is_far_fetched(tmp_path: Path) -> None:
    made = parts()
    made.tensors = {name: tensor for name, tensor in made.tensors.items() if ".1." not in name}
    error = refusal(made, tmp_path)
    assert advice(error) == []
    assert "layers.1.self_attn.{q,v}_proj" in str(error) or "layers.1.self_attn.q_proj" in str(error)


# -- how it is said


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    made = parts()
    names = sorted(made.tensors)
    made.tensors["something.else"] = torch.ones(1)
    made.tensors[names[0]] = torch.ones(3)
    del made.tensors[names[1]]
    error = refusal(made, tmp_path)
    assert (error.missing, error.unexpected, error.mismatched) == ([names[1]], ["something.else"], [names[0]])
    for words in ("missing in the checkpoint (1):", "unexpected, with no place in the model (1):",
                  "of another shape or dtype (1):", "6 of 8 tensors"):  # fmt: skip
        assert words in str(error)


@pytest.mark.parametrize("wrong", ["lacking", "left over", "of another shape", "all of it"])
def test_what_the_error_says_of_loading_the_rest_is_so(wrong: str, tmp_path: Path) -> None:
    made = parts()
    names = sorted(made.tensors)
    if wrong in ("lacking", "all of it"):
        del made.tensors[names[1]]
    if wrong in ("left over", "all of it"):
        made.tensors["something.else"] = torch.ones(1)
    if wrong in ("of another shape", "all of it"):
        made.tensors[names[0]] = torch.ones(3)
    last = str(refusal(made, tmp_path)).splitlines()[-1]
    options = dict.fromkeys(re.findall(r"(\w+)=True", last), True) | dict.fromkeys(
        re.findall(r"(\w+)=False", last), False
    )
    with pytest.warns(splice.PeftWarning):
        model = splice.PeftModel.from_pretrained(llama(), made.write(tmp_path), **options)
    assert model.active_adapters == ["default"]


def test_hundreds_of_tensors_are_a_few_lines(tmp_path: Path) -> None:
    deep = llama(layers=28)
    everything = ["q_proj", "k_proj", "v_proj", "o_proj"]
    made = parts(network=deep, target_modules=everything)
    assert len(made.tensors) == 224
    made.config["base_model_name_or_path"] = "someone/their-base"
    given = llama(layers=28)
    given.name_or_path = "mine/of-another-kind"
    error = refusal(Parts({"x": torch.ones(1)}, made.config), tmp_path, given)
    message = str(error)
    assert len(error.missing) == 224
    assert "missing in the checkpoint (224):" in message
    assert "layers.{0..27}.self_attn.q_proj.lora_A.weight (28)" in message
    assert "... and 2 more groups" in message
    assert "'someone/their-base'" in message
    assert "mine/of-another-kind" in message
    assert len(message.splitlines()) < 20
    assert len(message) < 2500


def test_names_that_have_nothing_in_common_are_cut_short(tmp_path: Path) -> None:
    made = parts()
    made.tensors.update({f"{chr(97 + i // 26)}{chr(97 + i % 26)}.weight": torch.ones(1) for i in range(600)})
    error = refusal(made, tmp_path)
    assert len(error.unexpected) == 600
    assert "(600)" in str(error)
    assert len(str(error).splitlines()) < 20


def test_a_list_of_shapes_is_grouped_too(tmp_path: Path) -> None:
    made = parts(network=llama(layers=12))
    made.config["r"] = 16
    message = str(refusal(made, tmp_path, llama(layers=12)))
    assert "layers.{0..11}.self_attn.q_proj.lora_A.weight: (4,16) in the checkpoint, (16,16) here (12)" in message


@pytest.mark.parametrize(
    ("names", "lines"),
    [
        ([], []),
        (["a.b"], ["a.b"]),
        (["l.0.q", "l.1.q"], ["l.{0,1}.q (2)"]),
        (["l.0.q", "l.1.q", "l.2.q"], ["l.{0..2}.q (3)"]),
        (["l.10.q", "l.9.q", "l.8.q"], ["l.{8..10}.q (3)"]),
        (["l.0.q", "l.2.q", "l.7.q"], ["l.{0,2,7}.q (3)"]),
        (["l.0.q", "l.0.k", "l.1.q"], ["l.{0,1}.q (2)", "l.0.k"]),
        (["l.0.e.0", "l.0.e.1", "l.1.e.0", "l.1.e.1"], ["l.{0,1}.e.{0,1} (4)"]),
        (["7", "8"], ["{7,8} (2)"]),
        (["", "a"], ["", "a"]),
        (["l.00.q", "l.0.q"], ["l.{0,00}.q (2)"]),
    ],
    ids=str,
)
def test_names_that_differ_in_numbers_are_one_line(names: list[str], lines: list[str]) -> None:
    assert [sorted(line) for line in grouped(names)] == [sorted(line) for line in lines]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab.01279²٣x"), max_size=8), unique=True, max_size=40))
def test_any_names_can_be_grouped_and_none_is_lost(names: list[str]) -> None:
    lines = grouped(names)
    counts = [re.search(r" \((\d+)\)$", line) for line in lines]
    assert sum(int(found[1]) if found else 1 for found in counts) == len(names)
    assert len(lines) <= max(len(names), 0)


# -- a finished load


def test_the_line_of_a_finished_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "splice"):
        model = load(parts().write(tmp_path))
    report = model.load_report
    assert (report.adapter_name, report.placed, report.expected, report.layers) == ("default", 8, 8, 4)
    assert report.nbytes == sum(tensor.nbytes for tensor in parts().tensors.values())
    assert 0 < report.seconds < 60
    assert re.fullmatch(r"default: 8 of 8 tensors on 4 layers, \d+\.\d kB, \d+ ms", str(report))
    assert caplog.messages == [str(report)]


@pytest.mark.parametrize(
    ("nbytes", "shown"), [(0, "0.0 kB"), (1536, "1.5 kB"), (99_999, "100.0 kB"), (45_100_000, "45.1 MB")]
)
def test_sizes_are_shown_in_their_unit(nbytes: int, shown: str) -> None:
    line = str(LoadReport("a", 448, 448, 224, nbytes, 0.009, ("a note",)))
    assert line == f"a: 448 of 448 tensors on 224 layers, {shown}, 9 ms\n  a note"


def test_the_report_is_that_of_the_last_load(tmp_path: Path) -> None:
    model = load(parts().write(tmp_path))
    model.load_adapter(tmp_path, "other")
    assert model.load_report.adapter_name == "other"
    first = model.load_report
    edited(tmp_path, r=2)
    with pytest.raises(AdapterMismatchError):
        model.load_adapter(tmp_path, "third")
    assert model.load_report is first


def test_a_new_adapter_has_no_report() -> None:
    config = splice.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert splice.get_peft_model(llama(), config).load_report is None
