"""Parents that read a layer's weights instead of calling it: what is put on the layer takes effect all the same.

In eval mode torch's transformer encoder takes the weights of its layers into one fused kernel, and attention never calls
its output projection. There the reference's adapters have no effect, and nothing says so.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import splice
from splice.base.layers import LayerKind
from splice.errors import PeftWarning
from splice.kinds.registry import all_methods
from tests import bases
from tests.bases import Base, run
from tests.comparing import Snapshot, assert_close, differ
from tests.samples import SAMPLES, Case, everywhere

METHODS = [method for method in everywhere(all_methods().values()) if LayerKind.LINEAR in method.layers]
methods = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name.value)
TARGETS = (["linear1", "linear2"], ["linear1"], ["linear2"], ["out_proj"], ["linear1", "linear2", "out_proj"])
targets_of_an_encoder = pytest.mark.parametrize("targets", TARGETS, ids=str)


class OneLayer(nn.Module):
    """One encoder layer, called by itself."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask))


class Attention(nn.Module):
    """Attention by itself; what it attends to may be masked."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.attention(x, x, x, key_padding_mask=mask, need_weights=False)[0])


def _base(name: str, make: Callable[[], nn.Module]) -> Base:
    return Base(name, make, lambda rows: {"x": torch.randn(rows, 5, 8, generator=bases.generator())}, frozenset())


ENCODERS = (
    _base("encoder", bases.EncoderNet),
    _base("encoder without nesting", lambda: bases.EncoderNet(enable_nested_tensor=False)),
    _base("encoder with a norm", lambda: bases.EncoderNet(norm=nn.LayerNorm(8))),
    _base("layer", OneLayer),
    _base("layer, norm first", lambda: OneLayer(norm_first=True)),
    _base("layer, gelu", lambda: OneLayer(activation="gelu")),
    _base("layer without biases", lambda: OneLayer(bias=False)),
)
ATTENTION = (_base("attention", Attention), _base("attention without biases", lambda: Attention(bias=False)))
CASES = [(base, targets) for base in ENCODERS for targets in TARGETS] + [(base, ["out_proj"]) for base in ATTENTION]
every = pytest.mark.parametrize(("base", "targets"), CASES, ids=str)


@contextmanager
def gradients_of_the_input() -> Iterator[None]:
    with torch.enable_grad():
        yield


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "grad": gradients_of_the_input,
    "neither": nullcontext,
}


def adapted(base: Base, method: Any, targets: list[str], checkpoint: Any, **changes: Any) -> Any:
    config = Case(method, base).config(target_modules=targets, **changes)
    return splice.PeftModel.from_pretrained(base.build(), checkpoint(base, config))


def merged_output(model: Any, inputs: bases.Inputs) -> torch.Tensor:
    """What the base computes with the adapter in its weights: by the fused kernel, where torch chooses it."""
    return run(copy.deepcopy(model).merge_and_unload(), inputs)


def masked(base: Base, rows: int = 3) -> bases.Inputs:
    mask = torch.zeros(rows, 5, dtype=torch.bool)
    mask[1, 3:] = mask[2, 1:] = True
    return {**base.inputs(rows), "mask": mask}


def valid(output: torch.Tensor, inputs: bases.Inputs) -> torch.Tensor:
    """The positions that are not masked; what stands in the others is torch's own affair."""
    return output if "mask" not in inputs else output[~inputs["mask"]]


@methods
@every
def test_the_adapter_takes_effect(base: Base, targets: list[str], method: Any, checkpoint: Any) -> None:
    """In each mode that torch asks for before it takes the fused kernel, with and without a mask."""
    modes = list(MODES.values())
    for turn, inputs in enumerate((base.inputs(3), masked(base))):
        model = adapted(base, method, targets, checkpoint)
        expected, plain = merged_output(model, inputs), run(base.build(), inputs)
        # Each is the first one somewhere: what a call leaves behind may help the next.
        first = (turn + len(base.name) + len(targets)) % len(modes)
        for mode in (*modes[first:], *modes[:first]):
            with mode():
                output = model(**inputs)
            assert_close(valid(output.detach().clone(), inputs), valid(expected, inputs), factor=3)
            assert differ(valid(output.detach(), inputs), valid(plain, inputs))
        assert not model.unused_layers()


