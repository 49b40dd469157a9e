"""transformers' Trainer on models with adapters, in every mode that it has on a CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from tests.ecosystem.both import seed_of
from tests.ecosystem.comparing import same

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
LINES = [torch.randint(1, 40, (6,), generator=torch.Generator().manual_seed(i)) for i in range(16)]
DATA = [{"input_ids": line, "labels": line} for line in LINES]
shows = pytest.mark.shows
# The figures of all modes are made at once, by the first test that asks for them.
pytestmark = pytest.mark.timeout(900)


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, attn_implementation="eager", **options))


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=40, **sizes, decoder_start_token_id=0))


def filled(model: Any, key: object) -> Any:
    """With values that nothing random has touched."""
    generator = torch.Generator().manual_seed(seed_of(key))
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def lora(base: Callable[[], Any] = llama, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        fields = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
        return filled(peft.get_peft_model(base(), peft.LoraConfig(**fields)), "lora")

    return build


def other(config: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: filled(peft.get_peft_model(llama(), config()), "other")


def two() -> Any:
    """A second adapter with a name of its own, which is the one that is trained."""
    model = lora()()
    model.add_adapter("mine", peft.LoraConfig(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("mine")
    return filled(model, "mine")


def half() -> Any:
    """Adapters in float32 on a base of half precision."""
    return lora(lambda: llama().to(torch.bfloat16))()


# What is trained, and how.
MODES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (lora(), {}),
    "weight decay": (lora(lora_bias=True), {"weight_decay": 0.9}),
    "label smoothing": (lora(), {"label_smoothing_factor": 0.1}),
    "accumulated gradients": (lora(), {"gradient_accumulation_steps": 2}),
    "clipped gradients, Adafactor": (lora(), {"max_grad_norm": 0.1, "optim": "adafactor"}),
    "SGD, a schedule with warmup": (
        lora(),
        {"optim": "sgd", "lr_scheduler_type": "cosine", "warmup_steps": 2},
    ),
    "evaluation on the way": (lora(), {"eval_strategy": "steps", "eval_steps": 2}),
    "recomputed blocks, reentrant": (
        lora(),
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "recomputed blocks": (
        lora(),
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ),
    "bf16": (lora(), {"bf16": True}),
    "a base of half precision": (half, {}),
    "dropout": (lora(lora_dropout=0.3), {}),
    "a copied head": (lora(modules_to_save=["lm_head"]), {"weight_decay": 0.1}),
    "trained tokens, tied": (
        lora(lambda: llama(tie_word_embeddings=True), trainable_token_indices=[1, 3]),
        {},
    ),
    "biases of the base": (lora(lambda: llama(attention_bias=True), bias="all"), {}),
    "DoRA": (lora(use_dora=True), {}),
    "two adapters": (two, {"gradient_checkpointing": True}),
    "IA3": (
        other(lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")),
        {},
    ),
    "LoHa": (other(lambda: peft.LoHaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")), {}),
    "OFT": (other(lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"], task_type="CAUSAL_LM")), {}),
    "VeRA": (other(lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")), {}),
    "prompt tuning": (other(lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")), {}),
    "prefix tuning": (other(lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")), {}),
}
# Numbers of the two libraries are alike to this; of half precision, to what that has.
TOLERANCE = {"bf16": 2e-2, "a base of half precision": 2e-2}
# What the two draw at random is not the same: the matrices of VeRA.
OWN_NUMBERS = ("VeRA",)


def arguments(folder: Path, steps: int, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "save_steps": 2, "logging_steps": 1, "report_to": [], "use_cpu": True, "seed": 0, "disable_tqdm": True,
        "lr_scheduler_type": "constant", **options,
    }  # fmt: skip


def trainer(model: Any, folder: Path, steps: int, **options: Any) -> Trainer:
    chosen = TrainingArguments(**arguments(folder, steps, **options))
    return Trainer(model=model, args=chosen, train_dataset=DATA, eval_dataset=DATA[:4])


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Every tensor of every adapter by the names of a file."""
    return {
        f"{name}: {key}": tensor.detach().clone()
        for name in sorted(model.peft_config)
        for key, tensor in sorted(peft.get_peft_model_state_dict(model, adapter_name=name).items())
    }


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def losses(run: Trainer) -> list[tuple[float, ...]]:
    names = ("loss", "eval_loss")
    return [tuple(float(line[name]) for name in names if name in line) for line in run.state.log_history]


