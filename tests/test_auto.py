"""A base model and its adapter from the adapter's place alone."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import splice
from tests import bases
from tests.bases import Base, run
from tests.comparing import assert_close

TASKS = {
    "CAUSAL_LM": (bases.LLAMA, "AutoPeftModelForCausalLM", "PeftModelForCausalLM"),
    "SEQ_2_SEQ_LM": (bases.T5, "AutoPeftModelForSeq2SeqLM", "PeftModelForSeq2SeqLM"),
    "SEQ_CLS": (bases.BERT, "AutoPeftModelForSequenceClassification", "PeftModelForSequenceClassification"),
    "TOKEN_CLS": (
        "BertForTokenClassification",
        "AutoPeftModelForTokenClassification",
        "PeftModelForTokenClassification",
    ),
    "QUESTION_ANS": ("BertForQuestionAnswering", "AutoPeftModelForQuestionAnswering", "PeftModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("BertModel", "AutoPeftModelForFeatureExtraction", "PeftModelForFeatureExtraction"),
}


def saved(place: Path, base: Any, **fields: Any) -> Path:
    """The base in one folder, and in another an adapter for it, which is returned."""
    import transformers

    torch.manual_seed(5)
    described = bases.BERT.build().config
    described.num_labels = 2  # start and end
    network = base.build() if isinstance(base, Base) else getattr(transformers, base)(described).eval()
    network.save_pretrained(place / "base")
    network.name_or_path = str(place / "base")
    targets = list(base.targets) if isinstance(base, Base) else ["query", "value"]
    config = splice.LoraConfig(target_modules=targets, init_lora_weights=False, **fields)
    splice.get_peft_model(network, config).save_pretrained(place / "adapter")
    return place / "adapter"


def edit(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("task", TASKS)
def test_every_task(task: str, tmp_path: Path) -> None:
    base, name, wrapper = TASKS[task]
    folder = saved(tmp_path, base, task_type=task)
    ours: Any = getattr(splice, name).from_pretrained(folder, adapter_name="mine")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = getattr(peft, name).from_pretrained(str(folder))
    assert type(ours) is getattr(splice, wrapper)
    assert type(theirs.get_base_model()) is ours.get_base_model().__class__.__mro__[0]
    assert ours.active_adapter == "mine"
    assert not ours.training
    inputs = (base if isinstance(base, Base) else bases.BERT).inputs(2)
    if task in ("FEATURE_EXTRACTION", "QUESTION_ANS"):
        key = {"FEATURE_EXTRACTION": "last_hidden_state", "QUESTION_ANS": "start_logits"}[task]
        with torch.no_grad():
            assert_close(ours(**inputs)[key], theirs(**inputs)[key])
    else:
        assert_close(run(ours, inputs), run(theirs, inputs))


def test_options_reach_the_base_and_the_adapter(tmp_path: Path) -> None:
    folder = saved(tmp_path, bases.LLAMA, task_type="CAUSAL_LM")
    model: Any = splice.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, is_trainable=True)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.weight.dtype is torch.bfloat16
    adapter = [p for n, p in model.named_parameters() if "lora_A" in n]
    assert adapter[0].dtype is torch.float32
    assert adapter[0].requires_grad
    model = splice.AutoPeftModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, autocast_adapter_dtype=False, strict=True
    )
    assert {p.dtype for n, p in model.named_parameters() if "lora_A" in n} == {torch.bfloat16}


def test_a_folder_inside_is_the_adapters(tmp_path: Path) -> None:
    folder = saved(tmp_path, bases.LLAMA, task_type="CAUSAL_LM")
    model = splice.AutoPeftModelForCausalLM.from_pretrained(tmp_path, subfolder=folder.name)
    assert model.load_report is not None
    other = splice.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    other.base_model_name_or_path = str(tmp_path / "base")
    with pytest.raises(splice.AdapterMismatchError):
        splice.AutoPeftModelForCausalLM.from_pretrained(
            folder,
            config=splice.LoraConfig(
                r=3, target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path=str(tmp_path / "base")
            ),
        )


def test_the_vocabulary_grows_to_the_tokenizers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    folder = saved(tmp_path, bases.LLAMA, task_type="CAUSAL_LM")
    for count in (bases.VOCABULARY + 3, bases.VOCABULARY - 3):
        words = {f"w{i}": i for i in range(count)}
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "w0"))).save_pretrained(folder)
        for library in (splice, peft):
            model: Any = library.AutoPeftModelForCausalLM.from_pretrained(str(folder))
            rows = model.get_base_model().get_input_embeddings().weight.shape[0]
            assert rows == max(count, bases.VOCABULARY), (library, count)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("AutoPeftModelForSeq2SeqLM", {}, "Expected target PEFT class: PeftModelForCausalLM, but you have asked for"),
        ("AutoPeftModel", {}, "Cannot use `AutoPeftModel` with a task type"),
        ("AutoPeftModelForCausalLM", {"base_model_name_or_path": None}, "names no base model"),
        ("AutoPeftModelForCausalLM", {"task_type": None}, "Cannot infer the auto class from the config"),
        (
            "AutoPeftModel",
            {"task_type": None, "auto_mapping": {"base_model_class": "Linear", "parent_library": "torch.nn"}},
            r"'torch.nn' which is not in the import allowlist.*import_allowlist=\['torch.nn'\]",
        ),
        (
            "AutoPeftModel",
            {"task_type": None, "auto_mapping": {"base_model_class": "X", "parent_library": "transformers_of_mine"}},
            "not in the import allowlist",
        ),
    ],
)
def test_what_cannot_be_found(name: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, bases.LLAMA, task_type="CAUSAL_LM")
    edit(folder, **fields)
    with pytest.raises(ValueError, match=message):
        getattr(splice, name).from_pretrained(folder)
    if "names no base" not in message:
        with pytest.raises(ValueError, match=message.partition(".*")[0]):
            getattr(peft, name).from_pretrained(str(folder))


def test_without_a_task_the_config_names_the_class(tmp_path: Path) -> None:
    folder = saved(tmp_path, bases.LLAMA)
    model: Any = splice.AutoPeftModel.from_pretrained(folder)
    assert type(model) is splice.PeftModel
    assert isinstance(model.get_base_model(), type(bases.LLAMA.build()))
    assert type(splice.AutoPeftModelForCausalLM.from_pretrained(folder)) is splice.PeftModelForCausalLM
    edit(folder, auto_mapping={"base_model_class": "Linear", "parent_library": "torch.nn"})
    with pytest.raises(ValueError, match="torch.nn.Linear, which the config names .* has no `from_pretrained`"):
        splice.AutoPeftModel.from_pretrained(folder, import_allowlist=["torch"])
    with pytest.raises(OSError, match="from_pretrained"):
        splice.AutoPeftModel()
