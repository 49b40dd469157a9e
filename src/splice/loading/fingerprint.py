"""Which base an adapter was saved with: a few weights of its targets, kept in the metadata of the weights' file.

An adapter on another base of the same shapes loads without a complaint and answers nonsense. The name in the config
does not tell: it is a path as often as an id, and a fine-tune or another revision may lie under the same one. The
sampled weights do, and they survive what people do to a base without changing it: another dtype, another device,
quantising (then nothing is compared but the form), merging an adapter (the weights before it are looked at).
"""

from __future__ import annotations

import base64
import binascii
import ctypes
import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple

import torch
from torch import nn

from splice.base.backends.finding import backend_of
from splice.base.bare import original_class, own_tensors
from splice.base.weight_access import is_plain as stored_plainly
from splice.base.weight_access import weight_shape
from splice.checkpoint.format import METADATA_KEY
from splice.kinds.module_copy import WholeModule
from splice.kinds.trained_bias import BiasOnly
from splice.loading.base_weight import base_weight
from splice.surgery.tuner import Tuner

_VERSION = 1
# Values of each weight: enough to tell two apart, and little enough for the header of the file.
_SAMPLES = 8
# More layers than this are thinned out evenly: the header of the file stays small, and a load costs little more for it.
_MAX_LAYERS = 64
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# The smallest step of float16: smaller differences come of a dtype.
_SMALLEST = 2.0**-24


class Match(Enum):
    """What a fingerprint says about a given base."""

    SAME = "the weights that could be compared are the same, whatever their dtype"
    OTHER_WEIGHTS = "the same layers with other weights"
    UNKNOWN = "nothing to compare: no fingerprint, other layers, or weights without plain values"


