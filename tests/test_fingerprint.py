"""The base an adapter was saved with is recognised, and another one is told from it; the reference reads the same files."""

from __future__ import annotations

import base64
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import splice
from splice.checkpoint.format import METADATA_KEY
from splice.loading import other_base
from splice.loading.fingerprint import Match, fingerprint_of
from tests import bases
from tests.broken import SAFETENSORS, Around, adapter_tensors, bert, by_reference, llama, load, output, parts, unchanged
from tests.samples import Case, network_cases, plain_cases

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def metadata(folder: Path) -> dict[str, str]:
    with safe_open(folder / SAFETENSORS, "pt") as file:
        return dict(file.metadata())


def saved(tmp_path: Path, network: Any = None, **changes: Any) -> Path:
    """An adapter that was saved with this base (`llama()`, if None)."""
    made = parts(**changes).write(tmp_path / "made")
    load(made, network).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def match_of(folder: Path, network: Any) -> Match:
    """Load where any warning is an error."""
    return load(folder, network).load_report.base


def warned(run: Callable[[], Any]) -> str:
    """The text of the one warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    assert [w.category for w in caught] == [splice.PeftWarning]
    return str(caught[0].message)


def changed(network: Any, *endings: str) -> Any:
    """The base after a little training of these layers: one step of the size that fine-tuning makes."""
    source = torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        if name.endswith(endings):
            step = torch.randn(parameter.shape, generator=source) * 0.01 * parameter.detach().float().std()
            parameter.data += step.to(parameter.dtype)
    return network


# -- the same base


@pytest.mark.parametrize("written", DTYPES)
def test_the_same_weights_in_another_dtype(written: torch.dtype, tmp_path: Path) -> None:
    """Whatever dtypes the weights came by: how they were published, saved with, and are held now."""
    for published in DTYPES:
        folder = saved(tmp_path / str(published), llama().to(published).to(written))
        for through in DTYPES:
            for held in DTYPES:
                assert match_of(folder, llama().to(published).to(through).to(held)) is Match.SAME, (published, through)


def test_merged_and_unmerged(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    model = load(folder)
    model.merge_adapter()
    model.save_pretrained(tmp_path / "while merged")
    assert metadata(tmp_path / "while merged")[METADATA_KEY] == metadata(folder)[METADATA_KEY]
    model.load_adapter(folder, "beside")
    assert model.load_report.base is Match.SAME
    model.unmerge_adapter()
    assert match_of(folder, model.unload()) is Match.SAME
    with pytest.warns(splice.PeftWarning, match="weights of 4 of 4 adapted layers differ"):
        splice.PeftModel.from_pretrained(load(folder).merge_and_unload(), folder)


def test_a_head_that_is_random_in_every_base(tmp_path: Path) -> None:
    made = parts(network=bert(), target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    folder = tmp_path / "saved"
    load(made.write(tmp_path / "made"), bert()).save_pretrained(folder)
    other = bert()
    nn.init.normal_(other.classifier.weight)
    assert match_of(folder, other) is Match.SAME


def test_memory_orders_devices_and_other_names_of_the_class(tmp_path: Path) -> None:
    folder, strided = saved(tmp_path), llama()
    for parameter in strided.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.T.contiguous().T
    assert match_of(folder, strided) is Match.SAME
    renamed = llama()
    renamed.__class__ = type("LlamaOfAnotherVersion", (type(renamed),), {})
    assert match_of(folder, renamed) is Match.SAME


class Int8Linear(nn.Linear):
    """A quantised layer, as the backends make them: integers for a weight, and the class of a linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.scale)


def quantised() -> Any:
    network = llama()
    for layer in network.model.layers:
        layer.self_attn.q_proj, layer.self_attn.v_proj = map(
            Int8Linear, (layer.self_attn.q_proj, layer.self_attn.v_proj)
        )
    return network


