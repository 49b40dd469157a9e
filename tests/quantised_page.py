"""Writes docs/quantisation.md: `python -m tests.quantised_page`. Its table is what `tests/test_quantised.py` did just now.

Also measures how far the outputs of an adapter that was trained on a base of 4 bits are from those that it has elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import splice
from tests.quantised import BACKENDS, WAYS, WIDE
from tests.samples import plain_cases

PAGE = Path(__file__).parents[1] / "docs" / "quantisation.md"
TESTS = {
    "forward": "test_it_computes_what_it_does_on_the_dense_base",
    "train": "test_it_is_trained_as_on_the_dense_base",
    "merge": "test_it_is_merged_and_taken_out_again",
}
# Written from what the libraries say of their formats; nothing of them could be run.
NOT_RUN = ("GPTQ", "AWQ", "AQLM", "EETQ", "INC", "FP8")
_WORDS = {"passed": "yes", "failed": "**no**", "skipped": "-"}


class Outcomes:
    """What became of each test, by its function and its parameters."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            name, _, parameters = report.nodeid.rpartition("::")[2].partition("[")
            self.found[name, parameters.rstrip("]")] = report.outcome


def rows(found: Mapping[tuple[str, str], str]) -> list[str]:
    """A line for each method: on each way to quantise whether the forward, training and merging pass."""
    lines = []
    for case in plain_cases(WIDE):
        cells = []
        for way in BACKENDS:
            outcomes = [_of(found, test, str(way), str(case)) for test in TESTS.values()]
            cells.append(", ".join(outcomes))
        lines.append(f"| {case.method.name.value} | {' | '.join(cells)} |")
    return lines


def _of(found: Mapping[tuple[str, str], str], test: str, way: str, case: str) -> str:
    both = (f"{way}-{case}", f"{case}-{way}")
    return next((_WORDS[found[test, ids]] for ids in both if (test, ids) in found), "-")


def _base() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).eval()


def _quantised(network: nn.Module) -> Any:
    way = WAYS[0]
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                setattr(parent, name, way.quantised(child))
    return network.eval()


def gaps() -> list[tuple[str, float]]:
    """Where an adapter that was trained on 4 bits is used -> how far its logits are from those it had there, by norms."""
    torch.manual_seed(1)
    ids = torch.randint(0, 256, (8, 24))
    config = splice.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = splice.get_peft_model(_quantised(_base()), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()
    state = splice.get_peft_model_state_dict(model)

    def on(network: nn.Module) -> Any:
        fresh = splice.get_peft_model(network, config).eval()
        splice.set_peft_model_state_dict(fresh, state)
        return fresh

    def logits(network: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = network(input_ids=ids).logits
        return found

    trained = logits(model)
    places = {
        "beside the base of 4 bits, as trained": model,
        "merged into a dense copy of that base (`merge_and_unload(dequantize=True)`)": on(
            _quantised(_base())
        ).merge_and_unload(dequantize=True),
        "merged into the 4 bits (`merge_and_unload()`)": on(_quantised(_base())).merge_and_unload(),
        "beside the base in full precision": on(_base()),
        "merged into the base in full precision": on(_base()).merge_and_unload(),
    }
    return [(what, float((logits(place) - trained).norm() / trained.norm())) for what, place in places.items()]


def page(found: Mapping[tuple[str, str], str]) -> str:
    """The whole page."""
    heads = [f"{way.backend} ({way}, {way.library} {way.version})" for way in BACKENDS]
    measured = "\n".join(f"| {what} | {gap:.1%} |" for what, gap in gaps())
    return f"""# Quantised bases

Written by `python -m tests.quantised_page`. Every method on every way to quantise that runs on a CPU: forward, training and
merging, each beside the same adapter on the dense weights that the codes stand for (`tests/test_quantised.py`). "-" is what a
method does not do, or is refused in words:

- **PSOFT**. A checkpoint holds how the singular directions of a weight are turned into one another, and not the directions.
  They are worked out of the weight again, and of one that was quantised since they come with other signs and in another
  order. The reference refuses codes too, so no such adapter was trained on them.
- **FRoD**. The directions that all layers of a kind have in common are worked out of their weights; the reference fails on
  codes as well, so no such adapter was trained on them.
- **AdaMSS**, of adapters that were made on the full weight: which row is in which group is worked out of the weight again,
  and codes give other groups. One that is made on codes is trained, saved and loaded on the same codes, like every other
  method (`test_a_new_one_is_loaded_onto_the_same_codes`).

| method | {" | ".join(heads)} |
|---|{"---|" * len(heads)}
{chr(10).join(rows(found))}

**Not run**, for want of the library, a processor that it works on, or both: {", ".join(NOT_RUN)}. They are
read, where they can be, as their libraries describe their formats; nothing was shown.

## Merging

A merge into a quantised layer takes the weight apart, adds the update and quantises the sum with the layer's own settings.
`model.base_model.merge_report` has the largest and the relative error of every layer, and a warning says so.
`unmerge_adapter()` gives back the very codes. `merge_and_unload(dequantize=True)` gives a dense model. Where a layer cannot
be written the merge is refused before anything has changed.

## Which base to merge a QLoRA adapter into

An adapter that is trained beside 4 bits makes up for what they lost. LoRA of rank 8 on all linear layers of a Llama of 4
blocks with random weights, trained for 60 steps on nf4, and how far its logits are from those it had there, by their norms:

| where it is used | apart |
|---|---|
{measured}

So merge into a dense copy of the base that it was trained on. `splice.base_gap(model, batch, other)` measures the same for
your own model and another form of its base.
"""


def main() -> int:
    outcomes = Outcomes()
    chosen = " or ".join(TESTS.values())
    code = pytest.main(["-q", "-k", chosen, "-p", "no:cacheprovider", "tests/test_quantised.py"], plugins=[outcomes])
    if code == 0:
        PAGE.write_text(page(outcomes.found), encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
