"""The factors of each layer in an adapter of the format, for programs that know nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from splice.checkpoint.dialects import Part
from splice.checkpoint.engines import is_on
from splice.checkpoint.keys import PREFIX, parse_key
from splice.checkpoint.unread import Unread
from splice.errors import UnsupportedFeatureError, counted
from splice.methods.lora.engines import OTHER_PRODUCTS
from splice.methods.lora.written.scales import Scale, rank_of, scale_in

DOWN, UP, UP_BIAS, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"
EMBEDDING_DOWN, EMBEDDING_UP = "lora_embedding_A", "lora_embedding_B"
_NAMES = frozenset({"lora_A", "lora_B", MAGNITUDE, EMBEDDING_DOWN, EMBEDDING_UP})
# How what is no plain LoRA becomes one.
AS_PLAIN = "write it as a plain LoRA first: `splice convert --to lora`"
_MERGE = "merge the adapter into its base: `splice merge`"

# Of these that would not do either: what they change is no weight of a linear layer.
_NO_LINEAR = ("target_parameters", "layer_replication", "trainable_token_indices")

# Fields that ask for more than the product of two factors -> why that is no plain LoRA, and what to do.
REFUSED: Mapping[str, tuple[str, str]] = {
    "use_dora": ("it scales the rows of the sum with the base's weight", AS_PLAIN),
    "bias": ("biases of the base are trained", _MERGE),
    "lora_bias": ("B has a bias", _MERGE),
    "alora_invocation_tokens": ("the adapter is on from certain tokens on alone", _MERGE),
    **{name: (why, _MERGE if name in _NO_LINEAR else AS_PLAIN) for name, why in OTHER_PRODUCTS.items()},
}


# What stands behind the path of a layer with an adapter, of the base's own weight beside it: a copy, of embeddings.
_REPEATED = ".base_layer.weight"


class Factors(NamedTuple):
    """What an adapter has for one layer."""

    # Suffix -> tensor.
    tensors: Mapping[str, Unread]
    # What their product is multiplied with.
    scale: Scale

    @property
    def down(self) -> Unread:
        """A, (rank, in), with the kernel of a convolution; of an embedding (rank, tokens)."""
        return self.tensors[DOWN] if DOWN in self.tensors else self.tensors[EMBEDDING_DOWN]

    @property
    def up(self) -> Unread:
        """B, (out, rank), with a kernel of 1 of a convolution; of an embedding (size, rank)."""
        return self.tensors[UP] if UP in self.tensors else self.tensors[EMBEDDING_UP]


def factors_of(part: Part, program: str, suffixes: Iterable[str], also: Iterable[str] = ()) -> dict[str, Factors]:
    """The factors of every layer, by path.

    Args:
        part: the adapter.
        program: who is to read them, for messages.
        suffixes: of the tensors that it reads.
        also: fields of the config, of those that are refused else, that it knows what to do with.

    Raises:
        UnsupportedFeatureError: the adapter is more than these factors; the message says what to do.
    """
    for name in REFUSED.keys() - set(also):
        value = part.fields.get(name)
        if is_on(value):
            why, remedy = REFUSED[name]
            raise UnsupportedFeatureError(f"{program} has no place for {name}={value!r}: {why}; {remedy}")
    known, layers = set(suffixes), dict[str, dict[str, Unread]]()
    for key, tensor in part.tensors.items():
        parsed = parse_key(key, _NAMES)
        if parsed is None and _repeated(key):
            continue
        if not key.startswith(PREFIX):
            raise UnsupportedFeatureError(
                f"{key!r} is not named as the format names its tensors, which begin with {PREFIX!r}: give `base`, by which "
                "such names are read"
            )
        if parsed is None:
            raise UnsupportedFeatureError(
                f"{program} has no place for {key!r}, a part of the base that is saved whole; {_MERGE}"
            )
        if parsed.suffix not in known:
            remedy = _MERGE if parsed.suffix in (EMBEDDING_DOWN, EMBEDDING_UP) else AS_PLAIN
            raise UnsupportedFeatureError(f"{program} has no place for {key!r}; {remedy}")
        layers.setdefault(parsed.path, {})[parsed.suffix] = tensor
    found = {}
    for path, tensors in layers.items():
        pair = (EMBEDDING_DOWN, EMBEDDING_UP) if EMBEDDING_DOWN in tensors or EMBEDDING_UP in tensors else (DOWN, UP)
        lacking = [suffix for suffix in pair if suffix not in tensors]
        if lacking:
            raise UnsupportedFeatureError(f"{path!r} has no {lacking[0]}: the adapter is damaged")
        rank = rank_of(tensors[pair[0]].shape, tensors[pair[1]].shape, path)
        found[path] = Factors(tensors, scale_in(part.fields, path, rank))
    return found


def left_out(part: Part) -> list[str]:
    """A line where the file repeats weights of the base, which no other program has a place for."""
    found = [key for key in part.tensors if _repeated(key)]
    if not found:
        return []
    return [
        f"{counted(len(found), 'tensor')} of the file repeat the base's own, and are left out ({found[0]}): if they were "
        "trained or have more rows than the base's, the base that is used has to have them"
    ]


def _repeated(key: str) -> bool:
    return key.startswith(PREFIX) and key.endswith(_REPEATED)
