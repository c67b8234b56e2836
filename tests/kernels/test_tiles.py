"""The table of tile sizes, the user's own, and the search that makes one."""

from __future__ import annotations

import dataclasses
import json
import logging
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.devices import absent_mesh
from vlm_jax.errors import UsageError
from vlm_jax.kernels import softmax_contrastive_loss, tiles, tune
from vlm_jax.kernels.attention import xla as attention
from vlm_jax.kernels.contrastive import xla as contrastive
from vlm_jax.kernels.contrastive.shapes import ContrastiveShape
from vlm_jax.kernels.cross_entropy import xla as cross_entropy
from vlm_jax.kernels.tiles import tile_size


@pytest.fixture
def of_user(tmp_path, monkeypatch):
    """`of_user(table)`: the user's file, in use; a string is written as it is."""

    def write(table):
        file = tmp_path / "mine.json"
        file.write_text(table if isinstance(table, str) else json.dumps(table))
        monkeypatch.setenv(tiles.ENVIRONMENT, str(file))
        return file

    return write


# --------------------------------------------------------------------------------------------------------------- tables


def test_the_packaged_table_is_whole_and_in_the_package(repository) -> None:
    table = tiles.read_table(tiles.PACKAGED)
    for platform in tiles.PLATFORMS:
        for operation, sizes in tiles.SIZES.items():
            used = {name for name, size in sizes.items() if platform in size.platforms}
            assert set(table[platform][operation]) == used | {tiles.SOURCE}
    assert all(tiles.SOURCE in sizes for entry in table.values() for sizes in entry.values())
    project = tomllib.loads((repository / "pyproject.toml").read_text())
    assert tiles.PACKAGED.name in project["tool"]["setuptools"]["package-data"]["vlm_jax.kernels"]


def test_the_packaged_sizes_of_a_cpu_and_of_others() -> None:
    assert contrastive.choose_tiles(8192, 8192, "cpu") == contrastive.Tiles(512, 1024)
    assert contrastive.choose_tiles(8192, 8192, "TPU v5 lite") == contrastive.Tiles(4096, 4096)
    assert [cross_entropy.chunk_size(32768, 32000, device) for device in ("cpu", "NVIDIA H200")] == [256, 1024]
    few, many = ((64, 77, 12, 64),) * 2, ((1, 4096, 32, 128), (1, 4096, 8, 128))
    choose = attention.choose_blocks
    assert choose(*few, ordered=True, device="cpu") == attention.Blocks(16, 12, 77, 77)
    assert choose(*many, ordered=True, device="cpu") == attention.Blocks(1, 1, 256, 256)
    assert choose(*many, ordered=False, device="gpu") == attention.Blocks(1, 8, 1024, 1024)