def each_mode(folder: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """Train for four steps."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        build, options = MODES[name]
        place = Path(folder) / name
        run = trainer(build(), place, 4, **options)
        before, flags = weights(run.model), _flags(run.model)
        run.train()
        after = weights(run.model)
        found[name] = {
            "losses": losses(run),
            "weights": after,
            "changed": not equal(before, after),
            "flags stay": _flags(run.model) == flags,
            "files": sorted(
                path.relative_to(place).as_posix()
                for path in place.rglob("*")
                if path.name.startswith("adapter_") and "checkpoint-4" in path.parts
            ),
        }
    return found


def _flags(model: Any) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=LINES[0][None]).logits


def best(folder: str) -> dict[str, Any]:
    """The best of the checkpoints is in the model at the end, which then goes on from it."""
    result: dict[str, Any] = {}
    for name, build in {"plain": lora(), "a copied head": lora(modules_to_save=["lm_head"]), "two": two}.items():
        place = Path(folder) / f"best {name}"
        # So fast that it gets worse.
        options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 3.0}
        run = trainer(build(), place, 6, **options)
        run.train()
        chosen = Path(run.state.best_model_checkpoint)
        inside = chosen / "mine" if name == "two" else chosen
        saved = peft.PeftModel.from_pretrained(llama(), str(inside), adapter_name=run.model.active_adapter)
        result[name] = {
            "which": chosen.name, "as saved": torch.equal(logits(run.model), logits(saved)), "losses": losses(run),
            "mode": run.model.training,
        }  # fmt: skip
    return result


def cards(folder: str) -> dict[str, Any]:
    place = Path(folder) / "card"
    run = trainer(lora(lambda: llama_from(Path(folder) / "base"))(), place, 2)
    run.train()
    run.save_model()
    run.create_model_card(
        license="mit", tags="mine", language="en", model_name="A model", finetuned_from="someone/base",
        tasks="text-generation", dataset="some/data",
    )  # fmt: skip
    first = (place / "README.md").read_text(encoding="utf-8")
    run.create_model_card(license="mit", tags=["mine"])
    run.save_model()
    return {"first": first, "again": (place / "README.md").read_text(encoding="utf-8")}


def llama_from(place: Path) -> Any:
    if not place.exists():
        llama().save_pretrained(place)
    return LlamaForCausalLM.from_pretrained(place, attn_implementation="eager")


def sequences(folder: str) -> dict[str, Any]:
    """Seq2SeqTrainer, whose evaluation generates."""
    model = filled(
        peft.get_peft_model(t5(), peft.LoraConfig(r=4, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")), "t5"
    )
    chosen = Seq2SeqTrainingArguments(
        **arguments(Path(folder) / "t5", 3, predict_with_generate=True, generation_max_length=5)
    )
    run = Seq2SeqTrainer(
        model=model, args=chosen, train_dataset=DATA, eval_dataset=DATA[:2],
        compute_metrics=lambda found: {"sum": float((found.predictions * (found.predictions > 0)).sum())},
    )  # fmt: skip
    run.train()
    metrics = run.evaluate()
    return {"losses": losses(run), "sum": metrics["eval_sum"], "loss": metrics["eval_loss"]}


def all_of_it(folder: str) -> dict[str, Any]:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return {
        "modes": each_mode(folder, list(MODES)),
        **{scenario.__name__: scenario(folder) for scenario in (best, cards, sequences)},
    }


@shows("transformers", "Trainer in every mode: losses, weights, files")
@pytest.mark.parametrize("name", MODES)
def test_every_mode(name: str, here: dict[str, Any], there: dict[str, Any]) -> None:
    found, expected = here["modes"][name], there["modes"][name]
    assert found["changed"]
    assert found["flags stay"]
    if name in OWN_NUMBERS:
        found, expected = ({k: v for k, v in f.items() if k not in ("losses", "weights")} for f in (found, expected))
    same(found, expected, TOLERANCE.get(name, 1e-4))


@shows("transformers", "Trainer, resumed: to the bit what it is unbroken")
@pytest.mark.parametrize("name", MODES)
def test_resumed(name: str, here: dict[str, Any], place: Path) -> None:
    """Two steps, a stop, and the other two in another Trainer on another model."""
    build, options = MODES[name]
    run = trainer(build(), place / "resumed" / name, 4, **options)
    flags = _flags(run.model)
    run.train(resume_from_checkpoint=str(place / "here" / name / "checkpoint-2"))
    assert equal(weights(run.model), here["modes"][name]["weights"])
    assert _flags(run.model) == flags
    assert losses(run)[-2:] == here["modes"][name]["losses"][-2:]


def test_what_decays_is_smaller(here: dict[str, Any]) -> None:
    """And it is the adapter that decays, in both: else the figures above would be those without."""
    norms = {
        name: sum(float(t.norm()) for key, t in here["modes"][name]["weights"].items() if key.endswith("weight"))
        for name in ("plain", "weight decay")
    }
    assert norms["weight decay"] < norms["plain"] * 0.99


@pytest.mark.parametrize("name", ["recomputed blocks, reentrant", "recomputed blocks"])
def test_recomputing_changes_nothing(name: str, here: dict[str, Any]) -> None:
    same(here["modes"][name]["weights"], here["modes"]["plain"]["weights"], 1e-6)


@shows("transformers", "Trainer: the best checkpoint at the end")
@pytest.mark.parametrize("name", ["plain", "a copied head", "two"])
def test_the_best_checkpoint_at_the_end(name: str, here: dict[str, Any], there: dict[str, Any]) -> None:
    found, expected = here["best"][name], there["best"][name]
    assert found["as saved"]
    if name == "two":  # the Trainer asks for the folder of the other adapter: see docs/differences.md
        assert not expected.pop("as saved") and found.pop("as saved")
    same(found, expected, 1e-3)


@shows("transformers", "Trainer: `create_model_card`")
@pytest.mark.parametrize("which", ["first", "again"])
def test_cards(which: str, here: dict[str, Any], there: dict[str, Any], place: Path) -> None:
    """As the reference's, but that tags and base of its author stay, and no folder is named: see docs/differences.md."""
    found, expected = (
        {*figures["cards"][which].replace(str(place / name), "").splitlines()}
        for name, figures in (("here", here), ("reference", there))
    )
    assert {"license: mit", "library_name: peft", "- lora", "- mine", "- PEFT 0.21.2"} <= found
    base = {"base_model: someone/base"} if which == "first" else set()
    assert found - expected <= {"- mine", "- generated_from_trainer", *base}
    assert base <= found
    assert expected - found <= {"base_model: /base", "- base_model:adapter:/base"}


@shows("transformers", "Seq2SeqTrainer with `predict_with_generate`")
def test_sequences(here: dict[str, Any], there: dict[str, Any]) -> None:
    same(here["sequences"], there["sequences"], 1e-4)


@shows("transformers", "Trainer with `torch_compile=True`")
@pytest.mark.slow
def test_compiled(tmp_path: Path) -> None:
    plain = trainer(lora()(), tmp_path / "plain", 3)
    plain.train()
    run = trainer(lora()(), tmp_path / "compiled", 3, torch_compile=True)
    run.train()
    run.save_model()
    same(losses(run), losses(plain), 1e-4)
    same(weights(run.model), weights(plain.model), 1e-3)
    names = sorted(path.name for path in (tmp_path / "compiled").glob("adapter*"))
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