@methods
@every
def test_in_training_mode_too(base: Base, targets: list[str], method: Any, checkpoint: Any) -> None:
    model = adapted(base, method, targets, checkpoint)
    expected = merged_output(model, base.inputs(3))
    assert_close(model.train()(**base.inputs(3)).detach(), expected, factor=3)


@methods
@every
def test_gradients_flow(base: Base, targets: list[str], method: Any, checkpoint: Any) -> None:
    """In train and in eval mode; their direction is that of the loss."""
    model = adapted(base, method, targets, checkpoint)
    model.set_adapter("default")
    for mode in (model.train, model.eval):
        mode()
        model.zero_grad()
        loss = model(**base.inputs(3)).square().mean()
        loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert trained
        assert all(p.grad is not None and p.grad.any() for p in trained)
        with torch.no_grad():
            for parameter in trained:
                parameter -= 1e-3 * parameter.grad
        assert model(**base.inputs(3)).square().mean() < loss


@methods
@every
def test_disabled_and_taken_off(base: Base, targets: list[str], method: Any, checkpoint: Any) -> None:
    """Disabled it is the base; taken off, the parents have their own class and switches again."""
    network = base.build()
    before, output = Snapshot.of(network), run(network, masked(base))
    switches = _switches(network)
    folder = checkpoint(base, Case(method, base).config(target_modules=targets))
    model = splice.PeftModel.from_pretrained(network, folder)
    model.load_adapter(folder, "second")
    with model.disable_adapter():
        inputs = masked(base)
        assert_close(valid(run(model, inputs), inputs), valid(output, inputs))
    model.delete_adapter("default")
    assert differ(valid(run(model, inputs), inputs), valid(output, inputs))
    model.delete_adapter("second")
    before.assert_same(network)
    assert _switches(network) == switches
    assert torch.equal(run(network, masked(base)), output)
    splice.PeftModel.from_pretrained(network, folder).unload()
    before.assert_same(network)
    assert _switches(network) == switches


def _switches(network: nn.Module) -> dict[str, Any]:
    """The plain attributes of torch's own modules, by which they choose how to compute."""
    return {
        f"{path}.{name}": value
        for path, module in network.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, str, float, type(None)))
    }


@methods
@every
def test_merged_in_place(base: Base, targets: list[str], method: Any, checkpoint: Any) -> None:
    model = adapted(base, method, targets, checkpoint)
    before = run(model, base.inputs(3))
    model.merge_adapter()
    assert_close(run(model, base.inputs(3)), before, factor=3)
    model.unmerge_adapter()
    assert torch.equal(run(model, base.inputs(3)), before)


def _pickled(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied_by", [copy.deepcopy, _pickled], ids=["copy", "pickle"])
@methods
@every
def test_copied(base: Base, targets: list[str], method: Any, copied_by: Any, checkpoint: Any) -> None:
    network = base.build()
    before = Snapshot.of(network)
    folder = checkpoint(base, Case(method, base).config(target_modules=targets))
    model = splice.PeftModel.from_pretrained(network, folder)
    output = run(model, base.inputs(3))
    clone = copied_by(model)
    assert torch.equal(run(clone, base.inputs(3)), output)
    before.assert_same(clone.unload(), same_objects=False)
    assert torch.equal(run(model, base.inputs(3)), output)
    model.unload()
    before.assert_same(network)


@methods
@every
def test_two_adapters_add_up(base: Base, targets: list[str], method: Any, checkpoint: Any) -> None:
    model = adapted(base, method, targets, checkpoint)
    if method.exclusive:
        pytest.skip("one at a time")
    config = Case(method, base).other_config(target_modules=targets[:1])
    model.load_adapter(checkpoint(base, config, seed=1, name="other"), "second")
    model.base_model.set_adapter(["default", "second"])
    both = run(model, base.inputs(3))
    assert_close(both, merged_output(model, base.inputs(3)), factor=3)
    model.set_adapter("default")
    assert differ(both, run(model, base.inputs(3)))


@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["linear1"]], ids=str)
@methods
def test_rows_of_an_encoder(method: Any, targets: list[str], checkpoint: Any) -> None:
    """Layers that are called can have an adapter for each row, padded or not."""
    base = ENCODERS[0]
    model = adapted(base, method, targets, checkpoint)
    for inputs in (base.inputs(3), masked(base)):
        with model.disable_adapter():
            bare = run(model, inputs)
        full = run(model, inputs)
        mixed = run(model, inputs, adapter_names=["default", "__base__", "default"])
        expected = torch.stack([full[0], bare[1], full[2]])
        assert_close(valid(mixed, inputs), valid(expected, inputs), factor=3)


