"""Short trainings with trl's trainers: the same under both libraries, for `test_trl.py` to compare."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from tests.ecosystem.both import seed_of

disable_progress_bars()

# What a training is judged by: numbers that it logged, tensors by name, whatever else.
Found = dict[str, Any]

_WORDS = re.findall(r"\w+", "the a cat dog sat ran on under mat tree red blue was not very happy and then slept again")
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
_LOGGED = ("loss", "reward", "kl", "rewards/chosen", "rewards/rejected", "mean_token_accuracy", "entropy", "eval_loss")


def tokenizer(*more: str) -> PreTrainedTokenizerFast:
    words = ["<unk>", "<pad>", "<s>", "</s>", "user", "assistant", *_WORDS]
    tokens = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = Whitespace()
    tokens.add_special_tokens(["<unk>", "<pad>", "<s>", "</s>"])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokens, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    if more:
        made.add_special_tokens({"additional_special_tokens": list(more)})
    made.chat_template = _TEMPLATE
    return made


def base(cls: type[nn.Module] = LlamaForCausalLM, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        **fields,
    )
    return cls(config)


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"], **fields})


def trained_model(folder: str, config: PeftConfig) -> PeftModel:
    """A model with an adapter that was saved and loaded again, for further training."""
    fill(get_peft_model(base(), config)).save_pretrained(folder)
    return PeftModel.from_pretrained(base(), folder, is_trainable=True)


def fill(model: Any) -> Any:
    """Give every tensor that is trained values that depend on its name alone: the libraries draw theirs differently."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.manual_seed(seed_of(name))
            parameter.data.copy_(0.1 * torch.randn(parameter.shape))
    return model


def sentences() -> Dataset:
    return Dataset.from_dict(
        {"text": ["the cat sat on the mat", "a dog ran under the tree", "the red dog was not happy"] * 4}
    )


def pairs() -> Dataset:
    return Dataset.from_dict(
        {
            "prompt": ["the cat", "a dog", "the red dog"] * 4,
            # Prompt and completion are joined as they stand.
            "chosen": [" sat on the mat", " ran under the tree", " was very happy"] * 4,
            "rejected": [" ran and then slept", " was blue again", " sat not on a tree"] * 4,
        }
    )


def judged() -> Dataset:
    rows = pairs()
    return Dataset.from_dict({"prompt": rows["prompt"], "completion": rows["chosen"], "label": [True, False, True] * 4})


def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": ["the cat", "a dog", "the red dog"] * 4})


def options(folder: str, **more: Any) -> dict[str, Any]:
    common = {
        "output_dir": folder,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 7,
    }
    return {**common, **more}


def trained(trainer: Trainer, resume: str | None = None) -> Found:
    """Train, and tell what was logged and the trained tensors."""
    fill(trainer.model)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train(resume_from_checkpoint=resume)
    after = dict(trainer.model.named_parameters())
    logs = [{k: v for k, v in line.items() if k in _LOGGED} for line in trainer.state.log_history]
    return {
        "logged": [line for line in logs if line],
        "tensors": {n: p.detach().clone() for n, p in after.items() if p.requires_grad},
        "moved": sorted(n for n, p in after.items() if p.requires_grad and not torch.equal(p, before[n])),
        # Names of frozen tensors differ; there is none that may move.
        "frozen moved": [n for n, p in after.items() if not p.requires_grad and not torch.equal(p, before[n])],
        "active": list(trainer.model.active_adapters),
    }


def sft(
    folder: str, config: PeftConfig | None = None, model: Any = None, data: Dataset | None = None, **more: Any
) -> SFTTrainer:
    return SFTTrainer(
        base() if model is None else model,
        SFTConfig(**options(folder, max_length=32, **more)),
        train_dataset=sentences() if data is None else data,
        eval_dataset=sentences().select(range(2)),
        processing_class=tokenizer(),
        peft_config=config,
    )


def sft_new(folder: str) -> Found:
    return trained(sft(folder, lora()))


def sft_loaded(folder: str) -> Found:
    return trained(sft(folder, model=trained_model(folder, lora())))


def sft_head(folder: str) -> Found:
    """A copied head: the loss multiplies with `lm_head.weight`, which has to be the copy's."""
    trainer = sft(folder, lora(modules_to_save=["lm_head"]))
    found = trained(trainer)
    found["logged"].append(trainer.evaluate())
    return found


def sft_loaded_head(folder: str) -> Found:
    return trained(sft(folder, model=trained_model(folder, lora(modules_to_save=["lm_head"]))))


