"""The distribution called `peft`: its version, its paths and its names."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import splice
from splice.kinds.registry import all_methods
from tests.ecosystem import absent
from tests.ecosystem.both import reference, shim_version
from tests.ecosystem.surface import Parameter, constants, everything, parameters

Surface = dict[str, dict[str, list[Parameter] | None]]


@pytest.mark.shows("transformers", "finds the distribution `peft`, new enough")
def test_the_version_is_one_and_new_enough_for_transformers() -> None:
    from transformers.utils import is_peft_available

    assert peft.__version__ == version("peft") == shim_version()
    assert is_peft_available()
    assert peft.PeftModel is splice.PeftModel


@pytest.fixture(scope="module")
def there() -> tuple[Surface, dict[str, Any], str, str]:
    return reference(everything)


def test_the_reference_is_asked_in_a_process_of_its_own(there: Any) -> None:
    _, _, version_there, file = there
    assert version_there.startswith("0.21")
    assert Path(file) != Path(peft.__file__)


def test_submodules_are_attributes_and_nothing_is_imported_before_it_is_asked_for() -> None:
    program = (
        "import peft, sys\n"
        "assert not {'torch', 'splice.model', 'peft.tuners'} & set(sys.modules)\n"
        "print(peft.tuners.lora.layer.LoraLayer.__name__, peft.utils.other.ModulesToSaveWrapper.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["LoraLayer", "ModulesToSaveWrapper"]


def test_a_star_gives_every_config_and_model() -> None:
    names: dict[str, Any] = {}
    exec("from peft import *", names)
    for method in all_methods().values():
        assert names[method.config.__name__] is method.config
    assert names["LoraModel"] is peft.tuners.lora.model.LoraModel
    assert {"tuners", "utils", "PeftModel", "LoraModel", "LoraConfig"} <= set(dir(peft))


def test_a_config_is_the_same_at_every_path() -> None:
    """Configs inside LoRA's are told by their class; one of that name from another import of the package is taken too."""
    from peft.tuners import lora

    for name in (
        "BdLoraConfig",
        "EvaConfig",
        "KasaConfig",
        "LoftQConfig",
        "LoraGAConfig",
        "MontecloraConfig",
        "VeloraConfig",
    ):
        places = (peft, peft.tuners, lora, lora.config, splice)
        assert len({getattr(place, name) for place in places}) == 1, name
    fields = [(f.name, f.type, f) for f in dataclasses.fields(peft.KasaConfig)]
    twin = dataclasses.make_dataclass("KasaConfig", fields)
    assert peft.LoraConfig(kasa_config=twin()).kasa_config == peft.KasaConfig()


def test_names_of_methods_that_are_not_there() -> None:
    with pytest.raises(AttributeError, match="NoSuchConfig"):
        peft.NoSuchConfig  # noqa: B018
    with pytest.raises(ModuleNotFoundError, match="no_such_method"):
        import_module("peft.tuners.no_such_method")
    with pytest.raises(ImportError, match="NoSuchLayer"):
        from peft.tuners.lora.layer import NoSuchLayer  # noqa: F401


def test_tuners_and_layers_are_recognised_by_classes_of_their_method() -> None:
    from peft.tuners import ia3, lora
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    network = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    tuner = peft.LoraModel(network, peft.LoraConfig(target_modules=["0", "1"]), "mine")
    assert tuner.model is network
    assert isinstance(tuner, peft.LoraModel)
    assert not isinstance(tuner, peft.IA3Model)
    assert issubclass(peft.LoraModel, BaseTuner)
    assert issubclass(lora.Linear, lora.LoraLayer)
    assert issubclass(lora.LoraLayer, BaseTunerLayer)
    found = [[isinstance(layer, c) for layer in network] for c in (lora.LoraLayer, lora.Linear, lora.Embedding)]
    assert found == [[True, True, False], [False, True, False], [True, False, False]]
    assert not any(isinstance(layer, (ia3.Linear, lora.Linear4bit)) for layer in network)
    with pytest.raises(TypeError, match="IA3Config"):
        peft.IA3Model(nn.Linear(2, 2), peft.LoraConfig(), "default")
    with pytest.raises(TypeError, match="inject_adapter_in_model"):
        lora.Linear(nn.Linear(2, 2), "default", r=8)


