"""Tiny base models. Every `Base.build()` gives a new model with the same weights.

The plain nets have two layers of one kind, `first` and `second`, and a linear `head`; so a test can adapt one, both or
neither, whatever the kind. The others are real transformers models, made from their configs and so without a download.
None has dropout of its own, so that a model in training mode computes what it does in eval mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.layers import LayerKind

VOCABULARY = 40
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Base:
    """A base model and what a test has to know to use it.

    Attributes:
        name: for the ids of tests.
        make: makes the model, with any weights; `build` seeds it.
        inputs: keyword arguments of a forward, by the number of rows.
        kinds: the kinds of its `targets`.
        targets: `target_modules` that select all of them.
        head: a module that is no target and that an adapter may save whole.
        task: `task_type` of a config for it.
        generates: whether it has a `generate`.
        tied: whether two of its layers share a weight.
    """

    name: str
    make: Callable[[], nn.Module] = field(repr=False)
    inputs: Callable[[int], Inputs] = field(repr=False)
    kinds: frozenset[LayerKind] = frozenset()
    targets: tuple[str, ...] = ("first", "second")
    head: str = "head"
    task: str | None = None
    generates: bool = False
    tied: bool = False

    def build(self, dtype: torch.dtype = torch.float32) -> Any:
        """A new model in eval mode, always with the same weights."""
        return copy.deepcopy(_prototype(self)).to(dtype)

    def __str__(self) -> str:
        return self.name


@cache
def _prototype(base: Base) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = base.make().eval()
        for parameter in model.parameters():  # some models start with biases of zero, which would hide mistakes
            if parameter.dim() == 1:
                nn.init.normal_(parameter, std=0.2) if not parameter.any() else None
    return model


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- plain nets


class Net(nn.Module):
    """first, second, mean over whatever is neither batch nor channels, head."""

    def __init__(self, first: nn.Module, second: nn.Module, width: int, channels: int = -1) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.head = nn.Linear(width, 3)
        self.channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.second(torch.tanh(self.first(x)))
        return self.head(hidden.movedim(self.channels, -1).flatten(1, -2).mean(1))


class EmbeddingNet(nn.Module):
    """The sum of two look-ups of the same ids, then head."""

    def __init__(self, width: int = 6, **options: Any) -> None:
        super().__init__()
        self.first = nn.Embedding(VOCABULARY, width, **options)
        self.second = nn.Embedding(VOCABULARY, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.first(x) + self.second(x)).mean(1))


class ScaledEmbedding(nn.Embedding):
    """Multiplies what it looks up, as those of Gemma and BART do."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.embed_scale = 3.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.embed_scale


class ScaledEmbeddingNet(EmbeddingNet):
    """Its first embedding has a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ScaledEmbedding(VOCABULARY, 6)


class MixedNet(nn.Module):
    """An embedding, linear layers and a norm: what most models are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.norm = nn.LayerNorm(8)
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(x)
        for layer in self.layers:
            hidden = hidden + layer["down"](torch.tanh(layer["up"](self.norm(hidden))))
        return self.head(hidden.mean(1))


class WeightReader(nn.Module):
    """Uses its layer's weight without calling the layer: nothing that is put on the layer can take effect."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.second(x), self.first.weight, self.first.bias)


class EncoderNet(nn.Module):
    """torch's own transformer encoder, which in eval mode reads weights instead of calling layers."""

    def __init__(self, layers: int = 2, batch_first: bool = True, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, layers, **options)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask))


class Experts(nn.Module):
    """Stacked experts: three-dimensional parameters and a plain one, in a module without layers."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(count, 10, 6) / 3)
        self.down = nn.Parameter(torch.randn(count, 6, 10) / 3)
        self.gate = nn.Parameter(torch.randn(count, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = (x @ self.gate.T).softmax(-1)
        hidden = torch.tanh(torch.einsum("eoi,...i->...eo", self.up, x))
        return torch.einsum("eoi,...ei,...e->...o", self.down, hidden, share)


class ExpertsNet(nn.Module):
    """Two blocks of experts and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Experts(), Experts()])
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(1))


