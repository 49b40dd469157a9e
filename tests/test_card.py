"""Model cards: the README.md beside a checkpoint."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import yaml
from torch import nn

import splice
from splice.checkpoint.format import FORMAT_VERSION
from tests import bases

LORA = {"r": 4, "target_modules": ["q_proj"]}
CARD = "README.md"


def made(library: Any = splice, base: str | None = None, **options: Any) -> Any:
    network = bases.LLAMA.build()
    if base is not None:
        network.name_or_path = base
        network.config._name_or_path = base
    return library.get_peft_model(network, library.LoraConfig(**{**LORA, "task_type": "CAUSAL_LM", **options}))


def card(folder: Path) -> tuple[dict[str, Any], str]:
    """Its data and its text."""
    _, data, text = (folder / CARD).read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(data), text


def saved(model: Any, folder: Path) -> tuple[dict[str, Any], str]:
    model.save_pretrained(folder)
    return card(folder)


def test_the_data_are_those_of_the_reference(tmp_path: Path) -> None:
    ours, text = saved(made(base="someone/llama"), tmp_path / "ours")
    theirs, their_text = saved(made(peft, base="someone/llama"), tmp_path / "theirs")
    assert ours == theirs
    assert ours["tags"] == ["base_model:adapter:someone/llama", "lora", "transformers"]
    assert text.count(f"### Framework versions\n\n- PEFT {FORMAT_VERSION}\n") == 1
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [line for line in their_text.splitlines() if line.startswith("#")]
    assert "model = PeftModel.from_pretrained(base_model," in text


def test_what_depends_on_the_base_and_the_method(tmp_path: Path) -> None:
    class Net(nn.Module):
        model_tags = ["mine"]

        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

    plain, _ = saved(splice.get_peft_model(Net(), splice.LoraConfig(target_modules=["lin"])), tmp_path / "plain")
    assert plain == {"library_name": "peft", "tags": ["lora", "mine"]}
    other = splice.get_peft_model(bases.LLAMA.build(), splice.IA3Config(**_IA3))
    assert saved(other, tmp_path / "ia3")[0] == {"library_name": "peft", "tags": ["transformers"]}


_IA3 = {"target_modules": ["k_proj"], "feedforward_modules": [], "task_type": "SEQ_CLS"}


def test_a_folder_of_this_machine_is_no_base_on_the_hub(tmp_path: Path) -> None:
    """The Hub refuses a card that names one, and the path is nobody's business."""
    bases.LLAMA.build().save_pretrained(tmp_path / "llama")
    data, _ = saved(made(base=str(tmp_path / "llama")), tmp_path / "a")
    assert "base_model" not in data and data["tags"] == ["lora", "transformers"]
    assert str(tmp_path) not in (tmp_path / "a" / CARD).read_text()
    model = made(base="")
    model.peft_config["default"].base_model_name_or_path = "someone/llama"
    data, _ = saved(model, tmp_path / "b")
    assert data["base_model"] == "someone/llama"


def test_what_its_author_wrote_stays(tmp_path: Path) -> None:
    written = "---\ntags:\n- mine\n- lora\nlicense: mit\nbase_model: someone/older\n---\n# Mine\n\nüber\n"
    (tmp_path / CARD).write_text(written, encoding="utf-8")
    data, text = saved(made(base="someone/llama"), tmp_path)
    assert data["tags"] == ["mine", "lora", "base_model:adapter:someone/llama", "transformers"]
    assert (data["license"], data["base_model"]) == ("mit", "someone/older")
    assert text == f"# Mine\n\nüber\n\n### Framework versions\n\n- PEFT {FORMAT_VERSION}\n"
    before = (tmp_path / CARD).read_bytes()
    made(base="someone/llama").save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_bytes() == before


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "# A\n\n### Framework versions\n\n- PEFT 0.4.0\n- torch 2\n",
            "### Framework versions\n\n- PEFT {}\n- torch 2\n",
        ),
        ("# A\n\n### Framework versions\n\n- torch 2\n", "### Framework versions\n\n- PEFT {}\n\n- torch 2\n"),
    ],
)
def test_the_line_of_the_version(text: str, wanted: str, tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(text)
    _, found = saved(made(), tmp_path)
    assert found.endswith(wanted.format(FORMAT_VERSION))


def test_a_card_that_cannot_be_read_is_left_alone(tmp_path: Path) -> None:
    """And the adapter is saved all the same."""
    (tmp_path / CARD).write_text("---\ntags: [unclosed\n---\n# Mine\n")
    with pytest.warns(splice.PeftWarning, match="README.md cannot be read, so it is left as it is"):
        made().save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text() == "---\ntags: [unclosed\n---\n# Mine\n"
    splice.PeftModel.from_pretrained(bases.LLAMA.build(), tmp_path)


def test_one_card_beside_all_adapters_and_one_process_that_writes_it(tmp_path: Path) -> None:
    model = made()
    model.add_adapter("second", splice.LoraConfig(**LORA))
    model.save_pretrained(tmp_path / "a", selected_adapters=["second"])
    assert sorted(p.relative_to(tmp_path / "a").as_posix() for p in (tmp_path / "a").rglob("*") if p.is_file()) == [
        CARD, "second/adapter_config.json", "second/adapter_model.safetensors",
    ]  # fmt: skip
    model.save_pretrained(tmp_path / "b", is_main_process=False)
    assert not list((tmp_path / "b").rglob("*.*"))


def test_written_by_itself(tmp_path: Path) -> None:
    made().create_or_update_model_card(tmp_path / "new")
    assert card(tmp_path / "new")[0]["library_name"] == "peft"
    mixed = splice.PeftMixedModel(bases.LLAMA.build(), splice.LoraConfig(**LORA))
    with pytest.raises(NotImplementedError, match="Model cards are not supported"):
        mixed.create_or_update_model_card(tmp_path / "mixed")


def test_saving_does_not_publish_and_says_so(tmp_path: Path) -> None:
    """The reference ignores the argument in silence."""
    with pytest.warns(splice.PeftWarning, match=r"call `push_to_hub\(repo_id\)`"):
        made().save_pretrained(tmp_path, push_to_hub=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made().save_pretrained(tmp_path, max_shard_size="1GB")