def test_weights_that_cannot_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantised base, on either side, and one on the meta device: nothing is claimed of values, and the form is told."""
    monkeypatch.setattr(other_base, "_said", set())
    folder = saved(tmp_path)
    text = warned(lambda: splice.PeftModel.from_pretrained(quantised(), folder))
    assert "trained on a base that is not quantised, and this one is stored as Int8Linear" in text
    assert "splice.base_gap" in text
    assert match_of(folder, quantised()) is Match.UNKNOWN
    assert match_of(folder, llama().to("meta")) is Match.UNKNOWN
    load(folder, quantised()).save_pretrained(tmp_path / "of quantised")
    assert json.loads(metadata(tmp_path / "of quantised")[METADATA_KEY])["quantization"] == "Int8Linear"
    text = warned(lambda: splice.PeftModel.from_pretrained(llama(), tmp_path / "of quantised"))
    assert "stored as Int8Linear, and this one is not quantised" in text
    assert match_of(tmp_path / "of quantised", llama()) is Match.UNKNOWN  # and once alone
    one = llama()
    one.model.layers[0].self_attn.q_proj = Int8Linear(one.model.layers[0].self_attn.q_proj)
    assert match_of(folder, one) is Match.SAME  # as far as it can be seen


def test_weights_that_are_elsewhere_while_it_is_saved(tmp_path: Path) -> None:
    """ZeRO-3 leaves none of a weight's elements between calls: they are unknown, and not zeros."""
    model = load(saved(tmp_path))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    values, layer.weight.data = layer.weight.data, torch.empty(0)
    found = fingerprint_of(model.base_model, "default")
    model.save_pretrained(tmp_path / "gathered elsewhere")
    layer.weight.data = values
    unknown = [path for path, samples in zip(found.paths, found.samples) if samples.isnan().any()]
    assert unknown == ["model.layers.0.self_attn.q_proj"]
    assert torch.equal(output(load(tmp_path / "gathered elsewhere")), output(model))


# -- another base


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fine_tuned_base(dtype: torch.dtype, tmp_path: Path) -> None:
    """One warning that names the adapter, how many layers, both bases and the cause; the adapter is loaded all the same."""
    folder = saved(tmp_path)
    other = changed(llama(), "weight").to(dtype)
    text = warned(lambda: splice.PeftModel.from_pretrained(other, folder, adapter_name="mine"))
    assert text.startswith(
        "adapter 'mine': the base is not the one it was saved with: the weights of 4 of 4 adapted layers"
    )
    assert "model.layers.{0,1}.self_attn.q_proj" in text
    assert "a fine-tuned base" in text
    assert "given was a LlamaForCausalLM" in text


