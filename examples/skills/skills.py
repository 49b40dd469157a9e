"""The word skills, the character tokenizer, the loading and the answering that `train.py` and `demo.py` share.

A prompt is a lower-case word and a tag character, such as `hello>`; the answer ends at a full stop. The base model
is trained on one tag per skill. The neutral tag `>` only copies the word, so whatever else comes out at `>` is the
work of an adapter.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from string import ascii_letters, ascii_lowercase
from typing import cast

import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.utils import logging

from splice import PeftModel

BASE_FOLDER = Path(__file__).parent / "base"
ADAPTERS_FOLDER = Path(__file__).parent / "adapters"

NEUTRAL_TAG = ">"
TAGS = {"copy": NEUTRAL_TAG, "reverse": "<", "sort": "#", "upper": "^"}

END = "."
PADDING = "_"
ALPHABET = PADDING + END + "".join(TAGS.values()) + ascii_letters
ID_OF = {character: index for index, character in enumerate(ALPHABET)}
PADDING_ID = ID_OF[PADDING]
END_ID = ID_OF[END]
IGNORED_LABEL = -100

VOWELS = "aeiou"
VOWEL_CHANCE = 0.6
SHORTEST_WORD = 3
LONGEST_WORD = 9
LONGEST_ANSWER = 24

Model = LlamaForCausalLM | PeftModel
Skill = Callable[[str], str]


def copy(word: str) -> str:
    """Give the word back: what the base does with a neutral prompt."""
    return word


def reverse(word: str) -> str:
    """Write the word backwards."""
    return word[::-1]


def sort(word: str) -> str:
    """Put the letters of the word in alphabetical order."""
    return "".join(sorted(word))


def upper(word: str) -> str:
    """Write the word in capitals."""
    return word.upper()


SKILLS: dict[str, Skill] = {"copy": copy, "reverse": reverse, "sort": sort, "upper": upper}
ADAPTERS = ("reverse", "sort", "upper")


def encode(text: str) -> list[int]:
    """Turn each character into its id."""
    return [ID_OF[character] for character in text]


def decode(ids: Sequence[int]) -> str:
    """Turn ids back into text, up to the first end character."""
    return "".join(ALPHABET[index] for index in ids).partition(END)[0]


def make_word(rng: random.Random, shortest: int = SHORTEST_WORD, longest: int = LONGEST_WORD) -> str:
    """Invent a word; a vowel often follows a consonant, so that double letters and clusters occur but words read."""
    length = rng.randint(shortest, longest)
    word = ""
    while len(word) < length:
        after_consonant = word[-1:] not in VOWELS
        word += rng.choice(VOWELS if after_consonant and rng.random() < VOWEL_CHANCE else ascii_lowercase)
    return word


def make_prompts(count: int, seed: int, shortest: int = SHORTEST_WORD, longest: int = LONGEST_WORD) -> list[str]:
    """Invent neutral prompts, always the same ones for the same seed."""
    rng = random.Random(seed)
    return [make_word(rng, shortest, longest) + NEUTRAL_TAG for _ in range(count)]


def training_batch(examples: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Pack (prompt, answer) pairs into model inputs whose labels cover the answers alone.

    Padding stands on the right, where causal attention never looks back at it, so no attention mask is needed.
    """
    width = max(len(prompt) + len(answer) for prompt, answer in examples) + 1
    input_ids = torch.full((len(examples), width), PADDING_ID)
    labels = torch.full((len(examples), width), IGNORED_LABEL)
    for row, (prompt, answer) in enumerate(examples):
        ids = torch.tensor(encode(prompt + answer + END))
        input_ids[row, : len(ids)] = ids
        labels[row, len(prompt) : len(ids)] = ids[len(prompt) :]
    return {"input_ids": input_ids, "labels": labels}


def silence_transformers() -> None:
    """Keep the progress bars and warnings of transformers from breaking up what the example prints."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_base() -> LlamaForCausalLM:
    """Read the base model afresh, since adapters change the model they are put on."""
    return cast("LlamaForCausalLM", AutoModelForCausalLM.from_pretrained(BASE_FOLDER))


@torch.inference_mode()
def answer(model: Model, prompts: Sequence[str]) -> list[str]:
    """Answer all prompts in one greedy batch; padding stands on the left, so that every answer starts level."""
    width = max(map(len, prompts))
    input_ids = torch.tensor([encode(prompt.rjust(width, PADDING)) for prompt in prompts], device=model.device)
    output = model.generate(
        input_ids=input_ids,
        attention_mask=(input_ids != PADDING_ID).long(),
        max_new_tokens=LONGEST_ANSWER,
        do_sample=False,
        eos_token_id=END_ID,
        pad_token_id=PADDING_ID,
    )
    return [decode(ids) for ids in output[:, width:].tolist()]


def accuracy(model: Model, skill: str, prompts: Sequence[str]) -> float:
    """Tell which share of the prompts the model answers exactly as the named skill would."""
    expected = [SKILLS[skill](prompt.removesuffix(NEUTRAL_TAG)) for prompt in prompts]
    answers = answer(model, prompts)
    return sum(got == wanted for got, wanted in zip(answers, expected, strict=True)) / len(prompts)
