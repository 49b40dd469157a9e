"""Loads one base model and three LoRA adapters, shows what each adapter does, and trains one of them further.

Run from the repository root: `.venv/bin/python examples/skills/demo.py`. Ends with an error when an adapter does not
do its skill or when training does not lower the loss.
"""

import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import ParamSpec, TypeVar

import torch
from train import fit, neutral_examples

from skills import ADAPTERS, ADAPTERS_FOLDER, accuracy, answer, load_base, make_prompts, silence_transformers
from splice import PeftModel

SHOWN_PROMPTS = ["hello>", "python>", "banana>", "zebra>", "vexolatu>"]

FRESH_SEED = 3
FRESH_COUNT = 200
REQUIRED_ACCURACY = 0.95

MORE_STEPS = 60
MORE_LENGTHS = (10, 12)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def timed(label: str, call: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    """Make the call and print how long it took."""
    start = time.perf_counter()
    result = call(*args, **kwargs)
    print(f"  {label}: {(time.perf_counter() - start) * 1000:.1f} ms")
    return result


def load_all() -> PeftModel:
    """Load the base and all adapters onto it: the first one wraps the base, the others join it."""
    base = timed("base", load_base)
    first, *others = ADAPTERS
    model = timed(first, PeftModel.from_pretrained, base, ADAPTERS_FOLDER / first, adapter_name=first)
    print(f"    {model.load_report}")
    for name in others:
        timed(name, model.load_adapter, ADAPTERS_FOLDER / name, adapter_name=name)
        print(f"    {model.load_report}")
    return model


def answers_by_column(model: PeftModel) -> dict[str, list[str]]:
    """Answer the shown prompts with the adapters off, then with each adapter in turn."""
    columns = {"prompt": SHOWN_PROMPTS}
    with model.disable_adapter():
        columns["base"] = answer(model, SHOWN_PROMPTS)
    for name in ADAPTERS:
        timed(f"set_adapter({name!r})", model.set_adapter, name)
        columns[name] = answer(model, SHOWN_PROMPTS)
    return columns


def print_table(columns: dict[str, list[str]]) -> None:
    """Print the columns side by side, with rich where it is installed."""
    rows = list(zip(*columns.values(), strict=True))
    if find_spec("rich"):
        from rich.console import Console
        from rich.table import Table

        table = Table(*columns)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    else:
        for row in [tuple(columns), *rows]:
            print("".join(cell.ljust(12) for cell in row).rstrip())


def check_skills(model: PeftModel) -> None:
    """Measure every adapter on fresh prompts, and end the program if one falls short."""
    prompts = make_prompts(FRESH_COUNT, FRESH_SEED)
    with model.disable_adapter():
        print(f"  base copies: {accuracy(model, 'copy', prompts):.1%}")
    failures = []
    for name in ADAPTERS:
        model.set_adapter(name)
        share = accuracy(model, name, prompts)
        print(f"  {name}: {share:.1%}")
        if share < REQUIRED_ACCURACY:
            failures.append(f"{name} answers {share:.1%} of the prompts correctly, less than {REQUIRED_ACCURACY:.0%}")
    if failures:
        sys.exit("error: " + "; ".join(failures))


def train_further(skill: str) -> None:
    """Load an adapter for training and teach it words longer than it has seen, and end the program if it does not."""
    model = PeftModel.from_pretrained(load_base(), ADAPTERS_FOLDER / skill, is_trainable=True)
    prompts = make_prompts(FRESH_COUNT, FRESH_SEED, *MORE_LENGTHS)
    before = accuracy(model, skill, prompts)
    losses = fit(model, neutral_examples(skill, *MORE_LENGTHS), MORE_STEPS, peak_rate=2e-3, label=skill)
    print(f"  loss: {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"  accuracy: {before:.1%} -> {accuracy(model, skill, prompts):.1%}")
    if losses[-1] >= losses[0]:
        sys.exit(f"error: training {skill} further did not lower the loss")


def main() -> None:
    """Show the loading, the skills, their accuracy, and further training, in this order."""
    silence_transformers()
    torch.set_num_threads(1)

    print("Load one base and three adapters")
    model = load_all()
    print("\nSwitch between them")
    columns = answers_by_column(model)
    print()
    print_table(columns)
    print(f"\nAccuracy on {FRESH_COUNT} fresh prompts")
    check_skills(model)
    shortest, longest = MORE_LENGTHS
    print(f"\nTrain the reverse adapter further, on words of {shortest} to {longest} letters")
    train_further("reverse")


if __name__ == "__main__":
    main()
