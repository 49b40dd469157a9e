"""Context-aware prompt tuning: the embedded tokens of examples in front of the input, each moved by a trained step.

Blau et al., "Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods", arXiv 2410.17222. No step
is longer than the radius that the type of its token has, and the labels of the examples stay as they are. The loss counts the
answer and the labels of the examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, NamedTuple, Protocol, cast

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.dense import device_of
from splice.base.foreign_models import loss_of
from splice.checkpoint.types import PeftType, TaskType
from splice.config import PromptLearningConfig
from splice.kinds.effect import Forward
from splice.kinds.file_form import FileForm, Stored
from splice.kinds.registry import Method, register
from splice.kinds.slot import Role, Slot
from splice.kinds.tensors import Held
from splice.methods.prompts.attributes import PROMPT_METHODS, PROMPT_VIEWS
from splice.methods.prompts.counts import check_prompt
from splice.methods.prompts.embedded import EmbeddedPrompt, embeddings_of
from splice.methods.prompts.names import PROMPT_KEY
from splice.methods.prompts.prompt import Call, Encoder, Prompt, PromptLayer
from splice.methods.prompts.reparameterised import BEHIND, TrainedBehind, table_of
from splice.methods.prompts.sizes import sizes_of

# The type of a token that no loss counts and no step moves.
IGNORED = 0
# How many types an example has: template and input, template and label; those of the next example go on from there.
_TYPES = 4
_TEMPLATE_OF_INPUT, _INPUT, _TEMPLATE_OF_LABEL = 1, 2, 3
# The radius of tokens that stay where they are.
_NOWHERE = 1e-10
_MASK = "input_type_mask"
# The suffixes of the tokens as they were, and of the steps.
_TOKENS, _STEP = "embedding.weight", "delta_embedding.weight"


@dataclass
class CPTConfig(PromptLearningConfig):
    """Fields and defaults of the reference, in its order.

    Raises:
        ValueError: the task is another one than CAUSAL_LM, or the lists differ in length.
    """

    # The `peft_type` of its checkpoints.
    method: ClassVar[PeftType] = PeftType.CPT

    # Ids of the tokens of the examples; None for one token, 0.
    cpt_token_ids: list[int] | None = None
    # One for each of them; not used.
    cpt_mask: list[int] | None = None
    # What each of them is: 0 to leave it out of everything; for the first example 1 for the template of its input, 2 for the
    # input, 3 for the template of its label, 4 for the label; 5 to 8 for the second one, and so on. None for all 1.
    cpt_tokens_type_mask: list[int] | None = None
    # How the labels of the examples count in the loss: "none" for all alike, "decay" for the less the earlier they are.
    opt_weighted_loss_type: str = "none"
    # By how much less the labels of an example count than those of the next one.
    opt_loss_decay_factor: float = 1.0
    # How far tokens of inputs may move, in an embedding of 2048 numbers; with the square root of its size in any other.
    opt_projection_epsilon: float = 0.1
    # How far tokens of templates may move, likewise.
    opt_projection_format_epsilon: float = 0.1
    # The tokenizer that the ids are from; not used.
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_type != TaskType.CAUSAL_LM:
            raise ValueError("CPTConfig only supports task_type = CAUSAL_LM.")
        self.cpt_token_ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        count = self.num_virtual_tokens = len(self.cpt_token_ids)
        self.cpt_mask = [1] * count if self.cpt_mask is None else self.cpt_mask
        types = self.cpt_tokens_type_mask
        self.cpt_tokens_type_mask = [1] * count if types is None else types
        if not len(self.cpt_mask) == len(self.cpt_tokens_type_mask) == count:
            raise ValueError("cpt_token_ids, cpt_mask and cpt_tokens_type_mask must have the same length.")
        self.token_dim = self.num_attention_heads = self.num_layers = None
        self.num_transformer_submodules = 1

    def computed(self) -> dict[str, object]:
        return {
            "cpt_token_ids": self.cpt_token_ids,
            "cpt_tokens_type_mask": self.cpt_tokens_type_mask,
        }


def _check(config: CPTConfig) -> None:
    check_prompt(config)
    if config.opt_weighted_loss_type not in ("none", "decay"):
        raise ValueError(f"`opt_weighted_loss_type` must be 'none' or 'decay', got {config.opt_weighted_loss_type!r}")


class CPTEmbedding(Encoder):
    """The tokens of the examples and their steps, in the tree."""


class _WithSteps(FileForm):
    """The table, and what it is made of where a step has been made."""

    works_with = frozenset({_STEP})

    def to_file(self, layer: Stored, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        assert isinstance(layer, ContextPrompt)
        table = table_of(layer, tensors)
        if table is None:
            return
        yield PROMPT_KEY, table
        step = tensors.get(_STEP, layer.step)
        if bool(step.any()):
            yield f"{BEHIND}{_TOKENS}", tensors[_TOKENS]
            yield f"{BEHIND}{_STEP}", step


class ContextPrompt(EmbeddedPrompt):
    """The tokens of examples, however a checkpoint holds them."""

    encoder = CPTEmbedding
    step = Held(_STEP)

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: CPTConfig) -> None:
        embeddings = embeddings_of(base)
        ids = torch.tensor(config.cpt_token_ids, device=device_of(embeddings))
        tensors[_TOKENS].copy_(embeddings(ids))
        nn.init.zeros_(tensors[_STEP])

    def prepare(self, base: nn.Module, config: CPTConfig, path: str) -> None:
        super().prepare(base, config, path)
        self.ids, self.types = torch.tensor(config.cpt_token_ids), torch.tensor(config.cpt_tokens_type_mask)
        self.decay = config.opt_loss_decay_factor if config.opt_weighted_loss_type == "decay" else 1.0
        kind = self.types % _TYPES
        unit = math.sqrt(self.table_tensor.shape[1] / 2048)
        self.radii = torch.full(self.types.shape, _NOWHERE)
        self.radii[kind == _INPUT] = config.opt_projection_epsilon * unit
        self.radii[(kind == _TEMPLATE_OF_INPUT) | (kind == _TEMPLATE_OF_LABEL)] = (
            config.opt_projection_format_epsilon * unit
        )

    def table(self) -> torch.Tensor:
        step = self.step
        with torch.no_grad():
            shrunk = self._shrinking(step)
            if step.requires_grad:  # the optimizer goes on from where it is allowed to be
                step.data.mul_(shrunk)
        if not step.requires_grad:
            return self.table_tensor + step * shrunk
        moves = (self.types % _TYPES != 0).to(step.device)
        return self.table_tensor + torch.where(moves[:, None], step, step.detach())

    def _shrinking(self, step: torch.Tensor) -> torch.Tensor:
        """(n, 1): what brings each step back to its radius."""
        radii, norms = self.radii.to(step.device), step.norm(dim=1)
        return torch.where(norms > 0, radii / norms.maximum(radii), 1.0)[:, None]

    def prompted(self, call: Call, prompt: Prompt, inner: Forward) -> object:
        labels, types = call.pop("labels", None), call.pop(_MASK, None)
        if labels is None:
            return super().prompted(call, prompt, inner)
        context = _Context.of(prompt, labels, types)
        # The network is told the labels too: then its output has a place for the loss.
        output = super().prompted(call, prompt, lambda **call: inner(**call, labels=context.labels))
        return context.with_loss(output)


class CPT(ContextPrompt):
    """As it is used: a checkpoint holds the tokens with their steps made, and further ones begin there."""

    file_form = _WithSteps()

    @classmethod
    def for_training(cls, config: CPTConfig) -> type[PromptLayer]:
        return TrainedCPT

    @classmethod
    def slots(cls, base: nn.Module, config: CPTConfig, path: str) -> dict[str, Slot]:
        (table,) = super().slots(base, config, path).values()
        step = Slot(table.shape, dtype=torch.float32, stored=False)
        return {_TOKENS: table._replace(role=Role.FIXED), _STEP: step}


class TrainedCPT(TrainedBehind, ContextPrompt):
    """In training: the tokens as they were, and the steps, which may go on within their radii."""

    @classmethod
    def slots(cls, base: nn.Module, config: CPTConfig, path: str) -> dict[str, Slot]:
        shape = len(config.cpt_token_ids or ()), sizes_of(base, config)["token_dim"]
        fixed = Slot(shape, Role.FIXED, dtype=torch.float32)
        return {_TOKENS: fixed, _STEP: Slot(shape, dtype=torch.float32)}


class _HasLogits(Protocol):
    """The output of a network that was given labels."""

    logits: torch.Tensor
    loss: torch.Tensor


class _Context(NamedTuple):
    """What the loss of a call counts."""

    # (batch, n + T): the label of each position, -100 where it has none.
    labels: torch.Tensor
    # (batch, n + T): what each position is; examples count on from those of the prompt.
    types: torch.Tensor
    # (batch): by how much less the labels of an example count than those of the next one.
    decay: torch.Tensor

    @classmethod
    def of(cls, prompt: Prompt, labels: torch.Tensor, types: torch.Tensor | None) -> _Context:
        """Of the caller's labels (batch, T), and the types of their tokens, all of them labels where it gives none.

        Raises:
            ValueError: the two differ in shape.
        """
        if types is not None and types.shape != labels.shape:
            raise ValueError(f"`{_MASK}` {tuple(types.shape)} and `labels` {tuple(labels.shape)} must have one shape")
        given = torch.full_like(labels, _TYPES) if types is None else types.to(labels)
        batch = len(labels)
        # Rows without an adapter have no examples, and all of their tokens count but the first, which nothing tells.
        whole = cls(
            F.pad(labels, (prompt.count, 0), value=-100),
            F.pad(torch.full_like(labels[:, 1:], _TYPES), (prompt.count + 1, 0), value=IGNORED),
            torch.ones(batch, device=labels.device),
        )
        for layer, index in prompt.parts:
            assert isinstance(layer, ContextPrompt)
            rows = torch.arange(batch, device=labels.device) if index is None else index.to(labels.device)
            own = layer.types.to(labels)
            front = slice(prompt.count - layer.count, prompt.count)
            whole.labels[rows, front], whole.types[rows, front] = layer.ids.to(labels), own
            whole.types[rows, prompt.count :] = torch.where(given > IGNORED, given + own.max(), IGNORED)[rows]
            whole.decay[rows] = layer.decay
        counts = (whole.types > IGNORED) & (whole.types % _TYPES == 0)
        return whole._replace(labels=whole.labels.masked_fill(~counts, -100))

    def weights(self) -> torch.Tensor:
        """(batch, n + T): how much each label counts: of the last example in full, of the one before `decay` times that..."""
        examples = torch.where(self.types % _TYPES == 0, self.types // _TYPES, 0)
        there = torch.zeros(len(examples), int(examples.max()) + 1, device=examples.device).scatter_(1, examples, 1.0)
        there[:, IGNORED] = 0
        later = there.flip(1).cumsum(1).flip(1) - there
        return self.decay[:, None] ** later.gather(1, examples)

    def with_loss(self, output: object) -> object:
        """`output` of the network with this loss in the place of its own."""
        logits = output[1] if isinstance(output, tuple) else cast("_HasLogits", output).logits
        shifted, labels = logits[:, :-1].float(), self.labels[:, 1:].to(logits.device)
        each = F.cross_entropy(shifted.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        weights = _Context(self.labels[:, 1:], self.types[:, 1:], self.decay).weights().to(each)
        loss = (each * weights).sum() / (labels != -100).sum()
        if isinstance(output, tuple):
            return (loss, *output[1:])
        assert loss_of(output) is not None
        cast("_HasLogits", output).loss = loss
        return output


METHOD = register(
    Method(
        name=PeftType.CPT,
        summary="Puts embedded examples in front of the input, whose tokens each move a trained, limited step.",
        config=CPTConfig,
        prefix="cpt_",
        tensor_names=frozenset({"prompt_embeddings"}),
        network_layer=CPT,
        check=_check,
        tuner_methods=PROMPT_METHODS,
        tuner_views=PROMPT_VIEWS,
        names=MappingProxyType({"CPTEmbedding": CPTEmbedding}),
        paper="arXiv 2410.17222",
    )
)