def conv1d_of_transformers(size_in: int, size_out: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(size_out, size_in)
    nn.init.normal_(layer.weight, std=0.3)  # its own are so small that a change in proportion to them cannot be seen
    return layer


def _floats(*shape: int) -> Callable[[int], Inputs]:
    return lambda rows: {"x": torch.randn(rows, *shape, generator=generator())}


def _ids(rows: int) -> Inputs:
    return {"x": torch.randint(0, VOCABULARY, (rows, 5), generator=generator())}


def _plain(name: str, make: Callable[[], nn.Module], kind: LayerKind, inputs: Callable[[int], Inputs]) -> Base:
    return Base(name, make, inputs, frozenset({kind}))


LINEAR = _plain("linear", lambda: Net(nn.Linear(6, 8), nn.Linear(8, 4), 4), LayerKind.LINEAR, _floats(5, 6))
NO_BIAS = _plain(
    "linear_no_bias",
    lambda: Net(nn.Linear(6, 8, bias=False), nn.Linear(8, 4, bias=False), 4),
    LayerKind.LINEAR,
    _floats(5, 6),
)
TRANSPOSED = _plain(
    "transposed",
    lambda: Net(conv1d_of_transformers(6, 8), conv1d_of_transformers(8, 4), 4),
    LayerKind.TRANSPOSED_LINEAR,
    _floats(5, 6),
)
EMBEDDING = _plain("embedding", EmbeddingNet, LayerKind.EMBEDDING, _ids)
PADDED = _plain("embedding_padding", lambda: EmbeddingNet(padding_idx=3), LayerKind.EMBEDDING, _ids)
CLIPPED = _plain("embedding_max_norm", lambda: EmbeddingNet(max_norm=1.0), LayerKind.EMBEDDING, _ids)
SCALED = _plain("embedding_scale", ScaledEmbeddingNet, LayerKind.EMBEDDING, _ids)
CONV1D = _plain(
    "conv1d",
    lambda: Net(nn.Conv1d(4, 6, 3, padding=1), nn.Conv1d(6, 4, 2, stride=2), 4, channels=1),
    LayerKind.CONV1D,
    _floats(4, 9),
)
CONV2D = _plain(
    "conv2d",
    lambda: Net(nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1), 4, channels=1),
    LayerKind.CONV2D,
    _floats(4, 7, 6),
)
UNEVEN = _plain(
    "conv2d_uneven",
    lambda: Net(nn.Conv2d(4, 6, 3, padding=(1, 0)), nn.Conv2d(6, 4, 1, stride=(1, 2)), 4, channels=1),
    LayerKind.CONV2D,
    _floats(4, 7, 6),
)
CONV3D = _plain(
    "conv3d",
    lambda: Net(nn.Conv3d(2, 4, 2), nn.Conv3d(4, 4, (2, 1, 2)), 4, channels=1),
    LayerKind.CONV3D,
    _floats(2, 4, 5, 4),
)
GROUPED = _plain(
    "conv2d_groups",
    lambda: Net(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Conv2d(8, 4, 1, groups=4), 4, channels=1),
    LayerKind.CONV2D,
    _floats(4, 5, 5),
)
DILATED = _plain(
    "conv2d_dilation",
    lambda: Net(nn.Conv2d(4, 6, 3, dilation=2), nn.Conv2d(6, 4, 1), 4, channels=1),
    LayerKind.CONV2D,
    _floats(4, 8, 8),
)
SAME = _plain(
    "conv2d_same",
    lambda: Net(nn.Conv2d(4, 6, 3, padding="same"), nn.Conv2d(6, 4, (1, 3), padding=(0, 1)), 4, channels=1),
    LayerKind.CONV2D,
    _floats(4, 5, 5),
)
CIRCULAR = _plain(
    "conv2d_circular",
    lambda: Net(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), nn.Conv2d(6, 4, 1), 4, channels=1),
    LayerKind.CONV2D,
    _floats(4, 5, 5),
)
MIXED = Base("mixed", MixedNet, _ids, frozenset({LayerKind.LINEAR, LayerKind.EMBEDDING}), ("embed", "up", "down"))
ENCODER = Base("torch_encoder", EncoderNet, _floats(5, 8), frozenset({LayerKind.LINEAR}), ("linear1", "linear2"))
EXPERTS = Base("experts", ExpertsNet, _floats(5, 6), frozenset(), ())