def test_what_is_set_on_a_class_that_only_recognises_is_refused() -> None:
    """It would change nothing, in silence: nothing runs a method of these classes."""
    from peft.tuners import lora
    from peft.utils import ModulesToSaveWrapper

    for cls in (lora.Linear, lora.LoraLayer, peft.LoraModel, peft.IA3Model, ModulesToSaveWrapper):
        with pytest.raises(
            NotImplementedError, match=rf"{cls.__name__}.forward = ...` would have no effect.*layer.forward"
        ):
            cls.forward = lambda self, x: x
        assert "forward" not in vars(cls)
    layer = nn.Linear(2, 2)
    tuner = peft.LoraModel(nn.Sequential(layer), peft.LoraConfig(target_modules=["0"]), "default")
    layer.forward = lambda x: x + 1
    assert torch.equal(tuner(torch.ones(1, 2)), torch.full((1, 2), 2.0))
    with pytest.raises(NotImplementedError, match="inject_adapter_in_model"):
        tuner._create_new_module(peft.LoraConfig(), "default", layer)


BUILT = {method.name for method in all_methods().values()}


def words(*tables: dict[str, str]) -> set[str]:
    return {word for table in tables for text in table.values() for word in text.split()}


def belongs_to(path: str) -> peft.PeftType | None:
    """The method whose package a module is in."""
    folder = path.removeprefix("peft.tuners.").partition(".")[0].upper()
    return peft.PeftType(folder) if path.startswith("peft.tuners.") and folder in list(peft.PeftType) else None


@pytest.fixture(scope="module")
def theirs(there: Any) -> Surface:
    """What the reference offers, but for what belongs to methods that are not built."""
    found: Surface = there[0]
    unbuilt = {path for path in found if belongs_to(path) not in (None, *BUILT)}
    names = {name for path in unbuilt for name in found[path]}
    tables = tuple(f"TRANSFORMERS_MODELS_TO_{m.value.replace('_', '')}_" for m in peft.PeftType if m not in BUILT)
    assert unbuilt or len(BUILT) == len(peft.PeftType)

    def expected(path: str, name: str) -> bool:
        return not name.startswith(tables) and (belongs_to(path) in BUILT or name not in names)

    return {p: {n: v for n, v in found[p].items() if expected(p, n)} for p in found if p not in unbuilt}


def test_constants_and_tables_are_those_of_the_reference(there: Any) -> None:
    ours = constants()
    # The reference has no table for it: it says which attention it can be put on.
    del ours["TRANSFORMERS_MODELS_TO_ADAPTIONPROMPT_TARGET_MODULES_MAPPING"]
    assert ours.items() <= there[1].items(), {name: ours[name] for name in ours if ours[name] != there[1].get(name)}
    assert {"EMBEDDING_LAYER_NAMES", "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING"} <= ours.keys()


def test_a_table_of_default_targets_can_be_written_to() -> None:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as targets
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    config.model_type = "mine"
    model = LlamaForCausalLM(config)
    try:
        targets["mine"] = ["up_proj"]
        tuned = peft.get_peft_model(model, peft.LoraConfig())
    finally:
        del targets["mine"]
    assert tuned.base_model.targeted_module_names == ["model.layers.0.mlp.up_proj"]