@methods
def test_rows_are_refused_where_the_weight_is_only_read(method: Any, checkpoint: Any) -> None:
    """There is one weight for the whole batch. Refused, not ignored; the next call is as before."""
    for base in (ENCODERS[0], ATTENTION[0]):
        model = adapted(base, method, ["out_proj"], checkpoint)
        output = run(model, base.inputs(3))
        with pytest.raises(ValueError, match="out_proj") as raised:
            run(model, base.inputs(3), adapter_names=["default", "__base__", "default"])
        assert "rows" in str(raised.value)
        assert torch.equal(run(model, base.inputs(3)), output)


@methods
def test_an_exception_inside_attention_leaves_the_weight(method: Any, checkpoint: Any) -> None:
    base = ATTENTION[0]
    model = adapted(base, method, ["out_proj"], checkpoint)
    layer = model.get_base_model().attention.out_proj
    weight, output = layer._parameters["weight"], run(model, base.inputs(3))
    with pytest.raises((RuntimeError, AssertionError)):
        model(x=torch.randn(2, 5, 7))
    assert layer._parameters["weight"] is weight
    assert "weight" not in vars(layer)
    assert torch.equal(run(model, base.inputs(3)), output)


@methods
def test_trained_biases_of_an_encoder(method: Any, checkpoint: Any) -> None:
    """A trained bias takes the place of the base's, whether its layer is called or only read."""
    if "bias" not in vars(splice.get_peft_config(Case(method, bases.LINEAR).config())):
        pytest.skip("the method trains no biases")
    value = f"{method.name.value.lower()}_only"
    for base, targets in ((ENCODERS[0], ["linear1", "out_proj"]), (ATTENTION[0], ["out_proj"])):
        model = adapted(base, method, targets, checkpoint, bias=value)
        assert_close(run(model, base.inputs(3)), merged_output(model, base.inputs(3)), factor=3)
        with torch.no_grad():
            for adapter in model.base_model.placed["default"].values():
                if adapter.trained_bias is not None:
                    adapter.trained_bias.add_(1)
        assert_close(run(model, base.inputs(3)), merged_output(model, base.inputs(3)), factor=3)


@methods
def test_a_biased_head_and_norms_below_an_encoder(method: Any, checkpoint: Any) -> None:
    """With every bias of the model trained, the fused kernel would step around those of its norms as well."""
    if "bias" not in vars(splice.get_peft_config(Case(method, bases.LINEAR).config())):
        pytest.skip("the method trains no biases")
    base = ENCODERS[0]
    model = adapted(base, method, ["linear1"], checkpoint, bias="all")
    output = run(model, base.inputs(3))
    model.train()
    assert_close(model(**base.inputs(3)).detach(), output, factor=3)
    assert_close(merged_output(model.eval(), base.inputs(3)), output, factor=3)