class Fingerprint(NamedTuple):
    """What a base model is known by, as far as one adapter's targets go.

    Attributes:
        architecture: name of the model's class.
        target_count: how many targets there are.
        targets: hash of the targets' paths, and of the shapes of the weights that are sampled.
        quantization: how the first of the quantised targets is stored, with its settings, or its class where nobody knows;
            None where there is none.
        samples: (layers, 8) in float32, of the targets in the order of their paths; a row of NaN where a weight has no
            plain values.
        paths: the target that each row is of; empty for a fingerprint that was read, as they are not stored.
    """

    architecture: str
    target_count: int
    targets: str
    quantization: str | None
    samples: torch.Tensor
    paths: tuple[str, ...] = ()

    def text(self) -> str:
        """As it stands in the metadata; the same weights give the same text."""
        values = self.samples.flatten().tolist()
        fields = {
            "version": _VERSION,
            "architecture": self.architecture,
            "count": self.target_count,
            "targets": self.targets,
            "quantization": self.quantization,
            "samples": base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode(),
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    def __str__(self) -> str:
        quantised = f", stored as {self.quantization}" if self.quantization else ""
        return f"a {self.architecture} ({self.target_count} targets{quantised})"


class Comparison(NamedTuple):
    """How a base compares with a fingerprint.

    Attributes:
        match: the answer.
        compared: how many layers could be compared.
        differing: paths of the layers whose weights are not the same.
        forms: how the weights are stored on the two bases, the adapter's first, where they have the same layers and
            are stored in different ways; empty for plain ones. None where there is nothing to say.
    """

    match: Match
    compared: int = 0
    differing: tuple[str, ...] = ()
    forms: tuple[str, str] | None = None


def read_fingerprint(metadata: Mapping[str, str]) -> Fingerprint | None:
    """The fingerprint in the metadata of a file; None where there is none, or one that a later version wrote."""
    text = metadata.get(METADATA_KEY)
    if text is None:
        return None
    try:
        fields = json.loads(text)
        if fields["version"] != _VERSION:
            return None
        raw = bytearray(base64.b64decode(fields["samples"], validate=True))
        samples = torch.frombuffer(raw, dtype=torch.float32) if raw else torch.empty(0)
        return Fingerprint(
            str(fields["architecture"]), int(fields["count"]), fields["targets"], fields["quantization"],
            samples.view(-1, _SAMPLES),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, RuntimeError, binascii.Error):
        return None  # another tool's entry of that name: it is no part of the adapter


def fingerprint_of(tuner: Tuner, adapter_name: str) -> Fingerprint:
    """Look at the base layers below an adapter that is on the model.

    Modules that are saved whole do not count: the base has random ones in their place more often than not.
    """
    saved_whole = tuple(tuner.peft_config[adapter_name].target_rule().modules_to_save or ())
    paths = sorted(
        path
        for path, layer in tuner.placed[adapter_name].items()
        if path in tuner.adapted
        and not isinstance(layer, BiasOnly)
        and not (isinstance(layer, WholeModule) and path.endswith(saved_whole))
    )
    # Evenly, and not the first ones: fine-tunes change some layers more than others.
    sampled = paths[:: -(-len(paths) // _MAX_LAYERS) or 1]
    layers = [tuner.adapted[path] for path in sampled]
    weights = [base_weight(layer) for layer in layers]
    plain = [weight if _is_plain(weight) else None for weight in weights]
    # Of codes the shape of what they stand for: an adapter may be trained beside them and used beside that.
    shapes = [
        _shape(layer, weight) if known is None else tuple(known.shape)
        for layer, weight, known in zip(layers, weights, plain)
    ]
    digest = hashlib.sha256(repr((paths, shapes)).encode()).hexdigest()
    odd = [layer for layer, weight in zip(layers, plain) if weight is None]
    return Fingerprint(
        original_class(tuner.model).__name__,
        len(paths),
        digest[:16],
        next(filter(None, map(_form, odd)), None),
        _sampled(plain),
        tuple(sampled),
    )


def compare(stored: Fingerprint | None, given: Fingerprint) -> Comparison:
    """Whether `given` is of the base that `stored` was made of."""
    if stored is None or stored.targets != given.targets or stored.samples.shape != given.samples.shape:
        return Comparison(Match.UNKNOWN)
    found = _compared(stored, given)
    if stored.quantization == given.quantization:
        return found
    return found._replace(forms=(stored.quantization or "", given.quantization or ""))


def _compared(stored: Fingerprint, given: Fingerprint) -> Comparison:
    a, b = stored.samples, given.samples
    if torch.equal(a, b) and len(a):  # and nothing in them is NaN
        return Comparison(Match.SAME, len(a))
    known = ~(a.isnan().any(1) | b.isnan().any(1))
    compared = int(known.sum())
    if not compared:
        return Comparison(Match.UNKNOWN)
    if torch.equal(a[known], b[known]):
        return Comparison(Match.SAME, compared)
    differing = [path for path, differs in zip(given.paths, (_differ(a, b, known) & known).tolist()) if differs]
    return Comparison(Match.OTHER_WEIGHTS if differing else Match.SAME, compared, tuple(differing))


def _differ(a: torch.Tensor, b: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Which rows are not the same values in two dtypes.

    Both are rounded to the coarser of the dtypes that can hold each of them. Values that came by way of another dtype were
    rounded twice, which now and then ends one step away; where that happens often, somebody trained the base a little.
    """
    bfloat16 = _held_by(a, torch.bfloat16) | _held_by(b, torch.bfloat16)
    float16 = _held_by(a, torch.float16) | _held_by(b, torch.float16)
    a, b = (torch.where(bfloat16, t.bfloat16().float(), torch.where(float16, t.half().float(), t)) for t in (a, b))
    step = torch.where(bfloat16, 2.0**-7, torch.where(float16, 2.0**-10, 2.0**-23)) * torch.maximum(a.abs(), b.abs())
    difference = (a - b).abs()
    far = difference > step + _SMALLEST
    near = (difference > _SMALLEST) & ~far & known[:, None]
    often = int(near.sum()) > max(3, int(known.sum()) * _SAMPLES // 8)
    return (far | near if often else far).any(1)


def _held_by(samples: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(layers, 1): whether all samples of a layer are values of `dtype`."""
    return (samples.to(dtype).float() == samples).all(1, keepdim=True)


def _is_plain(weight: torch.Tensor | None) -> bool:
    """Whether the values are at hand: not quantised, sharded, offloaded or gathered elsewhere."""
    return (
        weight is not None
        and (type(weight) is nn.Parameter or type(weight) is torch.Tensor)
        and weight.dtype in _FLOATS
        and not weight.is_meta
        and weight.numel() > 0
    )


def _shape(layer: nn.Module, weight: torch.Tensor | None) -> tuple[int, ...] | None:
    if not stored_plainly(layer):
        return weight_shape(layer)
    return None if weight is None else tuple(weight.shape)


def _form(layer: nn.Module) -> str:
    """How a layer without plain values stores its weight; empty where it is not quantised but elsewhere."""
    backend = backend_of(layer)
    if backend is not None:
        return f"{backend.name} ({backend.describe(layer)})"
    return original_class(layer).__name__ if any(t.dtype not in _FLOATS for _, t in own_tensors(layer)) else ""


@torch.no_grad()
def _sampled(weights: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """(layers, 8) in float32, on the CPU: neighbours somewhere in each weight; NaN for None, zeros behind small ones."""
    # Of weights in this process's own memory the bytes are taken; a view of each would cost more than all the rest.
    first = next((weight for weight in weights if weight is not None), None)
    if first is not None and all(_is_at_hand(weight, first.dtype) for weight in weights):
        found = [_bytes_of(weight) for weight in weights if weight is not None]
        return torch.frombuffer(bytearray(b"".join(found)), dtype=first.dtype).float().view(-1, _SAMPLES)
    result = torch.full((len(weights), _SAMPLES), torch.nan)
    views: dict[tuple[torch.device, torch.dtype], list[tuple[int, torch.Tensor]]] = {}
    for row, weight in enumerate(weights):
        if weight is not None:
            # Of a weight in another memory order a copy is made: the same elements are to be looked at in both.
            view = weight.reshape(-1)[_start(weight) : _start(weight) + _SAMPLES]
            padded = nn.functional.pad(view, (0, _SAMPLES - len(view)))
            views.setdefault((weight.device, weight.dtype), []).append((row, padded))
    for same in views.values():  # one transfer for all of a device
        result[[row for row, _ in same]] = torch.stack([view for _, view in same]).to("cpu", torch.float32)
    return result


def _start(weight: torch.Tensor) -> int:
    return max(0, weight.numel() - _SAMPLES) * 618 // 1000


def _is_at_hand(weight: torch.Tensor | None, dtype: torch.dtype) -> bool:
    return (
        weight is not None
        and weight.dtype is dtype
        and weight.is_cpu
        and weight.numel() >= _SAMPLES
        and weight.is_contiguous()
    )


def _bytes_of(weight: torch.Tensor) -> bytes:
    size = weight.itemsize
    return ctypes.string_at(weight.data_ptr() + _start(weight) * size, _SAMPLES * size)
