"""Our checkpoint: bit-exact on any mesh, complete or visibly not, and every misfit named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from vlm_jax.errors import UsageError
from vlm_jax.interop import native, weights
from vlm_jax.interop.layout import find_model, read_config
from vlm_jax.interop.native import load_params, save_model
from vlm_jax.sharding import make_mesh

# path -> (shape, sharding); what lies below `layers` is stacked over its first axis.
LAYOUT = {
    "connector/linear/bias": ((16,), P("tensor")),
    "decoder/layers/mlp/up/kernel": ((3, 16, 32), P(None, "fsdp", "tensor")),
    "decoder/layers/attention_norm/scale": ((3, 16), P(None, None)),
    "decoder/embed/embedding": ((24, 16), P("tensor", "fsdp")),
    "newline": ((16,), P(None)),
}
ENTRIES = 2 * 3 + 3
CONFIG = {"model": {"family": "llava"}, "template": "plain"}
MESHES = {"one device": {"devices": 1}, "fsdp=8": {"devices": 8}, "fsdp=4, tensor=2": {"devices": 8, "tensor": 2}}


def mesh_of(devices: int, **axes: int) -> Any:
    return make_mesh(devices=jax.devices()[:devices], **axes)


def abstract(dtype: Any, **changes: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """As a model gives it: under the abstract mesh that is in use while its structure is made."""
    mesh = jax.sharding.get_abstract_mesh()
    return {
        path: jax.ShapeDtypeStruct(changes.get(path, shape), dtype, sharding=jax.sharding.NamedSharding(mesh, spec))
        for path, (shape, spec) in LAYOUT.items()
    }


def values(dtype: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Any bits, those of infinities, of numbers that are none and of negative zero among them. Those that are
    none are all the same one: which one is a compiler's affair."""
    dtype, found = np.dtype(dtype), {}
    unsigned = np.dtype(f"u{dtype.itemsize}")
    for number, (path, (shape, _)) in enumerate(LAYOUT.items()):
        random = np.random.default_rng([seed, number])
        bits = random.integers(0, np.iinfo(unsigned).max, shape, unsigned, endpoint=True).reshape(-1)
        numbers = bits.view(dtype)
        numbers[:3] = np.inf, -0.0, np.nan
        with np.errstate(invalid="ignore"):
            numbers[np.isnan(numbers)] = np.nan
        found[path] = numbers.reshape(shape)
    return found


