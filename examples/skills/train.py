"""Trains the base model and the three adapters of this example from fixed seeds and invented words.

Run from the repository root: `.venv/bin/python examples/skills/train.py`. It replaces `base/` and `adapters/`.
"""

import json
import random
import sys
import time
from collections.abc import Callable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from skills import (
    ADAPTERS,
    ADAPTERS_FOLDER,
    ALPHABET,
    BASE_FOLDER,
    END,
    END_ID,
    ID_OF,
    LONGEST_WORD,
    NEUTRAL_TAG,
    PADDING,
    PADDING_ID,
    SHORTEST_WORD,
    SKILLS,
    TAGS,
    Model,
    accuracy,
    load_base,
    make_prompts,
    make_word,
    silence_transformers,
    training_batch,
)
from splice import LoraConfig, TaskType, get_peft_model

BASE_NAME = "examples/skills/base"

BASE_STEPS = 3000
ADAPTER_STEPS = 300
BATCH_SIZE = 128
TRAINING_SEED = 1
CHECK_SEED = 2
CHECK_COUNT = 1000

Examples = list[tuple[str, str]]
ExampleSource = Callable[[random.Random], Examples]


def new_base() -> LlamaForCausalLM:
    """Build the untrained model: big enough to sort nine letters, small enough to keep in the repository."""
    config = LlamaConfig(
        vocab_size=len(ALPHABET),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PADDING_ID,
    )
    return LlamaForCausalLM(config)


def tagged_examples(rng: random.Random) -> Examples:
    """Invent words under every tag; sorting is the hardest skill and comes up twice as often."""
    skills = rng.choices([*SKILLS, "sort"], k=BATCH_SIZE)
    words = [make_word(rng) for _ in skills]
    return [(word + TAGS[skill], SKILLS[skill](word)) for word, skill in zip(words, skills, strict=True)]


def neutral_examples(skill: str, shortest: int = SHORTEST_WORD, longest: int = LONGEST_WORD) -> ExampleSource:
    """Make the source of examples that ask for the skill at the neutral tag, where the base would copy."""

    def examples(rng: random.Random) -> Examples:
        words = [make_word(rng, shortest, longest) for _ in range(BATCH_SIZE)]
        return [(word + NEUTRAL_TAG, SKILLS[skill](word)) for word in words]

    return examples


def fit(model: Model, source: ExampleSource, steps: int, peak_rate: float, label: str) -> list[float]:
    """Train the parameters that want gradients, with a rate that warms up and fades out; return the losses."""
    rng = random.Random(TRAINING_SEED)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, total_steps=steps, pct_start=0.1)
    losses: list[float] = []
    model.train()
    with tqdm(range(steps), desc=label, file=sys.stdout, mininterval=0.5) as progress:
        for _ in progress:
            loss = model(**training_batch(source(rng))).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            progress.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
    model.eval()
    return losses


def train_base() -> None:
    """Teach a new base all skills, one per tag, and save it."""
    base = new_base()
    fit(base, tagged_examples, BASE_STEPS, peak_rate=2e-3, label="base")
    base.save_pretrained(BASE_FOLDER)
    save_tokenizer()
    report(base, "base", "copy")


def train_adapter(skill: str) -> None:
    """Teach an adapter on the saved base to do the skill at the neutral tag, and save the adapter alone."""
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type=TaskType.CAUSAL_LM,
    )
    model = get_peft_model(load_base(), config)
    fit(model, neutral_examples(skill), ADAPTER_STEPS, peak_rate=5e-3, label=skill)
    folder = ADAPTERS_FOLDER / skill
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    report(model, skill, skill)


def save_tokenizer() -> None:
    """Write beside the base what `skills.encode` does, for programs that look for a tokenizer there.

    Unknown characters are padding. Its chat template makes the prompt of a word, and of a conversation the last word
    alone: the base has never seen two.
    """
    tokenizer = Tokenizer(models.WordLevel(ID_OF, unk_token=PADDING))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(BASE_FOLDER / "tokenizer.json"))
    # Not by transformers, which names the class in a way that its older versions do not know.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PADDING,
        "unk_token": PADDING,
        "padding_side": "left",
        "chat_template": "{{ messages[-1]['content'] }}" + NEUTRAL_TAG,
    }
    (BASE_FOLDER / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def report(model: Model, label: str, skill: str) -> None:
    """Say how often the model does the skill on prompts from a seed that training did not use."""
    share = accuracy(model, skill, make_prompts(CHECK_COUNT, CHECK_SEED))
    print(f"{label}: {share:.1%} of {CHECK_COUNT} fresh prompts answered with {skill}")


def main() -> None:
    """Train everything, the base first, since the adapters start from what it saved."""
    silence_transformers()
    torch.set_num_threads(2)
    torch.manual_seed(TRAINING_SEED)
    start = time.perf_counter()
    train_base()
    for skill in ADAPTERS:
        train_adapter(skill)
    print(f"trained in {(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
