"""The reader of safetensors files reads what the reference implementation reads, and refuses whatever that refuses."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from splice.checkpoint.header import read_header
from splice.checkpoint.tensors import DTYPES, open_weights
from splice.errors import CheckpointError
from tests.broken import raw_bytes

# What safetensors allows.
MAX_HEADER = 100_000_000
Content = tuple[dict[str, tuple[str, tuple[int, ...], bytes]], dict[str, str]]


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a safetensors file; `header` is its text, or what is written as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def ours(path: Path) -> Content:
    weights: Any = open_weights(path)
    tensors = weights.read(list(weights.entries))
    found = {}
    for (name, own), tensor in zip(weights.entries.items(), tensors):
        assert tensor.dtype is DTYPES[own.dtype]
        assert tuple(tensor.shape) == own.shape
        found[name] = (own.dtype, own.shape, raw_bytes(tensor))
    return found, weights.metadata


def theirs(path: Path) -> Content:
    found = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            found[name] = (part.get_dtype(), tuple(part.get_shape()), raw_bytes(file.get_tensor(name)))
        return found, dict(file.metadata() or {})


def agree(path: Path) -> bool:
    """Both read the same, or splice refuses with its own error; returns whether it read the file."""
    try:
        content = ours(path)
    except CheckpointError:
        return False
    assert content == theirs(path)
    return True


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("header") / "adapter_model.safetensors"


quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = draw(shapes)
    size = math.prod(shape) * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


valid_files = st.builds(
    save,
    st.dictionaries(names, tensors(), max_size=5),
    st.none() | st.dictionaries(names, st.text(max_size=5), min_size=1, max_size=2),
)


# -- what is valid is read


@quick
@given(content=valid_files)
def test_a_valid_file_is_read_as_safetensors_reads_it(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    assert agree(file)


def test_the_places_of_the_tensors_are_right(file: Path) -> None:
    expected = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.int8)}
    content = save(expected)
    file.write_bytes(content)
    for name, own in read_header(file).entries.items():
        assert content[own.offset : own.offset + own.size] == raw_bytes(expected[name])


def test_only_some_tensors_in_any_order(file: Path) -> None:
    expected = {f"t{i}": torch.full((i,), float(i)) for i in range(9)}
    file.write_bytes(save(expected))
    wanted = ["t7", "t0", "t3", "t4"]
    for name, tensor in zip(wanted, open_weights(file).read(wanted)):
        assert torch.equal(tensor, expected[name])


def test_more_tensors_than_one_system_call_takes(file: Path) -> None:
    expected = {f"t{i}": torch.tensor([float(i), -1.0]) for i in range(2500)}
    file.write_bytes(save(expected))
    for name, tensor in zip(expected, open_weights(file).read(list(expected))):
        assert torch.equal(tensor, expected[name])


def test_metadata(file: Path) -> None:
    file.write_bytes(save({"a": torch.ones(1)}, {"format": "pt", "by": "someone"}))
    assert read_header(file).metadata == {"format": "pt", "by": "someone"}


def test_a_file_without_tensors(file: Path) -> None:
    file.write_bytes(save({}))
    assert read_header(file).entries == {}


def test_reading_a_header_reads_no_tensor(file: Path) -> None:
    """A file of 4 GiB with a hole in it is opened at once."""
    size = 2**32
    with open(file, "wb") as out:
        out.write(file_of({"big": entry(0, size, [size // 4])}))
        out.truncate(out.tell() + size)
    assert read_header(file).entries["big"].shape == (size // 4,)
    file.unlink()


# -- what is damaged is refused


@quick
@given(content=valid_files, data=st.data())
def test_a_damaged_file_is_refused_or_read_alike(content: bytes, data: st.DataObject, file: Path) -> None:
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1)) if damaged else 0
        how = data.draw(st.sampled_from(["flip", "cut", "insert", "delete"]))
        if how == "cut":
            del damaged[at:]
        elif how == "insert":
            damaged[at:at] = data.draw(st.binary(max_size=4))
        elif damaged and how == "delete":
            del damaged[at]
        elif damaged:
            damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(damaged)
    agree(file)


@quick
@given(content=valid_files, length=st.integers(0, 400))
def test_a_truncated_file_is_refused(content: bytes, length: int, file: Path) -> None:
    file.write_bytes(content[: min(length, len(content) - 1)])
    with pytest.raises(CheckpointError):
        ours(file)


@quick
@given(content=st.binary(max_size=200), text=st.binary(max_size=60))
def test_random_bytes_are_refused_or_read_alike(content: bytes, text: bytes, file: Path) -> None:
    for each in (content, file_of(text, content)):
        file.write_bytes(each)
        agree(file)


numbers = st.integers(-1, 40) | st.sampled_from([2**31, 2**32, 2**40, 2**63, 2**64, 2**70, -(2**63)])
odd_values = numbers | st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.just([]) | st.just({})


@quick
@given(
    header=st.dictionaries(
        names | st.just("__metadata__"),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F16", "U8", "F4", "C64", "f32"]) | odd_values,
                "shape": st.lists(numbers, max_size=3) | st.lists(odd_values, max_size=2) | odd_values,
                "data_offsets": st.lists(numbers, min_size=2, max_size=2)
                | st.lists(odd_values, max_size=3)
                | odd_values,
            },
            optional={"extra": odd_values},
        )
        | odd_values,
        max_size=2,
    ),
    data=st.binary(max_size=40),
)
def test_any_header_is_refused_or_read_alike(header: dict[str, Any], data: bytes, file: Path) -> None:
    file.write_bytes(file_of(header, data))
    agree(file)


ONE = entry(0, 4)
DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\x08\0\0\0\0\0\0",
    "cut off in the header": file_of({"a": ONE}, b"1234")[:20],
    "cut off in the tensors": file_of({"a": ONE}, b"123"),
    "bytes behind the tensors": file_of({"a": ONE}, b"12345"),
    "no tensor but bytes": file_of({}, b"12345"),
    "overlap": file_of({"a": ONE, "b": entry(2, 6)}, b"123456"),
    "same place": file_of({"a": ONE, "b": ONE}, b"1234"),
    "gap": file_of({"a": ONE, "b": entry(8, 12)}, b"1" * 12),
    "gap in front": file_of({"a": entry(4, 8)}, b"1" * 8),
    "offsets reversed": file_of({"a": entry(4, 0)}, b"1234"),
    "offsets beyond the end": file_of({"a": entry(0, 400, [100])}, b"1234"),
    "negative offset": file_of({"a": entry(-4, 0)}, b""),
    "one offset": file_of({"a": {**ONE, "data_offsets": [0]}}, b"1234"),
    "shape too large for its bytes": file_of({"a": entry(0, 4, [2])}, b"1234"),
    "shape overflow": file_of({"a": entry(0, 0, [2**33, 2**31])}),
    "shape overflow to the right size": file_of({"a": entry(0, 4, [2**32, 2**32 + 1])}, b"1234"),
    "shape beyond 64 bits and no element": file_of({"a": entry(0, 0, [0, 2**70])}),
    "shape product beyond 64 bits and no element": file_of({"a": entry(0, 0, [2**40, 2**40, 0])}),
    "negative shape": file_of({"a": entry(0, 4, [-1, -1])}, b"1234"),
    "fraction in the shape": file_of({"a": entry(0, 4, [1.0])}, b"1234"),
    "true in the shape": file_of({"a": entry(0, 4, [True])}, b"1234"),
    "null in the shape": file_of({"a": entry(0, 4, None)}, b"1234"),
    "string for a shape": file_of({"a": entry(0, 4, "")}, b"1234"),
    "object for a shape": file_of({"a": entry(0, 4, {})}, b"1234"),
    "unknown dtype": file_of({"a": entry(0, 4, [1], "F7")}, b"1234"),
    "lower-case dtype": file_of({"a": entry(0, 4, [1], "f32")}, b"1234"),
    "dtype null": file_of({"a": entry(0, 4, [1], None)}, b"1234"),
    "dtype a list": file_of({"a": entry(0, 4, [1], ["F32"])}, b"1234"),
    "dtype an object": file_of({"a": entry(0, 4, [1], {"F32": 1})}, b"1234"),
    "an entry that is a number": file_of({"a": 3}),
    "an entry that is null": file_of({"a": None}),
    "no dtype": file_of({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "a field twice": file_of(b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"),
    "metadata twice": file_of(b'{"__metadata__":{},"__metadata__":{}}'),
    "bad UTF-8": file_of(b'{"\xff\xfe":1}'),
    "not JSON": file_of(b"{'a': 1}"),
    "half of a JSON": file_of(b'{"a": '),
    "nothing for a header": file_of(b""),
    "a JSON list": file_of([1, 2]),
    "a JSON string": file_of(b'"text"'),
    "half of a character in a name": file_of(b'{"\\ud800":%b}' % json.dumps(ONE).encode(), b"1234"),
    "NaN, which JSON lacks": file_of(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":NaN}}', b"1234"),
    "a minus before zero": file_of(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', b"1234"),
    "a number of five thousand digits": file_of(b'{"a":' + b"9" * 5000 + b"}"),
    "deeply nested": file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "metadata a list": file_of({"__metadata__": ["x"]}),
    "metadata an empty list": file_of({"__metadata__": []}),
    "metadata false": file_of({"__metadata__": False}),
    "metadata with a number": file_of({"__metadata__": {"x": 1}}),
    "header of 1 GiB": file_of(b"{}", length=2**30),
    "header of 2**60 bytes": file_of(b"{}", length=2**60),
    "header longer than allowed": file_of(b"{}", length=MAX_HEADER + 1),
    "web page": b"<!DOCTYPE html><html><head><title>404</title></head></html>",
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_refused(what: str, file: Path) -> None:
    file.write_bytes(DAMAGED[what])
    with pytest.raises(CheckpointError, match="damaged, at [0-9]+ bytes") as caught:
        ours(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("what", DAMAGED)
def test_safetensors_refuses_it_too(what: str, file: Path) -> None:
    """So that no row of the table asks for more than the format does."""
    file.write_bytes(DAMAGED[what])
    with pytest.raises((SafetensorError, UnicodeDecodeError)):
        theirs(file)


# Twice the same name, and what might make up for the missing pair in a count of pairs.
TWICE = {
    "plain": b'{"a":%b,"a":%b}',
    "a colon in a name": b'{"__metadata__":{"b:c":"1"},"a":%b,"a":%b}',
    "a colon in a value": b'{"__metadata__":{"b":"::::"},"a":%b,"a":%b}',
    "an escaped colon": b'{"__metadata__":{"b":"\\u003a\\u003A"},"a":%b,"a":%b}',
    "a colon with spaces before it": b'{"__metadata__" : {"b" :"1"},"a" \t\n:%b,"a":%b}',
    "in the metadata": b'{"__metadata__":{"a":"1","a":"::::"},"b":%b,"c":%b}',
    "by another spelling": b'{"\\u0061":%b,"a":%b}',
    "a field more": b'{"a":{"x":{"y":1},"z":2,"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":%b,"c":%b}',
}


@pytest.mark.parametrize("header", TWICE.values(), ids=TWICE)
def test_a_name_twice_is_refused(header: bytes, file: Path) -> None:
    """safetensors takes the last one."""
    last = b"1234" if header.count(b"%b") == 2 and b'"c"' not in header else b"12345678"
    second = json.dumps(entry(0, 4) if len(last) == 4 else entry(4, 8)).encode()
    file.write_bytes(file_of(header % (json.dumps(entry(0, 4)).encode(), second), last))
    with pytest.raises(CheckpointError, match=r"names \['a'\] twice"):
        ours(file)


def test_a_git_lfs_pointer(file: Path) -> None:
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(CheckpointError, match="a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"):
        ours(file)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_under_the_name_of_a_safetensors_file(legacy: bool, file: Path) -> None:
    torch.save({"a": torch.ones(1)}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"a PyTorch pickle .* rename it to adapter_model\.bin"):
        open_weights(file)


def test_a_plain_pickle_under_the_name_of_a_safetensors_file(file: Path) -> None:
    file.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="damaged"):
        open_weights(file)


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder, not a file"):
        read_header(tmp_path)


def test_a_file_that_shrinks_between_header_and_tensors(file: Path) -> None:
    content = save({"a": torch.arange(1000.0)})
    file.write_bytes(content)
    weights = open_weights(file)
    file.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="cut off while it was read"):
        weights.read(["a"])


def test_a_header_of_half_a_gigabyte_that_is_not_there_costs_nothing(file: Path) -> None:
    """The length is checked against the file before a byte of the header is asked for."""
    file.write_bytes(file_of(b"{}", length=MAX_HEADER))
    with pytest.raises(CheckpointError, match="damaged, at 10 bytes"):
        read_header(file)
