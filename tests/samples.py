"""One row for every method: the configs that tests load it with. A new method is a new row here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from splice.checkpoint.types import PeftType
from splice.kinds.registry import Method, all_methods
from tests import bases
from tests.bases import Base, Inputs


@dataclass(frozen=True)
class Sample:
    """Configs of one method.

    Attributes:
        config: fields of a plain adapter; the targets come from the base model.
        options: fields that change what the adapter computes, each under a name for the test's id.
        small: fields of an adapter of the same method that differs in size, to stand beside the first.
        not_on: names of base models where an option cannot be used, because the reference refuses it or gets it wrong;
            under "" those where the method cannot.
        same_targets: whether the reference needs all adapters of a model to be on the same layers.
        reference_mixes: whether the reference supports `adapter_names` for it.
        mixing_lacks: what of that the reference lacks: "heads" that each row has of its own, "beams".
        reference_scales: whether the reference's layers have `set_scale` and its like.
        one_trained: whether only one adapter of a model can be in training.
        trained_in: the dtype of its tensors on a bfloat16 base.
        reference_tells: whether the reference says so where there is nothing to unmerge.
        reference_adds: whether the reference gets several of its adapters at once right.
        reference_not_on: names of base models on which a new adapter fails in the reference alone.
        reference_calls_base: whether the reference calls the base layer's own forward, and does not compute in its place.
        stored_otherwise: whether what is trained is not what checkpoints hold, which tests/test_trained_behind.py is about.
        reference_generates: whether the reference's `generate` gives what its forwards do, one after the other.
        reference_on_other_bases: whether the reference gets its adapters right on a base with other weights than those they
            were made for, where they can be loaded on it.
        has_own_weight: whether its adapters compute with a weight of their own, worked out when they were put on, so that
            another weight of the layer changes nothing.
        any_base: whether its adapters can be loaded on a base with other weights than those they were made for.
        reference_unmerges: whether the reference can take what is merged out again, and merges an adapter only once.
        call: arguments that every call of a model with such an adapter needs -> a value for each row.
        task: the only task that its configs may have; None for any.
        in_any_order: whether several of its adapters at once give the same in any order.
        draws_in_training: whether what it computes in training is drawn at random. The reference does so on every layer that
            was just adapted, splice on those of a base that is in training.
        refused_on_codes: what is said where an adapter of the full base is refused on a quantised one; empty where it is not.
        made_on_codes: whether a new adapter can be made on a quantised base, even if one of the full base is refused there.
        merges: whether its adapters can be merged into weights; neither library merges those of the others.
        row_by_row: whether an adapter gives the same for a row, whatever other rows of it are in the batch.
        reference_shares: whether the reference lets layers of all adapters share tensors, not of the first one alone.
        file_forms: fields with which checkpoints hold another form than memory, each under a name for the test's id, where
            `options` has none: what tests of those need, such as training, does not go with it.
        keeps_less_in_file: why such a form holds less than memory does, and is rounded; empty where it holds all.
        on_every_base: whether it is tested on every base model, and beside every method, in the place of all of its kind:
            what a base asks of an adapter is hosted by the kind, once. The others are tested on `bases.CORE`.
    """

    config: Mapping[str, Any]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    small: Mapping[str, Any] = field(default_factory=dict)
    not_on: Mapping[str, frozenset[str]] = field(default_factory=dict)
    same_targets: bool = False
    reference_mixes: bool = False
    mixing_lacks: frozenset[str] = frozenset()
    reference_scales: bool = False
    reference_on_other_bases: bool = True
    has_own_weight: bool = False
    any_base: bool = True
    reference_unmerges: bool = True
    in_any_order: bool = True
    one_trained: bool = False
    reference_not_on: frozenset[str] = frozenset()
    reference_calls_base: bool = True
    stored_otherwise: bool = False
    reference_generates: bool = True
    trained_in: torch.dtype = torch.float32
    draws_in_training: bool = False
    reference_tells: bool = True
    reference_adds: bool = True
    call: Mapping[str, Any] = field(default_factory=dict)
    task: str | None = None
    refused_on_codes: str = ""
    made_on_codes: bool = True
    merges: bool = True
    row_by_row: bool = True
    reference_shares: bool = True
    file_forms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    keeps_less_in_file: str = ""
    on_every_base: bool = False


# Convolutions on which the reference computes something else than the base does: it takes the first size of a kernel, a
# padding and a stride for all, and neither dilation nor padding with anything but zeros.
_NOT_SQUARE = frozenset({"conv2d_uneven", "conv2d_groups", "conv2d_same", "conv2d_circular", "conv2d_dilation"})

SAMPLES: dict[PeftType, Sample] = {
    PeftType.LORA: Sample(
        on_every_base=True,
        config={"r": 4, "lora_alpha": 6},
        small={"r": 4, "lora_alpha": 8, "use_rslora": True},
        options={
            "rslora": {"use_rslora": True, "lora_alpha": 5},
            "patterns": {
                "rank_pattern": {"first|q_proj": 8},
                # Each matches a layer of every base: of one that matches none a load would warn.
                "alpha_pattern": {
                    "second|v_proj|value|v|embed|embed_tokens|c_attn": 3,
                    "^.*(first|q_proj|query|q|embed|embed_tokens|c_attn)": 9,
                },
            },
            "lora_bias": {"lora_bias": True},
            "bias_all": {"bias": "all"},
            "bias_of_targets": {"bias": "lora_only"},
            "other_orientation": {"fan_in_fan_out": True},
            "uninitialised": {"init_lora_weights": False},
            "gaussian": {"init_lora_weights": "gaussian"},
        },
        not_on={
            "lora_bias": frozenset({"embedding", "embedding_padding", "embedding_scale", "mixed", "llama_tied"}),
        },
        reference_mixes=True,
        reference_scales=True,
    ),
    # On LoRA adapters alone: its tests are in test_xlora.py.
    PeftType.XLORA: Sample(config={"hidden_size": 16, "adapters": {"0": "a folder"}}, on_every_base=False),
    PeftType.FOURIERFT: Sample(
        config={"n_frequency": 12, "scaling": 20.0},
        small={"n_frequency": 5, "random_loc_seed": 3},
        options={
            "pattern": {"n_frequency_pattern": {"first|q_proj": 8, "first": 7}, "random_loc_seed": 1},
            "bias_of_targets": {"bias": "fourier_only"},
        },
    ),
    PeftType.HIRA: Sample(
        config={"r": 4},
        small={"r": 2},
        options={"gaussian": {"init_weights": "gaussian"}, "uninitialised": {"init_weights": False}},
        not_on={"": frozenset({"conv2d_groups"})},
    ),
    PeftType.DELORA: Sample(
        config={"r": 4, "delora_lambda": 5},
        small={"r": 2, "delora_lambda": 3},
        options={
            "patterns": {
                "rank_pattern": {"first|q_proj": 3},
                "lambda_pattern": {"second|v_proj|value|v|q_proj|layers.1.up": 7},
            },
            "bias_of_targets": {"bias": "delora_only"},
            "uninitialised": {"init_weights": False},
        },
    ),
    PeftType.DEFT: Sample(
        reference_not_on=frozenset({"transposed"}),
        config={"r": 4, "alpha": 6},
        small={"r": 2},
        options={
            "rotated": {"decomposition_method": "qr"},
            "removal_alone": {"para": True},
            "both": {"decomposition_method": "qr", "para": True},
            "bias_of_targets": {"bias": "deft_only"},
            "drawn": {"init_weights": False, "init_scale": 3.0},
        },
    ),
    PeftType.PEANUT: Sample(
        config={"r": 4, "depth": 1, "scaling": 0.5},
        small={"r": 2, "act_fn": "gelu_new"},
        options={
            "plain": {"depth": 0},
            "deep": {"depth": 2, "act_fn": "tanh"},
            "uninitialised": {"init_weights": False},
        },
    ),
    PeftType.OSF: Sample(
        config={"effective_rank": 2},
        reference_unmerges=False,
        small={"effective_rank": 0.75},
        options={
            "half": {"effective_rank": None},
            "patterns": {"rank_pattern": {"first|q_proj|up": 3, "second": 0.3}},
            "uninitialised": {"init_weights": False},
        },
    ),
    PeftType.FROD: Sample(
        refused_on_codes="FRoD requires a weight in float32, float16 or bfloat16",
        made_on_codes=False,
        config={"sparse_rate": 0.1, "init_weights": False, "progressbar": False},
        options={
            "regenerated": {"save_projection": False, "projection_prng_key": 5},
            "diagonal": {"sparse_rate": 0.0, "regularization_alpha": 0.1},
            "bias_of_targets": {"bias": "frod_only"},
            "unchanged": {"init_weights": True},
        },
        same_targets=True,
        reference_calls_base=False,
        # It works U out of another basis than the one that it computes with, that of the checkpoint.
        reference_on_other_bases=False,
        has_own_weight=True,
    ),
    PeftType.PSOFT: Sample(
        refused_on_codes="PSOFT requires a weight in float32, float16 or bfloat16",
        made_on_codes=False,
        config={"r": 3},
        small={"r": 2, "ab_svd_init": "pissa_init"},
        options={
            "series": {"use_cayley_neumann": True, "num_cayley_neumann_terms": 3},
            "limited": {"use_cayley_neumann": True, "cayley_neumann_eps": 0.3},
            "free": {"psoft_orth": False, "psoft_mag_a": False},
            "random_start": {"psoft_svd": "lowrank", "random_seed": 3, "psoft_mag_b": False},
            "uninitialised": {"init_weights": False},
        },
    ),
    PeftType.ADAMSS: Sample(
        refused_on_codes="the adapter was trained for groups of .* rows, and those of this weight have",
        config={"r": 3, "num_subspaces": 2},
        any_base=False,
        small={"r": 2, "num_subspaces": 3},
        options={
            "wide": {"subspace_rank": 2},
            "dynamic": {"subspace_rank": 3, "use_dynamic_rank": True, "svd_threshold": 0.3, "random_seed": 2},
            "uninitialised": {"init_weights": None},
        },
    ),
    PeftType.PREFIX_TUNING: Sample(
        on_every_base=True,
        config={"num_virtual_tokens": 4},
        small={"num_virtual_tokens": 2},
        options={"projected": {"prefix_projection": True, "encoder_hidden_size": 6}},
        reference_generates=False,
        # It looks for the argument `past_key_values`, which transformers 5.24 calls `cache`.
        not_on={"": frozenset({"bert_label", "llama_label", "bert_tokens", "bert_spans"})},
    ),
    PeftType.CARTRIDGE: Sample(
        config={"num_virtual_tokens": 4},
        small={"num_virtual_tokens": 2},
        options={"none_frozen": {"num_frozen_tokens": 0}, "most_frozen": {"num_frozen_tokens": 3}},
        reference_generates=False,
        # As prefix tuning.
        not_on={"": frozenset({"bert_label", "llama_label", "bert_tokens", "bert_spans"})},
    ),
    PeftType.IA3: Sample(
        on_every_base=True,
        config={"feedforward_modules": r".*(second|c_fc|\bv|v_proj|down|value)"},
        small={"feedforward_modules": []},
        options={"outputs_alone": {"feedforward_modules": []}},
    ),
    PeftType.LOHA: Sample(
        on_every_base=True,
        config={"r": 4, "alpha": 6},
        small={"r": 2, "alpha": 3},
        options={
            "patterns": {
                "rank_pattern": {"first|q_proj": 2},
                "alpha_pattern": {"second|v_proj|value|v|embed|embed_tokens|c_attn": 3},
            },
            "effective": {"use_effective_conv2d": True},
        },
        reference_scales=True,
    ),
    PeftType.LOKR: Sample(
        config={"r": 2, "alpha": 6, "init_weights": False},
        small={"r": 8, "alpha": 3, "init_weights": False},
        options={
            "effective": {"use_effective_conv2d": True},
            "both": {"decompose_both": True, "decompose_factor": 2, "r": 1},
        },
        reference_scales=True,
    ),
    # The reference drops the bias of linear targets, and fails with two adapters on tied layers.
    PeftType.TRAINABLE_TOKENS: Sample(
        on_every_base=True,
        config={"token_indices": [4, 2]},
        small={"token_indices": [5, 3, 1]},
        options={"random": {"init_weights": False}},
        not_on={"": frozenset({"linear", "linear_no_bias", "mixed", "bert", "llama_tied"})},
        same_targets=True,
    ),
    PeftType.LN_TUNING: Sample(config={}, same_targets=True, trained_in=torch.bfloat16, on_every_base=True),
    PeftType.OFT: Sample(
        on_every_base=True,
        config={"oft_block_size": 4},
        small={"oft_block_size": 0, "r": 1, "use_cayley_neumann": False},
        options={
            "exact": {"use_cayley_neumann": False, "block_share": True},
            "three_terms": {"num_cayley_neumann_terms": 3, "bias": "oft_only"},
            "constrained": {"coft": True, "eps": 0.5},
        },
        in_any_order=False,
        # Grouped channels, a kernel that is no square, and one with holes.
        not_on={"": frozenset({"conv2d_groups", "conv2d_same", "conv2d_dilation"})},
    ),
    # It cannot be merged into a layer without bias, here as in the reference.
    PeftType.BEFT: Sample(
        config={},
        options={"uninitialised": {"init_weights": False}},
        not_on={"": frozenset({"linear_no_bias", "llama", "t5"})},
    ),
    PeftType.HRA: Sample(
        reference_calls_base=False,
        config={"r": 2},
        small={"r": 4, "init_weights": False},
        options={
            "orthogonal": {"apply_GS": True, "init_weights": False},
            "odd": {"r": 3, "bias": "hra_only"},
        },
        in_any_order=False,
        not_on={"": _NOT_SQUARE},
    ),
    PeftType.C3A: Sample(
        config={"block_size": 2},
        small={"block_size": 1, "init_weights": "gaussian"},
        options={
            "pattern": {"block_size": 1, "block_size_pattern": {"first|q_proj|query|q": 2, "second": 4}},
            "kaiming": {"init_weights": "kaiming_uniform", "bias": "c3a_only"},
            "zero": {"init_weights": True},
        },
        # It gives the second adapter what the first one gave.
        reference_adds=False,
    ),
    PeftType.GRALORA: Sample(
        config={"r": 4, "alpha": 6},
        small={"r": 2, "alpha": 3, "hybrid_r": 1},
        options={
            "hybrid": {"hybrid_r": 2},
            "one_block": {"gralora_k": 1, "bias": "gralora_only"},
            "uninitialised": {"init_weights": False, "hybrid_r": 2},
        },
    ),
    PeftType.ROAD: Sample(
        config={"group_size": 2},
        small={"group_size": 4, "variant": "road_4"},
        options={
            "two": {"variant": "road_2"},
            "four": {"variant": "road_4", "init_weights": False},
        },
        in_any_order=False,
        reference_mixes=True,
        mixing_lacks=frozenset({"heads", "beams"}),
    ),
    PeftType.MISS: Sample(
        config={"r": 2},
        small={"r": 4},
        options={
            "odd_shard": {"r": 4, "bias": "MiSS_only"},
            "mini": {"init_weights": "mini", "mini_r": 2},
            "block_by_block": {"init_weights": "bat"},
            "uninitialised": {"init_weights": False},
        },
    ),
    PeftType.BOFT: Sample(
        config={"boft_block_size": 2},
        small={"boft_block_size": 0, "boft_block_num": 1},
        options={"uninitialised": {"init_weights": False, "bias": "boft_only"}},
        in_any_order=False,
        not_on={"": _NOT_SQUARE},
    ),
    PeftType.GLORA: Sample(
        reference_calls_base=False,
        config={"r": 2},
        small={"r": 1, "config_A_B": "vector", "config_D_E": "vector"},
        options={
            "vectors": {"config_A_B": "vector", "config_C": "vector", "config_D_E": "none", "bias": "glora_only"},
            "numbers": {"config_A_B": "constant", "config_C": "none"},
            "nothing": {"config_A_B": "none", "config_D_E": "vector"},
            "uninitialised": {"init_weights": False},
        },
        reference_tells=False,
        # Of layers without bias nothing is left of it.
        not_on={"nothing": frozenset({"linear_no_bias", "llama", "t5"})},
        reference_mixes=True,
        mixing_lacks=frozenset({"heads", "beams"}),
    ),
    # Every call needs `task_ids`, which plain networks do not take and generic tests do not give: tests/test_poly.py.
    PeftType.POLY: Sample(
        config={"r": 2, "n_tasks": 3, "n_skills": 3},
        not_on={"": frozenset({*(base.name for base in (*bases.ALL, bases.ENCODER)), "wide"})},
        call={"task_ids": (2, 0, 1)},
    ),
    PeftType.VERA: Sample(
        on_every_base=True,
        config={"r": 4, "d_initial": 0.3},
        small={"r": 4, "d_initial": 0.2},
        options={
            "regenerated": {"save_projection": False, "projection_prng_key": 5},
            "bias_of_targets": {"bias": "vera_only"},
            "uninitialised": {"init_weights": False},
        },
        same_targets=True,
    ),
    PeftType.PVERA: Sample(
        config={"r": 4, "d_initial": 0.3},
        small={"r": 4, "d_initial": 0.2},
        draws_in_training=True,
        options={
            "regenerated": {"save_projection": False, "projection_prng_key": 5},
            "bias_of_targets": {"bias": "pvera_only"},
            "uninitialised": {"init_weights": False},
        },
        same_targets=True,
    ),
    PeftType.VBLORA: Sample(
        # The reference puts the bank of every adapter on all layers with any.
        same_targets=True,
        config={"r": 3, "num_vectors": 10, "vector_length": 2, "topk": 3, "init_vector_bank_bound": 0.8},
        small={"r": 2, "num_vectors": 300, "vector_length": 1, "topk": 2, "init_vector_bank_bound": 0.5},
        options={"bias_of_targets": {"bias": "vblora_only"}},
        # Of such a checkpoint nobody can train, and the tests of options do.
        file_forms={
            "largest": {"save_only_topk_weights": True},
            "wide_indices": {"save_only_topk_weights": True, "num_vectors": 300, "bias": "vblora_only"},
        },
        keeps_less_in_file="of the logits the largest alone, as their weights, which add up to 1",
    ),
    PeftType.RANDLORA: Sample(
        config={"r": 4, "randlora_alpha": 6},
        small={"r": 4, "randlora_alpha": 5},
        options={
            "regenerated": {"save_projection": False, "projection_prng_key": 5},
            "sparse": {"sparse": True},
            "very_sparse": {"very_sparse": True, "save_projection": False},
            "bias_of_targets": {"bias": "randlora_only"},
            "uninitialised": {"init_weights": False},
        },
        same_targets=True,
    ),
    PeftType.WAVEFT: Sample(
        config={"n_frequency": 12, "scaling": 3.0, "init_weights": False},
        small={"n_frequency": 5, "random_loc_seed": 3},
        options={
            "longer": {"wavelet_family": "db3"},
            "least_symmetric": {"wavelet_family": "sym4", "n_frequency_pattern": {"first|q_proj": 8}},
            "no_transform": {"use_idwt": False},
            "dealt_out": {"proportional_parameters": True, "wavelet_family": "coif1"},
            "bias_of_targets": {"bias": "waveft_only"},
        },
    ),
    PeftType.UNILORA: Sample(
        config={"r": 3, "theta_d_length": 37},
        small={"r": 2, "theta_d_length": 23, "proj_seed": 5},
        options={
            "stored": {"save_indices": True, "proj_seed": 7},
            "bias_of_targets": {"bias": "unilora_only"},
            "uninitialised": {"init_weights": False},
        },
        # There every layer names the vectors of all adapters, also of those that are not on it.
        same_targets=True,
    ),
    PeftType.LILY: Sample(
        config={"r": 3, "num_B": 3},
        small={"r": 2, "scaling": 0.5},
        options={
            "strides": {"stride_A": 2},
            "uninitialised": {"init_weights": False, "scaling": 1.5},
        },
        merges=False,
        row_by_row=False,
        reference_shares=False,
    ),
    PeftType.TINYLORA: Sample(
        config={"r": 2, "u": 5, "init_weights": "uniform"},
        small={"u": 3, "projection_seed": 7},
        options={
            "tied": {"weight_tying": 0.5},
            "regenerated": {"save_projection": False, "projection_seed": 3, "weight_tying": 1.0},
            "bias_of_targets": {"bias": "tinylora_only"},
        },
        # There embeddings hold projections as if they were saved.
        not_on={"regenerated": frozenset({"embedding", "embedding_padding", "embedding_scale", "mixed", "llama_tied"})},
        # There every layer names the vectors of all adapters, also of those that are not on it, and an adapter that comes
        # later has the positions of the first one's layers.
        same_targets=True,
    ),
    PeftType.SHIRA: Sample(
        reference_calls_base=False,
        config={"r": 1},
        small={"r": 2, "random_seed": 3},
        options={"uninitialised": {"init_weights": False, "random_seed": 5}},
    ),
    PeftType.SUPERTUNING: Sample(
        reference_calls_base=False,
        config={"sparsity": 0.8, "r": 2},
        small={"sparsity": 0.5, "r": None},
        options={
            "entries_alone": {"r": None},
            "smallest": {"select_top": False, "lora_alpha": 3},
            "all_entries": {"sparsity": 0.0},
            "worked_out": {"save_precomputed_indices": False},
            "uninitialised": {"init_weights": False},
        },
        # Which entries are the largest cannot be told of codes.
        not_on={"worked_out": frozenset({"wide"})},
    ),
    PeftType.ADALORA: Sample(
        config={"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 10},
        one_trained=True,
        small={"init_r": 3, "lora_alpha": 5, "total_step": 10},
        options={
            "bias_of_targets": {"bias": "lora_only"},
            "no_alpha": {"lora_alpha": 0},
            "uninitialised": {"init_lora_weights": False},
        },
        # Without an init the values are so large that rounding shows after several layers.
        not_on={"": frozenset({"conv2d_groups"}), "uninitialised": frozenset({"gpt2", "t5", "bert", "llama"})},
    ),
    PeftType.PROMPT_TUNING: Sample(
        config={"num_virtual_tokens": 4}, small={"num_virtual_tokens": 2}, on_every_base=True
    ),
    PeftType.MULTITASK_PROMPT_TUNING: Sample(
        config={"num_virtual_tokens": 4, "num_tasks": 3, "num_ranks": 2},
        small={"num_virtual_tokens": 2, "num_tasks": 3},
        call={"task_ids": (2, 0, 1)},
        # It cannot be called with `decoder_input_ids`.
        not_on={"": frozenset({"t5"})},
    ),
    PeftType.CPT: Sample(
        stored_otherwise=True,
        config={
            "task_type": "CAUSAL_LM",
            "cpt_token_ids": [4, 7, 5, 9, 6],
            "cpt_tokens_type_mask": [1, 2, 2, 3, 4],
            "cpt_mask": [1] * 5,
        },
        small={"cpt_token_ids": [3, 8], "cpt_tokens_type_mask": [1, 2], "cpt_mask": [1] * 2},
        options={"decay": {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5}},
        task="CAUSAL_LM",
    ),
    PeftType.ADAPTION_PROMPT: Sample(
        config={"adapter_len": 3, "adapter_layers": 1}, small={"adapter_len": 2, "adapter_layers": 2}
    ),
    PeftType.SHADOW: Sample(
        config={"r": 4, "shadow_alpha": 0.5},
        small={"r": 2, "shadow_hidden_size": 8, "shadow_intermediate_size": 6, "update_hidden_size": 3},
        options={
            "narrow": {"shadow_hidden_size": 8, "shadow_num_hidden_layers": 2},
            "own_embeddings": {"share_embeddings": False},
            "uninitialised": {"init_weights": False},
        },
        task="CAUSAL_LM",
        merges=False,
    ),
    PeftType.P_TUNING: Sample(
        stored_otherwise=True,
        config={"num_virtual_tokens": 4, "encoder_hidden_size": 6},
        small={"num_virtual_tokens": 2},
        options={"lstm": {"encoder_reparameterization_type": "LSTM"}},
    ),
}


@dataclass(frozen=True)
class Case:
    """A method on a base model, with one of the method's options or none."""

    method: Method
    base: Base
    option: str = ""

    @property
    def sample(self) -> Sample:
        return SAMPLES[self.method.name]

    def config(self, **changes: Any) -> dict[str, Any]:
        """Fields for `get_peft_config` of either library."""
        targets = {"target_modules": list(self.base.targets)} if self.method.layers else {}
        if not self.saves_modules:
            changes.pop("modules_to_save", None)
        return {
            "peft_type": self.method.name.value,
            "task_type": self.base.task,
            **targets,
            **self.sample.config,
            **self.sample.options.get(self.option, {}),
            **self.sample.file_forms.get(self.option, {}),
            **changes,
        }

    @property
    def saves_modules(self) -> bool:
        """Whether its configs have `modules_to_save`."""
        return "modules_to_save" in {f.name for f in dataclasses.fields(self.method.config)}

    @property
    def trains_biases(self) -> bool:
        """Whether the adapter brings biases of the base: splice keeps the originals beside them."""
        return self.config().get("bias", "none") != "none"

    def with_head(self, **changes: Any) -> dict[str, Any]:
        """`config` of an adapter that saves the head whole as well.

        Not together with trained biases: the reference then writes the head's biases three times.
        """
        return self.config(**({} if self.trains_biases else {"modules_to_save": [self.base.head]}), **changes)

    def other_config(self, **changes: Any) -> dict[str, Any]:
        """Fields of a second adapter for the same model: of other sizes, and on the first target alone if that works."""
        names = list(self.base.targets if self.sample.same_targets else self.base.targets[:1])
        targets = {"target_modules": names} if self.method.layers else {}
        own = {**self.sample.config, **self.sample.small, **targets}
        return {"peft_type": self.method.name.value, "task_type": self.base.task, **own, **changes}

    def __str__(self) -> str:
        return "-".join(filter(None, (self.method.name.value, self.base.name, self.option)))


