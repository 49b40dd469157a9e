"""FRoD on a linear layer.

"Full-Rank Efficient Fine-Tuning with Rotational Degrees", doi 10.1609/aaai.v40i31.39813. With V (in, in) of all layers of a
kind, and U (out, in) from `W = U diag(l) V^T`: `W' = U (S + diag(l)) V^T`, where l (in) and a sparse S are trained. A
checkpoint holds V and where the numbers of S stand, or the seed of these. U is worked out of V and of the base's weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from splice.base.dense import dtype_of
from splice.base.layers import LayerKind, features, kind_of
from splice.base.weight_access import check_readable, is_plain
from splice.errors import UnsupportedFeatureError, UnsupportedLayerError
from splice.kinds.layer import AdapterLayer
from splice.kinds.layout import LaidOut, Layout
from splice.kinds.names import SharedInContainersNames
from splice.kinds.original import original_weight, weight_at_hand
from splice.kinds.shared import SharedTensors, UsesShared
from splice.kinds.slot import Role, Slot
from splice.kinds.tensors import Held
from splice.kinds.worked_out import WorkedOut
from splice.methods.frod.basis import basis_of, in_basis, kind_at, layers_by_kind, place_count, places
from splice.methods.frod.config import FrodConfig

# What a weight can be decomposed in.
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class FrodBases(LaidOut, SharedTensors):
    """Of each kind of layers V (in, in), the places of S (2, count), and the size of S."""

    names = SharedInContainersNames()

    @classmethod
    def shared_slots(cls, targets: Sequence[tuple[str, nn.Module]], config: FrodConfig) -> dict[str, Slot]:
        first: dict[str, tuple[str, nn.Module]] = {}
        for path, base in targets:
            check_readable(base, path, "FRoD")
            before, other = first.setdefault(kind_at(path), (path, base))
            if features(other)[0] != features(base)[0]:
                raise UnsupportedLayerError(
                    f"{path}: FRoD has one basis for all layers of the kind {kind_at(path)!r}, and this one takes "
                    f"{features(base)[0]} features where {before} takes {features(other)[0]}. Leave one of them out of the "
                    "targets."
                )
        stored, slots = config.save_projection, {}
        for kind, (_, base) in sorted(first.items()):
            size = features(base)[0]
            count = place_count(size, config.sparse_rate)
            # In the base's own dtype, whatever that of the adapter is: U was worked out of what was rounded so.
            slots[f"frod_V.{kind}"] = Slot((size, size), Role.BUFFER, stored, dtype_of(base))
            slots[f"frod_s_indices.{kind}"] = Slot((2, count), Role.BUFFER, stored, torch.int64, choices=(size, size))
            slots[f"frod_s_size.{kind}"] = Slot((2,), Role.BUFFER, stored, torch.int64)
        return dict(sorted(slots.items(), key=lambda item: _ORDER.index(item[0].partition(".")[0])))

    @classmethod
    def initialise_in(
        cls, layout: Layout, path: str, tensors: dict[str, torch.Tensor], base: nn.Module, config: FrodConfig
    ) -> None:
        sizes = {}
        for kind, paths in layers_by_kind(layout.targets).items():
            weights = [weight_at_hand(layout.targets[path]) for path in paths]
            if any(weight.is_meta for weight in weights):
                raise UnsupportedFeatureError(
                    f"{paths[0]}: the basis of an adapter with FRoD is made of the values of the weights, and these are on "
                    "the meta device. Load the base's weights first."
                )
            tensors[f"frod_V.{kind}"].copy_(
                basis_of([weight.float().cpu() for weight in weights], config.regularization_alpha)
            )
            sizes[kind] = weights[0].shape[1]
        for kind, found in places(sizes, config.sparse_rate, config.projection_prng_key).items():
            tensors[f"frod_s_indices.{kind}"].copy_(found)
            tensors[f"frod_s_size.{kind}"].fill_(sizes[kind])


# Of the tensors that layers share, as the reference writes them.
_ORDER = ("frod_V", "frod_s_indices", "frod_s_size")


class FrodLayer(UsesShared, WorkedOut):
    """FRoD on a linear layer, stored either way round."""

    lengths, values, U = Held("frod_lambda_l"), Held("frod_lambda_s_values"), Held("frod_U")
    # Which V it was, and how often that was changed, when U was worked out.
    of: tuple[int, int] = (0, 0)

    @classmethod
    def slots(cls, base: nn.Module, config: FrodConfig, path: str) -> dict[str, Slot]:
        own, size = dtype_of(base), features(base)[0]
        # What a quantised weight has in directions that hardly count in it is noise, which S takes for something.
        if own not in _DTYPES or not is_plain(base):
            raise UnsupportedLayerError(
                f"{path}: FRoD requires a weight in float32, float16 or bfloat16, and this one is "
                f"{f'in {own}' if is_plain(base) else 'quantised'}. Load the base in one of these, or leave the layer out."
            )
        return {
            "frod_lambda_l": Slot((size,)),
            "frod_lambda_s_values": Slot((place_count(size, config.sparse_rate),)),
        }

    @classmethod
    def resolved(cls, base: nn.Module, config: FrodConfig) -> dict[str, object]:
        return {"fan_in_fan_out": kind_of(base) is LayerKind.TRANSPOSED_LINEAR}

    @classmethod
    def initialise(cls, tensors: dict[str, torch.Tensor], base: nn.Module, config: FrodConfig) -> None:
        values, lengths = tensors["frod_lambda_s_values"], tensors["frod_lambda_l"]
        nn.init.zeros_(values) if config.init_weights else nn.init.normal_(values, std=0.1)
        nn.init.zeros_(lengths)  # what the weight has there is added in the end
        if not config.init_weights:
            lengths += 0.1 * torch.randn_like(lengths)

    def prepare(self, base: nn.Module, config: FrodConfig, path: str) -> None:
        self.kind, self.dropout, self.r = kind_at(path), config.frod_dropout, features(base)[1]

    def join(self, shared: AdapterLayer) -> None:
        super().join(shared)
        self.work_out_now()

    @torch.no_grad()
    def begin(self) -> None:
        weight = original_weight(self.base)
        # Rounded as the weight is, also where they are held in another precision.
        self.lengths.add_(in_basis(weight, self.basis.to(weight.device))[1].to(weight.dtype))

    def leave_empty(self) -> None:
        super().leave_empty()
        self.waits = True

    @property
    def basis(self) -> torch.Tensor:
        """V."""
        return self.shared[0].tensor(f"frod_V.{self.kind}")

    @property
    def places(self) -> torch.Tensor:
        """The places of S, (2, count)."""
        return self.shared[0].tensor(f"frod_s_indices.{self.kind}")

    def is_outdated(self) -> bool:
        if self.waits or torch.compiler.is_compiling():
            return self.waits
        # Another object is one that was moved, as U was.
        now = _state(self.basis)
        return now[0] == self.of[0] and now[1] != self.of[1]

    def work_out(self, weight: torch.Tensor) -> None:
        basis = self.basis
        self.of, self.waits = _state(basis), weight.is_meta or basis.is_meta
        if self.waits:
            self.keep("frod_U", torch.empty_like(weight))
            return
        # Of the V that is there, which a checkpoint brings: its columns may have other signs where it is made again.
        found = in_basis(weight, basis.to(weight.device))[0].to(weight.dtype)
        before = self.find("frod_U")
        if before is None or before.is_meta:
            self.keep("frod_U", found)
        else:  # in place, for graphs that were compiled with it
            before.copy_(found)

    def cast_input(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def core(self) -> torch.Tensor:
        """S + diag(l), (in, in)."""
        lengths, (rows, columns) = self.lengths, self.places.to(self.lengths.device)
        return lengths.diag().index_put((rows, columns), self.values, accumulate=True)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        # One factor after the other: the whole weight costs as much as a thousand tokens.
        hidden = F.linear(F.linear(x, self.basis.T.to(x)), self.core().to(x))
        return F.linear(hidden, self.U.to(x)) - F.linear(x, original_weight(self.base).to(x))

    def delta_weight(self, weight: torch.Tensor) -> torch.Tensor:
        own = original_weight(self.base)
        core = self.core()
        return self.U.to(core) @ core @ self.basis.T.to(core) - own


def _state(tensor: torch.Tensor) -> tuple[int, int]:
    return id(tensor), 0 if tensor.is_inference() else tensor._version
