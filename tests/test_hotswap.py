"""One adapter in the place of another, also in a compiled model: what comes out, what is saved, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import hotswap as in_reference
from torch import nn

import splice
from splice import hotswap
from splice.loading import swapping as loading_swapping
from splice.methods.lora.swapping import RankSwapping


class Net(nn.Module):
    """An embedding, linear layers, and convolutions of which one is grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 8, bias=False)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.second(self.first(self.embed(ids)).relu())
        return self.grouped(self.conv(hidden.unsqueeze(1)).relu())


LINEAR, ALL = ["first", "second"], ["embed", "first", "second", "conv", "grouped"]
IDS = torch.arange(12).view(2, 6)


def base() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def saved(folder: Path, seed: int, targets: list[str], **fields: Any) -> str:
    """An adapter with values everywhere, as the reference writes it."""
    model = peft.get_peft_model(base(), peft.LoraConfig(target_modules=targets, init_lora_weights=False, **fields))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(parameter, std=0.5)
    place = folder / str(seed)
    model.save_pretrained(place)
    return str(place)


@torch.no_grad()
def fresh(library: Any, place: Any) -> torch.Tensor:
    return library.PeftModel.from_pretrained(base(), str(place)).eval()(IDS)


# What the first adapter is, and what takes its place.
PAIRS: dict[str, tuple[list[str], dict[str, Any], list[str], dict[str, Any]]] = {
    "alike": (LINEAR, {"r": 4}, LINEAR, {"r": 4}),
    "another alpha": (LINEAR, {"r": 4}, LINEAR, {"r": 4, "lora_alpha": 3}),
    "a lower rank": (ALL, {"r": 8}, ALL, {"r": 4, "lora_alpha": 6}),
    "a higher rank": (ALL, {"r": 4}, ALL, {"r": 8, "lora_alpha": 4}),
    "ranks of single layers": (LINEAR, {"r": 8}, LINEAR, {"r": 4, "rank_pattern": {"first": 2}}),
    "alphas of single layers": (LINEAR, {"r": 4}, LINEAR, {"r": 4, "alpha_pattern": {"second": 1}}),
    "by the root of the rank": (LINEAR, {"r": 1, "use_rslora": True}, LINEAR, {"r": 4, "use_rslora": True}),
    "the root of a lower rank": (LINEAR, {"r": 4, "use_rslora": True}, LINEAR, {"r": 1, "use_rslora": True}),
    "biases of B": (LINEAR, {"r": 4, "lora_bias": True}, LINEAR, {"r": 2, "lora_bias": True}),
    "no biases of B": (LINEAR, {"r": 4, "lora_bias": True}, LINEAR, {"r": 2}),
    "magnitudes": (ALL, {"r": 4, "use_dora": True}, ALL, {"r": 2, "use_dora": True}),
    "fewer layers": (ALL, {"r": 4}, ["first", "grouped"], {"r": 4}),
}


@pytest.mark.parametrize("prepared", [False, True], ids=["as it is", "with room"])
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_it_computes_what_a_fresh_load_would(
    pair: tuple[list[str], dict[str, Any], list[str], dict[str, Any]], prepared: bool, tmp_path: Path
) -> None:
    before, fields, after, others = pair
    if fields.get("use_dora"):  # its magnitudes on the grouped convolution are another matter
        before, after = [before[:4], after[:4]]
    one, two = saved(tmp_path, 1, before, **fields), saved(tmp_path, 2, after, **others)
    model = splice.PeftModel.from_pretrained(base(), one).eval()
    if prepared:
        with torch.no_grad():
            was = model(IDS)
            hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
            assert torch.allclose(model(IDS), was, atol=1e-6)
    held = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    hotswap.hotswap_adapter(model, two, "default")
    with torch.no_grad():
        ours = model(IDS)
    assert torch.allclose(ours, fresh(splice, two), atol=1e-5)
    assert not torch.allclose(ours, fresh(splice, one), atol=1e-2)
    now = dict(model.named_parameters())
    larger = not prepared and others.get("r", 0) > fields["r"]
    assert all((now[name] is parameter) is not larger for name, parameter in held.items())
    # What is saved is the adapter that is there, for both libraries.
    model.save_pretrained(tmp_path / "again")
    assert torch.allclose(fresh(splice, tmp_path / "again"), ours, atol=1e-5)
    assert torch.allclose(fresh(peft, tmp_path / "again"), ours, atol=1e-5)
    layer = model.get_base_model().first
    assert layer.r["default"] == layer.lora_A["default"].weight.shape[0]
    layer.unscale_layer()
    with torch.no_grad():
        assert torch.allclose(model(IDS), ours, atol=1e-6)


def test_the_reference_computes_the_same(tmp_path: Path) -> None:
    one, two = saved(tmp_path, 1, LINEAR, r=8), saved(tmp_path, 2, LINEAR, r=4, lora_alpha=6)
    outputs = []
    for library, functions in ((splice, hotswap), (peft, in_reference)):
        model = library.PeftModel.from_pretrained(base(), one).eval()
        functions.prepare_model_for_compiled_hotswap(model, target_rank=16)
        functions.hotswap_adapter(model, two, "default")
        with torch.no_grad():
            outputs.append(model(IDS))
            model.get_base_model().first.scale_layer(2.0)
            outputs.append(model(IDS))
    assert torch.allclose(outputs[0], outputs[2], atol=1e-6)
    assert torch.allclose(outputs[1], outputs[3], atol=1e-6)


