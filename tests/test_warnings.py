"""A warning blames the line of the caller: the first frame that is neither splice's nor torch's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import splice
from tests.broken import edited, llama, parts


def blamed(run: Callable[[], object], text: str) -> str:
    """The line of source that the one warning with `text` in it blames."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    (found,) = [warning for warning in caught if text in str(warning.message)]
    return Path(found.filename).read_text(encoding="utf-8").splitlines()[found.lineno - 1].strip()


class Unused(nn.Module):
    """A network that calls none of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.proj._parameters["weight"])


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def loaded(folder: Path) -> splice.PeftModel:
    base = Unused()
    splice.get_peft_model(copy.deepcopy(base), splice.LoraConfig(target_modules=["proj"])).save_pretrained(folder)
    return splice.PeftModel.from_pretrained(base, folder)


def test_of_a_load(tmp_path: Path) -> None:
    folder = edited(parts().write(tmp_path), from_the_future=True)
    line = blamed(
        lambda: splice.PeftModel.from_pretrained(llama(), folder),
        "from_the_future",
    )
    assert line == "lambda: splice.PeftModel.from_pretrained(llama(), folder),"


def test_of_a_load_by_way_of_the_config_class(tmp_path: Path) -> None:
    folder = edited(parts().write(tmp_path), from_the_future=True)
    line = blamed(
        lambda: splice.PeftConfig.from_pretrained(folder),
        "from_the_future",
    )
    assert line == "lambda: splice.PeftConfig.from_pretrained(folder),"


def test_of_a_forward_through_the_frames_of_torch(tmp_path: Path) -> None:
    model = loaded(tmp_path)
    line = blamed(
        lambda: model(torch.ones(1, 4)),
        "had no effect",
    )
    assert line == "lambda: model(torch.ones(1, 4)),"


def test_of_a_forward_in_the_middle_of_somebody_elses_code(tmp_path: Path) -> None:
    """Whoever called splice is blamed, not who called that one."""
    trainer = Around(loaded(tmp_path))
    line = blamed(
        lambda: trainer(torch.ones(1, 4)),
        "had no effect",
    )
    assert line == "return self.inner(x)"


def test_of_a_change_to_a_merged_model(tmp_path: Path) -> None:
    model = splice.PeftModel.from_pretrained(llama(), parts().write(tmp_path))
    model.merge_adapter()
    line = blamed(
        lambda: model.set_adapter("default"),
        "Unmerging",
    )
    assert line == 'lambda: model.set_adapter("default"),'


def test_a_method_that_warns_in_its_config() -> None:
    line = blamed(
        lambda: splice.LoraConfig(loftq_config={"loftq_bits": 4}),
        "loftq_config",
    )
    assert line == 'lambda: splice.LoraConfig(loftq_config={"loftq_bits": 4}),'


def test_every_warning_goes_through_one_function() -> None:
    """`warnings.warn` with a level of its own would blame a line of ours."""
    package = Path(splice.__file__).parent
    files = [path for path in package.rglob("*.py") if path.name != "errors.py"]
    assert not [str(path) for path in files if "warnings.warn(" in path.read_text(encoding="utf-8")]