def test_one_layer_differs(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    model = load(folder)
    changed(model.get_base_model(), "layers.1.self_attn.v_proj.weight")
    other = changed(llama(), "layers.1.self_attn.v_proj.weight")
    text = warned(lambda: splice.PeftModel.from_pretrained(other, folder))
    assert "the weights of 1 of 4 adapted layers differ (model.layers.1.self_attn.v_proj)" in text
    assert "layers of the base that were trained, initialised anew, or had another adapter merged" in text
    assert match_of(folder, changed(llama(), "o_proj.weight", "embed_tokens.weight")) is Match.SAME  # of no target
    text = warned(lambda: model.load_adapter(folder, "default"))
    assert "adapter 'default': the base is not the one it was saved with: the weights of 1 of 4" in text
    assert model.load_report.base is Match.OTHER_WEIGHTS


def test_another_architecture_is_named_where_it_is_refused(tmp_path: Path) -> None:
    folder, network = saved(tmp_path), bert()
    with unchanged(network), pytest.raises(splice.AdapterMismatchError) as caught:
        splice.PeftModel.from_pretrained(
            network, folder, config=splice.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
        )
    assert "It was saved with a LlamaForCausalLM (4 targets)." in str(caught.value)


def test_a_base_inside_another_module(tmp_path: Path) -> None:
    """Its layers have other paths: a load finds them, and nothing is claimed of their weights."""
    folder = saved(tmp_path, task_type=None)
    assert match_of(folder, Around(llama())) is Match.UNKNOWN


# -- the file


def test_the_reference_reads_the_file(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    assert METADATA_KEY in metadata(folder)
    torch.testing.assert_close(output(by_reference(folder)), output(load(folder)))
    assert len(metadata(folder)[METADATA_KEY]) < 500


def test_every_save_has_the_same_fingerprint(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    model = load(folder, is_trainable=True)
    for tensor in adapter_tensors(model).values():
        tensor.data += 1
    model.save_pretrained(tmp_path / "again")
    assert metadata(tmp_path / "again")[METADATA_KEY] == metadata(folder)[METADATA_KEY]


def test_a_pickle_and_a_file_of_the_reference_have_none(tmp_path: Path) -> None:
    other = changed(llama(), "weight")
    model = load(parts().write(tmp_path / "by reference"))
    assert model.load_report.base is Match.UNKNOWN
    model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert match_of(tmp_path / "bin", other) is Match.UNKNOWN


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        "not JSON",
        '{"version": 99}',
        '{"version":1,"architecture":"A","count":1,"targets":"","quantization":null,"samples":"AAA"}',
    ],
)
def test_an_entry_that_is_no_fingerprint_is_ignored(text: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    save_file(load_file(folder / SAFETENSORS), folder / SAFETENSORS, {"format": "pt", METADATA_KEY: text})
    assert match_of(folder, llama()) is Match.UNKNOWN


# -- what is on disk stays as it is


class Counted(nn.Module):
    """Linear layers whose weights are counted: the same on every machine and in every version of torch."""

    def __init__(self, count: int, size: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(count))
        for number, layer in enumerate(self.layers):
            layer.weight.data = (torch.arange(size * size).view(size, size) + 100.0 * number) / 64


def fingerprint_in(folder: Path, network: nn.Module) -> dict[str, Any]:
    model = splice.get_peft_model(network, splice.LoraConfig(target_modules=r"layers\.\d+"))
    model.save_pretrained(folder)
    return json.loads(metadata(folder)[METADATA_KEY])


def test_the_text_in_the_file_is_what_it_always_was(tmp_path: Path) -> None:
    """Files that are published hold it: another choice of samples would take every base for another one."""
    fingerprint_in(tmp_path, Counted(2))
    assert METADATA_KEY == "splice_base"
    assert metadata(tmp_path)[METADATA_KEY] == (
        '{"architecture":"Counted","count":2,"quantization":null,'
        '"samples":"AACIPgAAkD4AAJg+AACgPgAAqD4AALA+AAC4PgAAwD4AAOo/AADsPwAA7j8AAPA/AADyPwAA9D8AAPY/AAD4Pw==",'
        '"targets":"7da88e6bac3fa638","version":1}'
    )


def test_the_layers_that_are_sampled_are_those_they_always_were(tmp_path: Path) -> None:
    """Up to 64, taken evenly of more, in the order of their paths."""
    for count, rows in ((64, 64), (65, 33), (130, 44)):
        found = fingerprint_in(tmp_path / str(count), Counted(count))
        samples = torch.frombuffer(bytearray(base64.b64decode(found["samples"])), dtype=torch.float32).view(-1, 8)
        step = -(-count // 64)
        numbers = [int(path) for path in sorted(map(str, range(count)))][::step]
        assert found["count"] == count and len(samples) == rows == len(numbers)
        assert samples[:, 0].tolist() == [(17 + 100 * number) / 64 for number in numbers]


@pytest.mark.parametrize(
    ("shape", "first"), [((6, 6), 17), ((2, 4), 0), ((3, 3), 0), ((10, 10), 56), ((1, 3), 0), ((40, 50), 1231)], ids=str
)
def test_the_values_that_are_sampled_are_those_they_always_were(
    shape: tuple[int, int], first: int, tmp_path: Path
) -> None:
    """Eight neighbours, the first of them at 0.618 of the way; zeros behind weights that have fewer. By either way."""
    for strided in (False, True):
        network = Counted(1)
        layer = network.layers[0] = nn.Linear(*shape[::-1], bias=False)
        values = torch.arange(1.0, 1 + shape[0] * shape[1]).view(shape)
        layer.weight.data = values.T.contiguous().T if strided else values
        found = fingerprint_in(tmp_path / str(strided), network)
        samples = torch.frombuffer(bytearray(base64.b64decode(found["samples"])), dtype=torch.float32)
        expected = values.flatten()[first : first + 8].tolist()
        assert samples.tolist() == expected + [0.0] * (8 - len(expected))


# -- every method


@pytest.mark.parametrize("case", [*plain_cases(bases.LINEAR), *network_cases(bases.LLAMA)], ids=str)
def test_every_method_on_the_base_it_was_saved_with(
    case: Case, shared_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Also where a method keeps tensors of its own in place of the base's."""
    model = splice.PeftModel.from_pretrained(
        case.base.build(), shared_checkpoint(case.base, case.config()), is_trainable=True
    )
    model(**case.base.inputs(2))
    model.save_pretrained(tmp_path)
    expected = Match.SAME if case.method.network_layer is None else Match.UNKNOWN
    assert match_of(tmp_path, case.base.build()) is expected
    if expected is Match.SAME:
        assert "differ" in warned(
            lambda: splice.PeftModel.from_pretrained(changed(case.base.build(), "weight"), tmp_path)
        )
