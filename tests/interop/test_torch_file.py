"""Files of torch without torch: every tensor exact, and whatever could run code or fill the memory refused."""

from __future__ import annotations

import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from vlm_jax.errors import UsageError
from vlm_jax.interop.torch_file import TorchFile

# ---------------------------------------------------------------------------------------- what torch itself wrote


def tensors() -> dict[str, Any]:
    """Tensors of every kind: contiguous, transposed, cut, strided, shared, empty, without dimensions."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    return {
        "base": base,
        "transposed": base.T,
        "part": base[1:4, 2:5],
        "strided": base[::2, ::3],
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "bfloat16": torch.randn(3, 4).bfloat16(),
        "float16": torch.randn(5).half(),
        "int64": torch.arange(-3, 3),
        "int32": torch.arange(4, dtype=torch.int32),
        "int8": torch.arange(-4, 4, dtype=torch.int8),
        "uint8": torch.arange(4, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
    }


def bits(tensor: Any) -> bytes:
    """The values of a tensor as bytes, in row-major order."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_every_tensor_is_bit_exact(tmp_path: Path, legacy: bool) -> None:
    saved, torch = tensors(), pytest.importorskip("torch")
    if not legacy:  # types that the older form cannot hold
        saved |= {"float8": torch.randn(7).to(torch.float8_e4m3fn), "uint16": torch.arange(5).to(torch.uint16)}
    torch.save(saved, tmp_path / "a.bin", _use_new_zipfile_serialization=not legacy)
    with TorchFile(tmp_path / "a.bin") as file:
        assert file.keys() == list(saved)
        for name, tensor in saved.items():
            array = file.get(name)
            assert (array.shape, array.dtype) == (file.shape(name), file.dtype(name)), name
            assert array.shape == tuple(tensor.shape) and str(tensor.dtype) == f"torch.{array.dtype}", name
            assert array.flags.c_contiguous and array.tobytes() == bits(tensor), name
        assert file.dtype("bfloat16") == ml_dtypes.bfloat16


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_the_state_of_a_module_and_of_a_whole_training(tmp_path: Path, legacy: bool) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = model.state_dict()
    torch.save({"epoch": 3, "name": "x", "model": state}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    with TorchFile(tmp_path / "a.pt") as file:
        assert file.keys() == [f"model.{name}" for name in state]
        assert all(file.get(f"model.{name}").tobytes() == bits(tensor) for name, tensor in state.items())


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_file_cut_short_is_refused_at_the_start(tmp_path: Path, legacy: bool) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.randn(300)}, tmp_path / "whole.bin", _use_new_zipfile_serialization=not legacy)
    whole = (tmp_path / "whole.bin").read_bytes()
    for length in (0, 3, 30, 200, 700, len(whole) - 400, len(whole) - 1):
        (tmp_path / "cut.bin").write_bytes(whole[:length])
        with pytest.raises(UsageError, match="cannot be read"):
            TorchFile(tmp_path / "cut.bin")


# ---------------------------------------------------------------------------------------- what somebody else made


def archive(path: Path, content: bytes, *, compression: int = zipfile.ZIP_STORED, **more: bytes) -> Path:
    """A zip file as torch lays it out around the pickle `content`; `more` are its storages."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", content)
        for name, data in more.items():
            file.writestr(f"archive/data/{name.removeprefix('s')}", data)
    return path


def legacy(path: Path, content: bytes) -> Path:
    before = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join([*before, content, pickle.dumps([], 2)]))
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def tensor(
    *, key: str = "0", count: int = 8, offset: int = 0, shape: tuple = (8,), strides: tuple = (1,), hooks: bytes = b""
) -> bytes:
    """The instructions that make one float32 tensor, as torch writes them."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(count) + b"tQ"
    numbers = [b"(" + b"".join(map(number, values)) + b"t" for values in (shape, strides)]
    hooks = hooks or b"ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + b"".join(numbers) + b"\x89" + hooks + b"tR"
    )


def state(**values: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in values.items()) + b"u."


BYTES = np.arange(8, dtype=np.float32).tobytes()


class Payload:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


class Stateful:
    """Nothing is called, but an object would be made and its attributes set."""


def nested(mark: Path) -> dict[str, Any]:
    return {"model": {"layers": [1, (2, {"weights": Payload(mark)})]}}


@pytest.mark.parametrize("wrap", [archive, legacy])
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("make", [Payload, nested], ids=["plain", "nested"])
def test_a_payload_does_not_run_and_is_named(
    tmp_path: Path, make: Callable[[Path], Any], protocol: int, wrap: Callable[[Path, bytes], Path]
) -> None:
    mark = tmp_path / "ran"
    content = pickle.dumps(make(mark), protocol)
    file = wrap(tmp_path / "bad.bin", content)
    with pytest.raises(UsageError) as error:
        TorchFile(file)
    assert not mark.exists()
    assert "bad.bin" in str(error.value) and str(error.value).count("\n") == 0
    if protocol >= 2:
        assert "'posix.system'" in str(error.value) and "refused" in str(error.value)
    pickle.loads(content)
    assert mark.exists(), "the payload would not have run anyway, so that this test shows nothing"


