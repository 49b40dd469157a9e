"""What a `.bin` file holds, told from the operations of its pickle. None of them is done: no name is looked up or called."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from splice.checkpoint.header import Entry, Header
from splice.errors import CheckpointError

if TYPE_CHECKING:
    import pickletools

# Names that a file asks for which holds nothing but tensors.
_TENSOR, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
_DICT = "collections.OrderedDict"
# Storages by their class: the dtype as safetensors spells it, and the bytes of a value.
_STORAGES = {
    "torch.DoubleStorage": ("F64", 8), "torch.FloatStorage": ("F32", 4), "torch.HalfStorage": ("F16", 2),
    "torch.BFloat16Storage": ("BF16", 2), "torch.LongStorage": ("I64", 8), "torch.IntStorage": ("I32", 4),
    "torch.ShortStorage": ("I16", 2), "torch.CharStorage": ("I8", 1), "torch.ByteStorage": ("U8", 1),
    "torch.BoolStorage": ("BOOL", 1),
}  # fmt: skip
_HARMLESS = {_TENSOR, _PARAMETER, _DICT, *_STORAGES}
# What stands in front of a file inside an archive, before its name.
_LOCAL_HEADER = 30

Operation: TypeAlias = "tuple[pickletools.OpcodeInfo, object, int | None]"


class Pickled(NamedTuple):
    """What a pickle says it holds."""

    # Its tensors. The offset of one that does not lie in the file as it is used is 0.
    header: Header
    # Names that it asks for besides those of tensors, as "module.name": whoever loads it plainly calls them.
    asks_for: tuple[str, ...]


class _Name(NamedTuple):
    """A name that would be looked up."""

    # As "module.name".
    name: str


class _Call(NamedTuple):
    """What would be called."""

    # "module.name"; "" where what is called is no name.
    name: str
    # With what.
    arguments: tuple[object, ...]


class _Stored(NamedTuple):
    """A storage that lies beside the pickle."""

    # The pickle's own description of it.
    description: object


def read_pickled(path: Path) -> Pickled:
    """The tensors that a file of `torch.save` holds, with their names, dtypes and shapes.

    Raises:
        CheckpointError: it is no such file, or one of torch before 1.6, which says what it holds only when it is loaded.
    """
    # Few adapters are pickles, and these take as long to import as a header to read.
    import pickletools
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as raw:
            (data,) = (info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
            walk = _Walk(pickletools.genops(archive.read(data)))
            front = data.filename.removesuffix("data.pkl") + "data/"
            places = {}
            for info in archive.infolist():
                raw.seek(info.header_offset)
                start = raw.read(_LOCAL_HEADER)
                lengths = int.from_bytes(start[26:28], "little") + int.from_bytes(start[28:30], "little")
                if info.compress_type == zipfile.ZIP_STORED:
                    places[info.filename.removeprefix(front)] = (
                        info.header_offset + _LOCAL_HEADER + lengths,
                        info.file_size,
                    )
    # Whatever is wrong with the file, of a module that reads any bytes as operations.
    except (
        zipfile.BadZipFile,
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        EOFError,
        NotImplementedError,
        RuntimeError,
    ) as e:
        with open(path, "rb") as raw:
            old = raw.read(2) == b"\x80\x02"
        what = "a pickle of torch before 1.6" if old else "damaged, or no file that `torch.save` wrote"
        raise CheckpointError(f"{path} is {what}: what it holds cannot be told without loading it ({e})") from e
    root = walk.result if isinstance(walk.result, dict) else {}
    entries = {name: _entry(value, places) for name, value in root.items()}
    return Pickled(
        Header({name: entry for name, entry in entries.items() if entry is not None}, {}),
        tuple(sorted(walk.asked - _HARMLESS)),
    )


class _Walk:
    """Follows the operations of a pickle with descriptions in the place of objects."""

    def __init__(self, operations: Iterable[Operation]) -> None:
        # Every name that would be looked up.
        self.asked: set[str] = set()
        self._stack: list[object] = []
        # Where the open marks are in the stack.
        self._marks: list[int] = []
        self._memo: dict[object, object] = {}
        for opcode, argument, _ in operations:
            self._step(opcode.name, argument)
        self.result = self._stack[-1]

    def _step(self, name: str, argument: object) -> None:
        stack = self._stack
        if name in ("PROTO", "FRAME", "STOP"):
            return
        if name in _PUSHES:
            stack.append(_PUSHES[name]() if argument is None else argument)
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name in ("TUPLE", "LIST"):
            items = self._behind_mark()
            stack.append(tuple(items) if name == "TUPLE" else items)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[argument])
        elif name in ("SETITEM", "SETITEMS"):
            items = self._behind_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            self._set(stack[-1], items)
        elif name in ("APPEND", "BUILD"):
            stack.pop()
        elif name == "APPENDS":
            self._behind_mark()
        else:
            self._step_of_names(name, argument)

    def _step_of_names(self, name: str, argument: object) -> None:
        """The operations that would look a name up, or call what was found."""
        stack = self._stack
        if name in ("GLOBAL", "STACK_GLOBAL", "INST"):
            if name == "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                argument = f"{module} {attribute}"
            found = str(argument).replace(" ", ".")
            self.asked.add(found)
            stack.append(_Call(found, tuple(self._behind_mark())) if name == "INST" else _Name(found))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, called = stack.pop(), stack.pop()
            what = called.name if isinstance(called, _Name) else ""
            given = arguments if isinstance(arguments, tuple) else ()
            stack.append({} if what == _DICT else _Call(what, given))
        elif name == "BINPERSID":
            stack.append(_Stored(stack.pop()))
        else:
            raise ValueError(f"the pickle has the operation {name}, which tensors never need")

    def _behind_mark(self) -> list[object]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    @staticmethod
    def _set(target: object, items: list[object]) -> None:
        if isinstance(target, dict):
            target.update((key, value) for key, value in zip(items[::2], items[1::2]) if isinstance(key, str))


# Operations that only push: their argument, or one of these.
_PUSHES: dict[str, Callable[[], object]] = {
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "NONE": lambda: None, "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False, **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "INT", "LONG", "BINFLOAT", "FLOAT", "BINUNICODE", "SHORT_BINUNICODE",
         "BINUNICODE8", "UNICODE", "BINSTRING", "SHORT_BINSTRING", "STRING", "BINBYTES", "SHORT_BINBYTES"), str,
    ),
}  # fmt: skip


def _entry(value: object, places: dict[str, tuple[int, int]]) -> Entry | None:
    """The tensor that a call would make; None where it would make something else."""
    while isinstance(value, _Call) and value.name == _PARAMETER and value.arguments:
        value = value.arguments[0]
    match value:
        case _Call(
            name=name,
            arguments=(
                _Stored(description=("storage", _Name(name=storage), key, _, _)),
                int(offset),
                tuple(shape),
                tuple(strides),
                *_,
            ),
        ) if name == _TENSOR and storage in _STORAGES and all(type(n) is int and n >= 0 for n in shape):
            dtype, width = _STORAGES[storage]
            size = math.prod(shape) * width
            start, length = places.get(str(key), (0, 0))
            plain = strides == tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))) or size == 0
            inside = start > 0 and 0 <= offset * width <= length - size
            return Entry(dtype, shape, start + offset * width if plain and inside else 0, size)
    return None