# One net for every kind of layer: a test over kinds is a test over this table.
BY_KIND: dict[LayerKind, Base] = {
    LayerKind.LINEAR: LINEAR,
    LayerKind.TRANSPOSED_LINEAR: TRANSPOSED,
    LayerKind.EMBEDDING: EMBEDDING,
    LayerKind.CONV1D: CONV1D,
    LayerKind.CONV2D: CONV2D,
    LayerKind.CONV3D: CONV3D,
}
# The same kinds with options that change what the layer computes.
SPECIAL = (NO_BIAS, PADDED, SCALED, SAME, UNEVEN, CIRCULAR, GROUPED)


# -- transformers


def _token_rows(rows: int, length: int = 6) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=generator())


def _decoder_inputs(rows: int) -> Inputs:
    return {"input_ids": _token_rows(rows)}


def _llama(**options: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=0,
            initializer_range=0.2, **options,
        )
    )  # fmt: skip


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None,
            pad_token_id=0, initializer_range=0.2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=64, num_labels=3, initializer_range=0.2, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0,
            pad_token_id=0, eos_token_id=None, initializer_factor=1.0, dropout_rate=0.0,
        )
    )  # fmt: skip


def _t5_inputs(rows: int) -> Inputs:
    tokens = _token_rows(rows, 9)
    return {"input_ids": tokens[:, :6], "decoder_input_ids": tokens[:, 6:]}


LLAMA = Base(
    "llama", _llama, _decoder_inputs, frozenset({LayerKind.LINEAR}), ("q_proj", "v_proj", "down_proj"), "lm_head",
    "CAUSAL_LM", True,
)  # fmt: skip
TIED = Base(
    "llama_tied", lambda: _llama(tie_word_embeddings=True), _decoder_inputs,
    frozenset({LayerKind.LINEAR, LayerKind.EMBEDDING}), ("embed_tokens", "q_proj"), "model.norm", "CAUSAL_LM", True, True,
)  # fmt: skip
GPT2 = Base(
    "gpt2", _gpt2, _decoder_inputs, frozenset({LayerKind.TRANSPOSED_LINEAR}), ("c_attn", "c_fc"), "lm_head",
    "CAUSAL_LM", True,
)  # fmt: skip
BERT = Base("bert", _bert, _decoder_inputs, frozenset({LayerKind.LINEAR}), ("query", "value"), "classifier", "SEQ_CLS")
T5 = Base("t5", _t5, _t5_inputs, frozenset({LayerKind.LINEAR}), ("q", "v"), "lm_head", "SEQ_2_SEQ_LM", True)

TRANSFORMERS = (LLAMA, GPT2, BERT, T5)
# One for each kind of layer, one of several kinds and one of transformers.
CORE = (*BY_KIND.values(), MIXED, LLAMA)
# ENCODER is left out: there the reference has no effect in eval mode.
ALL = (*BY_KIND.values(), *SPECIAL, MIXED, *TRANSFORMERS, TIED)


def tensors_of(output: Any) -> list[torch.Tensor]:
    """The tensors of an output, whatever holds them, without the cache."""
    if isinstance(output, torch.Tensor):
        return [output]
    if hasattr(output, "logits"):
        return [output.logits]
    return [tensor for item in output for tensor in tensors_of(item)]


def run(model: nn.Module, inputs: Inputs, **options: Any) -> torch.Tensor:
    """The main output of a forward, without a graph."""
    with torch.no_grad():
        return tensors_of(model(**inputs, **options))[0]


def generate(model: Any, base: Base, rows: int = 3, **options: Any) -> torch.Tensor:
    """A few greedily generated tokens."""
    inputs = {k: v for k, v in base.inputs(rows).items() if k == "input_ids"}
    return model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, **options)