def test_the_users_file_goes_before_the_package_and_a_kind_before_its_platform(of_user, monkeypatch, caplog) -> None:
    def found(device, name="contrastive.xla.rows"):
        return tile_size(name, device)

    packaged = {platform: {"contrastive": {"xla.rows": 8, "tpu.tile": 128}} for platform in tiles.PLATFORMS}
    packaged["TPU v4"] = {"contrastive": {"xla.rows": 16}}
    monkeypatch.setattr(tiles, "_packaged", lambda: packaged)
    assert (found("TPU v4"), found("TPU v5 lite"), found("cpu"), found("NVIDIA H200")) == (16, 8, 8, 8)
    of_user({"TPU v4": {"contrastive": {"xla.rows": 24}}, "tpu": {"contrastive": {"xla.rows": 32, "tpu.tile": 256}}})
    assert (found("TPU v4"), found("TPU v5 lite"), found("cpu"), found("gpu")) == (24, 32, 8, 8)
    # Interpreted on a CPU, a TPU's kernel has a TPU's tiles.
    assert found("cpu", "contrastive.tpu.tile") == found("TPU v4", "contrastive.tpu.tile") == 256
    notes = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(notes) == 2 and notes[0].endswith("has sizes for 'TPU v4', 'tpu' and none for 'cpu'")


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("{", "is not JSON"),
        ([], r"expected \{device"),
        ({"cpu": 3}, r"expected \{device.*found 'cpu': 3"),
        ({"CPU": {}}, r"device 'CPU' is unknown \(did you mean 'cpu'\?\)"),
        ({"cpu": {"atention": {}}}, r"'atention' is unknown \(did you mean 'attention'\?\)"),
        ({"cpu": {"attention": {"xla.blocks": 8}}}, r"'xla.blocks': it is unknown \(did you mean 'xla.block'\?\)"),
        ({"cpu": {"contrastive": {"tpu.tile": 512}}}, r"'tpu.tile': a cpu does not use it.*expected xla.rows"),
        ({"TPU v4": {"contrastive": {"tpu.tile": 100}}}, r"'tpu.tile' is 100, expected .* a multiple of 128"),
        ({"cpu": {"contrastive": {"xla.rows": "512"}}}, r"'xla.rows' is '512', expected a positive whole number"),
        ({"cpu": {"contrastive": {"xla.rows": 0}}}, "'xla.rows' is 0"),
    ],
)
def test_a_wrong_file_is_refused_with_one_sentence(table, says, of_user) -> None:
    file = of_user(table if isinstance(table, str) else json.dumps(table))
    with pytest.raises(UsageError, match=says) as caught:
        tile_size("attention.xla.block", "cpu")
    assert str(caught.value).startswith(f"VLM_JAX_TILES={file}") and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_refused(monkeypatch) -> None:
    monkeypatch.setenv(tiles.ENVIRONMENT, "nowhere.json")
    with pytest.raises(UsageError, match=r"^VLM_JAX_TILES=nowhere.json cannot be read: No such file"):
        tile_size("attention.xla.block", "cpu")


# ------------------------------------------------------------------------------------------------------------- programs


def value_and_gradients(image, text):
    return jax.value_and_grad(softmax_contrastive_loss, argnums=(0, 1))(image, text, 10.0)


def test_sizes_that_are_tried_make_another_program_each() -> None:
    features = jax.ShapeDtypeStruct((1030, 24), jnp.float32)
    step = jax.jit(value_and_gradients)
    programs = [step.lower(features, features).as_text()]
    for columns in (88, 96):
        with tiles.trying({"contrastive.xla.columns": columns}) as read:
            programs.append(step.lower(features, features).as_text())
        assert read == {"contrastive.xla.rows", "contrastive.xla.columns", "contrastive.tpu.tile"}
    programs.append(step.lower(features, features).as_text())
    assert ["x88xf32" in text for text in programs] == [False, True, False, False]
    assert ["x96xf32" in text for text in programs] == [False, False, True, False]
    assert programs[0] == programs[3]


def test_a_kernel_has_the_tiles_of_the_device_that_it_is_compiled_for(of_user) -> None:
    """Forward and backward; the user's file has v5e alone."""
    of_user({"TPU v5 lite": {"contrastive": {"tpu.tile": 128}}})

    def grids(kind):
        with jax.sharding.use_abstract_mesh(absent_mesh(kind)):
            features = jax.ShapeDtypeStruct((1030, 24), jnp.bfloat16)
            text = str(jax.make_jaxpr(value_and_gradients)(features, features))
        return [text.count(f"grid=({n}, {n})") for n in (3, 9)]

    assert grids("TPU v6 lite") == [2, 0]
    assert grids("TPU v5 lite") == [0, 2]


# --------------------------------------------------------------------------------------------------------------- search


@dataclasses.dataclass(frozen=True)
class Made:
    """A shape whose call sums up numbers in parts of "contrastive.xla.rows"; with parts of `wrong` it adds one."""

    wrong: int
    small: bool = False

    def call(self, name, dtype):
        def value(x):
            rows = tile_size("contrastive.xla.rows", "cpu")
            return jnp.sum(x.reshape(-1, rows) ** 2, 1).sum() + (rows == self.wrong)

        return [tune.Call(name, jax.value_and_grad(value), lambda: (np.ones(4096, dtype),), work=1.0)]