def placed(arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    mesh = jax.sharding.get_mesh()
    return {path: jax.device_put(a, jax.sharding.NamedSharding(mesh, LAYOUT[path][1])) for path, a in arrays.items()}


def bits(arrays: dict[str, Any]) -> dict[str, bytes]:
    return {path: np.asarray(a).tobytes() for path, a in arrays.items()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model of float32 in several files."""
    folder = tmp_path / "model"
    with jax.set_mesh(mesh_of(1)):
        save_model(str(folder), placed(values("float32")), CONFIG, shard_bytes=3000)
    return folder


def load(folder: Path, **changes: tuple[int, ...]) -> dict[str, jax.Array]:
    with jax.set_mesh(mesh_of(1)):
        return load_params(str(folder), abstract("float32", **changes))


@pytest.mark.parametrize("target", MESHES)
@pytest.mark.parametrize("source", MESHES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_round_trip_is_bit_exact_onto_any_mesh(tmp_path: Path, dtype: str, source: str, target: str) -> None:
    dtype = jax.numpy.dtype(dtype)
    arrays = values(dtype)
    with jax.set_mesh(mesh_of(**MESHES[source])):
        save_model(str(tmp_path), placed(arrays), CONFIG, shard_bytes=1000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with jax.set_mesh(mesh_of(**MESHES[target])):
        loaded = load_params(str(tmp_path), abstract(dtype))
        for path, a in loaded.items():
            assert a.dtype == dtype and a.sharding.spec == LAYOUT[path][1], path
            assert len(a.sharding.device_set) == MESHES[target]["devices"]
    assert bits(loaded) == bits(arrays)


def test_one_entry_per_layer_and_one_index(saved: Path) -> None:
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert len(index["weight_map"]) == ENTRIES
    assert "decoder.layers.2.mlp.up.kernel" in index["weight_map"] and "newline" in index["weight_map"]
    assert set(index["weight_map"].values()) == {file.name for file in saved.glob("*.safetensors")}
    assert index["metadata"]["total_size"] == 4 * sum(int(np.prod(shape)) for shape, _ in LAYOUT.values())
    assert read_config(saved) == {"format": "vlm_jax", **CONFIG}
    modes = {file.stat().st_mode for file in saved.iterdir()}
    assert len(modes) == 1, "some file is readable for fewer people than the others"


def test_weights_are_cast_to_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    arrays = {path: np.random.default_rng(0).normal(size=shape).astype("f4") for path, (shape, _) in LAYOUT.items()}
    with jax.set_mesh(mesh_of(1)):
        save_model(str(tmp_path), placed(arrays), CONFIG)
        loaded = load_params(str(tmp_path), abstract(jax.numpy.bfloat16))
    assert bits(loaded) == bits({path: a.astype(jax.numpy.bfloat16) for path, a in arrays.items()})


def test_a_new_model_replaces_an_old_one_and_nothing_else(saved: Path) -> None:
    (saved / "README.md").write_text("mine")
    before = len(list(saved.glob("*.safetensors")))
    with jax.set_mesh(mesh_of(1)):
        save_model(str(saved), placed(values("float32", seed=1)), {**CONFIG, "template": "vicuna_v1"})
    assert before > len(list(saved.glob("*.safetensors"))) == 1
    assert bits(load(saved)) == bits(values("float32", seed=1))
    assert read_config(saved)["template"] == "vicuna_v1" and (saved / "README.md").read_text() == "mine"
    assert not (saved / ".partial").exists()


class TokenizerOfOneFile:
    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def interrupt_after(count: int, monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> None:
    """The call after `count` others of `where.name` ends the process, as it were."""
    real, calls = getattr(where, name), 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if calls == count:
            raise KeyboardInterrupt
        calls += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(where, name, call)


def test_an_interrupted_save_leaves_the_old_model(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    with jax.set_mesh(mesh_of(1)):
        params = placed(values("float32", seed=1))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_after(2, patch, weights, "write_safetensors")
            save_model(str(saved), params, CONFIG, tokenizer=TokenizerOfOneFile(), shard_bytes=1000)
        assert {file.name: file.read_bytes() for file in saved.iterdir() if file.is_file()} == before
        assert bits(load(saved)) == bits(values("float32"))
        save_model(str(saved), params, CONFIG, tokenizer=TokenizerOfOneFile(), shard_bytes=1000)
    assert bits(load(saved)) == bits(values("float32", seed=1))
    assert (saved / "tokenizer.json").exists() and not (saved / ".partial").exists()


@pytest.mark.parametrize("moves", [0, 1, 3])
def test_a_save_that_was_interrupted_at_its_end_shows(saved: Path, monkeypatch, moves: int) -> None:
    with jax.set_mesh(mesh_of(1)):
        params = placed(values("float32", seed=1))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_after(moves, patch, type(native.epath.Path(saved)), "replace")
            save_model(str(saved), params, CONFIG, shard_bytes=1000)
        for path in (saved, saved.parent):
            with pytest.raises(UsageError, match=r"not complete.*repeat the command"):
                find_model(path)
        with pytest.raises(UsageError, match="not completely written"):
            read_config(saved)
        save_model(str(saved), params, CONFIG, shard_bytes=1000)
    assert find_model(saved.parent) == saved
    assert bits(load(saved)) == bits(values("float32", seed=1))


def test_the_first_save_that_was_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with jax.set_mesh(mesh_of(1)), monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(1, patch, weights, "write_safetensors")
        save_model(str(tmp_path / "model"), placed(values("float32")), CONFIG, shard_bytes=1000)
    assert not (tmp_path / "model").exists()


def test_the_first_save_that_was_killed_shows(tmp_path: Path) -> None:
    (tmp_path / "model" / ".partial").mkdir(parents=True)
    with pytest.raises(UsageError, match="not complete"):
        find_model(tmp_path)


def test_every_misfit_is_named_at_once(saved: Path) -> None:
    index = saved / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    where = content["weight_map"]
    del where["decoder.layers.1.mlp.up.kernel"]
    where["stray.kernel"] = where["newline"]
    first = next(file for file in where.values() if file != where["decoder.layers.2.mlp.up.kernel"])
    where["decoder.layers.2.mlp.up.kernel"] = first  # not the file that holds it
    index.write_text(json.dumps(content))
    with pytest.raises(UsageError) as error:
        load(saved, **{"newline": (17,), "decoder/layers/attention_norm/scale": (4, 8)})
    lines = str(error.value).split("\n")[1:]
    assert [line.strip() for line in lines] == [
        "decoder.layers.0.attention_norm.scale is [16], expected [8]",
        "decoder.layers.1.attention_norm.scale is [16], expected [8]",
        "decoder.layers.2.attention_norm.scale is [16], expected [8]",
        "left over stray.kernel",
        "missing decoder.layers.1.mlp.up.kernel",
        f"missing decoder.layers.2.mlp.up.kernel, which the index places in {first}",
        "missing decoder.layers.3.attention_norm.scale",
        "newline is [16], expected [17]",
    ]


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: os.truncate(shard(f), shard(f).stat().st_size - 1), "weight file .* is damaged"),
    "empty": (lambda f: os.truncate(shard(f), 0), "weight file .* is damaged"),
    "missing": (lambda f: shard(f).unlink(), "weight file .* is missing"),
    "no index": (lambda f: (f / native.INDEX).unlink(), "holds no model.safetensors.index.json"),
    "half an index": (lambda f: os.truncate(f / native.INDEX, 50), "index.json is damaged"),
    "another index": (lambda f: (f / native.INDEX).write_text("[]"), "index.json is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_sentence(saved: Path, damage: str) -> None:
    make, says = DAMAGES[damage]
    make(saved)
    with pytest.raises(UsageError, match=says) as error:
        load(saved)
    assert "\n" not in str(error.value)


def test_what_is_no_model_of_ours_is_named(saved: Path, tmp_path: Path) -> None:
    assert find_model(saved) == find_model(str(tmp_path)) == saved
    for name in ("file", "empty", "hf", "half", "list", "unfinished/checkpoints"):
        (tmp_path / name).mkdir(parents=True) if name != "file" else (tmp_path / name).touch()
    (tmp_path / "hf/config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "half/config.json").write_text('{"format": "vl')
    (tmp_path / "list/config.json").write_text("[]")
    for name, says in {
        "none": "the folder does not exist",
        "file": "it is a file",
        "empty": "holds neither a workdir nor a model",
        "hf": "model_type 'llava'",
        "half": "damaged",
        "list": "damaged",
        "unfinished": "has not finished a stage",
    }.items():
        with pytest.raises(UsageError, match=says):
            find_model(tmp_path / name)


TWO_PROCESSES = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from vlm_jax.interop.native import save_model
from vlm_jax.sharding import make_mesh

folder, address, process = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, int(process))
mesh = make_mesh()
with jax.set_mesh(mesh):
    def placed(shape, spec):
        whole = np.arange(np.prod(shape), dtype="f4").reshape(shape)
        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), lambda index: whole[index])
    params = {"decoder/layers/up/kernel": placed((3, 4, 2), P(None, "fsdp")), "newline": placed((4,), P())}
    save_model(folder, params, {}, shard_bytes=40)
"""


def test_two_processes_write_one_model(tmp_path: Path, run_processes: Callable[..., list[str]]) -> None:
    run_processes(TWO_PROCESSES, str(tmp_path / "model"))
    found, problems = native.open_entries(tmp_path / "model")
    assert not problems
    for layer in range(3):
        assert np.array_equal(
            found[f"decoder.layers.{layer}.up.kernel"].read(), np.arange(24, dtype="f4").reshape(3, 4, 2)[layer]
        )
    assert np.array_equal(found["newline"].read(), np.arange(4, dtype="f4"))