# What public programs and the libraries around import, of what is built.
PROGRAMS = """
peft: AdaLoraConfig IA3Config LoftQConfig LoHaConfig LoKrConfig LoraConfig LoraModel LoraRuntimeConfig PeftConfig
peft: PeftMixedModel PeftModel PeftModelForCausalLM PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftType
peft: PEFT_TYPE_TO_CONFIG_MAPPING PrefixTuningConfig PromptLearningConfig PromptTuningConfig PromptTuningInit TaskType
peft: MODEL_TYPE_TO_PEFT_MODEL_MAPPING get_peft_config get_peft_model get_peft_model_state_dict inject_adapter_in_model
peft: set_peft_model_state_dict load_peft_weights PromptEmbedding PrefixEncoder shift_tokens_right __version__
peft.config: PeftConfig PeftConfigMixin PromptLearningConfig
peft.functional: cast_adapter_dtype delete_adapter get_peft_model_state_dict inject_adapter_in_model set_adapter
peft.functional: set_peft_model_state_dict set_requires_grad
peft.import_utils: is_bnb_available is_bnb_4bit_available
peft.mapping: PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING PEFT_TYPE_TO_TUNER_MAPPING get_peft_model
peft.mixed_model: PeftMixedModel
peft.peft_model: PeftModel PeftModelForCausalLM PEFT_TYPE_TO_PREFIX_MAPPING set_peft_model_state_dict
peft.tuners: AdaLoraModel LoraConfig LoraModel IA3Model lora
peft.tuners.ia3: IA3Layer Linear Linear4bit Linear8bitLt
peft.tuners.loha.layer: LoHaLayer
peft.tuners.lokr.layer: LoKrLayer factorization
peft.tuners.lora: Conv2d Embedding Linear Linear4bit Linear8bitLt LoraConfig LoraLayer LoraModel bnb layer
peft.tuners.lora.bnb: Linear4bit Linear8bitLt
peft.tuners.lora.config: LoraConfig
peft.tuners.lora.layer: Linear LoraLayer ParamWrapper Embedding MultiheadAttention
peft.tuners.lora.model: LoraModel
peft.tuners.tuners_utils: BaseTuner BaseTunerLayer check_adapters_to_merge check_target_module_exists onload_layer
peft.tuners.tuners_utils: inspect_matched_modules replicate_layers
peft.tuners._buffer_dict: BufferDict
peft.utils: ALLOWED_COMPUTE_DTYPES CONFIG_NAME INCLUDE_LINEAR_LAYERS_SHORTHAND ModulesToSaveWrapper PeftType
peft.utils: SAFETENSORS_WEIGHTS_NAME TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING TaskType TrainableTokensWrapper
peft.utils: UPCAST_DTYPES WEIGHTS_NAME AuxiliaryTrainingWrapper _freeze_adapter _get_batch_size _get_submodules
peft.utils: _get_input_embeddings_name _is_valid_match _set_adapter get_peft_model_state_dict get_quantization_config
peft.utils: id_tensor_storage infer_device register_peft_method set_peft_model_state_dict transpose
peft.utils.constants: DUMMY_MODEL_CONFIG DUMMY_TARGET_MODULES EMBEDDING_LAYER_NAMES SEQ_CLS_HEAD_NAMES
peft.utils.integrations: dequantize_module_weight
peft.utils.other: AuxiliaryTrainingWrapper ModulesToSaveWrapper _get_submodules
peft.utils.save_and_load: get_embedding_layer_name get_peft_model_state_dict set_peft_model_state_dict
"""


@pytest.mark.parametrize("line", PROGRAMS.strip().splitlines())
def test_names_that_programs_import(line: str) -> None:
    path, _, names = line.partition(": ")
    exec(f"from {path} import {', '.join(names.split())}", {})


def imported(path: str) -> Any:
    """The module of the shim; None where there is none."""
    try:
        return import_module(path)
    except ModuleNotFoundError:
        return None


def test_what_is_missing_and_why(theirs: Surface) -> None:
    """The tables are true: what they do not list is there, and what they list is not."""
    modules = {path: imported(path) for path in theirs}
    assert {path for path, module in modules.items() if module is None} == words(absent.MODULES)
    missing = {
        name for path, names in theirs.items() for name in names if modules[path] and not hasattr(modules[path], name)
    }
    assert missing == words(absent.NAMES) & {name for names in theirs.values() for name in names}


def test_everything_is_called_as_in_the_reference(theirs: Surface) -> None:
    """Each parameter has the name, the place and the default that it has there; further ones follow, with defaults."""
    differing = {}
    for path, names in theirs.items():
        for name, wanted in names.items():
            found = parameters(getattr(imported(path), name, None))
            if wanted is not None and found is not None and not accepts(found, wanted):
                differing[name] = (path, found, wanted)
    assert differing.keys() == words(absent.CALLED), {n: differing[n] for n in differing.keys() - words(absent.CALLED)}


def accepts(found: list[Parameter], wanted: list[Parameter]) -> bool:
    """Whether every call that fits to `wanted` fits to `found`, and means the same."""
    fixed = [p for p in wanted if not p[1].startswith("VAR_")]
    rest = found[len(fixed) :]
    same = all(f[:2] == w[:2] and (w[2] is None or f[2] == w[2]) for f, w in zip(found, fixed))
    return len(found) >= len(fixed) and same and all(p[2] is not None or p[1] != "POSITIONAL_OR_KEYWORD" for p in rest)


def test_a_parameter_that_is_missing_is_found() -> None:
    one, two = ("a", "POSITIONAL_OR_KEYWORD", None), ("b", "POSITIONAL_OR_KEYWORD", "1")
    assert accepts([one, two], [one])
    assert accepts([one, two], [one, two])
    assert not accepts([one], [one, two])
    assert not accepts([two, one], [one, two])
    assert not accepts([one, ("b", "POSITIONAL_OR_KEYWORD", "2")], [one, two])
    assert not accepts([one, ("b", "POSITIONAL_OR_KEYWORD", None)], [one])