@pytest.fixture
def search(monkeypatch, tmp_path):
    """`search(cost)`: the table after a search over a made shape where a part of n takes `cost[n]` seconds."""
    monkeypatch.setitem(
        tune.SUBJECTS,
        "contrastive",
        tune.Subject({"made": Made(wrong=128)}, lambda name, shape, dtype: shape.call(name, dtype), lambda _: 1.0, []),
    )

    def run(cost):
        monkeypatch.setattr(tune, "in_turns", lambda sides, rounds: {n: [cost[n]] * rounds for n in sides})
        output = tmp_path / "found.json"
        output.write_text('{"TPU v4": {"attention": {"xla.block": 8}}, "cpu": {"attention": {"xla.block": 16}}}')
        tune.main(["--only=contrastive", f"--output={output}"])
        return output

    return run


def test_a_search_takes_the_fastest_that_computes_the_same(search, capsys, monkeypatch) -> None:
    output = search({512: 1.0, 128: 0.1, 256: 0.8, 1024: 0.9, 2048: 1.2})
    table = tiles.read_table(output)
    source = table["cpu"]["contrastive"].pop(tiles.SOURCE)
    assert source.startswith(f"python -m vlm_jax.kernels.tune --only=contrastive, jax {jax.__version__}, 20")
    assert table == {
        "TPU v4": {"attention": {"xla.block": 8}},
        "cpu": {"attention": {"xla.block": 16}, "contrastive": {"xla.rows": 256}},
    }
    printed = capsys.readouterr().out
    assert "256 is 1.25 times as fast, twice, and taken" in printed and "128 is out: made: 2.4e-04 off" in printed
    assert "contrastive.xla.columns, the most texts of a tile in XLA\n  makes no difference" in printed
    monkeypatch.setenv(tiles.ENVIRONMENT, str(output))
    assert tile_size("contrastive.xla.rows", "cpu") == 256


def test_a_search_keeps_what_is_hardly_slower(search) -> None:
    cost = {512: 1.0, 128: 0.1, 256: 0.98, 1024: 1.0, 2048: 1.2}
    assert tiles.read_table(search(cost))["cpu"]["contrastive"]["xla.rows"] == 512


def test_a_candidate_may_lose_on_no_shape() -> None:
    def best(**ratios):
        return tune.Comparison([8, 16], ratios={16: ratios}).best()

    assert best(a=1.5, b=0.96) == 16 and best(a=1.5, b=0.94) is None and best(a=1.02, b=1.02) is None


def test_a_search_of_a_real_operation(monkeypatch, tmp_path, capsys) -> None:
    real = tune.SUBJECTS["contrastive"]
    made = {"shapes": {"made": ContrastiveShape(600, 8)}, "calls": lambda *given: real.calls(*given)[1:]}
    monkeypatch.setitem(tune.SUBJECTS, "contrastive", dataclasses.replace(real, **made))
    tune.main(["--only=contrastive", "--rounds=1", f"--output={tmp_path / 'found.json'}"])
    assert set(tiles.read_table(tmp_path / "found.json")["cpu"]["contrastive"]) == {"from", "xla.rows", "xla.columns"}
    printed = capsys.readouterr().out
    assert printed.count("sigmoid made") == 2 and " is out" not in printed and "without" not in printed


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--only=atention"], r"--only expects one of contrastive, .* \(did you mean 'attention'\?\)"),
        (["--shapes=mistral_7bb"], r"'mistral_7bb' is no shape of .* \(did you mean 'mistral_7b'\?\)"),
        (["--only=contrastive", "--shapes=mistral_7b"], "'mistral_7b' is no shape of contrastive"),
        (["--output=no/folder/tiles.json"], r"there is no folder no/folder"),
        (["--rounds=0"], "must be positive"),
    ],
)
def test_a_mistake_is_one_sentence(flags, says) -> None:
    with pytest.raises(UsageError, match=says):
        tune.main(flags)