def supports(method: Method, base: Base) -> bool:
    able = bool(base.kinds) and base.kinds <= set(method.layers)
    return able and base.name not in SAMPLES[method.name].not_on.get("", ())


def _called(base: Base, call: Mapping[str, Any]) -> Base:
    """`base` with these arguments in every call."""
    if not call:
        return base

    def inputs(rows: int) -> Inputs:
        values = {name: torch.tensor(value)[torch.arange(rows) % len(value)] for name, value in call.items()}
        return {**base.inputs(rows), **values}

    return dataclasses.replace(base, inputs=inputs)


# The networks that methods are tested on which act on the call of a network, but for those that stand for all.
_CORE_NETWORKS = ("llama", "t5")


def network_cases(*chosen: Base, options: bool = False) -> list[Case]:
    """Every method that acts on the call of the network as a whole, on each of the base models that it is tested on.

    With `options` with each of its options too.
    """
    # What stands on adapters of another method cannot be made of a config alone, and has tests of its own.
    methods = [m for m in all_methods().values() if m.network_layer is not None and m.experts is None]
    return [
        Case(m, _called(b, SAMPLES[m.name].call), option)
        for m in methods
        for b in chosen
        if (b.name in _CORE_NETWORKS or SAMPLES[m.name].on_every_base) and SAMPLES[m.name].task in (None, b.task)
        for option in ("", *(SAMPLES[m.name].options if options else ()))
    ]


