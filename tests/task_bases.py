"""Tiny models of every task that virtual tokens can be put on, with inputs and labels for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tests import bases
from tests.bases import VOCABULARY, Base, Inputs, generator

_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def _bert(cls: str) -> nn.Module:
    import transformers

    return getattr(transformers, cls)(
        transformers.BertConfig(
            vocab_size=VOCABULARY, max_position_embeddings=64, num_labels=3 if "Token" in cls else 2, initializer_range=0.2,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **_SIZES,
        )
    )  # fmt: skip


def _llama(cls: str) -> nn.Module:
    import transformers

    return getattr(transformers, cls)(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY, num_key_value_heads=1, max_position_embeddings=64, num_labels=3, pad_token_id=0,
            bos_token_id=None, eos_token_id=None, initializer_range=0.2, **_SIZES,
        )
    )  # fmt: skip


def bart(decoder_layers: int = 2) -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY, d_model=16, encoder_layers=decoder_layers, decoder_layers=decoder_layers,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
            forced_eos_token_id=None, init_std=0.2, dropout=0.0, scale_embedding=True,
        )
    )  # fmt: skip


def _tokens(rows: int) -> Inputs:
    """Rows of different lengths, padded on the right."""
    ids = torch.randint(1, VOCABULARY, (rows, 6), generator=generator())
    mask = torch.ones_like(ids)
    mask[rows - 1, 4:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def _encoder_decoder(rows: int) -> Inputs:
    decoder = torch.randint(3, VOCABULARY, (rows, 4), generator=generator(2))
    return {**_tokens(rows), "decoder_input_ids": decoder}


BART = Base("bart", bart, _encoder_decoder, task="SEQ_2_SEQ_LM", generates=True)
T5 = replace(bases.T5, inputs=_encoder_decoder)
BERT_LABEL = replace(bases.BERT, name="bert_label", inputs=_tokens)
LLAMA_LABEL = Base(
    "llama_label", lambda: _llama("LlamaForSequenceClassification"), _tokens, head="score", task="SEQ_CLS"
)
BERT_TOKENS = Base(
    "bert_tokens", lambda: _bert("BertForTokenClassification"), _tokens, head="classifier", task="TOKEN_CLS"
)
BERT_SPANS = Base(
    "bert_spans", lambda: _bert("BertForQuestionAnswering"), _tokens, head="qa_outputs", task="QUESTION_ANS"
)
BERT_FEATURES = Base("bert_features", lambda: _bert("BertModel"), _tokens, task="FEATURE_EXTRACTION")
LLAMA_FEATURES = Base("llama_features", lambda: _llama("LlamaModel"), _tokens, task="FEATURE_EXTRACTION")

TASKS = (T5, BART, BERT_LABEL, LLAMA_LABEL, BERT_TOKENS, BERT_SPANS, BERT_FEATURES, LLAMA_FEATURES)


def labels_for(base: Base, rows: int = 3) -> dict[str, Any]:
    """What a forward takes to work out a loss; nothing for models without one."""
    if base.task == "SEQ_2_SEQ_LM":
        return {"labels": torch.randint(3, VOCABULARY, (rows, 4), generator=generator(3))}
    if base.task == "SEQ_CLS":
        return {"labels": torch.arange(rows) % 3}
    if base.task == "TOKEN_CLS":
        return {"labels": torch.arange(rows * 6).view(rows, 6) % 3}
    if base.task == "QUESTION_ANS":
        return {"start_positions": torch.arange(rows), "end_positions": torch.arange(rows) + 2}
    return {}


def answer(model: Any, inputs: Inputs) -> torch.Tensor:
    """What a model of any task answers, as one tensor, without a graph."""
    with torch.no_grad():
        output = model(**inputs)
    if "start_logits" in output:
        return torch.stack([output["start_logits"], output["end_logits"]], -1)
    found: torch.Tensor = output["logits"] if "logits" in output else output["last_hidden_state"]
    return found