def test_tensors_in_memory_however_they_are_spelled(tmp_path: Path) -> None:
    one, two = saved(tmp_path, 1, LINEAR, r=4), saved(tmp_path, 2, LINEAR, r=2)
    config = splice.PeftConfig.from_pretrained(two)
    in_file = splice.load_peft_weights(two)
    bare = {name.removeprefix("base_model.model."): tensor for name, tensor in in_file.items()}
    in_memory = {name.replace(".weight", ".default.weight"): tensor for name, tensor in bare.items()}
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in in_memory.items()}
    of_another = {name.replace(".weight", ".another.weight"): tensor for name, tensor in in_file.items()}
    expected = fresh(splice, two)
    for tensors in (in_file, bare, in_memory, compiled, of_another):
        network = base()
        splice.PeftModel.from_pretrained(network, one)
        hotswap.hotswap_adapter_from_state_dict(network, tensors, "default", config)
        with torch.no_grad():
            assert torch.allclose(network(IDS), expected, atol=1e-6)
    assert (config.r, config.lora_alpha) == (2, 8)


@pytest.fixture
def compiling() -> Iterator[Any]:
    import torch._dynamo

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield torch._dynamo
    torch._dynamo.reset()


@pytest.mark.parametrize("targets", [LINEAR, ALL], ids=["linear", "all"])
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "magnitudes"])
def test_a_compiled_model_is_not_compiled_again(targets: list[str], dora: bool, tmp_path: Path, compiling: Any) -> None:
    targets = targets[:4] if dora else targets
    places = [
        saved(tmp_path, seed, targets, r=r, lora_alpha=a, use_dora=dora)
        for seed, r, a in ((1, 4, 8), (2, 2, 3), (3, 8, 4))
    ]
    expected = [fresh(splice, place) for place in places]
    model = splice.PeftModel.from_pretrained(base(), places[0]).eval()
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    compiled = torch.compile(model, backend="eager")
    compiling.utils.counters.clear()
    with torch.no_grad():
        assert torch.allclose(compiled(IDS), expected[0], atol=1e-5)
        graphs = compiling.utils.counters["stats"]["unique_graphs"]
        for place, output in [*zip(places[1:], expected[1:]), (places[0], expected[0])]:
            hotswap.hotswap_adapter(compiled, place, "default")
            assert torch.allclose(compiled(IDS), output, atol=1e-5)
        model.get_base_model().first.set_scale("default", 0.5)
        assert not torch.allclose(compiled(IDS), expected[0], atol=1e-3)
    assert compiling.utils.counters["stats"]["unique_graphs"] == graphs > 0


def test_without_room_another_scale_is_another_graph(tmp_path: Path, compiling: Any) -> None:
    """What the tests above would not see if they could not fail."""
    one, two = saved(tmp_path, 1, LINEAR, r=4), saved(tmp_path, 2, LINEAR, r=8)
    model = splice.PeftModel.from_pretrained(base(), one).eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(IDS)
        hotswap.hotswap_adapter(compiled, two, "default")
        with pytest.raises(Exception, match="(?i)recompil"):
            compiled(IDS)


def test_room_is_made_once_for_all_adapters_and_configs_say_so(tmp_path: Path) -> None:
    one, two = saved(tmp_path, 1, ALL, r=4, rank_pattern={"conv": 2}), saved(tmp_path, 2, LINEAR, r=2, lora_alpha=3)
    model = splice.PeftModel.from_pretrained(base(), one, adapter_name="one").eval()
    model.load_adapter(two, "two")
    mine = splice.PeftConfig.from_pretrained(two)
    with torch.no_grad():
        before = model(IDS)
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8, config={"two": mine})
        assert torch.allclose(model(IDS), before, atol=1e-6)
    configs = model.peft_config
    assert [(configs[n].r, configs[n].rank_pattern) for n in ("one", "two")] == [(8, {}), (8, {})]
    assert (configs["one"].lora_alpha, configs["one"].alpha_pattern) == (16, {"^conv": 32})
    assert (mine.r, mine.lora_alpha) == (configs["two"].r, configs["two"].lora_alpha) == (8, 12)
    scaling = model.get_base_model().first.scaling
    assert all(isinstance(scaling[name], torch.Tensor) and scaling[name].dim() == 0 for name in ("one", "two"))
    model.save_pretrained(tmp_path / "both")
    assert torch.allclose(fresh(peft, tmp_path / "both" / "one"), fresh(peft, one), atol=1e-5)
    assert torch.allclose(fresh(peft, tmp_path / "both" / "two"), fresh(peft, two), atol=1e-5)


def _state(model: nn.Module) -> tuple[Any, ...]:
    tensors = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    return tensors, {name: copy.deepcopy(config) for name, config in model.peft_config.items()}


