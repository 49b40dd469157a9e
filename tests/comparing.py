"""What it means that two models, or two checkpoints, are the same."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import splice
from splice.base.bare import bare_parameters, walk_bare
from splice.checkpoint.keys import PREFIX, SHORT_PREFIX, format_key
from splice.kinds.network import NetworkLayer
from tests.bases import Base, run

# Far below what any mistake in the mathematics makes of these models (their outputs are about 1).
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same; of classes of other libraries, whether all tensors inside them do."""
    if not is_traceable_wrapper_subclass(a):
        return torch.equal(a, b)
    inside, _ = a.__tensor_flatten__()
    return all(same_bytes(getattr(a, name), getattr(b, name)) for name in inside)


@dataclass(frozen=True)
class Pair:
    """The same checkpoints on the same base model, loaded by the reference and by splice."""

    base: Base
    reference: Any
    ours: Any
    rows: int = 3

    def each(self, function: Callable[[Any], Any]) -> None:
        """Do the same with both."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(self.reference)
        function(self.ours)

    def outputs(self, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = self.base.inputs(self.rows)
        return run(self.reference, inputs, **options), run(self.ours, inputs, **options)

    def assert_equal(self, **options: Any) -> torch.Tensor:
        """Both give the same output; returns splice's."""
        reference, ours = self.outputs(**options)
        assert_close(ours, reference)
        return ours


def load_both(base: Base, folder: Path, *more: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Pair:
    """Load `folder` as "default", and the others as "second", "third"."""
    loaded = [_load(library, base.build(dtype), folder, more, options) for library in (peft, splice)]
    return Pair(base, *loaded)


def _load(library: Any, network: nn.Module, folder: Path, more: tuple[Path, ...], options: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if library is peft else "error")
        # Some adapters are right on the machine alone that they were made on, which here is this one.
        warnings.filterwarnings("ignore", ".*elsewhere the output may be wrong")
        model = library.PeftModel.from_pretrained(network, str(folder), **options)
        for name, extra in zip(("second", "third"), more):
            model.load_adapter(str(extra), adapter_name=name, **options)
    return model


def assert_close(ours: torch.Tensor, expected: torch.Tensor, factor: float = 1.0) -> None:
    """Equal in dtype, and in value up to rounding."""
    tolerance = TOLERANCE.get(expected.dtype, 0.0) * factor
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two outputs differ by more than rounding explains."""
    return a.shape != b.shape or bool((a - b).abs().max() > 100 * TOLERANCE[torch.float32])


@dataclass(frozen=True)
class Described:
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool | None = None


def names_in_reference(model: nn.Module) -> dict[str, str]:
    """Name of a tensor of our PeftModel -> the name that the reference has for it, where the two differ."""
    tuner: Any = model.base_model
    around = any(isinstance(layer, NetworkLayer) for placed in tuner.placed.values() for layer in placed.values())
    front = SHORT_PREFIX if around else PREFIX
    names = {PREFIX + name: front + name for module in [tuner.model] for name, _ in _bare_tensors(module)}
    taken = set()
    for adapter_name, placed in tuner.placed.items():
        for path, layer in placed.items():
            for suffix in layer.registered:
                theirs = layer.names.in_reference(path, suffix, adapter_name)
                names[layer.names.in_tree(path, suffix, adapter_name)] = theirs
                taken.add(theirs)
    for path, host in tuner.hosts.items():
        first = next((a for a in host.layers.values() if a.names.base), None)
        for name, _ in _bare_tensors(host.base) if first is not None else ():
            theirs = first.names.base_in_reference(path) + name
            names[format_key(path, name)] = format_key(path, f"original_module.{name}") if theirs in taken else theirs
    return names


def _bare_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for path, below in walk_bare(module).items():
        for name, tensor in (*bare_parameters(below), *below._buffers.items()):
            if tensor is not None:
                yield (f"{path}.{name}" if path else name), tensor


def named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`named_parameters`, of a model of either library by the reference's names."""
    names = names_in_reference(model) if isinstance(model, splice.PeftModel) else {}
    return ((names.get(name, name), parameter) for name, parameter in model.named_parameters())


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """`state_dict`, likewise."""
    names = names_in_reference(model) if isinstance(model, splice.PeftModel) else {}
    return {names.get(name, name): tensor for name, tensor in model.state_dict().items()}


def parameters_of(model: nn.Module) -> dict[str, Described]:
    """Every parameter of a model by the reference's name."""
    return {n: Described(tuple(p.shape), p.dtype, p.requires_grad) for n, p in named(model)}


def base_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the base model by their own names, without those of adapters that are on it."""
    first: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in _bare_tensors(network):
        if isinstance(parameter, nn.Parameter):
            first.setdefault(id(parameter), (name, parameter))
    return dict(first.values())


def layer_parameters(model: splice.PeftModel, adapter_name: str, path: str) -> list[nn.Parameter]:
    """The parameters that an adapter has on the layer at `path`."""
    held = model.base_model.placed[adapter_name][path].registered.values()
    return [registry[name] for registry, name, _ in held if isinstance(registry[name], nn.Parameter)]


def in_base_terms(name: str) -> str:
    """The name without what tells that its layer carries an adapter."""
    return name.replace("base_layer.", "").replace("original_module.", "")


def trainable_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in named(model) if parameter.requires_grad}


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint."""
    file = folder / "adapter_model.safetensors"
    return load_file(file) if file.exists() else torch.load(folder / "adapter_model.bin", weights_only=True)


def assert_same_tensors(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, and under each the same bytes."""
    assert set(ours) == set(expected)
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def config_in(folder: Path) -> dict[str, Any]:
    """The fields of a checkpoint's config; lists that stand for sets are sorted."""
    fields = json.loads((folder / "adapter_config.json").read_text())
    return {name: _sorted(value) for name, value in fields.items()}


def _sorted(value: Any) -> Any:
    # The reference names a head once more at every save.
    return sorted(set(value), key=str) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value


@dataclass(frozen=True)
class Snapshot:
    """A base model as it was: its classes, its very parameters, their bytes, and its names."""

    classes: dict[str, type]
    parameters: dict[str, tuple[int, torch.Tensor, bool]]
    state_keys: list[str]
    attributes: dict[str, set[str]]
    training: dict[str, bool]

    @classmethod
    def of(cls, network: nn.Module) -> Snapshot:
        return cls(
            {name: type(module) for name, module in network.named_modules()},
            {n: (id(p), p.detach().clone(), p.requires_grad) for n, p in network.named_parameters()},
            list(network.state_dict()),
            {name: set(module.__dict__) for name, module in network.named_modules()},
            {name: module.training for name, module in network.named_modules()},
        )

    def assert_same(self, network: nn.Module, same_objects: bool = True) -> None:
        """`network` is what it was; with `same_objects` down to the identity of its parameters."""
        now = Snapshot.of(network)
        assert now.classes == self.classes
        assert now.state_keys == self.state_keys
        assert now.attributes == self.attributes
        assert list(now.parameters) == list(self.parameters)
        for name, (identity, value, flag) in self.parameters.items():
            now_identity, now_value, now_flag = now.parameters[name]
            assert same_bytes(now_value, value), name
            assert now_value.dtype == value.dtype, name
            assert now_flag == flag, name
            assert not same_objects or now_identity == identity, name