def sft_new_tokens(folder: str) -> Found:
    """A chat template with tokens of its own, which trl adds to the vocabulary and trains."""
    tokenizer("<think>", "<answer>").save_pretrained(f"{folder}/template")
    talk = [{"role": "user", "content": "the cat sat"}, {"role": "assistant", "content": "<think> a dog ran <answer>"}]
    config = lora()
    trainer = SFTTrainer(
        base(),
        SFTConfig(**options(folder, max_length=32, chat_template_path=f"{folder}/template")),
        train_dataset=Dataset.from_dict({"messages": [talk] * 8}),
        processing_class=tokenizer(),
        peft_config=config,
    )
    found = trained(trainer)
    found["config"] = (config.trainable_token_indices, config.modules_to_save)
    trainer.save_model(f"{folder}/saved")
    again = PeftModel.from_pretrained(_resized(trainer.model.get_base_model().config.vocab_size), f"{folder}/saved")
    ids = torch.tensor([[2, 32, 7, 33]])
    with torch.no_grad():
        trainer.model.eval()
        found["logits"] = trainer.model(input_ids=ids).logits
        found["loaded logits"] = again(input_ids=ids).logits
    return found


def _resized(size: int) -> Any:
    model = base()
    torch.manual_seed(1)
    model.resize_token_embeddings(size)
    return model


