"""Reads the tensors of a file that `torch.save` wrote (`.bin`, `.pt`, `.pth`) without torch, and runs nothing of it.

Such a file is a pickle, a small program that may call any Python function, and the bytes of its storages. Here that
program is only followed: a machine of the few instructions that tensors need, in which a name stands for itself and is
never looked up. Any other instruction or name refuses the whole file. Both forms are read: the zip archive (torch 1.6
and later) and the stream of pickles before it.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from vlm_jax.errors import UsageError

MAX_PICKLE = 64 << 20  # bytes; that of a shard with a thousand tensors has a quarter of a megabyte
MAX_DEPTH, MAX_ENTRIES = 8, 1 << 17  # of nested dictionaries, and of all that they hold
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_PLAIN = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
_NARROW = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
DTYPES = {name: np.dtype(name) for name in (*_PLAIN, "uint16", "uint32", "uint64")}
DTYPES |= {name: np.dtype(getattr(ml_dtypes, name)) for name in _NARROW}

# The names that may stand in a pickle.
_STORAGES = {
    "torch DoubleStorage": "float64",
    "torch FloatStorage": "float32",
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
    "torch LongStorage": "int64",
    "torch IntStorage": "int32",
    "torch ShortStorage": "int16",
    "torch CharStorage": "int8",
    "torch ByteStorage": "uint8",
    "torch BoolStorage": "bool",
    "torch.storage UntypedStorage": "uint8",
}
_DTYPE_NAMES = {f"torch {name}": name for name in DTYPES}


class TorchFile:
    """The tensors of a file by name; each is read from the disk when it is asked for, as a contiguous array of its own.

    Those of nested dictionaries are named by their path, joined with dots; what is not a tensor (a step, a name) is not
    among them. Everything is checked at the start. Raises UsageError in one sentence when the file holds anything that
    a tensor does not need, or is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        try:
            self._file = open(self.path, "rb")
        except OSError as error:
            raise UsageError(f"cannot read {self.path}: {error.strerror}") from None
        try:
            self._extents, self._tensors = _open(self._file)
        except _Refused as error:
            self._file.close()
            raise UsageError(
                f"{self.path} is refused, and nothing of it was run: {error}; where you trust it, convert it to "
                "safetensors with torch"
            ) from None
        except _DAMAGE as error:
            self._file.close()
            told = str(error) if isinstance(error, _Damaged) else f"it is damaged ({_first_line(error)})"
            raise UsageError(f"{self.path} cannot be read: {told}") from None

    def keys(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._tensors[name].dtype

    def get(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        width = tensor.dtype.itemsize
        buffer = np.empty(tensor.span * width, np.uint8)
        self._file.seek(self._extents[tensor.storage.key][0] + tensor.offset * width)
        if self._file.readinto(buffer.data) != buffer.nbytes:
            raise UsageError(f"{self.path} ended within {name}: it was changed while it was read")
        flat = buffer != 0 if tensor.dtype == bool else buffer.view(tensor.dtype)
        if tensor.span == math.prod(tensor.shape) and tensor.contiguous:
            return flat.reshape(tensor.shape)
        strides = [stride * width for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False).copy()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


class _Refused(Exception):
    """The file asks for something that a tensor does not need."""


class _Damaged(Exception):
    """The file is not what torch writes."""


# What following a damaged pickle or archive ends in.
_DAMAGE = (
    *(_Damaged, zipfile.BadZipFile, NotImplementedError, OSError, EOFError, struct.error),
    *(ValueError, TypeError, LookupError, ArithmeticError),
)


@dataclasses.dataclass(frozen=True)
class _Name:
    """A name of Python's as it stands in a pickle, "module name"; never looked up."""

    text: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    count: int  # elements


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    dtype: np.dtype
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements of the storage from the first to the last of this tensor."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    @property
    def contiguous(self) -> bool:
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True


# ------------------------------------------------------------------------------------------------------- the containers

Extents = dict[str, tuple[int, int]]  # key of a storage -> its first byte in the file, its bytes


def _open(file: BinaryIO) -> tuple[Extents, dict[str, _Tensor]]:
    start = file.read(64)
    file.seek(0)
    if start.startswith(b"PK\x03\x04"):
        content, extents = _read_zip(file)
    elif start.startswith(b"\x80"):
        content, extents = _read_legacy(file)
    elif start.startswith(b"version https://git-lfs"):
        raise _Damaged("it is the pointer that git-lfs leaves in place of a file; fetch the file itself (git lfs pull)")
    else:
        raise _Damaged("torch.save did not write it")
    tensors: dict[str, _Tensor] = {}
    for name, tensor in _walk(content):
        if name in tensors:
            raise _Damaged(f"two of its tensors are named {name!r}")
        _check(name, tensor, extents)
        tensors[name] = tensor
    return extents, tensors


def _read_zip(file: BinaryIO) -> tuple[Any, Extents]:
    """The archive as torch writes it: `NAME/data.pkl` and `NAME/data/KEY`, nothing compressed."""
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    places: Extents = {}
    free = 0
    for entry in entries:
        name = entry.filename
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise _Refused(f"an entry is named {name!r}, which leads out of the archive")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
            raise _Refused(f"its entry {name!r} is compressed or encrypted, as torch writes none")
        if name in places:
            raise _Refused(f"it has two entries {name!r}")
        file.seek(entry.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise _Damaged(f"its entry {name!r} is not where the directory says")
        begin = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if entry.header_offset < free:
            raise _Refused(f"its entry {name!r} lies over another one")
        free = begin + entry.file_size
        if free > size:
            raise _Damaged(f"its entry {name!r} ends beyond the file, which was not wholly copied")
        places[name] = (begin, entry.file_size)

    pickles = [name for name in places if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise _Damaged("it is a zip archive, but not one that torch.save wrote (no data.pkl)")
    root = pickles[0].removesuffix("data.pkl")

    def read(name: str) -> bytes:
        begin, length = places[root + name]
        if length > MAX_PICKLE:
            raise _Refused(f"its {name} has {length:,} bytes, more than any list of tensors")
        file.seek(begin)
        return file.read(length)

    if root + "byteorder" in places and read("byteorder") != b"little":
        raise _Refused("its numbers are not little-endian")
    prefix = root + "data/"
    extents = {name.removeprefix(prefix): place for name, place in places.items() if name.startswith(prefix)}
    return _Machine().run(io.BytesIO(read("data.pkl"))), extents


def _read_legacy(file: BinaryIO) -> tuple[Any, Extents]:
    """The stream: magic number, version, machine, content, keys of the storages, and then each one's size and bytes."""
    head = io.BytesIO(file.read(MAX_PICKLE))
    if _Machine().run(head) != LEGACY_MAGIC:
        raise _Damaged("it is a pickle, but torch.save did not write it")
    _Machine().run(head)
    machine = _Machine().run(head)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise _Refused("its numbers are not little-endian")
    program = _Machine()
    content = program.run(head)
    keys = _Machine().run(head)
    if not isinstance(keys, list):
        raise _Damaged("it is a pickle, but torch.save did not write it")
    at, size = head.tell(), os.fstat(file.fileno()).st_size
    extents: Extents = {}
    for key in keys:
        file.seek(at)
        (count,) = struct.unpack("<q", file.read(8))
        if not isinstance(key, str) or key not in program.storages or key in extents:
            raise _Damaged("its list of storages is not that of its tensors")
        length = count * program.storages[key].dtype.itemsize
        if count < 0 or at + 8 + length > size:
            raise _Damaged("its storages end beyond the file, which was not wholly copied")
        extents[key] = (at + 8, length)
        at += 8 + length
    return content, extents


def _walk(content: Any) -> Iterator[tuple[str, _Tensor]]:
    """(name, tensor) of everything within dictionaries, lists and tuples."""
    pending: list[tuple[tuple[str, ...], Any]] = [((), content)]
    seen = 0
    while pending:
        path, value = pending.pop()
        seen += 1
        if isinstance(value, _Tensor):
            yield ".".join(path), value
        elif isinstance(value, _Name | _Storage):
            raise _Refused(f"it holds {_dotted(value)} outside of a tensor")
        elif isinstance(value, dict | list | tuple):
            if len(path) == MAX_DEPTH or seen + len(pending) + len(value) > MAX_ENTRIES:
                raise _Refused("its dictionaries are nested deeper than any state of a model")
            items = list(value.items() if isinstance(value, dict) else enumerate(value))
            pending += [((*path, str(key)), item) for key, item in reversed(items)]


def _check(name: str, tensor: _Tensor, extents: Mapping[str, tuple[int, int]]) -> None:
    """A tensor lies within its storage, and the storage is in the file."""
    storage = tensor.storage
    if storage.key not in extents:
        raise _Damaged(f"the storage of {name!r} is missing")
    held = extents[storage.key][1]
    if storage.count * storage.dtype.itemsize > held:
        raise _Damaged(f"the storage of {name!r} has {held:,} bytes instead of {storage.count:,} elements")
    if (tensor.offset + tensor.span) * tensor.dtype.itemsize > storage.count * storage.dtype.itemsize:
        raise _Damaged(f"{name!r} reaches beyond its storage")
    if math.prod(tensor.shape) * tensor.dtype.itemsize > held:
        raise _Refused(f"{name!r} has {math.prod(tensor.shape):,} elements, more than its storage of {held:,} bytes")


# --------------------------------------------------------------------------------------------------------- the machine


def _dotted(value: _Name | _Storage) -> str:
    return repr(value.text.replace(" ", ".")) if isinstance(value, _Name) else "a bare storage"


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any, _: Any, hooks: Any = None, extra: Any = None) -> Any:
    """`torch._utils._rebuild_tensor_v2`."""
    if not isinstance(storage, _Storage):
        raise _Damaged("a tensor has no storage")
    return _tensor(storage, storage.dtype, offset, shape, strides, hooks, extra)


def _rebuild_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, _: Any, hooks: Any, dtype: Any, extra: Any = None
) -> Any:
    """`torch._utils._rebuild_tensor_v3`: over a storage of bytes, for types that have no storage of their own."""
    if not isinstance(storage, _Storage) or not isinstance(dtype, _Name) or dtype.text not in _DTYPE_NAMES:
        raise _Damaged("a tensor has no storage or no type")
    return _tensor(storage, DTYPES[_DTYPE_NAMES[dtype.text]], offset, shape, strides, hooks, extra)


def _tensor(
    storage: _Storage, dtype: np.dtype, offset: Any, shape: Any, strides: Any, hooks: Any, extra: Any
) -> _Tensor:
    if hooks or extra:
        raise _Refused("a tensor of it carries hooks, or is stored conjugated or negated")
    for numbers in (shape, strides):
        if not isinstance(numbers, tuple) or len(numbers) > 32 or not all(map(_whole, numbers)):
            raise _Damaged("the shape or the strides of a tensor are not numbers")
    if len(shape) != len(strides) or not _whole(offset):
        raise _Damaged("the shape of a tensor does not fit its strides")
    return _Tensor(storage, dtype, offset, shape, strides)


def _parameter(tensor: Any, requires_grad: Any, hooks: Any) -> Any:
    """`torch._utils._rebuild_parameter`."""
    if not isinstance(tensor, _Tensor) or hooks:
        raise _Refused("a parameter of it is not a tensor, or carries hooks")
    return tensor


def _empty_dict() -> dict[Any, Any]:
    return {}


# The functions that a pickle may call, by what stands in for them.
_CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _empty_dict,
    "torch._utils _rebuild_tensor_v2": _rebuild,
    "torch._utils _rebuild_tensor_v3": _rebuild_v3,
    "torch._utils _rebuild_parameter": _parameter,
}
_ADMITTED = {*_CALLS, *_STORAGES, *_DTYPE_NAMES}


class _Machine:
    """Follows the instructions of one pickle (Python's `pickletools` splits them)."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}

    def run(self, stream: BinaryIO) -> Any:
        for instruction, argument, _ in pickletools.genops(stream):
            step = _STEPS.get(instruction.name)
            if step is None:
                raise _Refused(f"it holds the pickle instruction {instruction.name}, which no tensor needs")
            step(self, argument)
        return self.stack.pop()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_many(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise _Damaged("its pickle is damaged")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def pop_to_mark(self) -> list[Any]:
        return self.pop_many(len(self.stack) - self.marks.pop())

    def top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise _Damaged("its pickle is damaged")
        return self.stack[-1]

    def name(self, text: str) -> None:
        if text not in _ADMITTED:
            raise _Refused(f"it asks for {_dotted(_Name(text))}, which is no part of a tensor")
        self.push(_Name(text))

    def stack_name(self, _: Any) -> None:
        module, name = self.pop_many(2)
        self.name(f"{module} {name}" if isinstance(module, str) and isinstance(name, str) else "?")

    def append(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise _Refused(f"a dictionary of it has a key that is a {type(key).__name__}")
            target[key] = value

    def call(self, _: Any) -> None:
        function, arguments = self.pop_many(2)
        if not isinstance(function, _Name) or function.text not in _CALLS or not isinstance(arguments, tuple):
            called = _dotted(function) if isinstance(function, _Name) else "what is no function"
            raise _Refused(f"it calls {called}")
        self.push(_CALLS[function.text](*arguments))

    def build(self, _: Any) -> None:
        """The attributes of an OrderedDict: the versions of a model's modules, which no tensor needs."""
        self.pop_many(1)
        self.top(dict)

    def storage(self, _: Any) -> None:
        match self.pop_many(1)[0]:
            # A legacy file adds None, or says which part of another storage this is, which was given up early.
            case ("storage", _Name(text), str(key), str(), count, *view) if view in ([], [None]):
                if text not in _STORAGES or not _whole(count):
                    raise _Damaged("a storage of it has no type or no size")
                found = _Storage(key, DTYPES[_STORAGES[text]], count)
                if self.storages.setdefault(key, found) != found:
                    raise _Damaged("a storage of it has two types")
                self.push(found)
            case _:
                raise _Refused("it refers to something that is no storage of a tensor")


def _constant(value: Any) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(value)


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(tuple(machine.pop_many(count)))


_NUMBERS_AND_TEXT = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")

# Every instruction that is understood: `step(machine, argument)`.
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, _: None),
    **dict.fromkeys(_NUMBERS_AND_TEXT, lambda m, value: m.push(value)),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "EMPTY_TUPLE": _tuple_of(0),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_to_mark())),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "APPEND": lambda m, _: m.append(m.pop_many(1)),
    "APPENDS": lambda m, _: m.append(m.pop_to_mark()),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "SETITEM": lambda m, _: m.set_items(m.pop_many(2)),
    "SETITEMS": lambda m, _: m.set_items(m.pop_to_mark()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda m, index: m.memo.__setitem__(index, m.stack[-1])),
    "MEMOIZE": lambda m, _: m.memo.__setitem__(len(m.memo), m.stack[-1]),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, index: m.push(m.memo[index])),
    "GLOBAL": lambda m, text: m.name(text),
    "STACK_GLOBAL": _Machine.stack_name,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.storage,
}
