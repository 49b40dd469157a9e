"""Run by tests/test_shim.py in a process where the name `peft` is splice: what people's scripts do, as they write it.

Usage: python by_name_peft.py SCENARIO FOLDER. The folder holds a base model and adapters; the results go to result.json.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

warnings.simplefilter("ignore")
torch.set_num_threads(1)
FOLDER = Path(sys.argv[2])
LINES = [torch.randint(1, 40, (6,), generator=torch.Generator().manual_seed(i)) for i in range(16)]
DATA = [{"input_ids": line, "labels": line} for line in LINES]


def base(**options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER / "base", **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=LINES[0][None]).logits


def trainer(model: Any, name: str, steps: int, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(FOLDER / name), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=2,
        logging_steps=100, report_to=[], use_cpu=True, seed=0, disable_tqdm=True, **options,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=DATA, eval_dataset=DATA[:4])


def weights(model: Any, name: str = "default") -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model, adapter_name=name).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def resumed(build: Any, name: str, adapter: str, **options: Any) -> dict[str, Any]:
    """Whether 4 steps, a stop and 4 more give the weights of 8 steps without a stop."""
    first = trainer(build(), name, 4, lr_scheduler_type="constant", **options)
    first.train()
    second = trainer(build(), name, 8, lr_scheduler_type="constant", **options)
    flags = {key: p.requires_grad for key, p in second.model.named_parameters()}
    second.train(resume_from_checkpoint=True)
    straight = trainer(build(), f"{name}_straight", 8, lr_scheduler_type="constant", **options)
    straight.train()
    files = sorted(
        p.relative_to(FOLDER / name / "checkpoint-4").as_posix() for p in (FOLDER / name / "checkpoint-4").rglob("*")
    )
    return {
        "identical": same(weights(second.model, adapter), weights(straight.model, adapter)),
        "trained": not same(weights(second.model, adapter), weights(build(), adapter)),
        "flags": flags == {key: p.requires_grad for key, p in second.model.named_parameters()},
        "files": [f for f in files if f.endswith((".safetensors", ".bin", "adapter_config.json"))],
    }


def usage() -> dict[str, Any]:
    model = base(device_map="auto", dtype=torch.float16)
    model = PeftModel.from_pretrained(model, str(FOLDER / "adapter"), is_trainable=False)
    model.eval()
    tokens = model.generate(input_ids=LINES[0][None], max_new_tokens=3, do_sample=False)
    straight = logits(PeftModel.from_pretrained(base(), str(FOLDER / "adapter")))
    hub = logits(
        PeftModel.from_pretrained(base(), "someone/adapter", cache_dir=str(FOLDER / "hub"), local_files_only=True)
    )
    return {"tokens": list(tokens.shape), "hub": torch.equal(straight, hub), "logits": straight.flatten().tolist()}


def resume() -> dict[str, Any]:
    def build() -> Any:
        return PeftModel.from_pretrained(base(), str(FOLDER / "adapter"), is_trainable=True)

    return resumed(build, "one", "default")


def resume_two() -> dict[str, Any]:
    """Two adapters, of which the one with a name of its own is trained, with recomputed blocks."""

    def build() -> Any:
        model = PeftModel.from_pretrained(base(), str(FOLDER / "adapter"))
        model.load_adapter(str(FOLDER / "adapter"), adapter_name="mine", is_trainable=True)
        model.set_adapter("mine")
        return model.train()

    found = resumed(build, "two", "mine", gradient_checkpointing=True)
    fresh = build()
    return {**found, "other": same(weights(fresh, "default"), weights(build(), "default"))}


def best() -> dict[str, Any]:
    """The best of the checkpoints is in the model in the end."""
    model = PeftModel.from_pretrained(base(), str(FOLDER / "adapter"), is_trainable=True)
    run = trainer(model, "best", 6, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2)
    run.train()
    saved = PeftModel.from_pretrained(base(), run.state.best_model_checkpoint)
    run.save_model()
    run.create_model_card(license="mit", tags="mine")
    return {
        "card": (FOLDER / "best" / "README.md").read_text(encoding="utf-8"),
        "best": same(weights(run.model), weights(saved)),
        "equal": torch.equal(logits(run.model.eval()), logits(saved)),
    }


def layers() -> dict[str, Any]:
    """What transformers and diffusers do to a model that carries adapters itself, layer by layer."""
    from peft import PromptTuningConfig, TaskType, inject_adapter_in_model
    from peft.functional import delete_adapter
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    def each(method: str, *args: Any, **options: Any) -> None:
        for module in model.modules():
            if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
                getattr(module, method)(*args, **options)

    model = base()
    before = logits(model)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    assert inject_adapter_in_model(config, model, "a") is model
    with_a = logits(model)
    names = list(get_peft_model_state_dict(model, adapter_name="a"))
    found: dict[str, Any] = {
        "tuned": sum(isinstance(m, BaseTunerLayer) for m in model.modules()),
        "lora": sum(isinstance(m, LoraLayer) for m in model.modules()),
        "whole": sum(isinstance(m, ModulesToSaveWrapper) for m in model.modules()),
        "active": [m.active_adapter for m in model.modules() if isinstance(m, BaseTunerLayer)],
        "bare_names": "lm_head.weight" in names and all(not name.startswith("base_model") for name in names),
        "changed": not torch.equal(before, with_a),
    }
    each("enable_adapters", enabled=False)
    found["disabled"] = torch.equal(logits(model), before)
    each("enable_adapters", enabled=True)
    found["enabled"] = torch.equal(logits(model), with_a)
    named = {"model.layers.1.self_attn.v_proj.lora_A.weight": None}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other = LoraConfig(target_modules=["v_proj"], init_lora_weights=False)
        inject_adapter_in_model(other, model, "b", state_dict=named)
    found["told"] = [str(w.message) for w in caught if w.category is RuntimeWarning]
    found["second"] = model.model.layers[1].self_attn.v_proj.active_adapter
    each("set_adapter", "a")
    found["back"] = torch.equal(logits(model), with_a)
    delete_adapter(model, adapter_name="b", prefix="lora_")
    model.peft_config.pop("b")
    found["kept"] = torch.equal(logits(model), with_a)
    delete_adapter(model, adapter_name="a", prefix="lora_")
    found["gone"] = torch.equal(logits(model), before)
    # Its network has a `set_adapter` of its own, which calls that of every layer that it takes for a tuner's.
    prompted = get_peft_model(base(), PromptTuningConfig(num_virtual_tokens=2, task_type=TaskType.CAUSAL_LM))
    found["prompted"] = [name for name, m in prompted.named_modules() if isinstance(m, BaseTunerLayer)]
    return found


def mixed() -> dict[str, Any]:
    from peft import LoHaConfig, PeftMixedModel

    model = get_peft_model(base(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False), mixed=True)
    model.add_adapter("loha", LoHaConfig(target_modules=["q_proj", "v_proj"], init_weights=False))
    lora = logits(model)
    model.set_adapter(["default", "loha"])
    both = logits(model)
    with model.disable_adapter():
        plain = logits(model)
    merged = model.merge_and_unload()
    return {
        "type": isinstance(model, PeftMixedModel),
        "differ": not torch.equal(lora, both),
        "plain": torch.equal(plain, logits(base())),
        "merged": torch.allclose(logits(merged), both, atol=1e-4),
    }


if __name__ == "__main__":
    result = globals()[sys.argv[1]]()
    result["version"] = peft.__version__
    result["from"] = PeftModel.__module__
    (FOLDER / "result.json").write_text(json.dumps(result))