def _is_as_it_was(model: nn.Module, state: tuple[Any, ...]) -> bool:
    tensors, configs = state
    now = model.state_dict(keep_vars=True)
    same = all(now[name] is tensor and torch.equal(tensor, value) for name, (tensor, value) in tensors.items())
    return same and now.keys() == tensors.keys() and configs == model.peft_config


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"use_rslora": True}, ValueError, "for use_rslora, False != True"),
        ({"lora_dropout": 0.1}, ValueError, "for lora_dropout, 0.0 != 0.1"),
        ({"use_dora": True}, ValueError, "for use_dora, False != True"),
        ({"target_modules": ["first", "conv"]}, RuntimeError, "tensors for conv, where the adapter 'default' has none"),
        ({"lora_bias": True}, NotImplementedError, "it has no lora_B.bias, which the new adapter has"),
        ({"modules_to_save": ["second"]}, RuntimeError, "tensors for second, where"),
    ],
    ids=["stabilised", "dropout", "magnitudes", "another layer", "biases", "a whole module"],
)
def test_what_does_not_fit_is_refused_before_anything_changes(
    fields: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    one = saved(tmp_path, 1, ["first"], r=4)
    two = saved(tmp_path, 2, **{"targets": fields.pop("target_modules", ["first"]), "r": 4, **fields})
    model = splice.PeftModel.from_pretrained(base(), one)
    state = _state(model)
    with pytest.raises(error, match=message):
        hotswap.hotswap_adapter(model, two, "default")
    assert _is_as_it_was(model, state)


def test_other_refusals(tmp_path: Path) -> None:
    one, two = saved(tmp_path, 1, ALL, r=4), saved(tmp_path, 2, LINEAR, r=4)
    model = splice.PeftModel.from_pretrained(base(), one)
    state = _state(model)
    with pytest.raises(RuntimeError, match=r"no adapter 'other'.*\['default'\]"):
        hotswap.hotswap_adapter(model, two, "other")
    with pytest.raises(ValueError, match="Incompatible PEFT types found: LORA and IA3"):
        hotswap.check_hotswap_configs_compatible(model.peft_config["default"], splice.IA3Config())
    with pytest.raises(ValueError, match="IA3 cannot be hot-swapped, only those of LORA"):
        hotswap.check_hotswap_configs_compatible(splice.IA3Config(), splice.IA3Config())
    with pytest.raises(ValueError, match="rank is 4 already"):
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=2)
    with pytest.raises(ValueError, match=r"grouped: cannot be given rank 5.*groups \(2\)"):
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=5)
    with pytest.raises(ValueError, match="one of 'error', 'warn', or 'ignore'"):
        hotswap.prepare_model_for_compiled_hotswap(model, check_compiled="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="No adapter layers"):
        hotswap.prepare_model_for_compiled_hotswap(base())
    assert _is_as_it_was(model, state)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match=r"\*before\* compiling"):
        hotswap.prepare_model_for_compiled_hotswap(compiled)
    with pytest.warns(UserWarning, match=r"\*before\* compiling"):
        hotswap.prepare_model_for_compiled_hotswap(compiled, check_compiled="warn")
    hotswap.prepare_model_for_compiled_hotswap(compiled, check_compiled="ignore")


def test_a_merged_adapter_is_not_replaced(tmp_path: Path) -> None:
    one, two = saved(tmp_path, 1, LINEAR, r=4), saved(tmp_path, 2, LINEAR, r=4)
    model = splice.PeftModel.from_pretrained(base(), one)
    model.merge_adapter()
    state = _state(model)
    with pytest.raises(ValueError, match="merged"):
        hotswap.hotswap_adapter(model, two, "default")
    assert _is_as_it_was(model, state)
    model.unmerge_adapter()
    model.get_base_model().second.merge()
    with pytest.raises(ValueError, match="merged"):
        hotswap.hotswap_adapter(model, two, "default")


class _CutShort(RankSwapping):
    """Is interrupted at its third layer."""

    def __init__(self) -> None:
        self.count = 0

    def put(self, *args: Any) -> None:
        self.count += 1
        if self.count == 3:
            raise KeyboardInterrupt
        super().put(*args)


@pytest.mark.parametrize("prepared", [False, True], ids=["as it is", "with room"])
def test_an_exchange_that_is_cut_short_is_taken_back(prepared: bool, tmp_path: Path) -> None:
    one, two = saved(tmp_path, 1, ALL, r=4), saved(tmp_path, 2, ALL, r=8)
    model = splice.PeftModel.from_pretrained(base(), one).eval()
    if prepared:
        hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    other = splice.PeftModel.from_pretrained(base(), two)
    placed, news = model.base_model.placed["default"], other.base_model.placed["default"]
    state, scales = _state(model), {path: float(layer.scale) for path, layer in placed.items()}
    exchanges = [loading_swapping._Exchange(path, layer, news[path]) for path, layer in placed.items()]
    with pytest.raises(KeyboardInterrupt):
        loading_swapping._exchange(model.base_model, "default", _CutShort(), exchanges)
    assert _is_as_it_was(model, state)
    assert {path: float(layer.scale) for path, layer in placed.items()} == scales