REFUSED = {
    "an object of a class": pickle.dumps(Stateful(), 2),
    "eval": b"\x80\x02cbuiltins\neval\n" + text("1") + b"\x85R.",
    "the old opcode for an instance": b"\x80\x02(" + text("1") + b"ios\nsystem\n.",
    "an attribute of an admitted name": b"\x80\x04"
    + text("torch._utils")
    + text("_rebuild_tensor_v2.__globals__")
    + b"\x93.",
    "a name made of two": b"\x80\x04" + text("collections OrderedDict") + text("x") + b"\x93.",
    "the registry of extensions": b"\x80\x02\x82\x01.",
    "out-of-band buffers": b"\x80\x05\x97.",
    "a call of a storage": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "a call of what is no name": b"\x80\x02}" + b")R.",
    "a persistent id that is no storage": b"\x80\x02" + text("http://example.com") + b"Q.",
    "a module": state(a=b"ctorch.nn.modules.linear\nLinear\n)\x81"),
    "an admitted name as a value": state(a=b"ctorch\nFloatStorage\n"),
    "hooks": state(a=tensor(hooks=b"}" + text("x") + number(1) + b"s")),
    "hooks beside a payload": state(a=tensor(hooks=b"}" + text("x") + b"cos\nsystem\ns")),
    "keys that take forever to hash": b"\x80\x02})\x85" + number(1) + b"s.",
    "a deep nest": b"\x80\x02" + b"}" + (text("a") + b"}") * 40 + b"s" * 40 + b".",
    "a wide nest of few bytes": b"\x80\x02]q\x00" + (b"](" + b"h\x00" * 100 + b"eq\x00") * 7 + b".",
    "more elements than bytes": state(a=tensor(shape=(1 << 40,), strides=(0,))),
}


@pytest.mark.parametrize("what", REFUSED)
def test_whatever_no_tensor_needs_refuses_the_file(tmp_path: Path, what: str) -> None:
    with pytest.raises(UsageError, match="is refused, and nothing of it was run"):
        TorchFile(archive(tmp_path / "bad.bin", REFUSED[what], s0=BYTES))


DAMAGED = {
    "beyond its storage": state(a=tensor(shape=(9,))),
    "beyond its storage by its offset": state(a=tensor(offset=1)),
    "beyond its storage by its strides": state(a=tensor(shape=(2, 2), strides=(1, 7))),
    "a negative offset": state(a=tensor(offset=-1)),
    "a negative size": state(a=tensor(shape=(-1,))),
    "a negative stride": state(a=tensor(strides=(-1,))),
    "fewer strides than sizes": state(a=tensor(shape=(2, 2))),
    "a storage larger than its bytes": state(a=tensor(count=9, shape=(1,))),
    "a storage that is missing": state(a=tensor(key="1")),
    "a storage elsewhere": state(a=tensor(key="../data.pkl")),
    "two tensors of one name": state(**{"a.b": tensor()}, a=b"}" + text("b") + tensor() + b"s"),
    "an empty stack": b"\x80\x02R.",
    "a mark that is missing": b"\x80\x02u.",
    "a memo that is missing": b"\x80\x02h\x07.",
    "no end": b"\x80\x02}",
}


@pytest.mark.parametrize("what", DAMAGED)
def test_tensors_that_do_not_lie_in_their_storage_are_refused(tmp_path: Path, what: str) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        TorchFile(archive(tmp_path / "bad.bin", DAMAGED[what], s0=BYTES))


def test_the_made_up_tensor_is_read_when_nothing_is_wrong(tmp_path: Path) -> None:
    """Without this the two tests above could pass for another reason."""
    with TorchFile(archive(tmp_path / "a.bin", state(a=tensor(shape=(2, 3), strides=(1, 3))), s0=BYTES)) as file:
        assert file.get("a").tolist() == [[0, 3, 6], [1, 4, 7]]


def bomb(path: Path) -> None:
    archive(path, state(a=tensor()), compression=zipfile.ZIP_DEFLATED, s0=bytes(1 << 20))


def climbing(path: Path) -> None:
    archive(path, state(a=tensor()), s0=BYTES)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/data/../../../etc/passwd", b"x")


def absolute(path: Path) -> None:
    archive(path, state(a=tensor()), s0=BYTES)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("/archive/data/1", b"x")


def twice(path: Path) -> None:
    archive(path, state(a=tensor()), s0=BYTES)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/data/0", bytes(32))


def overlapping(path: Path) -> None:
    """Two entries of the directory that point at the same bytes."""
    archive(path, state(a=tensor()), s0=BYTES, s1=BYTES)
    data = bytearray(path.read_bytes())
    first, second = (data.rindex(b"archive/data/" + key) - 4 for key in (b"0", b"1"))
    data[second : second + 4] = data[first : first + 4]
    path.write_bytes(data)


def too_long(path: Path) -> None:
    archive(path, b"\x80\x02}." + bytes(65 << 20), s0=BYTES)


@pytest.mark.parametrize("make", [bomb, climbing, absolute, twice, overlapping, too_long])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_made_to_trick_a_reader_are_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "bad.bin")
    with pytest.raises(UsageError, match="is refused"):
        TorchFile(tmp_path / "bad.bin")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<html>", "torch.save did not write it"),
        (pickle.dumps({"a": 1}, 2), "torch.save did not write it"),
    ],
)
def test_other_files_are_told_apart(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "other.bin").write_bytes(content)
    with pytest.raises(UsageError, match=says):
        TorchFile(tmp_path / "other.bin")
    with pytest.raises(UsageError, match="No such file"):
        TorchFile(tmp_path / "missing.bin")


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    """The end of a storage of 4 GiB, which is a hole on this disk and would not fit the limit on memory of a test."""
    count = 1 << 30
    program = state(a=tensor(count=count, offset=count - 8))
    before = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    with open(tmp_path / "large.bin", "wb") as file:
        file.write(b"".join([*before, program, pickle.dumps(["0"], 2), struct.pack("<q", count)]))
        file.seek(4 * count - len(BYTES), os.SEEK_CUR)
        file.write(BYTES)
    with TorchFile(tmp_path / "large.bin") as read:
        tracemalloc.start()
        assert read.get("a").tolist() == list(range(8))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
