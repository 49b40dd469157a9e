"""aLoRA behind a cache: the same tokens as without, whoever filled the cache and wherever the invocation is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import splice
from tests import bases
from tests.comparing import assert_close

INVOCATION = [5, 6]
BASES = (bases.LLAMA, bases.GPT2)
# The invocation at different places of each row, twice in one, and nowhere.
IDS = torch.tensor(
    [
        [1, 5, 6, 7, 8, 9, 2, 3],
        [1, 2, 3, 5, 6, 4, 2, 3],
        [1, 2, 3, 4, 8, 9, 5, 6],
        [5, 6, 1, 2, 5, 6, 7, 8],
        [1, 2, 3, 4, 8, 9, 7, 3],
    ]
)


@pytest.fixture(params=BASES, ids=str)
def model(request: Any, shared_checkpoint: Any) -> Any:
    return activated(request.param, shared_checkpoint)


def activated(base: bases.Base, shared_checkpoint: Any, **fields: Any) -> Any:
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 64, "target_modules": list(base.targets), "task_type": "CAUSAL_LM",
        "alora_invocation_tokens": INVOCATION, **fields,
    }  # fmt: skip
    return splice.PeftModel.from_pretrained(base.build(), shared_checkpoint(base, config))


def start_of(row: torch.Tensor) -> int:
    """Where the last invocation of a row begins; its length, if nowhere."""
    found = [i for i in range(len(row) - 1) if row[i : i + 2].tolist() == INVOCATION]
    return found[-1] if found else len(row)


@torch.no_grad()
def base_cache(model: Any, ids: torch.Tensor, how: str) -> Any:
    """The cache of `ids` that the base filled, in one of the ways in which people let it."""
    if how == "by the network alone":
        return model.get_base_model()(input_ids=ids, use_cache=True).past_key_values
    if how == "by another object":
        other = copy.deepcopy(model).unload()
        return other(input_ids=ids, use_cache=True).past_key_values
    with model.disable_adapter():
        return model(input_ids=ids, use_cache=True).past_key_values


FILLED = ("with the adapter disabled", "by the network alone", "by another object")


@pytest.mark.parametrize("how", FILLED)
@pytest.mark.parametrize("row", range(len(IDS)))
@torch.no_grad()
def test_a_prompt_that_the_base_has_cached(how: str, row: int, model: Any) -> None:
    """Any part of what stands before the invocation; the whole prompt but one token, where there is none."""
    ids = IDS[row : row + 1]
    whole = model(input_ids=ids).logits
    plain = model.generate(input_ids=ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    for cached in range(1, min(start_of(ids[0]), ids.shape[1] - 1) + 1):
        cache = base_cache(model, ids[:, :cached], how)
        found = model(input_ids=ids[:, cached:], past_key_values=copy.deepcopy(cache)).logits
        assert_close(found, whole[:, cached:], factor=10)
        generated = model.generate(
            input_ids=ids, past_key_values=cache, max_new_tokens=5, min_new_tokens=5, do_sample=False
        )
        assert torch.equal(generated, plain)


@pytest.mark.parametrize("cached", range(1, 8))
@torch.no_grad()
def test_a_cache_that_the_adapter_has_filled(cached: int, model: Any) -> None:
    """Then the invocation may lie in it, or across its end. Of several the last in all of a row counts, but what is in the
    cache stays as it was computed."""
    rows = IDS[[row for row in range(len(IDS)) if row != 3]]
    whole = model(input_ids=rows).logits
    # An invocation across the end of the cache was none yet when its first part was computed.
    right = torch.tensor([start_of(row) != cached - 1 for row in rows])
    cache = model(input_ids=rows[:, :cached], use_cache=True).past_key_values
    found = model(input_ids=rows[:, cached:], past_key_values=cache).logits
    assert_close(found[right], whole[right, cached:], factor=10)
    if not right.all():
        from_base = model.get_base_model()(input_ids=rows).logits
        assert not torch.allclose(found[~right], from_base[~right][:, cached:], atol=1e-3)


@torch.no_grad()
def test_token_by_token(model: Any) -> None:
    """The loop that people write: each call gets one token and the cache of the last; also after a generation."""
    rows = IDS[:3]
    plain = model.generate(input_ids=rows, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    cache, ids, new = None, rows, rows
    for _ in range(6):
        output = model(input_ids=new, past_key_values=cache, use_cache=True)
        cache, new = output.past_key_values, output.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], 1)
    assert torch.equal(ids, plain)
    half = model.generate(
        input_ids=rows, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    cache, ids = half.past_key_values, half.sequences
    more = model(input_ids=ids[:, cache.get_seq_length() :], past_key_values=copy.deepcopy(cache))
    assert torch.equal(more.logits[:, -1].argmax(-1), plain[:, 11])
    rest = model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert torch.equal(rest, plain)


@torch.no_grad()
def test_a_prompt_in_pieces(model: Any) -> None:
    """`generate` may be told to compute a prompt bit by bit."""
    for rows in (IDS[:3], IDS[3:]):
        plain = model.generate(input_ids=rows, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        for size in (2, 3, 5):
            found = model.generate(
                input_ids=rows, max_new_tokens=4, min_new_tokens=4, do_sample=False, prefill_chunk_size=size
            )
            assert torch.equal(found, plain)


@torch.no_grad()
def test_guessed_tokens(model: Any) -> None:
    """Several tokens at a time that are checked together, some of which are taken back."""
    for row in range(len(IDS)):
        ids = IDS[row : row + 1]
        plain = model.generate(input_ids=ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        found = model.generate(
            input_ids=ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=7
        )
        assert torch.equal(found, plain)


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_several_sequences_for_each_prompt(use_cache: bool, model: Any) -> None:
    """All alike here, as of all tokens the best is drawn: each prompt has its own invocation, or none."""
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "use_cache": use_cache}
    plain = model.generate(input_ids=IDS, do_sample=False, **options)
    found = model.generate(input_ids=IDS, do_sample=True, top_k=1, num_return_sequences=3, **options)
    assert torch.equal(found, plain.repeat_interleave(3, 0))


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("sequences", [1, 2])
@torch.no_grad()
def test_rows_with_adapters_of_their_own(sequences: int, base: bases.Base, shared_checkpoint: Any) -> None:
    """Invoked by other tokens, or none at all; behind a cache as without."""
    model = activated(base, shared_checkpoint)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(base.targets)}
    config["task_type"] = "CAUSAL_LM"
    model.load_adapter(shared_checkpoint(base, {**config, "alora_invocation_tokens": [2, 3]}), "other")
    model.load_adapter(shared_checkpoint(base, config), "plain")
    names = ["__base__", "default", "other", "default", "plain"]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    alone = []
    for name, ids in zip(names, IDS):
        if name == "__base__":
            with model.disable_adapter():
                alone.append(model.generate(input_ids=ids[None], **options))
        else:
            model.set_adapter(name)
            alone.append(model.generate(input_ids=ids[None], **options))
    expected = torch.cat(alone).repeat_interleave(sequences, 0)
    if sequences > 1:
        options.update(do_sample=True, top_k=1, num_return_sequences=sequences)
    for use_cache in (True, False):
        found = model.generate(input_ids=IDS, adapter_names=names, use_cache=use_cache, **options)
        assert torch.equal(found, expected)


@torch.no_grad()
def test_offsets_of_the_callers_own(model: Any) -> None:
    """They count from the end, with embeddings in the place of tokens and behind a cache too."""
    whole = model(input_ids=IDS).logits
    offsets = [offset if offset else None for offset in (IDS.shape[1] - start_of(row) for row in IDS)]
    embedded = model.get_input_embeddings()(IDS)
    assert_close(model(inputs_embeds=embedded, alora_offsets=offsets).logits, whole)
    cache = model(input_ids=IDS[:, :4], use_cache=True, alora_offsets=[3, 1, None, None, None]).past_key_values
    found = model(input_ids=IDS[:, 4:], past_key_values=cache, alora_offsets=offsets).logits
    rows = [0, 1, 2, 4]
    assert_close(found[rows], whole[rows, 4:], factor=10)