@methods
def test_an_attention_module_that_is_saved_whole(method: Any, checkpoint: Any) -> None:
    """Also below a parent that would read its weights, also together with a target inside another layer."""
    base = ENCODERS[0]
    model = adapted(base, method, ["linear1"], checkpoint, modules_to_save=["layers.1.linear2"])
    output = run(model, base.inputs(3))
    assert_close(merged_output(model, base.inputs(3)), output, factor=3)
    model = adapted(base, method, ["linear1"], checkpoint, modules_to_save=["layers.0.self_attn"])
    output = run(model, base.inputs(3))
    assert_close(merged_output(model, base.inputs(3)), output, factor=3)
    assert_close(model.train()(**base.inputs(3)).detach(), output, factor=3)


# -- loaded is not yet applied


class GoesAround(bases.WeightReader):
    """Looks for the weight where no adapter can show another."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(x) @ self.first._parameters["weight"].t()


def _reader(method: Any, checkpoint: Any, targets: list[str]) -> Any:
    base = Base("reader", GoesAround, lambda rows: {"x": torch.randn(rows, 6)}, frozenset())
    return adapted(base, method, targets, checkpoint)


@methods
def test_a_model_that_reads_weights_itself_is_reported(method: Any, checkpoint: Any) -> None:
    """One warning, at the first call, and it names the layer; later calls are quiet."""
    model = _reader(method, checkpoint, ["first"])
    assert model.unused_layers() == ["first"]
    with pytest.warns(PeftWarning, match="had no effect") as caught:
        run(model, {"x": torch.randn(2, 6)})
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "'default'" in text
    assert "did not reach its only layer" in text
    assert "first" in text
    assert "unused_layers" in text
    assert model.unused_layers() == ["first"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, {"x": torch.randn(2, 6)})


@pytest.mark.parametrize("new", [False, True], ids=["loaded", "new"])
@methods
def test_the_layers_that_are_not_reached_are_named(method: Any, new: bool, checkpoint: Any) -> None:
    """Also where others are, and of an adapter that was made here."""
    model = _reader(method, checkpoint, ["first", "second"])
    if new:
        config = model.peft_config["default"]
        model = splice.get_peft_model(GoesAround(), config)
    with pytest.warns(PeftWarning, match="had no effect on 1 layer: .* not first") as caught:
        run(model, {"x": torch.randn(2, 6)})
    assert len(caught) == 1
    assert model.unused_layers() == ["first"]


def test_no_warning_where_others_of_a_name_are_called() -> None:
    """A call may well leave out some of the experts."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.experts[1]["up"](x)

    model = splice.get_peft_model(Routed(), splice.LoraConfig(target_modules=["up"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, {"x": torch.randn(2, 4)})
    assert model.unused_layers() == ["experts.0.up", "experts.2.up"]


def test_a_weight_that_nothing_can_be_added_to_is_reported() -> None:
    class Packed(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.to(x.dtype)

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called, self.read = nn.Linear(4, 4), Packed()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.called(x) @ self.read.weight.to(x.dtype)

    model = splice.get_peft_model(Reads(), splice.LoraConfig(target_modules=["called", "read"]))
    with pytest.warns(PeftWarning, match="no effect on 1 of its 2 layers.* read the weights of read instead") as caught:
        run(model, {"x": torch.randn(2, 4)})
    assert len(caught) == 1


@methods
def test_a_load_asks_again(method: Any, checkpoint: Any) -> None:
    """Every load is followed by one look; a disabled adapter is not expected to have an effect."""
    model = _reader(method, checkpoint, ["first"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.disable_adapter():
            run(model, {"x": torch.randn(2, 6)})
    folder = checkpoint(
        lambda: GoesAround(),
        {"peft_type": method.name.value, **SAMPLES[method.name].config, "target_modules": ["first"]},
        name="again",
    )
    model.load_adapter(folder, "again")
    model.set_adapter("again")
    with pytest.warns(PeftWarning, match="'again'"):
        run(model, {"x": torch.randn(2, 6)})


@methods
def test_a_model_whose_adapters_work_is_quiet(method: Any, checkpoint: Any) -> None:
    model = adapted(ENCODERS[0], method, ["linear1", "out_proj"], checkpoint)
    assert model.unused_layers() == model.targeted_module_names
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, ENCODERS[0].inputs(2))
    assert model.unused_layers() == []