def sft_prompt(folder: str) -> Found:
    """trl exchanges the network's forward after the prompt was put around it."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = sft(folder, config)
    found = trained(trainer)
    found["logged"].append(trainer.evaluate())
    return {**found, **generated(trainer.model)}


def sft_prefix(folder: str) -> Found:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = sft(folder, config, gradient_checkpointing=False)
    found = trained(trainer)
    found["logged"].append(trainer.evaluate())
    return found


def sft_loaded_prompt(folder: str) -> Found:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return trained(sft(folder, model=trained_model(folder, config)))


def generated(model: Any) -> Found:
    model.eval()
    ids = torch.tensor([[2, 6, 8]])
    with_mask = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {
        "generated": model.generate(**with_mask, max_new_tokens=5, do_sample=False, pad_token_id=1, use_cache=False)
    }


def _sft_with(folder: str, optimizer: Callable[[Any], torch.optim.Optimizer]) -> Found:
    model = trained_model(folder, lora(modules_to_save=["lm_head"]))
    arguments = SFTConfig(**options(folder, max_length=32, lr_scheduler_type="linear", max_grad_norm=0.5))
    data, words = sentences(), tokenizer()
    return trained(
        SFTTrainer(model, arguments, train_dataset=data, processing_class=words, optimizers=(optimizer(model), None))
    )


def sft_loraplus(folder: str) -> Found:
    return _sft_with(
        folder,
        lambda model: create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.1
        ),
    )


def sft_lorafa(folder: str) -> Found:
    return _sft_with(folder, lambda model: create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2))


def sft_riemannian(folder: str) -> Found:
    return _sft_with(folder, lambda model: create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-2))


def sft_resumed(folder: str) -> Found:
    """The second half alone, from the checkpoint of a training that ran to its end: `whole` is that one."""
    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "weight_decay": 0.1}
    whole = trained(sft(folder, lora(modules_to_save=["lm_head"]), **config))
    resumed = trained(sft(folder, lora(modules_to_save=["lm_head"]), **config), resume=f"{folder}/checkpoint-2")
    return {"tensors": resumed["tensors"], "whole": whole["tensors"], "logged": whole["logged"]}


def _dpo(folder: str, model: Any, config: PeftConfig | None) -> DPOTrainer:
    arguments = DPOConfig(**options(folder, max_length=32))
    return DPOTrainer(model, args=arguments, train_dataset=pairs(), processing_class=tokenizer(), peft_config=config)


def dpo_new(folder: str) -> Found:
    return trained(_dpo(folder, base(), lora()))


def dpo_loaded(folder: str) -> Found:
    """Of a loaded adapter trl makes a frozen copy, "ref", by the names of its tensors."""
    trainer = _dpo(folder, trained_model(folder, lora(modules_to_save=["lm_head"])), None)
    return with_reference(trainer)


def with_reference(trainer: Trainer) -> Found:
    model = trainer.model
    names = [n for n, _ in model.named_parameters() if ".ref." in n]
    copied = all(
        torch.equal(model.get_parameter(n), model.get_parameter(n.replace(".ref.", ".default."))) for n in names
    )
    before = {n: model.get_parameter(n).detach().clone() for n in names}
    found = trained(trainer)
    found["reference"] = {"names": sorted(names), "copied": copied, "adapters": list(model.peft_config)}
    found["reference"]["stayed"] = all(torch.equal(model.get_parameter(n), tensor) for n, tensor in before.items())
    return found


def _kto(folder: str, model: Any, config: PeftConfig | None) -> KTOTrainer:
    arguments = KTOConfig(**options(folder, max_length=32))
    return KTOTrainer(model, args=arguments, train_dataset=judged(), processing_class=tokenizer(), peft_config=config)


def kto_new(folder: str) -> Found:
    return trained(_kto(folder, base(), lora()))


def kto_loaded(folder: str) -> Found:
    return with_reference(_kto(folder, trained_model(folder, lora()), None))


def reward_new(folder: str) -> Found:
    config = lora(task_type="SEQ_CLS")
    trainer = RewardTrainer(
        base(LlamaForSequenceClassification, num_labels=1),
        RewardConfig(**options(folder, max_length=32)),
        train_dataset=pairs(),
        processing_class=tokenizer(),
        peft_config=config,
    )
    return {**trained(trainer), "saved whole": sorted(set(config.modules_to_save))}


def _more_words(completions: Iterable[str], **_: object) -> list[float]:
    return [float(len(set(completion.split()))) for completion in completions]


def _online(cls: type[Trainer], arguments: Any, model: Any, config: PeftConfig | None) -> Trainer:
    return cls(
        model,
        reward_funcs=_more_words,
        args=arguments,
        train_dataset=prompts(),
        processing_class=tokenizer(),
        peft_config=config,
    )


def _sampling(folder: str, **more: Any) -> dict[str, Any]:
    return options(folder, max_completion_length=6, num_generations=2, beta=0.1, **more)


def grpo_new(folder: str) -> Found:
    return trained(_online(GRPOTrainer, GRPOConfig(**_sampling(folder)), base(), lora()))


def grpo_loaded(folder: str) -> Found:
    model = trained_model(folder, lora(modules_to_save=["lm_head"]))
    return with_reference(_online(GRPOTrainer, GRPOConfig(**_sampling(folder)), model, None))


def grpo_float32_head(folder: str) -> Found:
    """trl gives the head a forward of its own, which reads the weight that the layer shows."""
    arguments = GRPOConfig(**_sampling(folder, cast_lm_head_to_fp32=True))
    return trained(_online(GRPOTrainer, arguments, base(), lora(modules_to_save=["lm_head"])))


def grpo_prompt(folder: str) -> Found:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return trained(_online(GRPOTrainer, GRPOConfig(**_sampling(folder)), base(), config))


def dpo_prefix(folder: str) -> Found:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    arguments = DPOConfig(**options(folder, max_length=32, gradient_checkpointing=False))
    return trained(
        DPOTrainer(base(), args=arguments, train_dataset=pairs(), processing_class=tokenizer(), peft_config=config)
    )


def rloo_new(folder: str) -> Found:
    return trained(_online(RLOOTrainer, RLOOConfig(**_sampling(folder)), base(), lora()))


def rloo_loaded(folder: str) -> Found:
    return with_reference(_online(RLOOTrainer, RLOOConfig(**_sampling(folder)), trained_model(folder, lora()), None))


def cpo_new(folder: str) -> Found:
    arguments = CPOConfig(**options(folder, max_length=32))
    return trained(
        CPOTrainer(base(), args=arguments, train_dataset=pairs(), processing_class=tokenizer(), peft_config=lora())
    )


def orpo_new(folder: str) -> Found:
    arguments = ORPOConfig(**options(folder, max_length=32))
    return trained(
        ORPOTrainer(base(), args=arguments, train_dataset=pairs(), processing_class=tokenizer(), peft_config=lora())
    )


def sent_to_a_server(_: str) -> Found:
    """What trl's vLLM client does to send merged weights: by the adapters' prefix and the words in their names."""
    model = fill(get_peft_model(base(), lora(modules_to_save=["lm_head"], use_dora=True)))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sent = {}
    model.merge_adapter()
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if model.prefix in name or "original_module" in name:
            continue
        sent[name.replace("modules_to_save.default.", "")] = parameter.data.clone()
    model.unmerge_adapter()
    after = dict(model.named_parameters())
    back = all(torch.allclose(after[name], tensor, atol=1e-6) for name, tensor in before.items())
    return {"tensors": sent, "back": back}


RUNS: dict[str, Callable[[str], Found]] = {
    run.__name__: run
    for run in (
        sft_new,
        sft_loaded,
        sft_head,
        sft_loaded_head,
        sft_new_tokens,
        sft_prompt,
        sft_prefix,
        sft_loaded_prompt,
        sft_loraplus,
        sft_lorafa,
        sft_riemannian,
        sft_resumed,
        dpo_new,
        dpo_loaded,
        kto_new,
        kto_loaded,
        reward_new,
        grpo_new,
        grpo_loaded,
        grpo_float32_head,
        grpo_prompt,
        dpo_prefix,
        rloo_new,
        rloo_loaded,
        cpo_new,
        orpo_new,
        sent_to_a_server,
    )
}


def found_by(names: list[str]) -> dict[str, Found]:
    """What these trainings end with, each in a folder of its own."""
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory(prefix="trl-") as folder:
            found[name] = RUNS[name](str(Path(folder)))
    return found
