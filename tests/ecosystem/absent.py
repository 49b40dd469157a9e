"""What the reference offers and the shim does not, and what is called in another way there, each with its reason.

Names of methods that are not built are not listed: they come with the method.
"""

from __future__ import annotations

# Modules: reason -> paths.
MODULES: dict[str, str] = {
    "a layer keeps its class whatever stores its weight, so no class is made for a backend": (
        "peft.tuners.adalora.gptq peft.tuners.lora.aqlm peft.tuners.lora.awq peft.tuners.lora.eetq peft.tuners.lora.gptq "
        "peft.tuners.lora.hqq peft.tuners.lora.inc peft.tuners.lora.te peft.tuners.lora.torchao peft.tuners.lora.tp_layer "
        "peft.utils.quantization_utils"
    ),
    "parts of the reference's own mathematics, which no program imports": (
        "peft.tuners.lora.dora peft.tuners.lora.intruders peft.tuners.lora.monteclora peft.tuners.lora.variants "
        "peft.tuners.lora.velora peft.tuners.lycoris_utils peft.utils.incremental_pca peft.utils.merge_utils "
        "peft.tuners.adamss.asa_callback peft.tuners.adamss.utils peft.tuners.adaption_prompt.utils "
        "peft.tuners.boft.fbd peft.tuners.c3a.utils peft.tuners.osf.utils peft.tuners.poly.router "
        "peft.tuners.waveft.constants "
        "peft.tuners.shadow.diffusion_models peft.tuners.shadow.layers "
        "peft.tuners.waveft.wavelet peft.tuners.waveft.waverec2d peft.tuners.xlora.classifier peft.tuners.lora.arrow"
    ),
    "a mixed model's tuner is one like any other": "peft.tuners.mixed peft.tuners.mixed.model",
}

# Names: reason -> names, wherever the reference has them.
NAMES: dict[str, str] = {
    "a layer keeps its class whatever stores its weight, so no class is made for a backend": (
        "GPTQLoraLinear SVDQuantLinear dequantize_bnb_weight get_bnb_param_type get_quantization_kwargs "
        "get_gptqmodel_quant_linear is_gptqmodel_quant_linear is_gptqmodel_awq_layer quantization_extra_repr "
        "resolve_quantization_backend is_torchao_ge_v0_18_0 "
        "SVDLinear4bit SVDLinear8bitLt dispatch_bnb_4bit dispatch_bnb_8bit"
    ),
    "tensor parallelism is the layers' own business": (
        "TpInfo add_lora_tp_hooks_dtensor get_tp_plan_and_mesh dtensor_from_local_like"
    ),
    "at the path that it is from, and not wherever the reference imports it": (
        "ALLOWED_COMPUTE_DTYPES UPCAST_DTYPES ALL_LAYERNORM_LAYERS INCLUDE_LINEAR_LAYERS_SHORTHAND "
        "SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME"
    ),
    "what a load does with files of other layouts is part of the load": (
        "FlattenDims PeftConcatenate PermuteDims convert_peft_adapter_state_dict_for_transformers "
        "convert_peft_config_for_transformers"
    ),
    "which fields of a config have to agree is said by the record of its method": "CONFIG_KEYS_TO_CHECK",
    "no load initialises what it overwrites": "init_empty_weights skip_init_on_device",
    "parts of the reference's own code, which no program imports": (
        "ABC BasePromptEncoder HadaWeight HadaWeightCP LoraEmbeddingATPHolder LoraVariant MIN_EXPECTED_CONFIG_KEYS "
        "MultiplicativeDropoutLayer OFTRotationModule TYPE_CHECKING VARIANT_KWARG_KEYS clone_module create_attention_mask "
        "dispatch_default get_device_map loftq_init make_kron make_weight make_weight_cp torch_load is_torch_tpu_available "
        "check_file_exists_on_hf_hub mlu_available MixedModel "
        "ACT2FN AdaptedAttention AdaptedAttentionGPT DUMMY_TARGET_MODULES FastBlockDiag GloraEmptyPath GloraLoraPath "
        "GloraPath GloraScalarPath GloraVectorPath ModelTypeConfig OrthLayer TRANSFORMERS_MODEL_CONFIG UniqueBaseGrad "
        "WAVELET_REDUCTIONS XLoraConv2dLayer XLoraEmbeddingLayer XLoraLayer XLoraLinearLayer convert_layers_to_xlora "
        "get_fbd_cuda patch_environment prepare_config HashHook SVDHook UNSUPPORTED_LORA_MODULES find_equal_values "
        "get_device_with_meta_params move_inputs_to_device estimate_gradients get_model_device get_target_modules "
        "check_import_allowlist get_default_import_allowlist ShadowCache ShadowCarrier"
    ),
    # There where attrs is installed: without it that module of the reference cannot be imported.
    "parts of the reference's CorDA behind `preprocess_corda`": (
        "CordaEigens calib_cov_distribution collect_eigens collect_eigens_for_layer crop_corda_eigens target_modules"
    ),
}

# Called in another way: reason -> names.
CALLED: dict[str, str] = {
    "recognises layers or modules, and makes none": (
        "AdaLoraLayer AuxiliaryTrainingWrapper Conv1d Conv2d Embedding FourierFTLayer FourierFTLinear IA3Layer "
        "LNTuningLayer Linear LoHaLayer LoKrLayer LoraLayer ModulesToSaveWrapper MultiheadAttention OFTLayer ParamWrapper "
        "PrefixEncoder PromptEmbedding SVDConv2d SVDLinear TrainableTokensLayer TrainableTokensWrapper VeraLayer "
        "AdamssLayer BOFTLayer BeftLayer C3ALayer C3ALinear CPTEmbedding DeftLayer DeftLinear DeloraLayer DeloraLinear "
        "CartridgeEncoder FrodLayer ShadowLayer "
        "GloraLayer GloraLinear GraloraLayer HRAConv2d HRALayer HRALinear HiraLayer LilyLayer Linear4bit Linear8bitLt "
        "MissLayer MissLinear MultitaskPromptEmbedding OSFLayer PeanutLayer PolyLayer PromptEncoder PsoftLayer PveraLayer "
        "RandLoraLayer RoadLayer ShiraLayer SupertuningLayer TinyLoraLayer UniLoraLayer VBLoRALayer WaveFTLayer WaveFTLinear"
    ),
    "all tuners are made in the same way": (
        "AdaLoraModel BaseTuner AdamssModel AdaptionPromptModel OSFModel TinyLoraModel UniLoraModel XLoraModel"
    ),
    "the default follows from the method of the config": "hotswap_adapter_from_state_dict",
    "a config is needed": "PeftModelForTokenClassification",
    "made where a shadow is taken off its base, and by nobody else": "DetachedShadowModel",
    "the pairs of factors are told, not guessed from the order of the parameters": "LoraFAOptimizer",
}