def prompt_cases(*chosen: Base, options: bool = False) -> list[Case]:
    """Those of the `network_cases` whose methods put virtual tokens into the input or the cache."""
    return [case for case in network_cases(*chosen, options=options) if case.method.config.is_prompt_learning]


def parameter_cases(*chosen: Base) -> list[Case]:
    """Every method that can be put on bare parameters, on each of the base models."""
    return [Case(m, b) for m in all_methods().values() if m.parameters_layer is not None for b in chosen]


def plain_cases(*chosen: Base) -> list[Case]:
    """Every method on each of the base models (all of them, if none are named) that it can be put on and is tested on."""
    return [
        Case(m, b)
        for m in all_methods().values()
        for b in chosen or bases.ALL
        # A base that a test has of its own stands for nothing else, so that every method is tried on it.
        if supports(m, b) and (b in bases.CORE or b not in bases.ALL or SAMPLES[m.name].on_every_base)
    ]


def as_stored(cases: Iterable[Case]) -> list[Case]:
    """Those of the cases whose checkpoints hold what is trained."""
    return [case for case in cases if not case.sample.stored_otherwise]


def everywhere(methods: Iterable[Method]) -> list[Method]:
    """Those of the methods that stand for all of their kind where a test has many base models of its own."""
    return [method for method in methods if SAMPLES[method.name].on_every_base]


def kind_cases() -> list[Case]:
    """Every method on every kind of layer that it supports."""
    return plain_cases(*bases.BY_KIND.values())


def option_cases(*chosen: Base) -> Iterator[Case]:
    """Every method with each of its options, on each of the base models that takes it."""
    for case in plain_cases(*chosen):
        for option in case.sample.options:
            if case.base.name not in case.sample.not_on.get(option, ()):
                yield Case(case.method, case.base, option)
