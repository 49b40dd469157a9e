"""sentence-transformers: adapters on models that encode sentences, and on those that compare two."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses as criteria
from sentence_transformers.sentence_transformer import modules as parts
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast
from transformers.integrations import peft as mixin

from tests.ecosystem.both import seed_of
from tests.ecosystem.comparing import same

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SENTENCES = ["t3 t4 t5", "t9 t8", "t11 t12 t13 t14"]
PAIRS = [("t3 t4", "t5 t6"), ("t7", "t8 t9")]
shows = pytest.mark.shows


def fill(model: Any, key: object) -> None:
    generator = torch.Generator().manual_seed(seed_of(key))
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def bases(folder: Path) -> None:
    """A network of each kind with its tokenizer."""
    words = Tokenizer(WordLevel({f"t{index}": index for index in range(40)}, unk_token="t0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", cls_token="t1", sep_token="t2")
    for name, cls, options in (
        ("encoder", BertModel, {}),
        ("classifier", BertForSequenceClassification, {"num_labels": 1}),
    ):
        torch.manual_seed(0)
        cls(BertConfig(**SIZES, **QUIET, **options)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def encoder(folder: Path) -> Any:
    network = parts.Transformer(str(folder / "encoder"))
    return SentenceTransformer(modules=[network, parts.Pooling(16)], device="cpu")


def config(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["query", "value"], **options})


def encoding(folder: str) -> dict[str, Any]:
    place = Path(folder)
    model = encoder(place)
    result: dict[str, Any] = {"base": torch.tensor(model.encode(SENTENCES))}
    model.add_adapter(config(task_type="FEATURE_EXTRACTION"), adapter_name="mine")
    fill(model, "encoder")
    result["adapted"] = torch.tensor(model.encode(SENTENCES))
    result["active"], result["names"] = model.active_adapters(), sorted(model.get_adapter_state_dict())
    model.save_pretrained(str(place / "saved"), create_model_card=False)
    result["files"] = sorted(path.relative_to(place / "saved").as_posix() for path in (place / "saved").rglob("*"))
    again = SentenceTransformer(str(place / "saved"), device="cpu")
    result["loaded"] = torch.tensor(again.encode(SENTENCES))
    model.disable_adapters()
    result["disabled"] = torch.tensor(model.encode(SENTENCES))
    model.enable_adapters()
    model.load_adapter(str(place / "saved"), adapter_name="other")
    model.set_adapter("other")
    result["the same under another name"] = torch.tensor(model.encode(SENTENCES))
    model.delete_adapter("other")
    model.set_adapter("mine")
    result["left"] = torch.tensor(model.encode(SENTENCES))
    return result


def comparing(folder: str) -> dict[str, Any]:
    place = Path(folder)
    model = CrossEncoder(str(place / "classifier"), device="cpu")
    result: dict[str, Any] = {"base": torch.tensor(model.predict(PAIRS))}
    model.add_adapter(config(task_type="SEQ_CLS", modules_to_save=["classifier"]))
    fill(model, "classifier")
    result["adapted"] = torch.tensor(model.predict(PAIRS))
    model.save_pretrained(str(place / "ranker"), create_model_card=False)
    result["loaded"] = torch.tensor(CrossEncoder(str(place / "ranker"), device="cpu").predict(PAIRS))
    return result


def training(folder: str) -> dict[str, Any]:
    place = Path(folder)
    model = encoder(place)
    model.add_adapter(config(task_type="FEATURE_EXTRACTION"))
    fill(model, "training")
    data = datasets.Dataset.from_dict({"anchor": SENTENCES * 2, "positive": SENTENCES[::-1] * 2})
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(place / "trained"), max_steps=4, per_device_train_batch_size=3, learning_rate=1e-2, report_to=[],
        use_cpu=True, seed=0, disable_tqdm=True, save_steps=2, logging_steps=1, lr_scheduler_type="constant",
    )  # fmt: skip
    run = SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=data, loss=criteria.MultipleNegativesRankingLoss(model)
    )
    run.train()
    result = {
        "losses": [float(line["loss"]) for line in run.state.log_history if "loss" in line],
        "encoded": torch.tensor(model.encode(SENTENCES)),
    }
    saved = SentenceTransformer(str(place / "trained" / "checkpoint-4"), device="cpu")
    result["checkpoint"] = torch.tensor(saved.encode(SENTENCES))
    return result


def all_of_it(folder: str) -> dict[str, Any]:
    mixin.MIN_PEFT_VERSION = "0.21.0"  # which transformers asks for; the reference has what it needs
    for library in ("transformers", "sentence_transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    bases(Path(folder))
    return {scenario.__name__: scenario(folder) for scenario in (encoding, comparing, training)}


@shows("sentence-transformers", "SentenceTransformer: `add_adapter`, `load_adapter`, save, load again, `encode`")
def test_encoding(here: dict[str, Any], there: dict[str, Any]) -> None:
    found = here["encoding"]
    same(found, there["encoding"])
    assert not torch.allclose(found["adapted"], found["base"])
    for name in ("loaded", "the same under another name", "left"):
        assert torch.equal(found[name], found["adapted"])
    assert torch.equal(found["disabled"], found["base"])


@shows("sentence-transformers", "CrossEncoder: `add_adapter`, save, load again, `predict`")
def test_comparing(here: dict[str, Any], there: dict[str, Any]) -> None:
    found = here["comparing"]
    same(found, there["comparing"])
    assert not torch.allclose(found["adapted"], found["base"])
    assert torch.equal(found["loaded"], found["adapted"])


@shows("sentence-transformers", "SentenceTransformerTrainer, and its checkpoint")
def test_training(here: dict[str, Any], there: dict[str, Any]) -> None:
    found = here["training"]
    same(found, there["training"], 1e-4)
    assert torch.equal(found["checkpoint"], found["encoded"])


@shows("sentence-transformers", "what the reference saved")
def test_what_the_reference_saved(there: dict[str, Any], place: Path) -> None:
    model = SentenceTransformer(str(place / "reference" / "saved"), device="cpu")
    same(torch.tensor(model.encode(SENTENCES)), there["encoding"]["adapted"])
    ranker = CrossEncoder(str(place / "reference" / "ranker"), device="cpu")
    same(torch.tensor(ranker.predict(PAIRS)), there["comparing"]["adapted"])
